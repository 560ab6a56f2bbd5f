"""Limits of memory and time: the work is done in a process of its own, under watch.

What a library does in native code no exception reaches: an allocation that fails there ends the
process, and so does the system when memory is short. The process that was started therefore only
watches; a command that meets a limit, or its end, is one line and an exit code like any other.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgepipe.errors import EdgepipeError, UserError

INTERRUPTED = "interrupted; nothing was written"
#: Comes to the process that works when it is at a limit; the system sends it for ``ulimit -t``.
LIMIT: signal.Signals | None = getattr(signal, "SIGXCPU", None)
#: Seconds that work has to put away what it has, once it is told to end.
_GRACE_S = 5.0
_PERIOD_S = 0.1
#: Memory that the machine must keep, as less of it ends programs at random.
_RESERVE_BYTES = 128 << 20
_CGROUP = Path("/sys/fs/cgroup")
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)

#: In the process that works: to the one that watches. What it says is the reason of LIMIT; what it
#: is told is the exit code of an end that has been explained.
_watcher: socket.socket | None = None


@dataclass(frozen=True)
class Limits:
    """Memory of a command and of all that it starts (GB = 10⁹ bytes, what it shares with other
    programs apart), and minutes by the clock. None: as much as there is."""

    memory_gb: float | None = None
    minutes: float | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> Limits:
        """What ``add_arguments`` added."""
        return cls(options.max_memory_gb, options.max_minutes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--max-memory-gb`` and ``--max-minutes``."""
    group = parser.add_argument_group("limits")
    group.add_argument("--max-memory-gb", type=_positive, metavar="GB",
                       help="end with an error rather than use more memory (default: what the "
                       "machine has)")  # fmt: skip
    group.add_argument("--max-minutes", type=_positive, metavar="N",
                       help="end with an error rather than take longer")  # fmt: skip


def _positive(text: str) -> float:
    try:
        if 0 < (value := float(text)) < math.inf:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")


def supervised(work: Callable[[], int], limits: Limits) -> int:
    """Do ``work`` in a process of its own, within ``limits``, and return its exit code.

    Returns twice: in that process, too. Raises UserError or EdgepipeError where the process was
    ended from outside or by native code, and where there are limits but no such processes.
    """
    if not hasattr(os, "fork"):
        if limits != Limits():
            raise UserError("limits need Linux or macOS", where="--max-memory-gb, --max-minutes")
        return work()
    here, there = socket.socketpair()
    here.setblocking(False)
    there.setblocking(False)
    watching = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        global _watcher  # noqa: PLW0603 (one per process)
        _watcher = there
        here.close()
        _end_with(watching)
        return work()
    there.close()
    with here:
        return _watch(pid, limits, here)


def reason() -> str:
    """Why LIMIT came, one line."""
    told = _received(_watcher).decode() if _watcher is not None else ""
    return told or "the limit of CPU time (ulimit -t) is reached; nothing was written"


def explained(code: int) -> None:
    """Tell who watches that the line of an end with exit ``code`` is on stderr, however long the
    process then takes to be gone."""
    if _watcher is not None:
        _send(_watcher, bytes([code]))


def _send(channel: socket.socket, told: bytes) -> None:
    """Tell the other side, which may have ended in this moment: then there is nothing to tell."""
    with contextlib.suppress(OSError):
        channel.send(told)


def _received(channel: socket.socket) -> bytes:
    """What there is to read, without waiting for it."""
    try:
        return channel.recv(1000)
    except OSError:
        return b""


def _end_with(parent: int) -> None:
    """Be killed when ``parent`` is (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before
            os.kill(os.getpid(), signal.SIGKILL)


def _watch(pid: int, limits: Limits, worker: socket.socket) -> int:
    """The exit code of process ``pid``, which is told to end when it is at a limit."""
    process = psutil.Process(pid)
    end = time.monotonic() + 60 * limits.minutes if limits.minutes else math.inf
    held = 0
    try:
        while True:
            try:
                return _exit_code(process.wait(_PERIOD_S), held)
            except psutil.TimeoutExpired:
                held = _held(process)
            told = _beyond(limits, held, end)
            if told is not None:
                _send(worker, told.encode())
                return _finish(process, worker, LIMIT or signal.SIGTERM, told)
    except KeyboardInterrupt:
        return _finish(process, worker, signal.SIGTERM, INTERRUPTED)


def _finish(
    process: psutil.Process, worker: socket.socket, number: signal.Signals, told: str
) -> int:
    """Ask ``process`` to end, which it explains itself; kill it with all that it started where it
    does not end. Raises UserError with ``told`` where it has not explained it."""
    try:
        started = process.children(recursive=True)
        process.send_signal(number)
        code = process.wait(_GRACE_S)
        if code >= 0:
            return int(code)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        started += process.children(recursive=True)
    for one in (process, *started):
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    if code := _received(worker):
        return code[0]
    raise UserError(told)


def _beyond(limits: Limits, held: int, end: float) -> str | None:
    """The limit that is reached, in words."""
    fix = "nothing was written; fewer or smaller samples and a smaller model need less"
    if limits.memory_gb and held > limits.memory_gb * 1e9:
        return f"more memory than the {limits.memory_gb:g} GB of --max-memory-gb; {fix}"
    if time.monotonic() > end:
        return (
            f"not done within the {limits.minutes:g} minutes of --max-minutes; nothing was written"
        )
    if _left() < _RESERVE_BYTES and held > _RESERVE_BYTES:
        return f"the machine's memory is used up, {held / 1e9:.1f} GB by this; {fix}"
    return None


def _held(process: psutil.Process) -> int:
    """Bytes that ``process`` and what it started have for themselves."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            info = one.memory_info()
            total += info.rss - getattr(info, "shared", 0)
    except psutil.Error:  # one that has just ended
        pass
    return total


def _left() -> int:
    """Bytes that can still be had: of the machine, or of the control group if that has less."""
    left: int = psutil.virtual_memory().available + psutil.swap_memory().free
    try:
        group = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = (_CGROUP / "memory.stat").read_text(encoding="ascii").split()
        cached = int(stat[stat.index("inactive_file") + 1])
    except (OSError, ValueError, IndexError):  # "max", or no control group
        return left
    return min(left, group - used + cached)


def _exit_code(code: int, held: int) -> int:
    """``code`` as it is; a process that a signal ended is an error. Raises UserError or
    EdgepipeError."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    if name in ("SIGKILL", "SIGTERM", "SIGHUP"):
        raise UserError(
            f"ended from outside by {name}; nothing was written",
            fix=f"if that was the system, memory was short: this held {held / 1e9:.1f} GB",
        )
    if (limit := _address_space()) is not None:
        raise UserError(
            f"out of memory: a library ended with {name} within {limit / 1e9:.1f} GB of address "
            "space (ulimit -v); nothing was written",
            fix="use --max-memory-gb instead",
        )
    raise EdgepipeError(
        f"a bug: a library ended the process with {name}; please rerun with --debug and report it"
    )


def _address_space() -> int | None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit
