"""Converters at sizes that fill vectors and leave tails, against ONNX Runtime.

The conformance cases are tiny; these meet the schedule as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgepipe.errors import Unsupported, UserError
from tests.lowering.running import run_model

Array = np.ndarray[Any, Any]

#: Relative and absolute tolerance: float32 sums of up to some thousand terms in another order.
RTOL, ATOL = 1e-4, 1e-5


@dataclass
class Node:
    """One operator under test: run-time inputs, constant inputs (None: absent), attributes."""

    op: str
    inputs: list[Array]
    constants: list[Array | None] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 22


def _model(node: Node) -> onnx.ModelProto:
    names = [f"x{i}" for i in range(len(node.inputs))]
    constant_names = ["" if c is None else f"c{i}" for i, c in enumerate(node.constants)]
    made = helper.make_node(
        node.op,
        [*names, *constant_names],
        [f"y{i}" for i in range(node.outputs)],
        name="node",
        **node.attributes,
    )
    graph = helper.make_graph(
        [made],
        "g",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip(names, node.inputs, strict=True)
        ],
        [
            helper.make_tensor_value_info(f"y{i}", TensorProto.UNDEFINED, None)
            for i in range(node.outputs)
        ],
        [
            numpy_helper.from_array(c, n)
            for n, c in zip(constant_names, node.constants, strict=True)
            if c is not None
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", node.opset)])
    model.ir_version = 10
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    return inferred


def _inputs(node: Node) -> dict[str, Array]:
    return {f"x{i}": a for i, a in enumerate(node.inputs)}


def _reference(node: Node) -> list[Array]:
    session = onnxruntime.InferenceSession(
        _model(node).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, _inputs(node)))


def _definition(node: Node) -> list[Array]:
    """By the ONNX reference evaluator, where ONNX Runtime takes liberties."""
    return list(ReferenceEvaluator(_model(node)).run(None, _inputs(node)))


def _check(
    node: Node,
    rtol: float = RTOL,
    atol: float = ATOL,
    oracle: Callable[[Node], list[Array]] = _reference,
) -> None:
    got, expected = run_model(_model(node), _inputs(node)), oracle(node)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if np.issubdtype(a.dtype, np.floating):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(a, b)


def _f(*shape: int, seed: int = 0, low: float = -2.0, high: float = 2.0) -> Array:
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def _i(dtype: str, *shape: int, low: int = 0, high: int = 100, seed: int = 1) -> Array:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def _ints(*values: int) -> Array:
    return np.array(values, np.int64)


UNARY = str.split(
    "Abs Acos Acosh Asin Asinh Atan Atanh Ceil Cos Cosh Elu Erf Exp Floor HardSigmoid HardSwish "
    "LeakyRelu Log Neg Reciprocal Relu Round Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt "
    "Tan Tanh ThresholdedRelu Gelu Mish"
)
_DOMAIN = {
    "Acos": (-1.0, 1.0),
    "Acosh": (1.0, 9.0),
    "Asin": (-1.0, 1.0),
    "Atanh": (-0.9, 0.9),
    "Log": (0.01, 9.0),
    "Reciprocal": (0.5, 9.0),
    "Sqrt": (0.0, 9.0),
    "Tan": (-1.2, 1.2),
}


@pytest.mark.parametrize("op", UNARY)
def test_unary_over_its_range(op: str) -> None:
    low, high = _DOMAIN.get(op, (-9.0, 9.0))
    _check(Node(op, [_f(3, 7, 37, low=low, high=high)]), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"])
@pytest.mark.parametrize(
    "shapes", [((4, 5, 37), (5, 1)), ((37,), (4, 5, 37)), ((2, 1, 16), (2, 3, 1)), ((), (33,))]
)
def test_binary_broadcasts(op: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    a, b = (_f(*s, seed=i, low=0.5, high=3.0) for i, s in enumerate(shapes))
    _check(Node(op, [a, b]), rtol=1e-5)


@pytest.mark.parametrize("op", ["Relu", "Clip", "Max", "Min", "IsNaN", "IsInf", "Sign", "Exp"])
def test_special_values(op: str) -> None:
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3e38, -3e38], np.float32)
    x = np.tile(special, 5)
    others = {"Max": [_f(40)], "Min": [_f(40)], "Clip": []}.get(op, [])
    constants: list[Array | None] = (
        [np.array(-1, np.float32), np.array(1, np.float32)] if op == "Clip" else []
    )
    _check(Node(op, [x, *others], constants))
    if others:
        _check(Node(op, [*others, x]))


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Mod"])
def test_integers_never_trap(op: str, dtype: str) -> None:
    a = np.concatenate([_i(dtype, 60, low=-99), [np.iinfo(dtype).max]]).astype(dtype)
    b = np.concatenate([_i(dtype, 60, low=1, high=9), [-1]]).astype(dtype)
    _check(Node(op, [a, b]))


@pytest.mark.parametrize("op", ["Div", "Mod"])
def test_division_by_zero_does_not_take_the_process_down(op: str) -> None:
    low = np.iinfo(np.int32).min
    node = Node(op, [np.array([7, low, 0], np.int32), np.array([0, -1, 0], np.int32)])
    assert run_model(_model(node), _inputs(node))[0].shape == (3,)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8", "int32", "int64", "bool"])
@pytest.mark.parametrize("to", ["float32", "float16", "int8", "uint8", "int32", "int64", "bool"])
def test_cast_between_all_types(dtype: str, to: str) -> None:
    x = _i(dtype, 5, 13, high=2 if dtype == "bool" else 100)
    _check(Node("Cast", [x], attributes={"to": helper.np_dtype_to_tensor_dtype(np.dtype(to))}))


REDUCTIONS = str.split(
    "ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare "
    "ReduceLogSum ReduceLogSumExp"
)


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("axes", [(2,), (0,), (1, 2), (0, 1, 2), (0, 2)])
@pytest.mark.parametrize("last", [64, 37])
def test_reductions(op: str, axes: tuple[int, ...], last: int) -> None:
    x = _f(4, 6, last, low=0.9, high=1.1)
    _check(Node(op, [x], [_ints(*axes)], {"keepdims": 0}), rtol=1e-4)


def test_reduce_max_of_infinities() -> None:
    x = np.full((3, 48), -np.inf, np.float32)
    _check(Node("ReduceMax", [x], [_ints(1)]))


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("last", [0, 1])
def test_arg_extremes_with_ties(op: str, axis: int, last: int) -> None:
    x = _i("float32", 5, 9, 33, high=4)
    _check(Node(op, [x], attributes={"axis": axis, "select_last_index": last}))


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize(("axis", "k"), [(-1, 5), (0, 7), (1, 1), (-1, 33)])
def test_top_k_with_ties(axis: int, k: int, largest: int) -> None:
    x = _i("float32", 7, 4, 33, high=20)
    _check(Node("TopK", [x], [_ints(k)], {"axis": axis, "largest": largest}, outputs=2))


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(("shape", "axis"), [((3, 197), -1), ((2, 21, 40), 1), ((5, 6), 1)])
def test_softmax(op: str, shape: tuple[int, ...], axis: int) -> None:
    _check(Node(op, [_f(*shape, low=-20, high=20)], attributes={"axis": axis}))


@pytest.mark.parametrize("width", [192, 37, 5])
def test_normalisations(width: int) -> None:
    x, scale, bias = _f(2, 9, width), _f(width, seed=1), _f(width, seed=2)
    _check(Node("LayerNormalization", [x], [scale, bias], outputs=2, opset=17))
    _check(Node("RMSNormalization", [x], [scale], opset=23))
    _check(Node("LpNormalization", [x], attributes={"axis": 1}))
    channels = [_f(9, seed=3), _f(9, seed=4)]
    _check(Node("InstanceNormalization", [x], list(channels)))
    # ONNX has no shape inference for GroupNormalization, so ONNX Runtime rejects this model.
    grouped = Node("GroupNormalization", [x], list(channels), {"num_groups": 3})
    _check(grouped, oracle=_definition)


CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((1, 3, 40), (5, 3, 3), {"pads": [1, 1]}),
    ((2, 4, 13, 17), (6, 4, 3, 3), {"strides": [2, 2], "pads": [1, 0, 1, 2]}),
    ((1, 6, 12, 12), (9, 2, 3, 3), {"group": 3, "dilations": [2, 1]}),
    ((1, 4, 11, 11), (4, 1, 5, 5), {"group": 4, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((1, 2, 6, 7, 8), (3, 2, 3, 3, 3), {"pads": [1] * 6}),
]


@pytest.mark.parametrize(("x", "w", "attributes"), CONVOLUTIONS)
def test_convolutions(x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any]) -> None:
    _check(Node("Conv", [_f(*x)], [_f(*w, seed=1), _f(w[0], seed=2)], attributes))


TRANSPOSED: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((1, 3, 9), (3, 4, 3), {"strides": [2]}),
    ((1, 4, 7, 6), (4, 3, 2, 2), {"strides": [2, 2]}),
    ((2, 4, 5, 5), (4, 2, 3, 4), {"strides": [3, 2], "pads": [1, 1, 0, 1], "group": 2}),
    ((1, 2, 6, 6), (2, 3, 3, 3), {"strides": [2, 2], "output_padding": [1, 0], "pads": [1] * 4}),
    ((1, 2, 5, 5), (2, 2, 3, 3), {"dilations": [2, 3], "strides": [2, 1]}),
    ((1, 2, 4, 4), (2, 2, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ((1, 2, 3, 3, 3), (2, 2, 2, 2, 2), {"strides": [2, 2, 2]}),
]


@pytest.mark.parametrize(("x", "w", "attributes"), TRANSPOSED)
def test_transposed_convolutions(
    x: tuple[int, ...], w: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    outputs = w[1] * attributes.get("group", 1)
    _check(Node("ConvTranspose", [_f(*x)], [_f(*w, seed=1), _f(outputs, seed=2)], attributes))


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [3, 2], "auto_pad": "SAME_LOWER"},
        {"kernel_shape": [2, 2], "dilations": [2, 2]},
    ],
)
def test_pools(op: str, attributes: dict[str, Any]) -> None:
    _check(Node(op, [_f(1, 5, 15, 18)], attributes=attributes))


@pytest.mark.parametrize("include", [0, 1])
def test_average_pool_counts(include: int) -> None:
    attributes = {
        "kernel_shape": [3, 3],
        "strides": [2, 2],
        "pads": [1, 1, 1, 1],
        "ceil_mode": 1,
        "count_include_pad": include,
    }
    _check(Node("AveragePool", [_f(1, 3, 14, 16)], attributes=attributes))


def test_max_pool_indices() -> None:
    attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    _check(Node("MaxPool", [_f(2, 3, 11, 12)], attributes=attributes, outputs=2))


RESIZES = [
    {"mode": mode, "coordinate_transformation_mode": coordinates}
    for mode in ("nearest", "linear", "cubic")
    for coordinates in ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel")
]


@pytest.mark.parametrize("attributes", RESIZES)
@pytest.mark.parametrize("scale", [(2.0, 2.0), (0.6, 1.7)])
def test_resize(attributes: dict[str, Any], scale: tuple[float, float]) -> None:
    scales = np.array([1, 1, *scale], np.float32)
    # ONNX Runtime rounds the size before align_corners uses it; the definition does not.
    node = Node("Resize", [_f(1, 3, 10, 18)], [None, scales], attributes)
    _check(node, oracle=_definition)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resize_to_one_by_a_scale_that_says_more(mode: str) -> None:
    """1.5 is one element, whose position is 0 by the operator's text and in ONNX Runtime."""
    attributes = {"mode": mode, "coordinate_transformation_mode": "pytorch_half_pixel"}
    scales = np.array([1, 1, 2, 0.5], np.float32)
    _check(Node("Resize", [_f(1, 2, 3, 3)], [None, scales], attributes))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_resize_antialiased(mode: str) -> None:
    sizes = _ints(1, 2, 7, 9)
    attributes = {"mode": mode, "antialias": 1}
    _check(Node("Resize", [_f(1, 2, 20, 31)], [None, None, sizes], attributes), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [0, 1])
