"""ONNX operator → the function that translates it."""

from __future__ import annotations

from collections.abc import Callable

from edgepipe.interchange.tflite.converters import elementwise, linear, movement, pool, resize
from edgepipe.interchange.tflite.translation import Step, Translation

CONVERTERS: dict[str, Callable[[Translation, Step], None]] = {
    "Conv": linear.convolution,
    "ConvTranspose": linear.transposed_convolution,
    "Gemm": linear.dense,
    "MatMul": linear.dense,
    "MaxPool": pool.maximum,
    "AveragePool": pool.average,
    "GlobalAveragePool": pool.mean,
    "ReduceMean": pool.mean,
    "Add": elementwise.binary,
    "Sub": elementwise.binary,
    "Mul": elementwise.binary,
    "Div": elementwise.binary,
    "Relu": elementwise.clip,
    "Clip": elementwise.clip,
    "HardSigmoid": elementwise.hard_sigmoid,
    "Softmax": elementwise.softmax,
    **dict.fromkeys(elementwise.FUNCTIONS, elementwise.function),
    "Reshape": movement.reshape,
    "Flatten": movement.reshape,
    "Squeeze": movement.reshape,
    "Unsqueeze": movement.reshape,
    "Transpose": movement.transpose,
    "Identity": movement.identity,
    "Concat": movement.concatenate,
    "Slice": movement.slices,
    "Split": movement.split,
    "Pad": movement.pads,
    "DepthToSpace": movement.depth_to_space,
    "SpaceToDepth": movement.space_to_depth,
    "Resize": resize.resize,
}
