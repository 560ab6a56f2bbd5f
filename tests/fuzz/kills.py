"""SIGKILL at random moments: ``python -m tests.fuzz.kills [--kills 200] [--seed N] [--work NAME]``.

Work is done in a process of its own that is killed after a random share of the time that the work
takes. What is in the output folder then must be whole: the old result, the new one, or nothing.
The work is then done again and must come to its end, with the same bytes as work that nobody
disturbed, and leave nothing else in the folder. Tuning goes on from its records instead: not one of
them may be lost or made twice. A kind of work is a ``Work``, a line in ``WORKS``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from edgepipe import cli, records
from edgepipe.bundle import Bundle
from tests.fuzz import seeds

#: Work that takes longer than this has not come to its end.
_TIMEOUT_S = 300.0


#: Files by their path in the output folder.
Files = dict[str, bytes]


def _same(killed: Files, again: Files, wanted: Files) -> None:
    assert again == wanted, f"other results: {sorted(again)} instead of {sorted(wanted)}"


@dataclass(frozen=True)
class Work:
    """``act(source, out)`` works from files in ``source`` to files in ``out``, which ``prepare``
    makes; ``check(out)`` raises where what is in ``out`` is neither whole nor absent,
    ``compare(killed, again, wanted)`` where the work done again is not right after the kill.
    ``age(random, out)`` makes an older result of what is in ``out``."""

    prepare: Callable[[Path], None]
    act: Callable[[Path, Path], int]
    check: Callable[[Path], None]
    compare: Callable[[Files, Files, Files], None] = _same
    age: Callable[[Random, Path], None] = lambda random, out: None


def _compile(recipe: str) -> Callable[[Path, Path], int]:
    options = ["--target", "x86-64-v3", "--recipe", recipe, "--quiet"]
    return lambda source, out: cli.main(["compile", "digits", *options, "-o", str(out / "bundle")])


def _check_bundle(out: Path) -> None:
    if (out / "bundle").exists():
        Bundle.open(out / "bundle").verify()


def _prepare_report(source: Path) -> None:
    assert _compile("fp32")(source, source) == 0


def _report(source: Path, out: Path) -> int:
    bundle, page = str(source / "bundle"), str(out / "page.html")
    return cli.main(["report", bundle, "--no-measure", "--quiet", "-o", page])


def _check_page(out: Path) -> None:
    page = out / "page.html"
    assert not page.exists() or page.read_text(encoding="utf-8").rstrip().endswith("</html>")


def _prepare_tuning(source: Path) -> None:
    (source / "net.onnx").write_bytes(seeds.models()["image"])


def _tune(source: Path, out: Path) -> int:
    """By instructions, of which there are as many each time."""
    options = ["--target", "raspberry-pi-4", "--runner", "qemu", "--trials", "2", "--quiet"]
    found = str(out / "records.jsonl")
    return cli.main(["tune", str(source / "net.onnx"), *options, "--records", found])


def _lines(content: bytes) -> list[bytes]:
    """Whole lines; what a kill tore off ends in no line end, or is one that is no record."""
    return content.split(b"\n")[:-1]


def _check_records(out: Path) -> None:
    path = out / "records.jsonl"
    content = path.read_bytes() if path.exists() else b""
    found = records.read(path) if content else records.NO_RECORDS
    assert len(found.remarks) <= 2, found.remarks  # one torn by us, one by the kill


def _compare_records(killed: Files, again: Files, wanted: Files) -> None:
    (name,) = wanted
    assert again.keys() == wanted.keys()
    before = killed.get(name, b"")
    assert again[name].startswith(before), "what was recorded is gone"
    whole = [line for line in _lines(again[name]) if line in _lines(wanted[name])]
    assert sorted(whole) == sorted(_lines(wanted[name])), "records are missing, changed or double"


def _tear_records(random: Random, out: Path) -> None:
    path = out / "records.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: random.randrange(len(content))])


WORKS = {
    "compile": Work(lambda source: None, _compile("fp32"), _check_bundle),
    "compile-w8a8": Work(lambda source: None, _compile("w8a8"), _check_bundle),
    "report": Work(_prepare_report, _report, _check_page),
    "tune": Work(_prepare_tuning, _tune, _check_records, _compare_records, _tear_records),
}


@dataclass
class Outcome:
    """Of one kind of work: kills that hit, results present after one, and what went wrong."""

    seconds: float = 0.0
    kills: int = 0
    whole: int = 0
    problems: list[str] = field(default_factory=list)


def torment(name: str, kills: int, seed: str, folder: Path) -> Outcome:
    """Kill and resume ``name`` so many times. Every second time an older result is there. Work
    that ends before its kill does not count, and is done again up to twice as often."""
    work, random, outcome = WORKS[name], Random(f"{seed}:{name}"), Outcome()
    source, out = folder / "source", folder / "out"
    source.mkdir(parents=True)
    out.mkdir()
    work.prepare(source)
    for _ in range(2):  # the first one warms caches
        _clear(out)
        wanted, outcome.seconds = _undisturbed(work, source, out)
    for number in range(2 * kills):
        if outcome.kills == kills:
            break
        if number % 2 == 0:
            _clear(out)
        elif any(out.iterdir()):
            work.age(random, out)
        # Half of them at the end, where files are written.
        moment = random.uniform(random.choice((0.0, 0.8)), 1.0) * outcome.seconds
        pid = _start(work, source, out)
        hit = _kill(pid, moment)
        outcome.kills += hit
        try:
            work.check(out)
            outcome.whole += any(not path.name.startswith(".") for path in out.iterdir())
            killed = _files(out)
            again, _ = _undisturbed(work, source, out)
            work.compare(killed, again, wanted)
        except Exception as error:
            where = f"--work {name} --seed {seed}, kill {number} after {moment:.3f} s"
            outcome.problems.append(f"{where}: {type(error).__name__} {error}")
            print(f"finding: {outcome.problems[-1]}", flush=True)
            _clear(out)
    return outcome


def _files(out: Path) -> Files:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def _undisturbed(work: Work, source: Path, out: Path) -> tuple[Files, float]:
    start = time.perf_counter()
    pid = _start(work, source, out)
    assert not _kill(pid, _TIMEOUT_S), "it does not end"
    if (code := _codes.pop(pid)) != 0:
        raise AssertionError(f"exit code {code}")
    return _files(out), time.perf_counter() - start


#: Exit codes of processes that ended by themselves.
_codes: dict[int, int] = {}


def _start(work: Work, source: Path, out: Path) -> int:
    # Forked, so that a kill hits the work and not the import of libraries.
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        code = work.act(source, out)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _kill(pid: int, after_s: float) -> bool:
    """Whether the process was still there after so many seconds."""
    end = time.perf_counter() + after_s
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            _codes[pid] = os.waitstatus_to_exitcode(status)
            return False
        if time.perf_counter() >= end:
            break
        time.sleep(min(0.001, max(0.0, end - time.perf_counter())))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def _clear(out: Path) -> None:
    from tests.fuzz.kinds import clear

    clear(out)


def _import_compiler() -> None:
    import onnxruntime  # noqa: F401
    import tvm  # noqa: F401

    from edgepipe import codegen, lowering, passes, pipeline, tuning  # noqa: F401
    from edgepipe.tuning import search  # noqa: F401


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--seed", default=str(int(time.time())))
    parser.add_argument("--work", action="append", choices=sorted(WORKS))
    options = parser.parse_args()
    chosen = options.work or list(WORKS)
    _import_compiler()
    print(f"seed {options.seed}", flush=True)
    problems = 0
    for i, name in enumerate(chosen):
        count = options.kills // len(chosen) + (i < options.kills % len(chosen))
        with tempfile.TemporaryDirectory(prefix="edgepipe-kills-") as folder:
            os.environ["TMPDIR"] = tempfile.tempdir = folder
            outcome = torment(name, count, options.seed, Path(folder) / "work")
            tempfile.tempdir = None
        problems += len(outcome.problems)
        facts = f"{outcome.kills} killed, a whole result there after {outcome.whole}"
        print(f"{name}: runs of {outcome.seconds:.1f} s, {facts}, "
              f"{len(outcome.problems)} problems", flush=True)  # fmt: skip
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