def test_grid_sample(mode: str, padding: str, align: int) -> None:
    grid = _f(2, 6, 9, 2, seed=5, low=-1.4, high=1.4)
    attributes = {"mode": mode, "padding_mode": padding, "align_corners": align}
    _check(Node("GridSample", [_f(2, 3, 7, 8), grid], attributes=attributes), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("pads", [(0, 1, 2, 0, 2, 3), (0, -1, 3, 0, 1, -2)])
def test_pad(mode: str, pads: tuple[int, ...]) -> None:
    _check(Node("Pad", [_f(2, 6, 17)], [_ints(*pads)], {"mode": mode}))


@pytest.mark.parametrize("perm", [(0, 2, 1), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_transpose(perm: tuple[int, ...]) -> None:
    _check(Node("Transpose", [_f(5, 16, 33)], attributes={"perm": perm}))


def test_slices_with_negative_steps() -> None:
    arguments: list[Array | None] = [
        _ints(-1, 20),
        _ints(-1000, 1),
        _ints(0, 2),
        _ints(-1, -3),
    ]
    _check(Node("Slice", [_f(5, 4, 33)], arguments))


def test_concat_and_split() -> None:
    parts = [_f(2, n, 9, seed=n) for n in (3, 1, 4)]
    _check(Node("Concat", parts, attributes={"axis": 1}))
    _check(Node("Split", [_f(2, 9, 8)], [_ints(2, 3, 4)], {"axis": 1}, outputs=3))


@pytest.mark.slow
def test_gathers_and_scatters() -> None:
    x = _f(6, 5, 17)
    _check(Node("Gather", [x, _i("int64", 3, 2, low=-6, high=6)]))
    _check(Node("GatherElements", [x, _i("int64", 4, 5, 17, low=-6, high=6)]))
    _check(Node("GatherND", [x, _i("int64", 7, 2, low=0, high=5)]))
    for reduction in ("add", "mul", "max", "min"):
        indices, updates = _i("int64", 3, 5, 17, high=6), _f(3, 5, 17, seed=8)
        attributes = {"reduction": reduction}
        _check(Node("ScatterElements", [x, indices, updates], attributes=attributes))
        indices, updates = _i("int64", 9, 2, high=5), _f(9, 17, seed=8)
        _check(Node("ScatterND", [x, indices, updates], attributes=attributes))


def test_indices_beyond_the_tensor_stay_inside_it() -> None:
    node = Node("Gather", [_f(4, 8), np.array([99, -99], np.int64)])
    got = run_model(_model(node), _inputs(node))[0]
    np.testing.assert_array_equal(got, node.inputs[0][[3, 0]])


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", [(2, 5, 33), (2, 33, 17)]),
        ("bhid,bhjd->bhij", [(1, 2, 9, 16), (1, 2, 7, 16)]),
        ("ij->ji", [(6, 20)]),
        ("...ij,...jk->...ik", [(2, 3, 4, 5), (1, 3, 5, 6)]),
        ("ii->i", [(7, 7)]),
        ("ij,ij->", [(5, 9), (5, 9)]),
    ],
)
def test_einsum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    inputs = [_f(*s, seed=i) for i, s in enumerate(shapes)]
    _check(Node("Einsum", inputs, attributes={"equation": equation}))


@pytest.mark.parametrize(
    ("a", "b"),
    [((7, 33), (33, 20)), ((3, 1, 5, 16), (4, 16, 9)), ((16,), (16, 9)), ((9, 16), (16,))],
)
def test_matmul_broadcasts(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    _check(Node("MatMul", [_f(*a), _f(*b, seed=1)]))


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (3, 3), (1, 1), (3,), (1,)])
def test_gemm_with_a_bias_of_any_direction(shape: tuple[int, ...]) -> None:
    constants: list[Array | None] = [_f(3, 7, seed=1), _f(*shape, seed=2)]
    _check(Node("Gemm", [_f(3, 7)], constants, {"transB": 1}))


