"""Estimates for GPUs: occupancy by the tables of the CUDA guide, times by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgepipe.blob import Blob
from edgepipe.codegen.plan import Call, GpuCode, KernelAudit, Launch, Plan, Resources
from edgepipe.roofline import LAUNCH_US, estimate, occupancy, to_json
from edgepipe.target import Target

CUDA = Target.load("jetson-tx2").cuda
assert CUDA is not None


@pytest.mark.parametrize(
    ("sm", "threads", "registers", "shared_bytes", "share"),
    [
        (62, 128, 32, 0, 1.0),  # 16 blocks of 4 warps
        (62, 128, 64, 0, 0.5),  # registers: 32 warps
        (62, 128, 40, 0, 0.75),  # registers: 51 warps, in fours 48
        (62, 128, 32, 16384, 0.25),  # 64 KB of shared memory: 4 blocks
        (62, 128, 32, 16385, 0.1875),
        (87, 128, 32, 0, 1.0),  # 48 warps, 12 blocks
        (87, 32, 32, 0, 16 / 48),  # 16 blocks at most
        (87, 128, 32, 40960, 16 / 48),  # 1 KB more each: four times 41 KB are 164 KB
        (87, 128, 32, 40961, 12 / 48),
        (110, 256, 32, 0, 1.0),  # not in the table: as the newest that is
    ],
)
def test_occupancy(sm: int, threads: int, registers: int, shared_bytes: int, share: float) -> None:
    assert occupancy(sm, threads, registers, shared_bytes) == pytest.approx(share)


def plan(macs: int, moved: int, blocks: int, arithmetic: str = "float32") -> Plan:
    audit = KernelAudit("op", "Conv", "conv_0", arithmetic, "float32", macs, weight_bytes=moved)
    launches = (Launch("m_conv_0", (blocks, 1, 1), (128, 1, 1)),)
    code = GpuCode({"m_conv_0": launches}, {"m_conv_0": Resources(64, 8192, 0)})
    return Plan((), (), (Call("m_conv_0", (), "conv_0"),), 0, 0, Blob(), (audit,), gpu=code)


def test_many_operations_are_bound_by_the_peak() -> None:
    (op,) = estimate(plan(665_000_000, 1000, 64), CUDA)
    assert op.bound == "compute"
    assert op.us == pytest.approx(2 * 665e6 / (665e9 * 0.5) * 1e6 + LAUNCH_US)


def test_filled_up_tiles_take_time_and_count_for_nothing() -> None:
    whole = plan(10**9, 0, 64)
    padded = replace(whole, audit=(replace(whole.audit[0], executed_macs=2 * 10**9),))
    (one,), (two,) = estimate(whole, CUDA), estimate(padded, CUDA)
    assert two.us - LAUNCH_US == pytest.approx(2 * (one.us - LAUNCH_US))
    assert one.share == pytest.approx(0.5, rel=1e-2)
    assert two.share == pytest.approx(one.share / 2, rel=1e-2)


def test_many_bytes_are_bound_by_the_memory() -> None:
    one = plan(1000, 59_700_000, 64)
    (op,) = estimate(one, CUDA)
    assert op.bound == "memory"
    assert op.us == pytest.approx(1e3 / 0.7 + LAUNCH_US)
    (half,) = estimate(one, replace(CUDA, bandwidth_gb_s=CUDA.bandwidth_gb_s / 2))
    assert half.us - LAUNCH_US == pytest.approx(2 * (op.us - LAUNCH_US))


def test_blocks_that_leave_a_processor_idle_count_for_it() -> None:
    times = [estimate(plan(10**9, 0, blocks), CUDA)[0].us - LAUNCH_US for blocks in (1, 2, 3)]
    assert times[0] == pytest.approx(2 * times[1])
    assert times[2] == pytest.approx(times[1] * 4 / 3)


def test_halves_and_bytes_have_peaks_of_their_own() -> None:
    orin = Target.load("jetson-orin-nano").cuda
    assert orin is not None
    times = {
        arithmetic: estimate(plan(10**10, 0, 64, arithmetic), orin)[0].us - LAUNCH_US
        for arithmetic in ("float32", "float16", "int8")
    }
    assert times["float32"] == pytest.approx(2 * times["float16"])
    assert times["float32"] == pytest.approx(4 * times["int8"])
    (op,) = estimate(plan(10**10, 0, 64, "float32, weights float16"), orin)
    assert op.us - LAUNCH_US == pytest.approx(times["float32"])


def test_the_manifest_has_the_sum_and_says_that_it_is_an_estimate() -> None:
    found = to_json(plan(10**9, 0, 2), CUDA, 4096)
    assert found["memory_bytes"] == 4096
    assert found["kernels"]["m_conv_0"]["occupancy"] == 0.5
    assert found["estimate"]["ms"] == pytest.approx(
        found["estimate"]["ops"][0]["us"] / 1e3, abs=1e-3
    )
    assert "estimate, not measured" in found["estimate"]["assumptions"]
