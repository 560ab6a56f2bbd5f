"""Runs GPU bundles on this machine's NVIDIA GPU: a board's own PTX, in another host program.

The host program is compiled for this machine from the bundle's own source. Results are the
board's but for the order in which a driver's translation adds; times are this GPU's.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe import gpu
from edgepipe.runners import _program
from edgepipe.runners._base import Availability, Timing
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgepipe.bundle import Bundle

NAME = "cuda-local"

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def available(target: Target) -> Availability:
    """Whether there is a GPU whose driver takes the target's PTX."""
    if target.cuda is None:
        return Availability(False, f"it runs bundles for NVIDIA GPUs, not {target.kind}")
    if platform.system() != "Linux":
        return Availability(False, f"bundles are for Linux, this is {platform.system()}")
    found = gpu.detect()
    if isinstance(found, str):
        return Availability(False, found)
    major, minor = found.driver
    if found.sm < target.cuda.virtual_sm:
        need = target.cuda.virtual_sm
        reason = f"{found.name} is sm_{found.sm}, the kernels need sm_{need} or later"
        return Availability(False, reason)
    if 1000 * major + 10 * minor < gpu.driver_version(target.cuda.ptx_isa):
        reason = f"its driver is for CUDA {major}.{minor}, too old for PTX {target.cuda.ptx_isa}"
        return Availability(False, reason)
    return Availability(True, _engine(found))


def run_many(
    bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]]
) -> list[dict[str, npt.NDArray[Any]]]:
    """Execute samples in one process."""
    return _program.run_many(bundle, [], samples, _host_program(bundle))


def bench(bundle: Bundle, runs: int, warmup: int) -> Timing:
    """Time inferences on this machine's GPU."""
    found = gpu.detect()
    engine = found if isinstance(found, str) else _engine(found)
    program = _host_program(bundle)
    return _program.bench(bundle, [], NAME, engine, runs, warmup, emulated=False, program=program)


def profile(bundle: Bundle, runs: int) -> dict[str, Any]:
    """Time each kernel on this machine's GPU, by its events."""
    found = gpu.detect()
    engine = found if isinstance(found, str) else _engine(found)
    program = _host_program(bundle)
    return _program.profile(bundle, [], engine, runs, emulated=False, program=program)


def _engine(found: gpu.Gpu) -> str:
    return f"{found.name}, sm_{found.sm}, driver {found.driver[0]}.{found.driver[1]}"


def _host_program(bundle: Bundle) -> Path:
    machine = platform.machine().lower()
    machine = _MACHINES.get(machine, machine)
    if machine == bundle.target.arch:
        return bundle.file("bench")
    return _built(bundle.path, bundle.file("driver.c").stat().st_mtime_ns, machine).path


class _Program:
    """A host program in a folder that goes with the process."""

    def __init__(self, content: bytes) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="edgepipe-cuda-")
        self.path = Path(self.folder.name) / "bench"
        self.path.write_bytes(content)
        self.path.chmod(0o700)


@cache
def _built(folder: Path, written_ns: int, machine: str) -> _Program:
    """The bundle in ``folder``, as it was ``written_ns``, for ``machine``."""
    from edgepipe.bundle import Bundle
    from edgepipe.codegen import link
    from edgepipe.codegen.cuda import CUBIN, PTX

    bundle = Bundle.open(folder)
    sources = {name: bundle.file(name).read_text("utf-8") for name in link.GPU_SOURCES}
    names = [name for name in (PTX, CUBIN) if name in bundle.manifest["files"]]
    code = {name: bundle.file(name).read_bytes() for name in names}
    built = link.gpu(f"{machine}-linux-gnu.2.27", sources, code)
    return _Program(built["bench"])
