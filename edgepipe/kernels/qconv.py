"""Convolution of codes, pointwise and dense layers included.

Activations are NHWC, so the bytes of neighbouring taps of a row follow one another: a *run*. A
register tile of ``pixels`` x ``groups * lanes`` channels accumulates over runs; weights are packed
``[tile][run][step][group][lane][step bytes]`` and streamed; where a run does not fill its last
step, that step reads on, against weights of zero, or has half the bytes. Where several short rows
of taps fit a step, they share it. The last tile of pixels, and of channels where they do not fill
it, is moved back to overlap its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels import dot, qwinograd_stored
from edgepipe.kernels.builder import kernel
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qconv_geometry import Geometry, merges
from edgepipe.kernels.qconv_packed import PackedEmission
from edgepipe.kernels.qconv_tile import Emission
from edgepipe.kernels.qproduct import arguments, vectors
from edgepipe.kernels.strips import strip
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QConvOp) or op.depthwise:
        return ""
    lanes = dot.choose(target, op.limit, op.y.c // op.groups).lanes
    if op.y.lanes * op.y.blocks < lanes:
        return f"{op.y.c} output channels do not fill a vector of {lanes}"
    if any(r.layout.lanes < lanes for r in op.residuals):
        return f"the channels of what is added do not fill a vector of {lanes}"
    if op.x.blocks > 1:
        return "its input is not in NHWC"
    if op.x.lanes % 4 and not merges(op):
        return "the channels of a tap are not a multiple of four"
    if op.groups > 1 and ((op.x.c // op.groups) % 4 or (op.y.c // op.groups) % lanes):
        return f"channels per group do not fill vectors of {lanes}"
    return None


#: Register tiles ``(pixels, groups of channels)`` by way of summing, the best first.
_TILES = {
    "mlal": [(4, 1)],
    "pairs": [(4, 1)],
    "sdot": [(6, 4), (8, 2), (7, 3), (14, 1)],
    # Four groups store whole cache lines: with two, short sums took half as long again.
    "vnni": [(6, 4), (7, 3), (14, 2), (14, 1)],
    # Sums wait for one addition alone, so nine of them are enough. Twelve spill, and where what is
    # spilled crosses a cache line the loop took three times as long.
    "maddubs": [(3, 3), (2, 4), (5, 2), (8, 1)],
    "relaxed": [(4, 2), (8, 1)],
}
#: The same for 16 registers.
_SMALL_TILES = {"mlal": [(2, 1)], "vnni": [(4, 3), (6, 2), (3, 4), (12, 1)]}


def tile(target: Target, name: str, pixels: int, groups: int) -> tuple[int, int]:
    """The tile that wastes least on this many pixels in a row and groups of channels."""
    choices = _TILES[name]
    if target.simd.registers < 32:
        choices = _SMALL_TILES.get(name, choices)

    def waste(choice: tuple[int, int]) -> float:
        p, g = min(choice[0], pixels), min(choice[1], groups)
        return -(-pixels // p) * p / pixels * (-(-groups // g) * g / groups)

    best = min(choices, key=lambda c: (round(waste(c), 1), choices.index(c)))
    return min(best[0], pixels), min(best[1], groups)


def default(op: QConvOp, target: Target) -> Knobs:
    chosen = dot.choose(target, op.limit, op.y.c // op.groups)
    flat = (
        op.kernel == (1, 1)
        and op.strides == (1, 1)
        and not op.x.padded
        and not any(r.layout.padded for r in op.residuals)
    )
    channels = op.y.lanes * op.y.blocks // op.groups
    channels_in = op.x.lanes // op.groups
    width = op.y.h * op.y.w if flat else op.y.w
    relaxed = target.integer.dot == "relaxed" and op.groups == 1
    relaxed = relaxed and op.limit <= target.integer.weight_limit
    pixels, groups = tile(target, chosen.name, width, channels // chosen.lanes)
    if chosen.name == "mlal" and Geometry.word_of(op):  # its operands take registers too
        pixels = min(pixels, 2)
    variant, strip = {}, packed(op, pixels, flat)
    if relaxed:
        wide, stored = tile(target, "relaxed", width, channels // chosen.lanes)
        variant = {
            "relaxed": wide,
            "stored": stored,
            "winograd": qwinograd_stored.reads(op, stored),
        }
        strip = 0 if variant["winograd"] else strip
    if op.groups > 1:  # tiles of one group must not reach into the next
        groups = next(g for g in range(groups, 0, -1) if (channels // chosen.lanes) % g == 0)
    return {
        "dot": chosen.name,
        "lanes": chosen.lanes,
        "signed": chosen.signed,
        "pixels": pixels,
        "groups": groups,
        "flat": flat,
        "arch": target.arch,
        "unroll": (8 if channels_in >= 256 else 4)
        if chosen.name == "sdot"
        else 1
        if op.bits == 8
        else 2,
        # Products of int16 that may be added before they are widened; of 4 bits see ``short_sums``.
        "deep": 2 if op.limit <= 63 else 1,
        "offset": dot.UNSIGNED_OFFSET[op.bits] if relaxed else 0,
        **({"strip": strip} if chosen == dot.named("pairs", 4, True) else {}),
        # Register tiles of the relaxed variant, for whose groups weights are stored, and whether
        # the plain form is Winograd's.
        **variant,
        # Whether codes are stored at constant distances, apart from being computed, and whether
        # the last tile of a row is narrower instead of overlapping its neighbour.
        **({"apart": True, "rest": True} if target.arch == "aarch64" else {}),
    }


#: Output channels from which packing pays: what is packed is read once by every tile of them.
_PACKED_CHANNELS = 16
#: Weights up to this many bytes stay in the first-level cache while pixels stream past.
_SMALL_WEIGHTS = 24 * 1024


def packed(op: QConvOp, pixels: int, flat: bool) -> int:
    """Rows, or pixels of a flat image, whose inputs are packed together; 0: they are not."""
    if op.y.c // op.groups < _PACKED_CHANNELS or op.groups > 1 or pixels % 2:
        return 0
    taps = 2 * op.kernel[0] * op.kernel[1] * op.x.lanes  # bytes of a pixel
    if flat and taps // 2 * op.y.c <= _SMALL_WEIGHTS:
        return pixels  # their codes are then stored together, four channels having only a word
    if flat:
        return strip(op.y.h * op.y.w, taps, pixels)
    return strip(op.y.h, taps * op.y.w, pixels=op.y.w)


def settings(op: QConvOp, target: Target) -> list[Knobs]:
    """Other register tiles, and how many steps of a run are unrolled."""
    base = default(op, target)
    columns = op.y.h * op.y.w if base["flat"] else op.y.w
    groups = op.y.lanes * op.y.blocks // op.groups // base["lanes"]
    parts = dot.choose(target, op.limit, op.y.c // op.groups).parts
    most = (8 if target.kind == "wasm" else target.simd.registers - 3) // parts
    tiles = [
        (pixels, width)
        for width in (1, 2, 3, 4)
        for pixels in range(1, min(columns, most) + 1)
        if width <= groups and (op.groups == 1 or groups % width == 0)
        if pixels * width <= most and (pixels * width >= most // 4 or columns * groups < most)
        if base.get("stored", width) % width == 0
    ]
    fixed = base["dot"] == "mlal" or target.kind == "wasm"
    unrolls = (1, 2, 4) if op.bits == 8 and not fixed else (base["unroll"],)
    strips = {pixels: packed(op, pixels, base["flat"]) for pixels, _ in tiles}
    return [
        {
            **base, "pixels": pixels, "groups": width, "unroll": unroll,
            **({"strip": strips[pixels]} if "strip" in base else {}),
        }
        for pixels, width in tiles
        for unroll in unrolls
    ]  # fmt: skip


def pack(op: QConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci/g, kh, kw]`` int8, ``b[co]`` int32, ``m[co]`` float32 → as ``emit`` reads them."""
    weight = arrays[0]
    g = Geometry(op, knobs)
    co, ci, kh, kw = weight.shape
    grown = np.zeros((g.channels, g.ci, kh, kw), np.int8)
    grown[:co, :ci] = weight
    packed = g.lay(grown) + np.int8(knobs["offset"])
    if op.bits == 4:
        # Without sign where shifts with sign are dear.
        unsigned = knobs["arch"] not in ("aarch64", "arm") and not knobs["offset"]
        nibbles = (packed + np.int8(8 if unsigned else 0)).view(np.uint8) & 15
        steps, even = nibbles.reshape(g.tiles, g.runs, g.steps, -1), g.steps - g.whole_last
        pairs = steps[:, :, :even:2] | steps[:, :, 1:even:2] << 4
        last = packed.reshape(steps.shape)[:, :, even:].view(np.uint8)
        packed = np.concatenate([pairs, last], 2).view(np.int8)
    return [packed, *vectors(op, arrays, g.channels)]


