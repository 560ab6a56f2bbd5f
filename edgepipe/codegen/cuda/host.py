"""The C host program of a GPU bundle: where every tensor lies in GPU memory, and what is launched.

One block of GPU memory holds the weights, the inputs, the outputs and the arena, in this order, so
that every argument of a kernel is an offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from edgepipe import gpu
from edgepipe.codegen import driver
from edgepipe.codegen.cuda import CUBIN
from edgepipe.codegen.plan import Launch, Place, Plan
from edgepipe.target import Cuda

#: cuMemAlloc aligns to it; no tensor is less aligned than the block itself.
_ALIGNMENT = 256


@dataclass(frozen=True)
class Block:
    """Byte offsets of a plan's tensors in the block of GPU memory."""

    plan: Plan

    @cached_property
    def _starts(self) -> list[int]:
        sizes = [
            len(self.plan.weights),
            *(driver.tensor_bytes(t) for t in (*self.plan.inputs, *self.plan.outputs)),
            driver.arena_bytes(self.plan),
        ]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        return starts

    @property
    def bytes(self) -> int:
        """Size of the block."""
        return self._starts[-1]

    def offset(self, place: Place) -> int:
        """Where ``place`` is."""
        inputs = 1 + len(self.plan.inputs)
        first = {
            "weights": 0,
            "input": 1 + place.index,
            "output": inputs + place.index,
            "arena": inputs + len(self.plan.outputs),
        }
        return self._starts[first[place.space]] + place.offset


def render(
    plan: Plan, prefix: str, version: str, cuda: Cuda, files: Iterable[str]
) -> dict[str, str]:
    """``{"model.h": …, "driver.c": …}`` for ``plan``; ``files`` are those of the device code."""
    assert plan.gpu is not None
    block = Block(plan)
    used = {launch.symbol for c in plan.calls for launch in plan.gpu.launches[c.symbol]}
    kernels = sorted(used)
    places: list[int] = []
    rows: list[str] = []
    starts = [0]
    for call in plan.calls:
        for launch in plan.gpu.launches[call.symbol]:
            rows.append(_row(kernels, launch, len(places), len(call.arguments)))
        places += [block.offset(place) for place in call.arguments]
        starts.append(len(rows))
    cubin = CUBIN in files
    values = {
        "kernels": _lines(driver.c_string(name) for name in kernels),
        "launches": _lines(rows),
        "places": _lines(f"{place}u" for place in places),
        "input_places": _list(block.offset(Place("input", 0, i)) for i in range(len(plan.inputs))),
        "output_places": _list(
            block.offset(Place("output", 0, i)) for i in range(len(plan.outputs))
        ),
        "kernel_count": str(max(1, len(kernels))),
        "first_launch": _list(starts),
        "most_arguments": str(max([1, *(len(c.arguments) for c in plan.calls)])),
        "block_bytes": str(block.bytes),
        "blob_bytes": str(len(plan.weights)),
        "weights_place": "0",
        "virtual_sm": str(cuda.virtual_sm),
        "ptx_isa": cuda.ptx_isa,
        "driver_version": str(gpu.driver_version(cuda.ptx_isa)),
        "embedded_cubin": f'EMBED({prefix}_cubin, "{CUBIN}")' if cubin else "",
        "load_cubin": _load_cubin(prefix, cuda.sm) if cubin else "",
    }
    return driver.render(plan, prefix, version, "cuda_driver.c", values)


def candidate(
    launches: Sequence[Sequence[Launch]], counts: Sequence[int], cuda: Cuda, files: Iterable[str]
) -> str:
    """candidate_gpu.c for two kernels, of so many arguments, and what each of them launches."""
    rows = [
        f"{{{driver.c_string(each.symbol)}, {{{_extents(each.blocks)}}}, "
        f"{{{_extents(each.threads)}}}}}"
        for kernel in launches for each in kernel
    ]  # fmt: skip
    calls = []
    for i, count in enumerate(counts):
        names = [f"a{k}" for k in range(count)]
        head = f"void candidate_{i}({', '.join(f'void *{n}' for n in names)})"
        calls += [f"{head};", f"{head} {{", f"    void *given[] = {{{', '.join(names)}}};",
                  f"    gpu_launch({i}, given, {count}u);", "}"]  # fmt: skip
    cubin = CUBIN in files
    load = "    loaded = cuModuleLoadDataEx(&module, candidate_cubin, 0, NULL, NULL) == 0;"
    values = {
        "first_launches": str(len(launches[0])),
        "launch_count": str(len(rows)),
        "sm": str(cuda.sm),
        "most": str(max(counts)),
        "launches": _lines(rows),
        "calls": "\n".join(calls),
        "embedded_cubin": f'EMBED(candidate_cubin, "{CUBIN}")' if cubin else "",
        "load_cubin": load if cubin else "",
    }
    return driver.fill("candidate_gpu.c", values)


def _load_cubin(prefix: str, sm: int) -> str:
    return (
        f"    if (major == {sm // 10} && minor >= {sm % 10} &&\n"
        f"        cu.cuModuleLoadDataEx(&module, {prefix}_cubin, 0, NULL, NULL) == 0)\n"
        f'        code = "code for sm_{sm}";'
    )


def _row(kernels: Sequence[str], launch: Launch, first: int, count: int) -> str:
    number, blocks, threads = kernels.index(launch.symbol), launch.blocks, launch.threads
    return f"{{{number}, {{{_extents(blocks)}}}, {{{_extents(threads)}}}, {first}, {count}}}"


def _extents(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _lines(items: Iterable[str]) -> str:
    # ISO C has no empty arrays.
    return "\n".join(f"    {item}," for item in items) or "    0"


def _list(items: Iterable[int]) -> str:
    return ", ".join(map(str, items)) or "0"
