"""Operators that move codes: the grid stays, and codes stay codes behind the last rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgepipe.interchange.tflite import schema
from edgepipe.interchange.tflite.converters.linear import takes_any_order
from edgepipe.interchange.tflite.converters.pool import ones
from edgepipe.interchange.tflite.layout import Place, same_order
from edgepipe.interchange.tflite.reading import Result, shape_of, unsupported
from edgepipe.interchange.tflite.translation import Step, Translation, parameter
from edgepipe.interchange.tflite.windows import pad
from edgepipe.quantization.graph import is_op, name_of

TO_PLAIN = (0, 3, 1, 2)


def reshape(t: Translation, step: Step) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze → RESHAPE of the plain layout.

    Images flattened for dense layers alone stay as they lie; those permute their weights.
    """
    x = t.read(step.node.inputs[0])
    name = name_of(step.result.value)
    like = Place(0, step.shape, x.grid)
    if x.channels_last and len(x.shape) == 4:
        if same_order(x.stored_shape, TO_PLAIN):
            t.keep(step.result, t.reshape(x, like, name))
            return
        n, c, h, w = x.shape
        if step.shape == (n, c * h * w) and _only_dense_reads(step.result):
            like = replace(like, flattened=(c, h, w))
            t.keep(step.result, t.reshape(x, like, name))
            return
    x = t.read(step.node.inputs[0], channels_last=False)
    t.keep(step.result, t.reshape(x, like, name))


def transpose(t: Translation, step: Step) -> None:
    """TRANSPOSE, or nothing where the tensor already lies so."""
    node = step.node
    x = t.read(node.inputs[0])
    rank = len(x.shape)
    order = tuple(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))
    if x.channels_last and rank == 3:
        x = t.read(node.inputs[0], channels_last=False)
    stored = [x.axis(axis) for axis in order]
    like = Place(0, step.shape, x.grid)
    t.keep(step.result, t.transpose(x, stored, like, name_of(step.result.value)))


def identity(t: Translation, step: Step) -> None:
    """No operator at all."""
    t.keep(step.result, t.read(step.node.inputs[0]))


def concatenate(t: Translation, step: Step) -> None:
    """CONCATENATION; inputs on other grids are requantised first."""
    node = step.node
    last = any(t.is_last(value) for value in node.inputs)
    places = [t.read(value, last) for value in node.inputs]
    if step.result.grid is not None:
        places = [t.codes(step, value, last) for value in node.inputs]
    elif len({p.grid for p in places}) > 1:
        places = [t.floats(p) for p in places]
    grid = step.result.grid or places[0].grid
    name = name_of(step.result.value)
    aligned = [p if grid is None else t.regrid(p, grid, f"{name}/aligned") for p in places]
    like = Place(0, step.shape, grid, last)
    axis = places[0].axis(node.attributes.get_int("axis", 0))
    t.write(step, "CONCATENATION", aligned, like, axis=axis)


def slices(t: Translation, step: Step) -> None:
    """Slice → SLICE; where it steps, a depthwise convolution over images, else STRIDED_SLICE."""
    node = step.node
    x = t.read(node.inputs[0])
    rank = len(x.shape)
    starts, ends = parameter(step, 1, "starts"), parameter(step, 2, "ends")
    assert starts is not None and ends is not None
    axes = parameter(step, 3, "axes")
    steps = parameter(step, 4, "steps")
    chosen = range(starts.size) if axes is None else [int(a) % rank for a in axes]
    ranges = [range(n) for n in x.shape]
    for index, axis in enumerate(chosen):
        stride = 1 if steps is None else int(steps[index])
        cut = slice(int(starts[index]), int(ends[index]), stride)
        ranges[axis] = range(x.shape[axis])[cut]
    _take(t, node, step.result, x, ranges)


