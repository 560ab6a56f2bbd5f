"""From exceptions to exit codes: one line on stderr, a traceback only with --debug."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from edgepipe.cli import limits
from edgepipe.errors import EdgepipeError, one_line

INTERRUPTED = limits.INTERRUPTED

# Causes in the user's environment. Anything else the operating system says is a bug of ours,
# since paths that users name are checked where they are opened.
_ENVIRONMENT = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "read-only file system",
    errno.EMFILE: "too many open files",
    errno.ENAMETOOLONG: "file name too long",
    errno.ENOTDIR: "not a folder",
    errno.EISDIR: "is a folder",
    errno.ENOMEM: "out of memory",
}
_FIXES = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EACCES: "choose a folder you may write to",
    errno.EROFS: "choose a folder you may write to",
}

#: Modules that edgepipe depends on → what to install.
_PACKAGES = {
    "numpy": "numpy>=2",
    "onnx": "onnx>=1.23",
    "onnx_ir": "onnx-ir>=1.1",
    "onnxruntime": "onnxruntime",
    "tvm": "apache-tvm==0.27.0.post1",
    "ziglang": "ziglang",
    "torch": "edgepipe[torch]",
    "onnxscript": "edgepipe[torch]",
    "wasmtime": "edgepipe[wasmtime]",
    "PIL": "edgepipe[images]",
}


class _Interrupt:
    """Ctrl-C, SIGTERM and the signal of a limit. Libraries that run compiled code may turn the
    KeyboardInterrupt into an error of their own, so what came is remembered. What comes while
    the first is being answered is not: Ctrl-C goes to this process and to the one that watches
    it, which passes it on."""

    def __init__(self) -> None:
        self.came: str | None = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.came is None:
            self.came = limits.reason() if number == limits.LIMIT else INTERRUPTED
            raise KeyboardInterrupt

    def __enter__(self) -> _Interrupt:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in filter(None, (signal.SIGINT, signal.SIGTERM, limits.LIMIT)):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def guarded(work: Callable[[], int], *, debug: bool) -> int:
    """Run ``work`` and return its exit code, or print one line and return 1, 2 or 3.

    What libraries log and warn of is for developers: without ``debug`` it is not shown.
    """
    with _Interrupt() as interrupt, contextlib.nullcontext() if debug else _quiet():
        try:
            code = work()
            sys.stdout.flush()
            return code
        except SystemExit as ended:  # argparse after --help and --version
            return ended.code if isinstance(ended.code, int) else 0
        except BrokenPipeError:
            # The reader of our output has gone (edgepipe targets | head): no error of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except BaseException as error:
            if debug:
                traceback.print_exc()
            code, line = explain(error, interrupted=interrupt.came)
            if interrupt.came is not None and not debug:
                _forget(error)
            print(f"error: {line}", file=sys.stderr, flush=True)
            limits.explained(code)
            return code


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _forget(error: BaseException) -> None:
    """Destroy what the interrupted work still holds, in silence: TVM's objects complain on stderr
    when they are destroyed half-built."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:
        return  # started without a stderr
    quiet = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(quiet, 2)
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = error.__context__ = error.__cause__ = None
        gc.collect()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(quiet)


def explain(error: BaseException, *, interrupted: str | None = None) -> tuple[int, str]:
    """Return the exit code and the one line that tell ``error``, or what it was interrupted by."""
    if interrupted is not None or isinstance(error, KeyboardInterrupt):
        return 2, interrupted or INTERRUPTED
    if isinstance(error, EdgepipeError):
        return error.exit_code, one_line(str(error))
    if isinstance(error, MemoryError):
        return 2, "out of memory; nothing was written"
    if isinstance(error, ModuleNotFoundError) and error.name in _PACKAGES:
        return 2, f"{error.name} is not installed; pip install '{_PACKAGES[error.name]}'"
    if isinstance(error, ValueError) and str(error) == "embedded null byte":
        return 2, "a path holds a null character; give another name"
    if (environment := _environment(error)) is not None:
        return 2, environment
    said = one_line(f"{type(error).__name__}: {error}")
    if len(said) > 300:
        said = said[:297] + "..."
    return 3, f"a bug in edgepipe ({said}); please rerun with --debug and report what it prints"


def _environment(error: BaseException) -> str | None:
    """What the operating system refused, by ``error`` or by what it was explicitly raised from."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _ENVIRONMENT:
            where = f"{cause.filename}: " if cause.filename else ""
            fix = _FIXES.get(cause.errno)
            return one_line(f"{where}{_ENVIRONMENT[cause.errno]}" + (f"; {fix}" if fix else ""))
        cause = cause.__cause__
    return None
