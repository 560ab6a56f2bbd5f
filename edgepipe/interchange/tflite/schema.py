"""The parts of the .tflite schema that the writer uses: codes, versions and field slots.

Source: the published flatbuffer schema of LiteRT (``schema.fbs``, file identifier TFL3). Slots
and codes of a flatbuffer schema never change meaning; a field is only ever added. ``version`` is
the first version of an operator whose kernels take int8 as it is written here, so that older
interpreters take the file too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FILE_IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3

TENSOR_TYPES = {"float32": 0, "int32": 2, "int8": 9}

SAME, VALID = 0, 1
NONE, RELU, RELU_N1_TO_1, RELU6 = 0, 1, 2, 3
REFLECT = 0


@dataclass(frozen=True)
class OperatorType:
    """A builtin operator. ``options`` is its member of the options union (0: it has none);
    ``fields`` are option name → (slot, type of the scalar)."""

    code: int
    version: int = 1
    options: int = 0
    fields: dict[str, tuple[int, str]] = field(default_factory=dict)


_CONV = {
    "padding": (0, "Int8"),
    "stride_w": (1, "Int32"),
    "stride_h": (2, "Int32"),
    "activation": (3, "Int8"),
}
_DEPTHWISE = {
    "padding": (0, "Int8"),
    "stride_w": (1, "Int32"),
    "stride_h": (2, "Int32"),
    "depth_multiplier": (3, "Int32"),
    "activation": (4, "Int8"),
    "dilation_w": (5, "Int32"),
    "dilation_h": (6, "Int32"),
}
_POOL = {
    "padding": (0, "Int8"),
    "stride_w": (1, "Int32"),
    "stride_h": (2, "Int32"),
    "filter_w": (3, "Int32"),
    "filter_h": (4, "Int32"),
    "activation": (5, "Int8"),
}
_ACTIVATION = {"activation": (0, "Int8")}

OPERATORS: dict[str, OperatorType] = {
    "ADD": OperatorType(0, 2, 11, _ACTIVATION),
    "AVERAGE_POOL_2D": OperatorType(1, 2, 5, _POOL),
    "CONCATENATION": OperatorType(2, 2, 10, {"axis": (0, "Int32"), "activation": (1, "Int8")}),
    "CONV_2D": OperatorType(
        3, 3, 1, _CONV | {"dilation_w": (4, "Int32"), "dilation_h": (5, "Int32")}
    ),
    "DEPTHWISE_CONV_2D": OperatorType(4, 3, 2, _DEPTHWISE),
    "DEPTH_TO_SPACE": OperatorType(5, 1, 94, {"block_size": (0, "Int32")}),
    "DEQUANTIZE": OperatorType(6, 2),
    "FULLY_CONNECTED": OperatorType(
        9, 5, 8, {"activation": (0, "Int8"), "keep_num_dims": (2, "Bool")}
    ),
    "LOGISTIC": OperatorType(14, 2),
    "MAX_POOL_2D": OperatorType(17, 2, 5, _POOL),
    "MUL": OperatorType(18, 2, 21, _ACTIVATION),
    "RELU": OperatorType(19, 2),
    "RELU6": OperatorType(21, 2),
    "RESHAPE": OperatorType(22),
    "RESIZE_BILINEAR": OperatorType(
        23, 3, 15, {"align_corners": (2, "Bool"), "half_pixel_centers": (3, "Bool")}
    ),
    "SOFTMAX": OperatorType(25, 2, 9, {"beta": (0, "Float32")}),
    "SPACE_TO_DEPTH": OperatorType(26, 2, 19, {"block_size": (0, "Int32")}),
    "TANH": OperatorType(28, 2),
    "PAD": OperatorType(34, 2),
    "TRANSPOSE": OperatorType(39, 2),
    "MEAN": OperatorType(40, 2, 27, {"keep_dims": (0, "Bool")}),
    "SUB": OperatorType(41, 2, 28, _ACTIVATION),
    "DIV": OperatorType(42, 1, 29, _ACTIVATION),
    "STRIDED_SLICE": OperatorType(45, 2, 32),
    "EXP": OperatorType(47, 2),
    "MAXIMUM": OperatorType(55, 2),
    "MINIMUM": OperatorType(57, 2),
    "PADV2": OperatorType(60, 2),
    "SLICE": OperatorType(65, 2),
    "TRANSPOSE_CONV": OperatorType(67, 3, 49, _CONV),
    "RESIZE_NEAREST_NEIGHBOR": OperatorType(
        97, 3, 74, {"align_corners": (0, "Bool"), "half_pixel_centers": (1, "Bool")}
    ),
    "LEAKY_RELU": OperatorType(98, 2, 75, {"alpha": (0, "Float32")}),
    "MIRROR_PAD": OperatorType(100, 2, 77, {"mode": (0, "Int8")}),
    "ELU": OperatorType(111),
    "QUANTIZE": OperatorType(114, 2),
    "HARD_SWISH": OperatorType(117),
    "BATCH_MATMUL": OperatorType(126, 2, 101, {"adj_x": (0, "Bool"), "adj_y": (1, "Bool")}),
    "GELU": OperatorType(150, 2, 116, {"approximate": (0, "Bool")}),
}
