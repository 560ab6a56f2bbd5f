"""Runs native bundles on this machine: model.so in this process, timings in one of its own."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.errors import EdgepipeError, UserError
from edgepipe.runners import _program
from edgepipe.runners._base import Availability, Timing
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgepipe.bundle import Bundle

NAME = "local"

_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}

# /proc/cpuinfo names that an LLVM CPU or attribute needs. Levels: System V psABI, x86-64.
_V3 = frozenset({"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_CPU_NEEDS = {"x86-64-v3": _V3, "x86-64-v4": _V4, "cortex-a76": frozenset({"asimddp", "atomics"})}
_ATTRIBUTE_NEEDS = {
    "+dotprod": "asimddp", "+fullfp16": "asimdhp", "+i8mm": "i8mm",
    "+avx512vnni": "avx512_vnni", "+avxvnni": "avx_vnni",
}  # fmt: skip


def available(target: Target) -> Availability:
    """Whether this machine has the target's architecture and instructions."""
    if target.kind != "cpu":
        return Availability(False, f"it runs native bundles, not {target.kind}")
    if platform.system() != "Linux":
        return Availability(False, f"bundles are for Linux, this is {platform.system()}")
    machine = _MACHINES.get(platform.machine().lower(), platform.machine())
    if machine != target.arch:
        return Availability(False, f"this machine is {machine}, the target {target.arch}")
    needs = set(_CPU_NEEDS.get(str(target.llvm.get("mcpu")), ()))
    needs |= {_ATTRIBUTE_NEEDS[a] for a in target.llvm.get("mattr", ()) if a in _ATTRIBUTE_NEEDS}
    if lacking := sorted(needs - _cpu_flags()):
        return Availability(False, f"this CPU lacks {', '.join(lacking)}")
    return Availability(True, f"{machine}, has what {target.name} needs")


def run_many(
    bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]]
) -> list[dict[str, npt.NDArray[Any]]]:
    """Execute samples through model.so, which is unloaded afterwards, or, where threads share an
    inference, in the bundle's program, which has them."""
    if bundle.compiled_threads != 1:
        return _program.run_many(bundle, [], samples)
    from edgepipe.runners import _io

    # Unloaded each time: dlopen would hand out the old code for a bundle compiled anew.
    library = ctypes.CDLL(str(bundle.file("model.so")), mode=ctypes.RTLD_LOCAL)
    try:
        api = _Api(library, bundle.prefix)
        api.compare(bundle)  # it reads and writes as many bytes as it was compiled for
        path = bundle.file("weights.bin")
        weights = _io.aligned((path.stat().st_size,), "uint8")
        with path.open("rb") as stream:
            stream.readinto(weights.data)
        api.check("init", api.init(weights.ctypes.data, weights.nbytes))
        arena = _io.aligned((api.arena_bytes(),), "uint8")
        inputs = [_io.aligned(t.shape, t.dtype) for t in bundle.inputs]
        results = []
        for sample in samples:
            for tensor, buffer in zip(bundle.inputs, inputs, strict=True):
                buffer[...] = sample[tensor.name]
            outputs = [_io.aligned(t.shape, t.dtype) for t in bundle.outputs]
            status = api.run(_pointers(inputs), _pointers(outputs), arena.ctypes.data)
            api.check("run", status)
            names = (t.name for t in bundle.outputs)
            results.append(dict(zip(names, outputs, strict=True)))
        return results
    finally:
        _unload(library)


def bench(bundle: Bundle, runs: int, warmup: int) -> Timing:
    """Time the bundle's own bench program on this machine."""
    return _program.bench(bundle, [], NAME, _engine(), runs, warmup, emulated=False)


def profile(bundle: Bundle, runs: int) -> dict[str, Any]:
    """Time each kernel in the bundle's own bench program."""
    return _program.profile(bundle, [], _engine(), runs, emulated=False)


def _engine() -> str:
    return f"{platform.machine()} {_cpu_model()}".strip()


class _Tensor(ctypes.Structure):
    """``model_tensor`` of a bundle's header."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("rank", ctypes.c_int),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
        ("bytes", ctypes.c_size_t),
    )


class _Api:
    """The C functions of one loaded bundle."""

    def __init__(self, library: ctypes.CDLL, prefix: str) -> None:
        self.init = library[f"{prefix}_init"]
        self.init.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.run = library[f"{prefix}_run"]
        self.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        self.arena_bytes = library[f"{prefix}_arena_bytes"]
        self.arena_bytes.restype = ctypes.c_size_t
        self.tensors = {}
        for kind in ("input", "output"):
            count, tensor = library[f"{prefix}_{kind}_count"], library[f"{prefix}_{kind}"]
            count.restype, tensor.restype = ctypes.c_size_t, ctypes.POINTER(_Tensor)
            tensor.argtypes = [ctypes.c_size_t]
            self.tensors[kind] = [tensor(i).contents for i in range(count())]

    def compare(self, bundle: Bundle) -> None:
        """Raises UserError where the manifest tells of other tensors than the code."""
        for kind, named in (("input", bundle.inputs), ("output", bundle.outputs)):
            told = [(t.dtype, tuple(t.shape)) for t in named]
            have = [(t.dtype.decode(), tuple(t.dims[: t.rank])) for t in self.tensors[kind]]
            if told != have:
                text = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in have)
                raise UserError(
                    f"its manifest names other {kind}s than its code has: {text}",
                    where=str(bundle.path),
                    fix="compile it again",
                )

    @staticmethod
    def check(function: str, status: int) -> None:
        if status != 0:
            raise EdgepipeError(f"{function} of model.so failed with error {status}")


def _pointers(arrays: Sequence[npt.NDArray[Any]]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * max(1, len(arrays)))(*(a.ctypes.data for a in arrays))


def _unload(library: ctypes.CDLL) -> None:
    close = ctypes.CDLL(None).dlclose
    close.argtypes = [ctypes.c_void_p]
    close(library._handle)


def _cpuinfo(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags", "Features").split())


def _cpu_model() -> str:
    return _cpuinfo("model name", "CPU part")
