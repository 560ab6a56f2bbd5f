"""Every operator as a torch function against ONNX Runtime, batched against one by one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepipe import importer, passes
from edgepipe.errors import Unsupported
from quantization.networks import context, run, snr_db

torch = pytest.importorskip("torch")

from edgepipe.quantization.finetune.network import Network, check_batch  # noqa: E402
from edgepipe.quantization.finetune.operators import _BUILDERS  # noqa: E402

pytestmark = pytest.mark.needs_torch

#: float32 sums in another order and other formulas of the same functions.
LEAST_SNR_DB = 100.0
COUNT = 3

IMAGE = "float[1,4,7,9] x"
#: Name → inputs, constants, operator (or h = one, y = another); the output is y.
CASES: dict[str, tuple[str, str, str]] = {
    "Conv odd pads": (
        IMAGE,
        "float[6,2,3,2] w, float[6] b",
        "Conv<group=2, pads=[1,0,2,1], strides=[2,1], dilations=[1,2]>(x, w, b)",
    ),
    "Conv even pads": (IMAGE, "float[5,4,3,3] w", "Conv<pads=[1,1,1,1]>(x, w)"),
    "Conv depthwise 1d": (
        "float[1,4,9] x",
        "float[8,1,3] w, float[8] b",
        "Conv<group=4, pads=[1,1]>(x, w, b)",
    ),
    "ConvTranspose": (
        IMAGE,
        "float[4,3,3,2] w, float[6] b",
        "ConvTranspose<group=2, strides=[2,3], pads=[1,0,0,1], output_padding=[1,2]>(x, w, b)",
    ),
    "ConvTranspose dilated": (
        IMAGE,
        "float[4,3,3,2] w",
        "ConvTranspose<dilations=[2,1], pads=[1,1,1,1]>(x, w)",
    ),
    "Gemm": ("float[1,6] x", "float[6,5] w, float[5] b", "Gemm(x, w, b)"),
    "Gemm transposed": ("float[1,6] x", "float[5,6] w, float[5] b", "Gemm<transB=1>(x, w, b)"),
    "MatMul": ("float[1,7,6] x", "float[6,5] w", "MatMul(x, w)"),
    "MatMul of two": ("float[1,2,7,6] x, float[1,2,6,3] z", "", "MatMul(x, z)"),
    "Add": (f"{IMAGE}, float[1,4,1,1] z", "", "Add(x, z)"),
    "Sub": (IMAGE, "float[4,1,1] c", "Sub(c, x)"),
    "Mul": (IMAGE, "float[1,4,1,1] c", "Mul(x, c)"),
    "Div": (f"{IMAGE}", "float c = {3.0}", "Div(x, c)"),
    "Pow": (IMAGE, "float c = {2.0}", "Pow(x, c)"),
    "Max": (f"{IMAGE}, float[1,4,7,9] z", "", "Max(x, z)"),
    "Min": (IMAGE, "float c = {0.3}", "Min(x, c)"),
    "Clip": (IMAGE, "float lo = {-0.5}, float hi = {1.0}", "Clip(x, lo, hi)"),
    "Clip above": (IMAGE, "float hi = {0.7}", "Clip(x, , hi)"),
    "HardSigmoid": (IMAGE, "", "HardSigmoid<alpha=0.3, beta=0.4>(x)"),
    "LeakyRelu": (IMAGE, "", "LeakyRelu<alpha=0.2>(x)"),
    "Elu": (IMAGE, "", "Elu<alpha=0.7>(x)"),
    "Selu": (IMAGE, "", "Selu<alpha=1.5, gamma=1.2>(x)"),
    "Gelu": (IMAGE, "", "Gelu(x)"),
    "Gelu tanh": (IMAGE, "", 'Gelu<approximate="tanh">(x)'),
    "PRelu": (IMAGE, "float[4,1,1] c", "PRelu(x, c)"),
    "Log": ("float[1,6] x", "", "Exp(x) y = Log(h)"),
    "Sqrt": ("float[1,6] x", "", "Abs(x) y = Sqrt(h)"),
    "Reciprocal": ("float[1,6] x", "", "Exp(x) y = Reciprocal(h)"),
    "Reshape": (IMAGE, "int64[3] s = {1, 14, 18}", "Reshape(x, s)"),
    "Transpose": (IMAGE, "", "Transpose<perm=[0,2,3,1]>(x)"),
    "Slice": (
        IMAGE,
        "int64[2] a = {5, -7}, int64[2] b = {-999, 8}, int64[2] c = {2, 3}, int64[2] d = {-2, 3}",
        "Slice(x, a, b, c, d)",
    ),
    "Slice plain": (IMAGE, "int64[1] a = {1}, int64[1] b = {99}, int64[1] c = {1}",
                    "Slice(x, a, b, c)"),
    "Gather": (IMAGE, "int64[2,2] i = {0, -1, 2, 2}", "Gather<axis=1>(x, i)"),
    "Gather one": (IMAGE, "int64 i = {-2}", "Gather<axis=3>(x, i)"),
    "Concat": (f"{IMAGE}, float[1,2,7,9] z", "float[1,3,7,9] c", "Concat<axis=1>(x, z, c)"),
    "Softmax": (IMAGE, "", "Softmax<axis=1>(x)"),
    "LogSoftmax": ("float[1,6] x", "", "LogSoftmax(x)"),
    "LayerNormalization": (
        "float[1,5,8] x", "float[8] s, float[8] b", "LayerNormalization<epsilon=1e-3>(x, s, b)",
    ),
    "ReduceMean": (IMAGE, "int64[2] a = {1, 3}", "ReduceMean<keepdims=0>(x, a)"),
    "MaxPool": (IMAGE, "", "MaxPool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,1]>(x)"),
    "MaxPool ceil": (
        IMAGE, "", "MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1, dilations=[2,1]>(x)",
    ),
    "AveragePool": (IMAGE, "", "AveragePool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,1]>(x)"),
    "AveragePool with pads": (
        IMAGE,
        "",
        "AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], count_include_pad=1>(x)",
    ),
    "AveragePool ceil": (
        IMAGE, "", "AveragePool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(x)",
    ),
    "AveragePool plain": (IMAGE, "", "AveragePool<kernel_shape=[3,3]>(x)"),
    "GlobalAveragePool": (IMAGE, "", "GlobalAveragePool(x)"),
    "Pad": (IMAGE, "int64[8] p = {0,1,2,0,0,0,1,3}, float v = {0.5}", "Pad(x, p, v)"),
    "Pad axes": (IMAGE, "int64[2] p = {1,2}, int64[1] a = {-1}", "Pad(x, p, , a)"),
    "Pad reflect": (IMAGE, "int64[8] p = {0,0,2,0,0,0,1,3}", 'Pad<mode="reflect">(x, p)'),
    "Pad edge": (IMAGE, "int64[8] p = {0,0,2,0,0,0,1,3}", 'Pad<mode="edge">(x, p)'),
    "Resize nearest": (
        IMAGE,
        "float[4] s = {1, 1, 2, 3}",
        'Resize<mode="nearest", coordinate_transformation_mode="asymmetric",'
        ' nearest_mode="floor">(x, , s)',
    ),
    "Resize half pixel": (IMAGE, "float[4] s = {1, 1, 3, 2}", "Resize(x, , s)"),
    "Resize linear": (IMAGE, "float[4] s = {1, 1, 2, 2}", 'Resize<mode="linear">(x, , s)'),
    "Resize corners": (
        IMAGE,
        "float[4] s = {1, 1, 2, 2}",
        'Resize<mode="linear", coordinate_transformation_mode="align_corners">(x, , s)',
    ),
    "DepthToSpace": ("float[1,8,3,2] x", "", "DepthToSpace<blocksize=2>(x)"),
    "DepthToSpace CRD": ("float[1,8,3,2] x", "", 'DepthToSpace<blocksize=2, mode="CRD">(x)'),
    **{
        op: (IMAGE, "", f"{op}(x)")
        for op in (
            *("Relu", "Sigmoid", "Tanh", "HardSwish", "Softplus", "Softsign", "Mish", "Erf"),
            *("Abs", "Neg", "Exp", "Identity"),
        )
    },
}  # fmt: skip


def graph_of(inputs: str, constants: str, operator: str) -> ir.Model:
    """One operator as it is written, shapes inferred, constants filled."""
    generator = np.random.default_rng(0)
    tensors = []
    for dims, name in re.findall(r"float\[([\d,]+)\] (\w+)(?=,|$)", constants):
        shape = tuple(int(d) for d in dims.split(","))
        array = generator.standard_normal(shape).astype(np.float32)
        tensors.append(ir.tensor(array, name=name))
    first = "h" if " y = " in operator else "y"
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
        graph ({inputs}) => (y) <{constants}> {{ {first} = {operator} }}"""
    proto = ir.serde.serialize_model(ir.from_onnx_text(text, initializers=tensors))
    return ir.serde.deserialize_model(
        onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    )


