"""Integer lowering and kernels: bit for bit what the interpreter computes, on every target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepipe import importer, passes, pipeline
from edgepipe.bundle import Bundle
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.kernels.integer_ops import Limits
from edgepipe.lowering.integers.geometry import IMAGE, layout
from edgepipe.lowering.integers.kernels import limits_of
from edgepipe.lowering.integers.terms import DOMAIN, META, Integer, Term, Weights
from edgepipe.quantization.interpreter import Interpreter
from edgepipe.recipe import Recipe
from edgepipe.target import Target
from tests.lowering import integer_graphs

Array = np.ndarray[Any, np.dtype[Any]]

HOST = "host"
OTHERS = [
    pytest.param("wasm-simd", "node", marks=pytest.mark.needs_node),
    pytest.param("wasm-relaxed", "wasmtime", marks=pytest.mark.needs_wasmtime),
    pytest.param("wasm-relaxed", "node", marks=pytest.mark.needs_node),
    pytest.param("raspberry-pi-4", "qemu", marks=pytest.mark.needs_qemu),
    pytest.param("raspberry-pi-5", "qemu", marks=pytest.mark.needs_qemu),
    pytest.param("raspberry-pi-3-32", "qemu", marks=pytest.mark.needs_qemu),
]


def expected(path: Path, inputs: dict[str, Array]) -> dict[str, Array]:
    """What the integer interpreter answers to the model as the compiler sees it."""
    context = Context(Target.load(HOST), Recipe())
    graph = passes.run(importer.load(path, None).model, context)
    return Interpreter(graph).run(inputs)


def compiled(path: Path, target: str, folder: Path) -> Bundle:
    return pipeline.compile(path, target=target, output=folder / "bundle")


def differences(wanted: dict[str, Array], got: dict[str, Array]) -> list[str]:
    return [
        f"{name}: {int((wanted[name] != got[name]).sum())} of {wanted[name].size} differ"
        for name in wanted
        if not np.array_equal(wanted[name], got[name])
    ]


def check(seed: int, target: str, runner: str, folder: Path) -> None:
    model, inputs = integer_graphs.build(seed)
    path = folder / "model.onnx"
    onnx.save(model, path)
    bundle = compiled(path, target, folder)
    assert not differences(expected(path, inputs), bundle.run(inputs, runner))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_every_layer_on_this_machine(seed: int, tmp_path: Path) -> None:
    check(seed, HOST, "local", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [11, 12])
@pytest.mark.parametrize(("target", "runner"), OTHERS)
def test_every_layer_on_other_targets(seed: int, target: str, runner: str, tmp_path: Path) -> None:
    check(seed, target, runner, tmp_path)


@pytest.mark.slow
@pytest.mark.needs_qemu
def test_depthwise_by_dot_products(tmp_path: Path) -> None:
    """Interleaved rows on a CPU with SDOT; channels that fill no vector of 16 go the other way."""
    g = integer_graphs.Graph(5)
    for _ in range(10):
        integer_graphs.three_rows(g)
    onnx.save(g.model(), tmp_path / "model.onnx")
    bundle = compiled(tmp_path / "model.onnx", "raspberry-pi-5", tmp_path)
    kernels = [k for k in bundle.manifest["kernels"] if k["op_type"] == "Conv"]
    by_dots = [k for k in kernels if "dot=" in k["knobs"]]
    assert 4 <= len(by_dots) < len(kernels)
    got = bundle.run(g.feeds, "qemu")
    assert not differences(expected(tmp_path / "model.onnx", g.feeds), got)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "runner"), OTHERS)
def test_three_by_three(target: str, runner: str, tmp_path: Path) -> None:
    """By Winograd's where products of bytes are dear, weights of 4, 7 and 8 bits."""
    g = integer_graphs.Graph(7)
    for limit in (7, 63, 127) * 2:
        integer_graphs.nine_taps(g, limit)
    onnx.save(g.model(), tmp_path / "model.onnx")
    bundle = compiled(tmp_path / "model.onnx", target, tmp_path)
    kernels = [k for k in bundle.manifest["kernels"] if k["op_type"] == "Conv"]
    dear = Target.load(target).integer.dot in ("mlal", "pairs")
    assert {k["kernel"].startswith("q_winograd") for k in kernels} == {dear}
    got = bundle.run(g.feeds, runner)
    assert not differences(expected(tmp_path / "model.onnx", g.feeds), got)


@pytest.mark.parametrize(("kind", "largest"), [("MatMul", 4), ("Gemm", 4), ("Conv", 4000)])
def test_sums_of_weights_of_one_scale(kind: str, largest: int) -> None:
    """The operator says which axis is that of the outputs, not the one its scale would have."""
    weights = Weights(np.full((4, 4000), 127), np.asarray(1, np.float32), 1)
    term = Term("product", (), np.ones(1), ir.Node("", kind, []), weights)

    def bounded(multiplier: float) -> bool:
        multipliers = (np.asarray(multiplier, np.float32),)
        return limits_of(Integer(term, (), multipliers, -128, 127, 0, ())).bounded

    reach = largest * 127 * 255
    assert bounded(0.9 * 2**21 / reach) and not bounded(1.1 * 2**21 / reach)


@pytest.mark.parametrize(
    ("c", "lanes", "sums", "floats"),
    [(20, 16, 8, 8), (32, 16, 16, 16), (20, 4, 4, 4), (3, 16, 8, 4), (2, 8, 8, 2), (40, 16, 8, 8)],
)
def test_floats_have_no_more_channels_than_codes(
    c: int, lanes: int, sums: int, floats: int
) -> None:
    """What a kernel reads per vector of its float output, the pixels of its codes have."""
    node = ir.Node("", "DequantizeLinear", [ir.val("q")], outputs=[ir.val("y")])
    product = ir.Node(DOMAIN, "Conv", [ir.val("q")], outputs=[ir.val("z")])
    product.meta[META] = Integer(Term("product", (), np.ones(1)), (), (), 0, 0, 0, ())
    for value, expected in ((node.outputs[0], floats), (product.outputs[0], sums)):
        value.shape = ir.Shape([1, c, 2, 2])
        assert layout(value, IMAGE, lanes).lanes == expected


@pytest.mark.slow
@pytest.mark.needs_qemu
def test_images_by_dot_products(tmp_path: Path) -> None:
    """Neighbouring pixels take their words out of the same registers."""
    g = integer_graphs.Graph(6)
    for _ in range(16):
        integer_graphs.image(g)
    onnx.save(g.model(), tmp_path / "model.onnx")
    bundle = compiled(tmp_path / "model.onnx", "raspberry-pi-5", tmp_path)
    kernels = [k for k in bundle.manifest["kernels"] if k["op_type"] == "Conv"]
    assert all("dot=sdot" in k["knobs"] for k in kernels)
    got = bundle.run(g.feeds, "qemu")
    assert not differences(expected(tmp_path / "model.onnx", g.feeds), got)


def test_how_far_sums_reach() -> None:
    weights = Weights(np.asarray([[100, 1], [20, 1]]), np.ones(2, np.float32), 1)
    bias = np.asarray([100, 100])
    term = Term("product", (), np.ones(1), ir.Node("", "MatMul", []), weights, bias=bias)

    def limits(*multipliers: float) -> Limits:
        of_channels = (np.asarray(multipliers, np.float32),)
        return limits_of(Integer(term, (), of_channels, -128, 127, 0, ()))

    assert limits(1, 50).short  # the first channel: 255 · 120 + 100
    assert not limits(1.1, 50).short
    assert limits(1.1, 50).bounded
    assert not limits(70, 1).bounded
    assert not limits(2).short  # one for both


@pytest.mark.slow
def test_bilinear_resizing_stays_in_codes(tmp_path: Path) -> None:
    g = integer_graphs.Graph(5)
    for i in range(10):
        integer_graphs.resized(g, addend=i > 7)
    onnx.save(g.model(), tmp_path / "model.onnx")
    bundle = compiled(tmp_path / "model.onnx", HOST, tmp_path)
    kernels = [k["kernel"].rstrip("0123456789_") for k in bundle.manifest["kernels"]]
    assert kernels.count("q_bilinear") == 8 and "bilinear" not in kernels
    assert kernels.count("integer_resize") == 2  # the general form
    got = bundle.run(g.feeds, "local")
    assert not differences(expected(tmp_path / "model.onnx", g.feeds), got)


