"""The register tile of a direct convolution, and its other knobs: the default rule per target."""

from __future__ import annotations

from edgepipe.kernels.ops import ConvOp
from edgepipe.kernels.template import Knobs
from edgepipe.kernels.unpack import half_conversion
from edgepipe.kernels.weights import WeightFormat
from edgepipe.target import Target

#: Weights up to this many bytes stay in the first-level cache while pixels stream past.
_SMALL_WEIGHTS = 24 * 1024
#: Instructions of a tile on AArch64 beside its loop and what its size multiplies.
_AROUND_TILE = 30


def tile(
    target: Target, blocks: int, pixels: int, weights: WeightFormat, by_element: bool = False,
    channels: int = 4, step: int = 4,
) -> tuple[int, int]:  # fmt: skip
    """Register tile ``(pixels, channel blocks)`` that fits the target's vector registers.

    Sizes are those measured to reach 89-97 % of a core's peak: enough accumulators to hide the
    multiply-add latency, few enough that none spills. Unpacked weights are all in registers at
    once, and more pixels share the work of unpacking them. By element the estimated instructions
    decide, of ``channels`` products per output, ``step`` of them in an iteration.
    """
    if target.kind == "wasm":  # V8: 16 registers, and beyond 8 accumulators it spills
        choices = [(4, 2), (8, 1)]
    elif target.simd.registers == 32 and target.simd.lanes_f32 == 16:
        choices = [(7, 2), (14, 2), (14, 1), (7, 1)]
        if not weights.plain:
            choices[:2] = choices[1::-1]
    elif target.simd.registers == 32:  # accumulators, one input per pixel, one weight
        choices = [(6, 4), (7, 3), (8, 2), (14, 1)] if weights.plain else [(8, 2), (14, 1)]
        if weights.plain and by_element:
            choices += [(5, 4), (10, 2), (7, 2)]
    elif target.arch == "arm":
        choices = [(4, 2), (6, 1)]
    elif weights.coded:  # unpacking takes a register or two
        choices = [(5, 2), (3, 3), (12, 1)]
    else:
        choices = [(6, 2), (4, 3), (12, 1)]
    fitting = [c for c in choices if blocks % c[1] == 0]

    def waste(choice: tuple[int, int]) -> float:
        width = min(choice[0], pixels)
        return -(-pixels // width) * width / pixels

    def instructions(choice: tuple[int, int]) -> float:
        """Products, loads in pairs, the loop, and addresses; the last tile may be narrower."""
        high, (full, rest) = choice[1], divmod(pixels, min(choice[0], pixels))

        def of_tile(width: int) -> float:
            loads = step // 4 * (-(-width // 2) + 2 * high)
            loop = step * width * high + loads + step // 4 + 3
            return channels / step * loop + _AROUND_TILE

        return (full * of_tile(min(choice[0], pixels)) + (of_tile(rest) if rest else 0)) / high

    if by_element and target.arch == "aarch64":
        best = min(fitting, key=instructions)
    else:
        best = min(fitting, key=lambda c: (round(waste(c), 2), choices.index(c)))
    return min(best[0], pixels), best[1]


def is_flat(op: ConvOp) -> bool:
    """Whether all pixels of an image are one row to a pointwise kernel."""
    plain = op.kernel == (1, 1) and op.strides == (1, 1) and not op.x.padded
    return plain and not any(r.padded for r in op.residuals)


def default(op: ConvOp, target: Target) -> Knobs:
    flat = is_flat(op)
    blocks_per_group = op.y.blocks // op.groups
    columns = op.y.h * op.y.w if flat else op.y.w
    # By-element multiply-add wants the scalar operand in a vector register.
    by_element = target.arch in ("aarch64", "arm") and op.x.lanes == 4
    own = _aarch64(op) if target.arch == "aarch64" else {}
    products = -(-op.x.c // op.groups // op.x.lanes) * op.x.lanes * op.kernel[0] * op.kernel[1]
    step = own.get("unroll", 1) * op.x.lanes
    in_registers = by_element or own.get("by_row", False)
    pixels, blocks = tile(
        target, blocks_per_group, columns, op.weights, in_registers, products, step
    )
    weights = op.y.c * op.x.c // op.groups * op.kernel[0] * op.kernel[1]
    return {
        "pixels": pixels,
        "blocks": blocks,
        "flat": flat,
        "outer": "pixels" if weights * op.weights.bits // 8 <= _SMALL_WEIGHTS else "channels",
        # LLVM's wasm back end sinks a multiply-add chain to its last link, across an unrolled
        # body, until nothing fits the registers: one loop over channels keeps the body small.
        "channel_loop": target.kind == "wasm",
        # Divisions for addresses cost a third of the products; relaxed SIMD has half as many
        # instructions in the body, and gains nothing by another loop.
        "lane_loop": target.kind == "wasm" and not target.variants,
        "by_element": by_element,
        "fused": target.simd.fma and target.arch in ("aarch64", "arm"),
        "half": half_conversion(target),
        **own,
    }


def _aarch64(op: ConvOp) -> Knobs:
    """Knobs that AArch64 alone has: what loads and stores two vectors with one instruction."""
    blocks = op.x.c // op.groups // op.x.lanes
    pairs = op.kernel == op.strides == (1, 1)
    return {
        # Blocks of input channels per iteration. Four spill with 24 accumulators, and so do two
        # iterations, which LLVM unrolls as well, and two of pixels that no load takes in pairs.
        "unroll": 2 if pairs and op.x.lanes == 4 and blocks % 2 == 0 and blocks > 4 else 1,
        # Whether scalars of NCHW inputs are elements of vectors: an image has few channels.
        "by_row": op.x.lanes == 1 and op.y.lanes == 4 and op.x.c > 1,
        # Whether a tile is stored block by block, its pixels next to one another.
        "pairs": True,
        # Whether the last tile of a row is narrower instead of overlapping its neighbour.
        "rest": True,
    }


def settings(op: ConvOp, target: Target) -> list[Knobs]:
    """Other register tiles, and which loop is outermost; sums keep their order."""
    base = default(op, target)
    columns = op.y.h * op.y.w if base["flat"] else op.y.w
    per_group = op.y.blocks // op.groups
    most = 10 if target.kind == "wasm" else target.simd.registers - 2
    tiles = [
        (pixels, blocks)
        for blocks in (1, 2, 3, 4)
        for pixels in range(1, min(columns, most) + 1)
        if per_group % blocks == 0 and min(most // 3, columns) <= pixels * blocks <= most
    ]
    return [
        {**base, "pixels": pixels, "blocks": blocks, "outer": outer}
        for pixels, blocks in tiles
        for outer in ("pixels", "channels")
    ]