def both(model: ir.Model) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Outputs of COUNT samples: ONNX Runtime one by one, torch in a batch."""
    generator = np.random.default_rng(1)
    feeds = {
        v.name: generator.standard_normal([COUNT, *v.shape[1:]]).astype(np.float32)
        for v in model.graph.inputs
    }
    one_by_one = [run(model, {n: a[i : i + 1] for n, a in feeds.items()}) for i in range(COUNT)]
    network = Network(model.graph, None).eval()
    with torch.no_grad():
        found = network({name: torch.from_numpy(array) for name, array in feeds.items()})
    expected = [np.concatenate(parts) for parts in zip(*one_by_one, strict=True)]
    return expected, [array.numpy() for array in found]


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    for expected, found in zip(*both(graph_of(*CASES[name])), strict=True):
        assert found.shape == expected.shape
        assert snr_db(expected, found) > LEAST_SNR_DB


def test_split() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
        n (float[1,6,3] x) => (a, b) <int64[2] s = {4, 2}> { a, b = Split<axis=1>(x, s) }"""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    for expected, found in zip(*both(ir.serde.deserialize_model(proto)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_comparison_can_fail() -> None:
    """Positive control: a convolution whose begin and end pads are exchanged."""
    model = graph_of(*CASES["Conv odd pads"])
    expected, _ = both(model)
    model.graph[0].attributes.add(ir.AttrInt64s("pads", [2, 1, 1, 0]))
    _, found = both(model)
    assert snr_db(expected[0], found[0]) < 10


def test_every_operator_has_a_case() -> None:
    covered = " ".join(operator for _, _, operator in CASES.values())
    assert not [op for op in _BUILDERS if op != "Split" and not re.search(rf"\b{op}[<(]", covered)]


@pytest.mark.parametrize(
    ("inputs", "constants", "operator", "reason"),
    [
        (IMAGE, "", "Cos(x)", "does not know"),
        (IMAGE, "", "Transpose<perm=[1,0,2,3]>(x)", "moves the axis of samples|leading dimension"),
        (IMAGE, "", "Softmax<axis=0>(x)", "along the axis of samples"),
        (IMAGE, "int64[1] s = {-1}", "Reshape(x, s)", "leading dimension of 1"),
        ("float[1,4] x, float[1,1,4] z", "", "Add(x, z)", "different ranks"),
        ("float[1,1] x, float[1,4] z", "", "MatMul(x, z)", "3 dimensions"),
        (IMAGE, "int64[8] p = {1,0,0,0,0,0,0,0}", "Pad(x, p)", "samples|leading"),
        (IMAGE, "float[4] s = {1, 1, 0.5, 0.5}", "Resize(x, , s)", "whole factors"),
        (IMAGE, "", 'MaxPool<kernel_shape=[3,3], auto_pad="SAME_UPPER">(x)', "auto_pad"),
    ],
)
def test_refusals_name_the_reason(inputs: str, constants: str, operator: str, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason) as error:
        Network(graph_of(inputs, constants, operator).graph, None)
    assert re.match(r"\w+", operator)[0] in str(error.value)


def test_a_batch_in_the_model_is_refused() -> None:
    with pytest.raises(Unsupported, match="batch of 1"):
        check_batch(graph_of("float[2,4] x", "", "Relu(x)").graph)


@pytest.mark.slow
@pytest.mark.needs_shared
@pytest.mark.parametrize(
    "name",
    [
        *("ic_resnet8", "cifar_resnet20", "kws_dscnn", "vww_mobilenetv1_025", "ad_autoencoder"),
        *("mobilenet_v2_224", "squeezenet_v1_0_sparse", "ultraface_rfb320"),
    ],
)
def test_whole_networks(shared_models: Path, name: str) -> None:
    source = importer.load(shared_models / f"{name}.onnx", None)
    for expected, found in zip(*both(passes.run(source.model, context())), strict=True):
        assert snr_db(expected, found) > LEAST_SNR_DB
