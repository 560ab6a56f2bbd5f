"""From scheduled PrimFuncs to CUDA source, PTX, and a host program on the CUDA driver API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepipe.codegen.plan import GpuCode
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.target import Target

SOURCE, PTX, CUBIN = "model.cu", "model.ptx", "model.cubin"


def build(
    functions: Mapping[str, Any], context: Context
) -> tuple[dict[str, bytes], dict[str, list[int]], GpuCode]:
    """Compile ``functions`` (symbol → PrimFunc) for the target's GPU.

    Returns the files of the bundle's device code, per symbol the bytes of each workspace that
    follows its buffers, and what is launched. Raises UserError where NVIDIA's wheels are missing
    or do not know the GPU.
    """
    from edgepipe.codegen.cuda import toolkit
    from edgepipe.codegen.cuda.device import build_source

    cuda = context.target.cuda
    assert cuda is not None
    device = build_source(functions, context.target)
    context.dump(SOURCE, device.source)
    context.progress(f"compiling CUDA for sm_{cuda.sm}, PTX ISA {cuda.ptx_isa}")
    source, ptx, cubin, resources = toolkit.assemble(device.source, cuda)
    files = {SOURCE: source.encode(), PTX: ptx.encode(), CUBIN: cubin}
    if cuda.ptx_sm:  # the assembler does not know the GPU itself: its driver translates
        del files[CUBIN]
    launches = {symbol: tuple(found) for symbol, found in device.launches.items()}
    for symbol, found in launches.items():
        if any(launch.threads == launch.blocks == (1, 1, 1) for launch in found):
            context.warn("codegen.cuda", symbol, "runs in one thread of the GPU: slow")
    return files, device.workspaces, GpuCode(launches, resources)


def check(target: Target) -> None:
    """Refuse a GPU that the toolkit at hand does not know, before any work. Raises UserError."""
    from edgepipe.codegen.cuda import toolkit

    if target.cuda is not None:
        toolkit.check(target.cuda)


def check_memory(block_bytes: int, target: Target) -> None:
    """Refuse a network that does not fit the board. Raises UserError."""
    assert target.cuda is not None
    if block_bytes > target.cuda.memory_gb * 1e9:
        raise UserError(
            f"the network needs {block_bytes / 1e9:.2f} GB for weights and tensors, "
            f"{target.name} has {target.cuda.memory_gb:g} GB in all",
            where="--target",
            fix="take a recipe with smaller weights, a smaller input or another board",
        )
