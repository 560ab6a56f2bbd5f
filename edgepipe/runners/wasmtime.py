"""Runs wasm bundles in wasmtime, from PyPI: good for numerics, no proxy for a browser's speed."""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgepipe.errors import EdgepipeError, UserError
from edgepipe.runners._base import Availability, Timing
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgepipe.bundle import Bundle

NAME = "wasmtime"

_PAGE_BYTES = 65536


def available(target: Target) -> Availability:
    """Whether the Python package is installed."""
    if target.kind != "wasm":
        return Availability(False, f"it runs wasm bundles, not {target.kind}")
    if importlib.util.find_spec("wasmtime") is None:
        return Availability(False, "the package is not installed", "pip install wasmtime")
    return Availability(True, f"wasmtime {_version()}")


def run_many(
    bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]]
) -> list[dict[str, npt.NDArray[Any]]]:
    """Execute samples in one instance: the relaxed build where the bundle has it."""
    instance = _Instance(bundle)
    return [instance.run(sample) for sample in samples]


def bench(bundle: Bundle, runs: int, warmup: int) -> Timing:
    """Time inferences in wasmtime."""
    import numpy as np

    from edgepipe import golden

    instance = _Instance(bundle)
    instance.write(golden.synthetic_inputs(bundle.inputs))
    for _ in range(warmup):
        instance.call()
    times = np.empty(runs)
    for i in range(runs):
        start = time.perf_counter()
        instance.call()
        times[i] = (time.perf_counter() - start) * 1e3
    p50, p90, p99 = np.percentile(times, [50, 90, 99], method="inverted_cdf")
    return Timing(
        runner=NAME, engine=f"wasmtime {_version()}", emulated=False, runs=runs, warmup=warmup,
        min_ms=float(times.min()), p50_ms=float(p50), p90_ms=float(p90), p99_ms=float(p99),
        mean_ms=float(times.mean()), variant=instance.variant or "simd",
        round_p50_ms=tuple(
            float(np.percentile(part, 50, method="inverted_cdf"))
            for part in np.array_split(times, 5)
        ) if runs >= 5 else (),
    )  # fmt: skip


def profile(bundle: Bundle, runs: int) -> dict[str, Any]:
    """Refused: wasmtime's times are no proxy for those of a browser. Raises UserError."""
    raise UserError("its times are no proxy for those of a browser", where="--runner wasmtime",
                    fix="profile with --runner node or --runner browser")  # fmt: skip


class _Instance:
    """One instantiated module with its weights, arena and tensors in its memory."""

    def __init__(self, bundle: Bundle) -> None:
        import wasmtime

        self.variant = "relaxed" if "model.relaxed.wasm" in bundle.manifest["files"] else ""
        config = wasmtime.Config()
        config.wasm_simd = True
        config.wasm_relaxed_simd = True
        # wasmtime's cache would leave files in the user's home.
        name = f"model.{self.variant}.wasm" if self.variant else "model.wasm"
        self.store = wasmtime.Store(wasmtime.Engine(config))
        module = wasmtime.Module.from_file(self.store.engine, str(bundle.file(name)))
        self.exports = wasmtime.Instance(self.store, module, []).exports(self.store)
        self.bundle = bundle
        self._place(bundle.file("weights.bin").read_bytes())

    def run(self, sample: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        self.write(sample)
        self.call()
        return {
            t.name: self._view(at, t.shape, t.dtype).copy()
            for t, at in zip(self.bundle.outputs, self.outputs, strict=True)
        }

    def write(self, sample: Mapping[str, npt.NDArray[Any]]) -> None:
        for t, at in zip(self.bundle.inputs, self.inputs, strict=True):
            self._view(at, t.shape, t.dtype)[...] = sample[t.name]

    def call(self) -> None:
        table = self.table
        status = self._function("run", table, table + 4 * len(self.inputs), self.arena)
        if status != 0:
            raise EdgepipeError(f"run of model.wasm failed with error {status}")

    def _place(self, weights: bytes) -> None:
        import numpy as np

        from edgepipe.codegen.plan import ALIGNMENT

        end = int(self.exports["__heap_base"].value(self.store))

        def take(size: int) -> int:
            nonlocal end
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + max(size, 1)
            return start

        def tensors(specs: Any) -> list[int]:
            return [take(np.dtype(t.dtype).itemsize * int(np.prod(t.shape))) for t in specs]

        blob = take(len(weights))
        self.arena = take(self._function("arena_bytes"))
        self.inputs, self.outputs = tensors(self.bundle.inputs), tensors(self.bundle.outputs)
        pointers = [*self.inputs, *self.outputs]
        self.table = take(4 * len(pointers))
        memory = self.exports["memory"]
        missing = end - memory.data_len(self.store)
        if missing > 0:
            memory.grow(self.store, -(-missing // _PAGE_BYTES))
        self._view(blob, (len(weights),), "uint8")[...] = np.frombuffer(weights, np.uint8)
        self._view(self.table, (len(pointers),), "uint32")[...] = pointers
        if status := self._function("init", blob, len(weights)):
            raise EdgepipeError(f"init of model.wasm failed with error {status}")

    def _function(self, name: str, *values: int) -> int:
        # i32 is signed in wasmtime's interface, addresses are not.
        signed = [v - (1 << 32) if v >= 1 << 31 else v for v in values]
        return int(self.exports[f"{self.bundle.prefix}_{name}"](self.store, *signed)) % (1 << 32)

    def _view(self, address: int, shape: tuple[int, ...], dtype: str) -> npt.NDArray[np.generic]:
        import numpy as np

        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        memory = self.exports["memory"]
        if address + size > memory.data_len(self.store):
            raise EdgepipeError("a tensor lies outside the module's memory")
        base = ctypes.addressof(memory.data_ptr(self.store).contents)
        raw = (ctypes.c_ubyte * size).from_address(base + address)
        view: npt.NDArray[np.generic] = np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
        return view


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("wasmtime")
    except PackageNotFoundError:
        return ""
