"""What kernels on a GPU will take, estimated: occupancy from ptxas' report, times from rooflines.

A roofline says that a kernel takes at least what its operations take at the peak and what its bytes
take at full bandwidth ("Roofline: an insightful visual performance model", Williams, Waterman,
Patterson, 2009). How much of either is reached is assumed here, not measured; every number that
comes out is an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgepipe.codegen.plan import KernelAudit, Launch, Plan
from edgepipe.target import Cuda

#: Share of the peak that kernels with multiply-adds are assumed to reach, and of the bandwidth.
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.5, 0.7
#: Microseconds between two kernels of a graph.
LAUNCH_US = 2.0


@dataclass(frozen=True)
class _Multiprocessor:
    """Per multiprocessor: CUDA C guide, technical specifications per compute capability."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536
    reserved_bytes: int = 0


_LIMITS = {
    53: _Multiprocessor(64, 32, 65536),
    62: _Multiprocessor(64, 32, 65536),
    72: _Multiprocessor(64, 32, 98304),
    75: _Multiprocessor(32, 16, 65536),
    80: _Multiprocessor(64, 32, 167936, reserved_bytes=1024),
    86: _Multiprocessor(48, 16, 102400, reserved_bytes=1024),
    87: _Multiprocessor(48, 16, 167936, reserved_bytes=1024),
    89: _Multiprocessor(48, 24, 102400, reserved_bytes=1024),
    90: _Multiprocessor(64, 32, 233472, reserved_bytes=1024),
}


def occupancy(sm: int, threads: int, registers: int, shared_bytes: int) -> float:
    """Share of a multiprocessor's warps that blocks of so many ``threads`` can fill, 0 to 1.

    Registers are given out to warps 256 at a time, to four warps at once.
    """
    limits = _LIMITS[max([s for s in _LIMITS if s <= sm], default=min(_LIMITS))]
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = limits.registers // per_warp // 4 * 4 // warps
    shared = -(-shared_bytes // 256) * 256 + limits.reserved_bytes
    by_shared = limits.shared_bytes // shared if shared else limits.blocks
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return blocks * warps / limits.warps


@dataclass(frozen=True)
class OpEstimate:
    """What one operator is estimated to take, and what bounds it: "compute", "memory".

    ``share`` is what of the peak, or of the bandwidth, that comes to: idle processors, filled-up
    tiles and launches are in it.
    """

    op: str
    kernel: str
    us: float
    bound: str
    share: float


def assumptions(cuda: Cuda) -> str:
    """What ``estimate`` takes for granted."""
    halves = f", {cuda.peak_gflops_f16:g} in float16" if cuda.peak_gflops_f16 else ""
    return (
        f"estimate, not measured: {100 * COMPUTE_SHARE:.0f} % of {cuda.peak_gflops_f32:g} GFLOP/s "
        f"in float32{halves}, {100 * BANDWIDTH_SHARE:.0f} % of {cuda.bandwidth_gb_s:g} GB/s, "
        f"every tensor from memory, whole tiles, {LAUNCH_US:g} us between kernels, highest clock"
    )


def estimate(plan: Plan, cuda: Cuda) -> list[OpEstimate]:
    """One estimate per call of ``plan``; their sum is the network's."""
    assert plan.gpu is not None
    launches = [plan.gpu.launches[call.symbol] for call in plan.calls]
    return [_op(audit, each, cuda) for audit, each in zip(plan.audit, launches, strict=True)]


def _op(audit: KernelAudit, launches: Sequence[Launch], cuda: Cuda) -> OpEstimate:
    # Blocks go to processors one by one: the last round may leave some without.
    x, y, z = launches[0].blocks if launches else (1, 1, 1)
    blocks = x * y * z
    rounds = -(-blocks // cuda.processors)
    busy = blocks / (rounds * cuda.processors)
    peak = _peak(audit.arithmetic, cuda)
    executed = max(audit.macs, audit.executed_macs)
    compute = 2e-3 * executed / (peak * COMPUTE_SHARE * busy)
    moved = 1e-3 * (audit.weight_bytes + audit.activation_bytes) / cuda.bandwidth_gb_s
    memory = moved / BANDWIDTH_SHARE
    us = max(compute, memory) + LAUNCH_US * len(launches)
    bound, least = "memory", moved
    if compute > memory:
        bound, least = "compute", 2e-3 * audit.macs / peak
    return OpEstimate(audit.op, audit.kernel, us, bound, least / us if us else 0.0)


def _peak(arithmetic: str, cuda: Cuda) -> float:
    """Operations per second, in 1e9, of an audit's arithmetic."""
    if arithmetic.startswith("int8") and cuda.peak_gops_s8:
        return cuda.peak_gops_s8
    if arithmetic.startswith("float16") and cuda.peak_gflops_f16:
        return cuda.peak_gflops_f16
    return cuda.peak_gflops_f32


def to_json(plan: Plan, cuda: Cuda, block_bytes: int) -> dict[str, Any]:
    """For the manifest: what ptxas reports of each kernel, and the estimate."""
    assert plan.gpu is not None
    launched = {launch.symbol: launch for each in plan.gpu.launches.values() for launch in each}
    ops = estimate(plan, cuda)
    return {
        "memory_bytes": block_bytes,
        "launches": sum(len(plan.gpu.launches[call.symbol]) for call in plan.calls),
        "kernels": {
            symbol: _kernel(launched[symbol], asdict(resources), cuda)
            for symbol, resources in plan.gpu.resources.items()
            if symbol in launched
        },
        "estimate": {
            "ms": round(sum(op.us for op in ops) / 1e3, 4),
            "assumptions": assumptions(cuda),
            "ops": [
                {**asdict(op), "us": round(op.us, 2), "share": round(op.share, 3)} for op in ops
            ],
        },
    }


def _kernel(launch: Launch, resources: Mapping[str, int], cuda: Cuda) -> dict[str, Any]:
    x, y, z = launch.threads
    filled = occupancy(
        cuda.virtual_sm, x * y * z, resources["registers"], resources["shared_bytes"]
    )
    return {
        **resources,
        "blocks": list(launch.blocks),
        "threads": list(launch.threads),
        "occupancy": round(filled, 3),
    }
