"""Sliding windows: ONNX pads as tflite's SAME, VALID or an explicit pad in front."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepipe.interchange.tflite import schema
from edgepipe.interchange.tflite.layout import Place
from edgepipe.interchange.tflite.reading import shape_of, unsupported
from edgepipe.interchange.tflite.translation import LOWEST, Step, Translation
from edgepipe.quantization.layers import conv_pads

Pair = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """Geometry over (height, width); one spatial axis is an image of one row.

    ``ends`` pads only as far as windows reach, so that ceil and floor modes need no distinction;
    ``graph_ends`` are the pads that the graph names.
    """

    sizes: Pair
    out: Pair
    kernel: Pair
    strides: Pair
    dilations: Pair
    begins: Pair
    ends: Pair
    graph_ends: Pair

    @classmethod
    def of(cls, node: ir.Node, kernel: tuple[int, ...]) -> Windows:
        """The windows of a Conv or pool with a kernel of one or two axes."""
        spatial = len(kernel)
        value = node.inputs[0]
        assert value is not None
        sizes, out = shape_of(value)[2:], shape_of(node.outputs[0])[2:]
        if spatial not in (1, 2) or len(sizes) != spatial:
            raise unsupported(node, f"it has {spatial} spatial axes")
        strides = tuple(node.attributes.get_ints("strides", (1,) * spatial))
        dilations = tuple(node.attributes.get_ints("dilations", (1,) * spatial))
        pads = conv_pads(node, kernel, sizes, strides, dilations)
        if min(pads) < 0:
            raise unsupported(node, "its pads are negative")
        ends = tuple(
            max((o - 1) * s + (k - 1) * d + 1 - n - b, 0)
            for o, s, k, d, n, b in zip(out, strides, kernel, dilations, sizes, pads, strict=False)
        )
        return cls(
            _pair(sizes, 1), _pair(out, 1), _pair(kernel, 1), _pair(strides, 1),
            _pair(dilations, 1), _pair(pads[:spatial], 0), _pair(ends, 0),
            _pair(pads[spatial:], 0),
        )  # fmt: skip

    @property
    def same(self) -> bool:
        """Whether SAME of tflite pads just so: the total halved, the odd one at the end."""
        for o, s, k, d, n, b in zip(
            self.out, self.strides, self.kernel, self.dilations, self.sizes, self.begins,
            strict=True,
        ):  # fmt: skip
            total = max((o - 1) * s + (k - 1) * d + 1 - n, 0)
            if o != -(-n // s) or b != total // 2:
                return False
        return True

    @property
    def padded(self) -> bool:
        """Whether any window reaches over an edge."""
        return any((*self.begins, *self.ends))

    def counts(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """Elements of the input (pads left out) in each window, int64 [height, width]."""
        axes = []
        for o, s, k, d, n, b in zip(
            self.out, self.strides, self.kernel, self.dilations, self.sizes, self.begins,
            strict=True,
        ):  # fmt: skip
            taps = np.arange(o)[:, None] * s + np.arange(k) * d - b
            axes.append(((taps >= 0) & (taps < n)).sum(1))
        return np.outer(*axes)


def padded(
    t: Translation, step: Step, place: Place, windows: Windows, fill: int | None = None
) -> tuple[Place, int]:
    """The input to slide over, and the padding mode of the operator that does.

    ``fill`` is the code in the pads; None fills with the zero point. Pads of SAME hold the zero
    point (or, in pools, nothing).
    """
    if not windows.padded:
        return place, schema.VALID
    if windows.same:
        return place, schema.SAME
    edges = [(0, 0), *zip(windows.begins, windows.ends, strict=True), (0, 0)]
    return pad(t, place, edges, step, fill), schema.VALID


def pad(
    t: Translation, place: Place, stored_edges: list[Pair], step: Step, fill: int | None = None
) -> Place:
    """Pad by constant codes; ``stored_edges`` are (begin, end) per stored axis."""
    stored = place.stored_shape
    wide = tuple(n + a + b for n, (a, b) in zip(stored, stored_edges, strict=True))
    amounts = t.network.constant(np.array(stored_edges, np.int32), "pads")
    inputs: list[Place | int] = [place, amounts]
    if fill is not None and (place.grid is None or fill != place.grid.zero_point):
        inputs.append(_fill(t, place, fill))
    last = place.channels_last
    like = Place(0, _graph_shape(wide, len(place.shape)) if last else wide, place.grid, last)
    name = f"{step.node.outputs[0].name}/padded"
    return t.emit("PADV2" if len(inputs) > 2 else "PAD", inputs, like, name)


def _fill(t: Translation, place: Place, fill: int) -> int:
    if place.grid is None:
        lowest = np.float32(-np.inf) if fill == LOWEST else np.float32(fill)
        return t.network.constant(np.array(lowest, np.float32), "fill")
    scale = np.array([place.grid.scale])
    return t.network.constant(np.array(fill, np.int8), "fill", scale, place.grid.zero_point)


def _graph_shape(stored: tuple[int, ...], rank: int) -> tuple[int, ...]:
    n, h, w, c = stored
    return (n, c, w) if rank == 3 else (n, c, h, w)


def _pair(values: tuple[int, ...], missing: int) -> Pair:
    return (missing, values[0]) if len(values) == 1 else (values[0], values[1])
