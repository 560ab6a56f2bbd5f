"""Every operator in LiteRT against ONNX Runtime on the same Q/DQ graph, in steps of the output."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization.networks import build, run, samples, snr_db

from edgepipe.interchange import tflite
from interchange import operators
from interchange.litert import Program, output_scale, quantize

pytestmark = pytest.mark.needs_litert

CASES = {
    f"{group}: {name}": text
    for group in (
        "CONVOLUTIONS", "TRANSPOSED", "DENSE", "POOLS", "BINARIES", "FUNCTIONS", "MOVEMENTS"
    )
    for name, text in getattr(operators, group).items()
}  # fmt: skip

#: With XNNPACK: most steps of the output that a result may be off, least share of values without.
EXACT = (1, 0.98)
#: Where tflite prescribes a grid that is not the graph's: the input's, or a fixed one.
OTHERWISE_ROUNDED = {
    "POOLS: average, pads left out": (3, 0.5),
    "POOLS: average, ceil": (3, 0.6),
    "MOVEMENTS: resize, linear, half pixel": (1, 0.7),
    "MOVEMENTS: resize, linear, smaller": (1, 0.7),
    "MOVEMENTS: resize, linear, corners": (1, 0.7),
    "MOVEMENTS: resize, linear, asymmetric": (2, 0.8),
    "FUNCTIONS: sigmoid": (1, 0.8),
    "FUNCTIONS: swish": (1, 0.9),
    "FUNCTIONS: tanh": (1, 0.8),
    "FUNCTIONS: softmax of channels": (1, 0.8),
    "DENSE: attention": (1, 0.9),
    "DENSE: attention of four axes": (1, 0.95),
}
#: Steps with LiteRT's own kernels: fixed-point multipliers, tables of 16-bit interpolation.
OWN_KERNELS_STEPS = 4

#: What XNNPACK does not take in int8, so that a network falls into pieces there.
NOT_DELEGATED = {
    "AVERAGE_POOL_2D", "BATCH_MATMUL", "EXP", "GELU", "HARD_SWISH", "MIRROR_PAD", "PADV2",
    "RESIZE_NEAREST_NEIGHBOR", "SOFTMAX", "STRIDED_SLICE",
}  # fmt: skip


def steps_off(text: str, *, delegate: bool, broken: bool = False) -> np.ndarray:
    """|LiteRT − ONNX Runtime| of all outputs on fresh samples, in steps of the last grid."""
    model = build(text)
    graph = quantize(model)
    program = Program(tflite.write(graph), delegate)
    assert program.float_between_integers() == []
    found = []
    for sample in samples(model, 6, seed=9):
        expected, result = run(graph, sample)[0], program.run(sample)[0]
        assert result.shape == expected.shape
        found.append(np.abs(result - (expected[:, ::-1] if broken else expected)).ravel())
    return np.concatenate(found) / output_scale(graph)


@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_xnnpack(name: str) -> None:
    off = steps_off(CASES[name], delegate=True)
    most, share = OTHERWISE_ROUNDED.get(name, EXACT)
    assert off.max() < most + 0.01
    assert (off < 0.5).mean() >= share


@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_litert_alone(name: str) -> None:
    assert steps_off(CASES[name], delegate=False).max() < OWN_KERNELS_STEPS + 0.01


def test_the_comparison_can_fail() -> None:
    """Positive control: output channels in the wrong order."""
    off = steps_off(CASES["CONVOLUTIONS: same 3x3"], delegate=True, broken=True)
    assert off.max() > 10 and (off < 0.5).mean() < 0.5


@pytest.mark.parametrize("name", CASES)
def test_xnnpack_takes_all_it_can(name: str) -> None:
    program = Program(tflite.write(quantize(build(CASES[name]))))
    assert program.wholly_delegated() == NOT_DELEGATED.isdisjoint(program.kinds)


@pytest.mark.parametrize("name", operators.TAILS)
def test_what_is_float_behind_the_last_integer_operator(name: str) -> None:
    model = build(operators.TAILS[name])
    graph = quantize(model)
    program = Program(tflite.write(graph))
    assert program.float_between_integers() == []
    outputs = zip(
        *((run(graph, s), program.run(s)) for s in samples(model, 6, seed=9)), strict=True
    )
    expected, found = (zip(*side, strict=True) for side in outputs)
    for reference, result in zip(expected, found, strict=True):
        assert [y.shape for y in result] == [y.shape for y in reference]
        assert snr_db(np.concatenate(reference), np.concatenate(result)) > 40


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    group=st.sampled_from(["1", "2", "4"]), kernel=st.tuples(*[st.integers(1, 3)] * 2),
    pads=st.tuples(*[st.integers(0, 2)] * 4), strides=st.tuples(*[st.integers(1, 2)] * 2),
    dilation=st.integers(1, 2), size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    activation=st.sampled_from(["", "Relu", "Clip"]),
)  # fmt: skip
def test_any_geometry_of_a_convolution(
    group: str, kernel: tuple[int, int], pads: tuple[int, ...], strides: tuple[int, int],
    dilation: int, size: tuple[int, int], activation: str,
) -> None:  # fmt: skip
    attributes = f"group={group}, pads={[*pads]}, strides={[*strides]}, dilations={[dilation] * 2}"
    body = f"z = Conv<{attributes}>(x, w, b)"
    if activation:
        bounds = "" if activation == "Relu" else ", lo, hi"
        body = f"c = Conv<{attributes}>(x, w, b)\nz = {activation}(c{bounds})"
    weight = f"8,{4 // int(group)},{kernel[0]},{kernel[1]}"
    text = (
        f"n (float[1,4,{size[0]},{size[1]}] x) => (float[] z)"
        f" <float[{weight}] w, float[8] b, float lo = {{-0.25}}, float hi = {{0.5}}> {{ {body} }}"
    )
    off = steps_off(text, delegate=True)
    assert off.max() < 1.01 and (off < 0.5).mean() > 0.95
