"""NVIDIA's driver on this machine: which GPU there is, and what PTX a driver takes."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

#: CUDA version of a driver → highest PTX ISA it takes: PTX ISA, release history.
_PTX_ISA = {
    (10, 0): "6.3", (10, 1): "6.4", (10, 2): "6.5", (11, 0): "7.0", (11, 1): "7.1",
    (11, 2): "7.2", (11, 3): "7.3", (11, 4): "7.4", (11, 5): "7.5", (11, 6): "7.6",
    (11, 7): "7.7", (11, 8): "7.8", (12, 0): "8.0", (12, 1): "8.1", (12, 2): "8.2",
    (12, 3): "8.3", (12, 4): "8.4", (12, 5): "8.5", (12, 7): "8.6", (12, 8): "8.7",
    (12, 9): "8.8", (13, 0): "9.0",
}  # fmt: skip
#: float32 operations per clock of a multiprocessor: CUDA C guide, arithmetic throughput.
_CORES = {(5, 3): 128, (6, 0): 64, (6, 1): 128, (6, 2): 128, (7, 0): 64, (7, 2): 64, (7, 5): 64,
          (8, 0): 64}  # fmt: skip
#: Names the driver's library where the system does not find it by itself.
VARIABLE = "EDGEPIPE_LIBCUDA"
_CLOCK_KHZ, _PROCESSORS, _MEMORY_KHZ, _BUS_BITS, _MAJOR, _MINOR = 13, 16, 36, 37, 75, 76


@dataclass(frozen=True)
class Gpu:
    """The first GPU. ``driver`` is the CUDA version as (major, minor)."""

    name: str
    capability: tuple[int, int]
    driver: tuple[int, int]
    processors: int
    memory_bytes: int
    clock_khz: int
    bandwidth_gb_s: float

    @property
    def sm(self) -> int:
        return 10 * self.capability[0] + self.capability[1]

    @property
    def peak_gflops_f32(self) -> float:
        """Two operations per multiply-add of every core."""
        return 2 * _CORES.get(self.capability, 128) * self.processors * self.clock_khz * 1e-6


def driver_version(isa: str) -> int:
    """The oldest driver that takes PTX ISA ``isa``, as ``cuDriverGetVersion`` counts: 10020."""
    return min(1000 * major + 10 * minor for (major, minor), known in _PTX_ISA.items()
               if _number(known) >= _number(isa))  # fmt: skip


def highest_isa(driver: tuple[int, int]) -> str:
    """The highest PTX ISA known here that a driver takes."""
    return max((isa for since, isa in _PTX_ISA.items() if since <= driver), key=_number)


def known_isa(isa: str) -> bool:
    """Whether ``isa`` is a version that this module knows a driver for."""
    return isa in _PTX_ISA.values()


def _number(isa: str) -> tuple[int, ...]:
    return tuple(map(int, isa.split(".")))


def detect() -> Gpu | str:
    """The first GPU of this machine, or in a few words why there is none."""
    name = os.environ.get(VARIABLE) or "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(name)
    except OSError:
        return f"{name} cannot be opened: no NVIDIA driver here"
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver finds no GPU"
    text, memory = ctypes.create_string_buffer(128), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(text, len(text), device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    return Gpu(
        name=text.value.decode("utf-8", "replace"),
        capability=(attribute(_MAJOR), attribute(_MINOR)),
        driver=(version.value // 1000, version.value % 1000 // 10),
        processors=attribute(_PROCESSORS),
        memory_bytes=memory.value,
        clock_khz=attribute(_CLOCK_KHZ),
        bandwidth_gb_s=attribute(_MEMORY_KHZ) * attribute(_BUS_BITS) / 8 * 2e-6,
    )