def emit(op: QConvOp, knobs: Knobs) -> Any:
    g = Geometry(op, knobs)
    weights = g.tiles * g.tile_bytes, "int8"
    buffers = arguments(op, weights, g.channels, scratch(op, knobs))
    if knobs.get("winograd") and g.dot.name == "pairs":
        return qwinograd_stored.emit_stored(op, knobs, buffers)
    kind = "q_pointwise" if op.kernel == (1, 1) else "q_conv"
    emission = PackedEmission if g.strip else Emission
    return kernel(kind, buffers, lambda *held: emission(op, knobs, g, held).run())


def scratch(op: QConvOp, knobs: Knobs) -> tuple[int, ...]:
    """Sums of the inputs of every output pixel, which weights with an offset ask for, and packed
    inputs of a strip."""
    sums = (op.y.h * op.y.w,) if knobs["offset"] else ()
    if knobs.get("winograd"):
        return (*sums, *qwinograd_stored.workspaces(op, knobs))
    if not knobs.get("strip"):
        return sums
    plain = Geometry(op, {**knobs, "dot": "pairs"})  # a variant has what the plain form needs
    return (*sums, plain.packed_bytes // 4)


def variant(op: QConvOp, knobs: Knobs, name: str) -> Knobs | None:
    """Relaxed dot products where weights are stored for them."""
    if name != "relaxed" or not knobs["offset"]:
        return None
    width = op.y.h * op.y.w if knobs["flat"] else op.y.w
    # Records from before tiles of its own: one accumulator where the plain form has two.
    return {"relaxed": min(2 * knobs["pixels"], width), **knobs, "dot": "relaxed"}


TEMPLATE = KernelTemplate(
    name="q_conv",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=settings,
    scratch=scratch,
    variant=variant,
    rank=1,
    version=2,
    arithmetic="int8",
    accumulator="int32",
)
