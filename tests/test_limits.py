"""Limits of memory and time, and ends that no exception tells of: one line and an exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edgepipe.cli.guard import INTERRUPTED

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes of this kind")

_HEAD = """
import ctypes, os, signal, sys, time
from pathlib import Path
from edgepipe.cli import limits
from edgepipe.cli.guard import guarded
limits._GRACE_S = 0.3

def deaf():
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter, as native code may: no handler runs

def hold(megabytes):
    kept = bytearray(megabytes << 20)
    time.sleep(60)

def at_work(then):
    Path(sys.argv[1]).write_text(str(os.getpid()))
    return then() or 0
"""


def start(folder: Path, work: str, limits: str = "", before: str = "") -> subprocess.Popen[str]:
    """A program that does ``work``, an expression, within ``limits``; it has begun on return."""
    code = f"{_HEAD}{before}\nwork = lambda: at_work(lambda: {work})\n" + (
        f"within = limits.Limits({limits})\n"
        "sys.exit(guarded(lambda: limits.supervised(work, within), debug=False))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder / "pid")], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while not ((folder / "pid").exists() and (folder / "pid").read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    return process


def worker(folder: Path) -> int:
    return int((folder / "pid").read_text())


def end(folder: Path, process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was said; nothing is left running."""
    _, said = process.communicate(timeout=30)
    assert gone(worker(folder))
    return process.returncode, said


def gone(pid: int) -> bool:
    """Whether a process ends within two seconds; one that nobody waits for has ended."""
    for _ in range(200):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_the_exit_code_is_that_of_the_work(tmp_path: Path, code: int) -> None:
    assert end(tmp_path, start(tmp_path, str(code), "1, 1")) == (code, "")


@pytest.mark.parametrize("work", ["time.sleep(60)", "deaf()"])
def test_time_that_is_over(tmp_path: Path, work: str) -> None:
    code, said = end(tmp_path, start(tmp_path, work, "minutes=0.005"))
    assert code == 2
    assert said == (
        "error: not done within the 0.005 minutes of --max-minutes; nothing was written\n"
    )


def test_too_much_memory(tmp_path: Path) -> None:
    code, said = end(tmp_path, start(tmp_path, "hold(300)", "memory_gb=0.25"))
    assert code == 2
    assert said.startswith("error: more memory than the 0.25 GB of --max-memory-gb; nothing was")
    assert said.count("\n") == 1


def test_memory_of_programs_that_are_started_counts(tmp_path: Path) -> None:
    started = "import subprocess, time\n"
    work = (
        'subprocess.run([sys.executable, "-c", '
        '"import time; kept = bytearray(300 << 20); time.sleep(60)"])'
    )
    code, said = end(tmp_path, start(tmp_path, work, "memory_gb=0.25", started))
    assert (code, said[:32]) == (2, "error: more memory than the 0.25")


def test_memory_within_the_limit_is_none_of_our_business(tmp_path: Path) -> None:
    work = "len(bytearray(300 << 20)) and time.sleep(0.5)"
    assert end(tmp_path, start(tmp_path, work, "memory_gb=0.6")) == (0, "")


def test_a_machine_without_memory(tmp_path: Path) -> None:
    before = "limits._left = lambda: 1 << 20\n"
    code, said = end(tmp_path, start(tmp_path, "hold(400)", before=before))
    assert code == 2
    assert said.startswith("error: the machine's memory is used up, 0.")


@pytest.mark.parametrize("number", ["SIGSEGV", "SIGABRT"])
def test_a_library_that_ends_the_process(tmp_path: Path, number: str) -> None:
    code, said = end(tmp_path, start(tmp_path, f"os.kill(os.getpid(), signal.{number})"))
    assert code == 3
    assert said == (
        f"error: a bug: a library ended the process with {number}; please rerun with --debug and "
        "report it\n"
    )


def test_an_address_space_that_is_too_small(tmp_path: Path) -> None:
    before = "import resource; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
    process = start(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)", before=before)
    code, said = end(tmp_path, process)
    assert code == 2
    assert "within 4.3 GB of address space (ulimit -v)" in said


@pytest.mark.parametrize("work", ["time.sleep(60)", "deaf()"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to_both", [False, True])
def test_an_interrupt_is_told_once(
    tmp_path: Path, work: str, number: signal.Signals, to_both: bool
) -> None:
    process = start(tmp_path, work)
    time.sleep(0.1)
    process.send_signal(number)
    if to_both:  # as a terminal does it
        os.kill(worker(tmp_path), number)
    assert end(tmp_path, process) == (2, f"error: {INTERRUPTED}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_told_once_by_a_process_slow_to_end(
    tmp_path: Path, number: signal.Signals
) -> None:
    work = "atexit.register(deaf) and time.sleep(60)"
    process = start(tmp_path, work, before="import atexit\n")
    process.send_signal(number)
    assert end(tmp_path, process) == (2, f"error: {INTERRUPTED}\n")


def test_the_limit_of_processor_time(tmp_path: Path) -> None:
    before = "import resource\ndef spin():\n    while True: pass\n"
    work = "resource.setrlimit(resource.RLIMIT_CPU, (1, 10)) or spin()"
    assert end(tmp_path, start(tmp_path, work, before=before)) == (
        2, "error: the limit of CPU time (ulimit -t) is reached; nothing was written\n"
    )  # fmt: skip


def test_a_limit_that_is_met_as_the_work_ends(tmp_path: Path) -> None:
    """There is nobody left to tell: the work has ended as it ended."""
    late = "limits._beyond = lambda *_: time.sleep(1) or 'too late'"
    assert end(tmp_path, start(tmp_path, "time.sleep(0.3) or 3", "1, 1", late)) == (3, "")


def test_work_that_the_system_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "time.sleep(60)")
    os.kill(worker(tmp_path), signal.SIGKILL)
    code, said = end(tmp_path, process)
    assert code == 2
    assert said.startswith("error: ended from outside by SIGKILL; nothing was written; if that")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_the_work_ends_with_who_watches_it(tmp_path: Path) -> None:
    process = start(tmp_path, "deaf()")
    process.kill()
    assert end(tmp_path, process) == (-signal.SIGKILL, "")


@pytest.mark.parametrize("option", ["--max-memory-gb", "--max-minutes"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "much"])
def test_a_limit_is_a_number_above_0(
    capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    from edgepipe.cli import main

    assert main(["targets", f"{option}={value}"]) == 2
    assert f"'{value}' is no number above 0" in capsys.readouterr().err
