"""Where candidates are measured: runners of MetaSchedule's interface, one per way.

All take pairs of kernels (``edgepipe.tuning.candidate``) and answer with ``run_secs`` =
[default, candidate, default, candidate, …]: seconds, or instructions where ``unit`` says so. A
candidate that crashes or hangs has an error message instead, and costs nothing else.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.runner import PyRunner, PyRunnerFuture, RunnerInput, RunnerResult

from edgepipe import gpu, runners
from edgepipe.codegen import link
from edgepipe.errors import EdgepipeError, UserError
from edgepipe.runners import cuda_local, local, node, qemu, rpc
from edgepipe.runners._base import Address
from edgepipe.target import Target

#: A candidate that takes longer is given up.
TIMEOUT_S = 30.0
ROUNDS, ROUND_NS = 60, 400_000


@derived_object
class Done(PyRunnerFuture):  # type: ignore[misc]
    """A result that is there already."""

    def __init__(self, values: Sequence[float] | None, error: str | None = None) -> None:
        super().__init__()
        self.values, self.error = values, error

    def done(self) -> bool:
        """Always."""
        return True

    def result(self) -> RunnerResult:
        """Values of both kernels in turn, or what went wrong."""
        return RunnerResult(self.values, self.error)


class Meter(PyRunner):  # type: ignore[misc]
    """What all ways have in common. ``form`` is what ``candidate.build`` is to make for it."""

    form = "PROGRAM"
    unit = "ns"
    #: Candidates that are measured at the same time, each on a board of its own.
    boards = 1
    measured_on = ""

    def run(self, runner_inputs: Sequence[RunnerInput]) -> list[Any]:
        """One future per input, in order."""
        return [self._attempt(str(given.artifact_path)) for given in runner_inputs]

    def close(self) -> None:
        """End what was started."""

    def _attempt(self, path: str) -> Any:
        try:
            return Done(self.measure(path))
        except subprocess.TimeoutExpired:
            return Done(None, f"no result within {TIMEOUT_S:g} s")
        except (EdgepipeError, OSError, ValueError, RuntimeError) as error:
            return Done(None, str(error) or type(error).__name__)

    def measure(self, path: str) -> list[float]:
        """Values of the pair in ``path``."""
        raise NotImplementedError


def _output(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise EdgepipeError(f"the candidate ended with {done.returncode}")
    return done


@derived_object
class Local(Meter):
    """This machine, or its GPU: a process per candidate."""

    def __init__(self, engine: str) -> None:
        super().__init__()
        self.measured_on = engine

    def measure(self, path: str) -> list[float]:
        """Seconds."""
        out = _output([path, "time", str(ROUNDS), str(ROUND_NS)]).stdout
        return [float(word) * 1e-9 for word in out.split()]


@derived_object
class Counter(Meter):
    """Instructions under QEMU, which are no time but the same every time."""

    unit = "instructions"

    def __init__(self, target: Target) -> None:
        super().__init__()
        program = shutil.which(target.run.qemu)
        if program is None or not _takes_plugins(program):
            raise UserError(f"{target.run.qemu} with plugins is not installed", where="--runner",
                            fix="apt-get install qemu-user")  # fmt: skip
        self.folder = tempfile.TemporaryDirectory(prefix="edgepipe-count-")
        plugin = link.shared_for_this_machine(
            Path(__file__).with_name("icount.c").read_text(encoding="utf-8")
        )
        path = Path(self.folder.name) / "icount.so"
        path.write_bytes(plugin)
        cpu = target.run.qemu_cpu
        self.words = [program, *(["-cpu", cpu] if cpu else []), "-plugin", str(path)]
        self.measured_on = f"{target.run.qemu} -cpu {cpu or 'default'}, counted"

    def measure(self, path: str) -> list[float]:
        """Instructions of one run of each kernel."""
        base, default, own = (self._count(path, *run) for run in ((0, 0), (0, 1), (1, 1)))
        return [float(default - base), float(own - base)]

    def _count(self, path: str, which: int, times: int) -> int:
        said = _output([*self.words, path, "run", str(which), str(times)]).stderr
        return int(said.rsplit("instructions ", 1)[1])

    def close(self) -> None:
        """Remove the plugin."""
        self.folder.cleanup()


def _takes_plugins(program: str) -> bool:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = [program, "-help"]
        said = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        return "-plugin" in said.stdout
    return False


@derived_object
class Node(Meter):
    """V8: one Node process that takes all candidates, started again where one takes it along."""

    form = "MODULE"

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.words = [*node.command(target), str(Path(__file__).with_name("worker.mjs"))]
        self.measured_on = f"{node._engine()} on {local._engine()}"
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str] = queue.Queue()

    def measure(self, path: str) -> list[float]:
        """Seconds."""
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(path + "\n")
            process.stdin.flush()
            line = self.answers.get(timeout=TIMEOUT_S)
        except (queue.Empty, OSError):
            line = ""
        if not line:
            ended = process.poll() is not None
            self.close()
            raise EdgepipeError("Node ended" if ended else f"no result within {TIMEOUT_S:g} s")
        answer = json.loads(line)
        if "error" in answer:
            raise EdgepipeError(answer["error"])
        return [value * 1e-9 for pair in answer["rounds"] for value in pair]

    def _started(self) -> subprocess.Popen[str]:
        if self.process is None:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(self.words, stdin=pipe, stdout=pipe, text=True)
            self.answers = queue.Queue()
            arguments = (self.process.stdout, self.answers)
            threading.Thread(target=_read_lines, args=arguments, daemon=True).start()
        return self.process

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _read_lines(stream: Any, answers: queue.Queue[str]) -> None:
    for line in stream:
        answers.put(line)
    answers.put("")  # it has ended


def meter(target: Target, name: str | None) -> Any:
    """The way to measure for ``target``: that of runner ``name``, or the first there is.

    Raises UserError.
    """
    if name is not None and name.partition(":")[0] == "rpc":
        return _boards(target, rpc.at(Address.parse(name)[1]))
    chosen = runners.pick(target, name)
    ways: dict[str, Any] = {
        local.NAME: lambda: Local(local._engine()),
        cuda_local.NAME: lambda: Local(_same_gpu(target)),
        node.NAME: lambda: Node(target),
        qemu.NAME: lambda: Counter(target),
    }
    if chosen.NAME not in ways:
        raise UserError(f"'{chosen.NAME}' cannot measure single kernels", where="--runner",
                        fix=f"{', '.join(ways)} and rpc:HOST:PORT can")  # fmt: skip
    return ways[chosen.NAME]()


def _boards(target: Target, server: rpc.Server) -> Any:
    from edgepipe.tuning.boards import Boards

    on_gpu = target.kind == "cuda"  # the server's program is the board's CPU's all the same
    if on_gpu and not server.host:
        raise UserError("no server was named", where="--runner", fix="--runner rpc:HOST:PORT")
    state = server.available(target)
    if not on_gpu and not state.ok:
        raise UserError(state.reason, where="--runner", fix=state.fix)
    return Boards(server, link.GPU_TIMES if on_gpu else 1)


def _same_gpu(target: Target) -> str:
    """This machine's GPU, which must be of the target's kind. Raises UserError."""
    found = gpu.detect()
    assert target.cuda is not None and isinstance(found, gpu.Gpu)
    if found.sm != target.cuda.sm:
        raise UserError(
            f"{found.name} is sm_{found.sm}: it does not tell what is fast on sm_{target.cuda.sm}",
            where="--runner", fix="--target cuda for this GPU, --runner rpc:HOST:PORT for a board",
        )  # fmt: skip
    return f"{found.name}, sm_{found.sm}"
