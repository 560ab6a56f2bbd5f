"""Walks a Q/DQ graph in order and has every operator translated."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from edgepipe.errors import Unsupported
from edgepipe.interchange.tflite.converters import CONVERTERS
from edgepipe.interchange.tflite.network import Network
from edgepipe.interchange.tflite.reading import (
    Result,
    bias_behind,
    grid_of,
    result_of,
    shape_of,
    unsupported,
)
from edgepipe.interchange.tflite.translation import Step, Translation
from edgepipe.quantization.graph import is_op


def translate(graph: ir.Graph) -> Network:
    """The network of a graph. Raises Unsupported."""
    _check(graph)
    translation = Translation()
    for value in graph.inputs:
        if value.name not in graph.initializers:
            translation.add_input(value)
    done: set[ir.Node] = set()
    for node in graph:
        if node in done or is_op(node, "DequantizeLinear"):
            continue
        if is_op(node, "QuantizeLinear"):
            source = node.inputs[0]
            assert source is not None
            result = Result(source, node.outputs[0], grid_of(node))
            translation.keep(result, translation.read(source))
            continue
        step = _step(node)
        done.update(fused for result in step.results for fused in result.absorbed)
        CONVERTERS[node.op_type](translation, step)
    for value in graph.outputs:
        translation.add_output(value)
    return translation.network


def _check(graph: ir.Graph) -> None:
    """Refuse what has no form before any work is done, and types that are not float32."""
    for node in graph:
        if is_op(node, "QuantizeLinear", "DequantizeLinear"):
            continue
        if node.domain != "" or node.op_type not in CONVERTERS:
            raise unsupported(node, "there is no such operator on int8")
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype != ir.DataType.FLOAT:
            raise Unsupported(
                f"'{value.name}' is of type {value.dtype}",
                where="tflite",
                fix="inputs and outputs of the file are float32",
            )


def _step(node: ir.Node) -> Step:
    """A node with what is fused behind it."""
    if is_op(node, "MatMul"):
        found = bias_behind(node, shape_of(node.outputs[0])[-1])
        if found is not None:
            bias, add = found
            result = result_of(add.outputs[0])
            return Step(node, (replace(result, absorbed=(add, *result.absorbed)),), bias)
    return Step(node, tuple(result_of(value) for value in node.outputs))