def split(t: Translation, step: Step) -> None:
    """Split → one SLICE per output."""
    node = step.node
    x = t.read(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % len(x.shape)
    start = 0
    for output, result in zip(node.outputs, step.results, strict=True):
        width = shape_of(output)[axis]
        ranges = [range(n) for n in x.shape]
        ranges[axis] = range(start, start + width)
        start += width
        _take(t, node, result, x, ranges)


def pads(t: Translation, step: Step) -> None:
    """Pad → PAD, PADV2 or MIRROR_PAD."""
    node = step.node
    mode = node.attributes.get_string("mode", "constant")
    x = t.read(node.inputs[0])
    rank = len(x.shape)
    held, axes = parameter(step, 1, "pads"), parameter(step, 3, "axes")
    assert held is not None
    chosen = list(range(rank)) if axes is None else [int(a) % rank for a in axes]
    edges = [(0, 0)] * rank
    for index, axis in enumerate(chosen):
        edges[axis] = int(held[index]), int(held[index + len(chosen)])
    if min(min(edge) for edge in edges) < 0:
        raise unsupported(node, "its pads are negative")
    stored = list(x.arrange(edges, (0, 0)))
    if mode == "reflect":
        amounts = t.network.constant(np.array(stored, np.int32), "pads")
        like = replace(x, shape=step.shape)
        t.write(step, "MIRROR_PAD", [x, amounts], like, mode=schema.REFLECT)
        return
    if mode != "constant" or x.grid is None:
        raise unsupported(node, f"its mode is {mode}")
    value = parameter(step, 2, "fill value")
    fill = 0.0 if value is None else float(value.reshape(()))
    code = int(np.clip(x.grid.code(fill), -128, 127))
    t.keep(step.result, pad(t, x, stored, step, code))


def depth_to_space(t: Translation, step: Step) -> None:
    """DepthToSpace → DEPTH_TO_SPACE, or three movements where channels come before the block
    (mode CRD with more than one of them)."""
    node = step.node
    x = t.read(node.inputs[0], channels_last=True)
    size = node.attributes.get_int("blocksize", 1)
    like = Place(0, step.shape, x.grid, True)
    n, c, h, w = step.shape
    if node.attributes.get_string("mode", "DCR") == "DCR" or c == 1:
        t.write(step, "DEPTH_TO_SPACE", [x], like, block_size=size)
        return
    name = name_of(step.result.value)
    split = Place(0, (n, h // size, w // size, c, size, size), x.grid)
    turned = Place(0, (n, h // size, size, w // size, size, c), x.grid)
    blocks = t.reshape(x, split, f"{name}/blocks")
    rows = t.transpose(blocks, (0, 1, 4, 2, 5, 3), turned, f"{name}/rows")
    t.keep(step.result, t.reshape(rows, like, name))


def space_to_depth(t: Translation, step: Step) -> None:
    """SpaceToDepth → SPACE_TO_DEPTH."""
    x = t.read(step.node.inputs[0], channels_last=True)
    size = step.node.attributes.get_int("blocksize", 1)
    t.write(step, "SPACE_TO_DEPTH", [x], Place(0, step.shape, x.grid, True), block_size=size)


def _take(t: Translation, node: ir.Node, result: Result, x: Place, ranges: list[range]) -> None:
    """The elements at one arithmetic range per axis of the graph's tensor."""
    name = name_of(result.value)
    like = replace(x, shape=tuple(len(r) for r in ranges))
    stored = x.arrange(ranges, range(1))
    begins = t.network.integers([r.start for r in stored], "begins")
    if all(r.step == 1 for r in stored):
        sizes = t.network.integers([len(r) for r in stored], "sizes")
        t.keep(result, t.emit("SLICE", [x, begins, sizes], like, name))
        return
    if any(r.step < 0 for r in stored):
        raise unsupported(node, "it steps backwards")
    if x.channels_last and x.grid is not None and stored[0].step == stored[3].step == 1:
        t.keep(result, _thinned(t, x, stored, like, name))
        return
    ends = t.network.integers([r.stop for r in stored], "ends")
    strides = t.network.integers([r.step for r in stored], "strides")
    t.keep(result, t.emit("STRIDED_SLICE", [x, begins, ends, strides], like, name))


def _thinned(t: Translation, x: Place, stored: tuple[range, ...], like: Place, name: str) -> Place:
    """Every n-th row and column as a depthwise convolution by 1.

    It moves no code, and XNNPACK takes it, where a STRIDED_SLICE would break the network apart.
    """
    spans = [(r.start, (len(r) - 1) * r.step + 1) for r in stored]
    if [span for _, span in spans] != list(x.stored_shape):
        begins = t.network.integers([start for start, _ in spans], "begins")
        sizes = t.network.integers([span for _, span in spans], "sizes")
        n, h, w, c = (span for _, span in spans)
        shape = (n, c, h, w) if len(x.shape) == 4 else (n, c, w)
        x = t.emit("SLICE", [x, begins, sizes], replace(x, shape=shape), f"{name}/span")
    return t.emit(
        "DEPTHWISE_CONV_2D",
        [x, *ones(t, x, (1, 1), 1.0)],
        like,
        name,
        padding=schema.VALID,
        stride_h=stored[1].step,
        stride_w=stored[2].step,
        depth_multiplier=1,
        dilation_h=1,
        dilation_w=1,
    )


def _only_dense_reads(result: Result) -> bool:
    """Whether dense layers alone read the codes of a result, each as its rows."""
    readers = [use.node for use in result.key.uses()]
    if not readers or not all(is_op(node, "DequantizeLinear") for node in readers):
        return False
    floats = [node.outputs[0] for node in readers]
    return not any(value.is_graph_output() for value in floats) and all(
        takes_any_order(use.node, use.idx) for value in floats for use in value.uses()
    )
