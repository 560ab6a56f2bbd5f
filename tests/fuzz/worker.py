"""Works off inputs of one kind under watch: ``worker KIND SEED FOLDER WIDE``, indices on stdin.

Writes a line of JSON when an input starts and one when it ends. What it watches: exit code and
what was said, files written outside of the output and temporary folders, connections, unpickled
code, programs other than zig, memory and seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

#: More memory than this on top of what the process has is a finding: ten times what the largest
#: tensors have that damage makes and that fit a model.
MEMORY_BYTES = 2 << 30
#: More CPU time than this is a hang: seconds by the clock say more of what else the machine does.
HANG_S = 10.0
_ADDRESS_SPACE = 24 << 30
#: Compilers, what the check of a new bundle runs it in, and matplotlib's search for fonts.
_PROGRAMS = ("zig", "ptxas", "node", "chromium", "qemu-aarch64-static", "qemu-arm-static",
             "qemu-aarch64", "qemu-arm", "fc-list")  # fmt: skip
_CALLS = ("socket.connect", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod",
            "os.truncate", "shutil.rmtree", "shutil.move")  # fmt: skip


class Watch:
    """An audit hook that notes what edgepipe has no business doing with somebody's input."""

    def __init__(self, allowed: list[Path]) -> None:
        self.allowed = [str(path) + os.sep for path in allowed]
        self.found: list[str] = []
        self.on = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITING and isinstance(path, str | bytes):
                self._check(event, path)
        elif event in _CHANGES:
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(path, str | bytes | os.PathLike):
                    self._check(event, path)
        elif event in _CALLS:
            self.found.append(f"{event} {arguments[:2]!r}"[:200])
        elif event == "subprocess.Popen" and Path(str(arguments[0])).name not in _PROGRAMS:
            self.found.append(f"started {arguments[0]!r}"[:200])

    def _check(self, event: str, path: Any) -> None:
        text = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (links stay as they are)
        if text != os.devnull and not (text + os.sep).startswith(tuple(self.allowed)):
            self.found.append(f"{event} {text}"[:300])


def main() -> int:
    kind, seed, name, wide = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "1"
    # Ours alone: what the work prints goes nowhere.
    say = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    said = os.open(name / "stderr", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    faulthandler.register(signal.SIGUSR1, file=open(name / "stack", "w"), all_threads=True)  # noqa: SIM115, PTH123
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    source, out = name / "in", name / "out"
    for folder in (source, out, name / "tmp"):
        folder.mkdir(exist_ok=True)
    os.environ |= {"TMPDIR": str(name / "tmp"), "MPLCONFIGDIR": str(name / "fonts")}
    os.chdir(out)
    from edgepipe.cli.guard import guarded
    from edgepipe.codegen import link
    from tests.fuzz import kinds

    make = kinds.CONTROLS[kind] if kind in kinds.CONTROLS else kinds.KINDS[kind][0]
    make(Random(0), _fresh(source), out, wide)  # imports and templates, before the clock runs
    if kind in ("compile", "target"):
        kinds.cli.main(["compile", "digits", "--target", "x86-64-v3", "-o", str(out / "warm"),
                        "--quiet"])  # fmt: skip
    watch = Watch([out, name / "tmp", name / "fonts", link.cache_folder().parent])
    null = os.open(os.devnull, os.O_WRONLY)
    for line in sys.stdin:
        index = int(line)
        for folder in (source, out, name / "tmp"):
            kinds.clear(folder)
        work = make(Random(f"{seed}:{kind}:{index}"), source, out, wide)
        print(json.dumps({"start": index}), file=say)
        sys.stdout.flush()
        sys.stderr.flush()
        os.ftruncate(said, 0)
        os.lseek(said, 0, os.SEEK_SET)
        os.dup2(said, 2)
        os.dup2(null, 1)
        before, start, spent = _reset_peak(), time.perf_counter(), _cpu_s()
        watch.found, watch.on = [], True
        try:
            code = guarded(work, debug=False)
        finally:
            watch.on = False
        seconds, grown = time.perf_counter() - start, _peak() - before
        spent = _cpu_s() - spent
        sys.stderr.flush()
        text = (name / "stderr").read_text(encoding="utf-8", errors="replace")
        problems = [*watch.found, *judge(code, text)]
        if grown > MEMORY_BYTES:
            problems.append(f"{grown >> 20} MB of memory")
        if spent > HANG_S:
            problems.append(f"{spent:.1f} s of CPU time")
        times = {"seconds": round(seconds, 3), "cpu_s": round(spent, 3)}
        result = {"end": index, "code": code, **times, "said": text[:2000], "problems": problems}
        print(json.dumps(result), file=say)
    return 0


def judge(code: int, said: str) -> list[str]:
    """What is wrong with an answer: fine and silent (warnings apart), or one line that explains."""
    if code == 0:
        other = [line for line in said.splitlines() if not line.startswith("warning: ")]
        return [f"fine, but said: {other[0][:200]}"] if other else []
    if code != 2:
        return [f"exit code {code}: {said[:600]}"]
    lines = said.splitlines()
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return [f"not one line but {len(lines)}: {said[:300]!r}"]
    if not lines[0].isprintable():
        return [f"unprintable: {said[:300]!r}"]
    return [f"a line of {len(said)} characters"] if len(said) > 1200 else []


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def _cpu_s() -> float:
    """Of this process and what it waited for."""
    return sum(os.times()[:4])


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    return 0


def _reset_peak() -> int:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


if __name__ == "__main__":
    sys.exit(main())
