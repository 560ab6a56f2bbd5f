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
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

#: More memory than this on top of what the process has is a finding: ten times what the largest
#: tensors have that damage makes and that fit a model.
MEMORY_BYTES = 2 << 30
#: More CPU time than this is a hang: seconds by the clock say more of what else the machine does.
HANG_S = 10.0
_ADDRESS_SPACE = 24 << 30
#: Compilers, what the check of a new bundle runs it in, a bundle's own program, and matplotlib's
#: search for fonts.
_PROGRAMS = ("zig", "ptxas", "node", "chromium", "qemu-aarch64-static", "qemu-arm-static",
             "qemu-aarch64", "qemu-arm", "bench", "fc-list")  # fmt: skip
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


class Desk:
    """Folders that inputs come to and answers go to, and how one is worked off under watch. It
    takes what the process says from here on; ``folder`` may be shared with nobody."""

    def __init__(self, kind: str, folder: Path, *, wide: bool) -> None:
        self.source, self.out, self.temporary = folder / "in", folder / "out", folder / "tmp"
        for place in (self.source, self.out, self.temporary):
            place.mkdir(exist_ok=True)
        os.environ |= {"TMPDIR": str(self.temporary), "MPLCONFIGDIR": str(folder / "fonts")}
        tempfile.tempdir = None  # it may be known already
        os.chdir(self.out)
        from edgepipe.codegen import link
        from tests.fuzz import kinds, seeds

        self.clear, self.wide = kinds.clear, wide
        self.make = kinds.CONTROLS[kind] if kind in kinds.CONTROLS else kinds.KINDS[kind][0]
        if wide and kind in ("onnx", "compile"):
            seeds.conformance()
        self.make(Random(0), self.source, self.out, wide)  # imports and templates, before the clock
        if kind in ("compile", "target"):
            kinds.cli.main(["compile", "digits", "--target", "x86-64-v3",
                            "-o", str(self.out / "warm"), "--quiet"])  # fmt: skip
        cache = link.cache_folder().parent
        self.watch = Watch([self.out, self.temporary, folder / "fonts", cache])
        self.said = folder / "stderr"
        self.stderr = os.open(self.said, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.null = os.open(os.devnull, os.O_WRONLY)

    def work(self, random: Random) -> Callable[[], int]:
        """The work that an input is, and the input itself in an empty folder."""
        for folder in (self.source, self.out, self.temporary):
            self.clear(folder)
        return self.make(random, self.source, self.out, self.wide)

    def done(self, work: Callable[[], int]) -> dict[str, Any]:
        """Do it; exit code, seconds, what was said, and the problems found."""
        from edgepipe.cli.guard import guarded

        sys.stdout.flush()
        sys.stderr.flush()
        os.ftruncate(self.stderr, 0)
        os.lseek(self.stderr, 0, os.SEEK_SET)
        os.dup2(self.stderr, 2)
        os.dup2(self.null, 1)
        before, start, spent = _reset_peak(), time.perf_counter(), _cpu_s()
        self.watch.found, self.watch.on = [], True
        try:
            code = guarded(work, debug=False)
        finally:
            self.watch.on = False
        seconds, grown = time.perf_counter() - start, _peak() - before
        spent = _cpu_s() - spent
        sys.stderr.flush()
        text = self.said.read_text(encoding="utf-8", errors="replace")
        problems = [*self.watch.found, *judge(code, text)]
        if grown > MEMORY_BYTES:
            problems.append(f"{grown >> 20} MB of memory")
        if spent > HANG_S:
            problems.append(f"{spent:.1f} s of CPU time")
        times = {"seconds": round(seconds, 3), "cpu_s": round(spent, 3)}
        return {"code": code, **times, "said": text[:2000], "problems": problems}


def main() -> int:
    kind, seed, folder, wide = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4] == "1"
    # Ours alone: what the work prints goes nowhere.
    say = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    faulthandler.register(signal.SIGUSR1, file=open(folder / "stack", "w"), all_threads=True)  # noqa: SIM115, PTH123
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    desk = Desk(kind, folder, wide=wide)
    for line in sys.stdin:
        index = int(line)
        work = desk.work(Random(f"{seed}:{kind}:{index}"))
        print(json.dumps({"start": index}), file=say)
        print(json.dumps({"end": index, **desk.done(work)}), file=say)
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