def test_a_transposed_convolution_in_the_general_form(tmp_path: Path) -> None:
    """Too few channels for a template: the convolution it becomes is computed as one."""
    g = integer_graphs.Graph(0)
    weight, _ = g.weights([2, 3, 3, 3], 1, 127)
    g.finish(g.op("ConvTranspose", [g.codes(1, 2, 7, 5), weight], pads=[1] * 4), rounds=True)
    onnx.save(g.model(), tmp_path / "model.onnx")
    bundle = compiled(tmp_path / "model.onnx", HOST, tmp_path)
    kernels = [k["kernel"] for k in bundle.manifest["kernels"]]
    assert "integer_conv" in kernels and "integer_convtranspose" not in kernels
    got = bundle.run(g.feeds, "local")
    assert not differences(expected(tmp_path / "model.onnx", g.feeds), got)


@pytest.mark.slow
def test_one_code_off_is_seen(tmp_path: Path) -> None:
    """The positive control: the model that is judged by has one weight that is one more."""
    model, inputs = integer_graphs.build(1)
    onnx.save(model, tmp_path / "model.onnx")
    bundle = compiled(tmp_path / "model.onnx", HOST, tmp_path)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4:
            array = onnx.numpy_helper.to_array(tensor).copy()
            array.flat[0] += -1 if array.flat[0] > 0 else 1
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "changed.onnx")
    assert differences(expected(tmp_path / "changed.onnx", inputs), bundle.run(inputs))


@pytest.mark.slow
def test_the_audit_names_integers(tmp_path: Path) -> None:
    model, _ = integer_graphs.build(1)
    onnx.save(model, tmp_path / "model.onnx")
    kernels = compiled(tmp_path / "model.onnx", HOST, tmp_path).manifest["kernels"]
    products = [k for k in kernels if k["macs"]]
    assert products
    assert all(k["arithmetic"].startswith("int8") for k in products)
    assert all(k["accumulator"] == "int32" for k in products)


@pytest.mark.slow
@pytest.mark.parametrize("largest", [1.0, 0.7])
def test_a_vector_that_is_computed_is_no_bias(largest: float, tmp_path: Path) -> None:
    """Of one scale (largest 1) or of two, it is added as any other tensor of codes."""
    make, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [make("Add", ["x", "v"], ["y"])], "g",
        [info("x", 1, [3, 4, 5]), info("v", 1, [5])], [info("y", 1, [3, 4, 5])],
    )  # fmt: skip
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "m.onnx"
    )
    rng = np.random.default_rng(0)
    data = {"x": rng.uniform(-1, 1, (24, 4, 5)), "v": rng.uniform(-largest, largest, 40)}
    for name, limit in (("x", 1.0), ("v", largest)):
        data[name].reshape(-1)[:2] = -limit, limit
    bundle = pipeline.compile(
        tmp_path / "m.onnx", target=HOST, recipe="w8a8", output=tmp_path / "b",
        calibration={name: array.astype(np.float32) for name, array in data.items()},
    )  # fmt: skip
    assert not bundle.validate().failures
    inputs, outputs = bundle.golden()
    assert not differences(dict(outputs), bundle.run(inputs, "local"))


@pytest.mark.slow
def test_a_quantized_product_in_float_is_refused(tmp_path: Path) -> None:
    """A bias whose scale is not the product's cannot join the accumulator."""
    g = integer_graphs.Graph(0)
    weight, scale = g.weights([8, 4, 1, 1], 0, 63)
    bias = g.const(np.ones(8, np.float32))
    g.finish(g.op("Conv", [g.codes(1, 4, 3, 3), weight, bias]), rounds=True)
    onnx.save(g.model(), tmp_path / "model.onnx")
    del scale
    bundle = compiled(tmp_path / "model.onnx", HOST, tmp_path)  # written in the product's scale
    assert all(k["arithmetic"] != "float32" or not k["macs"] for k in bundle.manifest["kernels"])
    g = integer_graphs.Graph(0)
    x = g.codes(1, 4, 3, 3)
    g.finish(g.op("Conv", [x, g.const(np.ones((8, 4, 1, 1), np.float32))]), rounds=True)
    onnx.save(g.model(), tmp_path / "float.onnx")
    with pytest.raises(UserError, match="would compute in float"):
        pipeline.compile(tmp_path / "float.onnx", target=HOST, output=tmp_path / "float")
    pipeline.compile(
        tmp_path / "float.onnx", target=HOST, output=tmp_path / "float", allow_float_fallback=True
    )