@pytest.mark.parametrize(("op", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("hidden", [16, 11])
@pytest.mark.parametrize("lengths", [False, True])
def test_recurrent(op: str, gates: int, direction: str, hidden: int, lengths: bool) -> None:
    steps, batch, features, d = 6, 3, 10, 2 if direction == "bidirectional" else 1
    constants: list[Array | None] = [
        _f(d, gates * hidden, features, seed=1, low=-0.5, high=0.5),
        _f(d, gates * hidden, hidden, seed=2, low=-0.5, high=0.5),
        _f(d, 2 * gates * hidden, seed=3),
        np.array([6, 2, 4], np.int32) if lengths else None,
        _f(d, batch, hidden, seed=4),
    ]
    outputs = 2
    if op == "LSTM":
        constants += [_f(d, batch, hidden, seed=5), _f(d, 3 * hidden, seed=6)]
        outputs = 3
    attributes = {"hidden_size": hidden, "direction": direction}
    _check(Node(op, [_f(steps, batch, features)], constants, attributes, outputs))


@pytest.mark.parametrize("number", range(1, 8))
def test_recurrent_weights_of_another_shape(number: int) -> None:
    """Inference takes any; a kernel would read behind the ends of smaller ones."""
    shapes = [(2, 44, 10), (2, 44, 11), (2, 88), (3,), (2, 3, 11), (2, 3, 11), (2, 33)]
    constants = [_f(*shape, low=1, high=1) for shape in shapes]
    constants[3] = constants[3].astype(np.int32)
    wrong = constants[number - 1][..., :1]
    constants[number - 1] = wrong
    attributes = {"hidden_size": 11, "direction": "bidirectional"}
    with pytest.raises(UserError, match=r"LSTM has (shape|weights)"):
        _check(Node("LSTM", [_f(6, 3, 10)], constants, attributes, 3))


@pytest.mark.parametrize(("number", "size"), [(1, 2), (2, 7), (4, 2), (5, 4), (7, 7), (8, 1)])
def test_scales_and_zero_points_of_other_sizes(number: int, size: int) -> None:
    image, weight = np.ones((1, 1, 7, 7), np.uint8), np.ones((3, 1, 1, 1), np.uint8)
    scale, zero = np.ones(1, np.float32), np.zeros(1, np.uint8)
    given = [image, scale, zero, weight, scale, zero, scale, zero, np.zeros(3, np.int32)]
    _check(Node("QLinearConv", given[:1], given[1:]))
    given[number] = np.resize(given[number], size)
    with pytest.raises(UserError, match=f"input {number} of QLinearConv has {size} elements"):
        _check(Node("QLinearConv", given[:1], given[1:]))


def test_gru_with_linear_before_reset() -> None:
    constants: list[Array | None] = [
        _f(1, 48, 10, seed=1),
        _f(1, 48, 16, seed=2),
        _f(1, 96, seed=3),
    ]
    attributes = {"hidden_size": 16, "linear_before_reset": 1}
    _check(Node("GRU", [_f(5, 2, 10)], constants, attributes, 2))


def test_recurrent_activations_and_clip() -> None:
    constants: list[Array | None] = [_f(1, 16, 10, seed=1), _f(1, 16, 16, seed=2)]
    for name in ("Relu", "LeakyRelu", "HardSigmoid", "Softsign", "Softplus", "Elu"):
        attributes = {"hidden_size": 16, "activations": [name], "clip": 1.5}
        _check(Node("RNN", [_f(5, 2, 10)], constants, attributes, 2))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_quantise_and_back(dtype: str) -> None:
    scale, zero = np.array([0.1, 0.02, 0.3], np.float32), np.array([3, 0, 7], dtype)
    x = _f(2, 3, 37, low=-20, high=20)
    _check(Node("QuantizeLinear", [x], [scale, zero], {"axis": 1}))
    q = _i(dtype, 2, 3, 37, low=np.iinfo(dtype).min, high=np.iinfo(dtype).max)
    _check(Node("DequantizeLinear", [q], [scale, zero], {"axis": 1}))


def test_integer_products_are_exact() -> None:
    a, b = _i("uint8", 5, 33, high=255), _i("int8", 33, 20, low=-128, high=127)
    # ONNX Runtime saturates u8 x s8 products on x86 without VNNI.
    products = Node("MatMulInteger", [a, b], [np.array(7, np.uint8), np.array(-3, np.int8)])
    _check(products, oracle=_definition)
    x, w = _i("uint8", 1, 3, 11, 12, high=255), _i("uint8", 4, 3, 3, 3, high=255)
    zeros: list[Array | None] = [np.array(5, np.uint8), np.array(9, np.uint8)]
    _check(Node("ConvInteger", [x, w], zeros, {"pads": [1, 1, 1, 1]}))


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align(mode: str, ratio: int) -> None:
    rois = np.array([[0, 0, 7, 7], [1.5, 2, 9, 6.5], [3, 3, 4, 4]], np.float32)
    attributes = {
        "mode": mode,
        "sampling_ratio": ratio,
        "output_height": 3,
        "output_width": 4,
        "spatial_scale": 0.8,
    }
    _check(
        Node("RoiAlign", [_f(2, 3, 10, 11), rois, _ints(0, 1, 1)], attributes=attributes, opset=16)
    )


@pytest.mark.parametrize("op", ["NonZero", "Unique", "Compress", "NonMaxSuppression"])
def test_data_dependent_shapes_are_refused_by_name(op: str) -> None:
    inputs = {
        "Compress": [_f(4), np.array([True, False, True, True])],
        "NonMaxSuppression": [_f(1, 6, 4), _f(1, 1, 6)],
    }.get(op, [_f(4)])
    with pytest.raises(Unsupported, match=f"Op {op} .*depends on the data"):
        node = Node(op, inputs)
        run_model(_model(node), _inputs(node))


@pytest.mark.parametrize(
    ("weight", "offset", "mask", "said"),
    [
        ((1, 2, 2, 1), (1, 16, 2, 2), None, r"input 1 .* \[1, 2, 2, 1\], not \[1, 2, 2, 2\]"),
        ((1, 1, 2, 2), (1, 16, 2, 2), None, r"input 1 .*, not \[1, 2, 2, 2\]"),
        ((1, 2, 2, 2), (1, 8, 2, 2), None, r"input 2 .*, not \[1, 16, 2, 2\]"),
        ((1, 2, 2, 2), (1, 16, 2, 2), (1, 4, 2, 2), r"input 4 .*, not \[1, 8, 2, 2\]"),
        ((1, 2, 2, 2), (1, 16, 2, 2), (1, 8, 2, 2), None),
    ],
)
def test_sampled_taps_without_values_are_refused(
    weight: tuple[int, ...], offset: tuple[int, ...], mask: tuple[int, ...] | None, said: str | None
) -> None:
    """They would be read from what lies behind the tensors."""
    inputs = [_f(1, 2, 3, 3), _f(*weight), _f(*offset)]
    if mask is not None:
        inputs += [_f(1), _f(*mask)]
    attributes = {"kernel_shape": [2, 2], "offset_group": 2}
    node = Node("DeformConv", inputs, attributes=attributes, opset=19)
    if said is None:
        run_model(_model(node), _inputs(node))
        return
    with pytest.raises(UserError, match=said):
        run_model(_model(node), _inputs(node))


def test_a_shape_computed_at_run_time_is_refused_by_name() -> None:
    node = Node("Tile", [_f(3), _ints(2)])
    with pytest.raises(Exception, match=r"Tile|'y0'|y0") as caught:
        run_model(_model(node), _inputs(node))
    assert isinstance(caught.value, Unsupported), caught.value


def test_logarithms_of_integers_are_refused_by_their_type() -> None:
    node = Node("ReduceLogSumExp", [_i("int32", 3, 4)], [np.array([1], np.int64)], opset=18)
    with pytest.raises(Unsupported, match="int32, whose logarithms"):
        run_model(_model(node), _inputs(node))


def test_the_check_notices_a_swapped_input() -> None:
    node = Node("Sub", [_f(33), _f(33, seed=1)])
    got = run_model(_model(node), _inputs(node))[0]
    swapped = _reference(Node("Sub", [node.inputs[1], node.inputs[0]]))[0]
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got, swapped, rtol=RTOL, atol=ATOL)
