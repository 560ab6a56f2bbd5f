"""Products of two tensors of codes (attention): the right operand is packed at run time.

Both have zero points: Σ (a − za)(b − zb) = Σ a·b − zb·Σa − za·Σb + k·za·zb. The right matrix of a
product is written into a buffer of the kernel as weights of a convolution are stored, its columns'
sums beside it with the constants; the rows' sums follow, and the register tile of ``qconv_tile``
does the rest, rows being pixels. Unsigned codes of the right operand are stored less 128.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepipe.kernels import dot
from edgepipe.kernels.builder import (
    Registers,
    bytes_of,
    float32,
    kernel,
    load,
    loop,
    minimum,
    splat,
    store,
)
from edgepipe.kernels.integer_ops import QConvOp, QMatmulOp
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.qconv import tile
from edgepipe.kernels.qconv_geometry import Geometry
from edgepipe.kernels.qconv_tile import Emission
from edgepipe.kernels.requantize import scaled
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

#: Largest magnitude of the right operand's codes: all of int8.
LIMIT = 128


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QMatmulOp):
        return ""
    lanes = dot.choose(target, LIMIT, op.n).lanes
    return f"{op.n} columns do not fill a vector of {lanes}" if op.n < lanes else None


def default(op: QMatmulOp, target: Target) -> Knobs:
    chosen = dot.choose(target, LIMIT, op.n)
    pixels, groups = tile(target, chosen.name, op.m, op.n // chosen.lanes)
    return {
        "dot": chosen.name,
        "lanes": chosen.lanes,
        "signed": chosen.signed,
        "pixels": pixels,
        "groups": groups,
        "flat": True,
        "arch": target.arch,
        "unroll": 4 if chosen.name == "sdot" else 1,
        "deep": 0,  # two products of full bytes do not fit int16 together
        "offset": 0,
    }


def emit(op: QMatmulOp, knobs: Knobs) -> Any:
    sizes = [("a", op.a.elements, op.a.dtype), ("b", op.b.elements, op.b.dtype)]
    buffers = [*sizes, ("y", op.y.elements, op.y.dtype)]
    buffers += [(f"s{i}", size, "int32") for i, size in enumerate(scratch(op, knobs))]
    return kernel("q_matmul", buffers, lambda *held: _Emission(op, knobs, held).run())


def scratch(op: QMatmulOp, knobs: Knobs) -> tuple[int, ...]:
    """The packed right operand, the columns' corrections and the rows'."""
    g = Geometry(_as_conv(op), knobs)
    return -(-g.tiles * g.tile_bytes // 4), op.n, op.m


def _as_conv(op: QMatmulOp) -> QConvOp:
    """Rows as pixels, products of a batch as images."""
    x = Blocked(op.batch, op.k, 1, op.m, op.k, dtype=op.a.dtype, zero=op.a.zero)
    y = Blocked(op.batch, op.n, 1, op.m, op.n, dtype=op.y.dtype, zero=op.y.zero)
    return QConvOp(x, y, (1, 1), op.limits, limit=LIMIT)


class _Emission(Emission):
    """``bias`` and ``sums`` of the tile are corrections of columns and rows."""

    def __init__(self, op: QMatmulOp, knobs: Knobs, buffers: Any) -> None:
        a, self.right, y, packed, columns, rows = buffers
        conv = _as_conv(op)
        super().__init__(conv, knobs, Geometry(conv, knobs), (a, packed, columns, None, y))
        self.product = op
        self.weights = bytes_of(packed)
        self.rest = []
        # Codes without sign are stored less 128.
        self.moved = op.b.dtype == "uint8"
        self.right_zero = op.b.zero - (128 if self.moved else 0)
        self.sums = rows if self.right_zero else None

    def run(self) -> None:
        tiles = -(-self.columns // self.pixels)
        if self.product.b_batch == 1:
            self.pack(0)
        with loop(self.op.y.n) as n:
            if self.product.b_batch > 1:
                self.pack(n)
            if self.sums is not None:
                self.row_sums(n)
            with loop(self.g.tiles) as tile_, loop(tiles) as column_tile:
                self.register_tile(n, tile_, 0, self.start(column_tile))

    # -- packing ------------------------------------------------------------------------------

    def pack(self, batch: Any) -> None:
        """The right matrix of ``batch`` as ``[tile][step][group][lane][step bytes]``."""
        lanes, step, k = self.dot.lanes, self.dot.step, self.product.k
        with loop(self.g.tiles) as number, loop(self.groups) as j:
            start = minimum(number * self.g.width, self.g.channels - self.g.width)
            column = start + j * lanes
            acc = Registers(1, lanes, "int32")
            acc[0] = splat(tirx.const(0, "int32"), lanes)
            with loop(k // step) as s:
                self.pack_step(acc, batch, number, s, j, column, step, step)
            if k % step:
                size = step // 2 if self.g.halved else step
                self.pack_step(acc, batch, number, k // step, j, column, k % step, size)
            left = self.product.a.zero
            value = acc[0] * splat(tirx.const(-left, "int32"), lanes)
            constant = tirx.const(k * left * self.right_zero, "int32")
            store(self.bias, column, value + splat(constant, lanes), lanes)

    def pack_step(
        self, acc: Registers, batch: Any, number: Any, s: Any, j: Any, column: Any, count: int,
        size: int,
    ) -> None:  # fmt: skip
        """``count`` rows, the others of the step's ``size`` zero."""
        lanes, step, n = self.dot.lanes, self.dot.step, self.product.n
        at = number * self.g.run_stride + s * (step * self.g.width) + j * (lanes * size)
        held = Registers(size, lanes, "int8")
        for i in range(size):
            if i < count:
                held[i] = self.codes((batch * self.product.k + s * step + i) * n + column, lanes)
                acc[0] = acc[0] + tirx.Cast(f"int32x{lanes}", held[i])
            else:
                held[i] = splat(tirx.const(0, "int8"), lanes)
        rows = [held[i] for i in range(size)]
        width = lanes
        while len(rows) > 1:  # neighbours interleave: pairs of bytes, then of pairs
            unit = width // lanes
            index = [
                part * width + lane * unit + u
                for lane in range(lanes)
                for part in (0, 1)
                for u in range(unit)
            ]
            joined = [tirx.Shuffle(rows[i : i + 2], index) for i in range(0, len(rows), 2)]
            rows, width = joined, 2 * width
        store(self.weights, at, rows[0], width)

    def codes(self, offset: Any, lanes: int) -> Any:
        """Codes of the right operand as int8."""
        value = load(self.right, offset, lanes)
        if not self.moved:
            return value
        turned = tirx.bitwise_xor(value, splat(tirx.const(128, "uint8"), lanes))
        return dot.reinterpret(f"int8x{lanes}", turned)

    def row_sums(self, batch: Any) -> None:
        """−zb · Σ a of every row."""
        op, lanes = self.product, 4 if self.dot.lanes == 4 else 8
        whole, rest = divmod(op.k, lanes)
        with loop(op.m) as row:
            first = (batch * op.m + row) * op.k
            acc = Registers(1, lanes, "int32")
            acc[0] = splat(tirx.const(0, "int32"), lanes)
            with loop(whole) as i:
                codes = load(self.source, first + i * lanes, lanes)
                acc[0] = acc[0] + tirx.Cast(f"int32x{lanes}", codes)
            total = acc.lane(0, 0)
            for lane in range(1, lanes):
                total = total + acc.lane(0, lane)
            for i in range(rest):
                total = total + tirx.Cast("int32", self.source[first + whole * lanes + i])
            store(self.sums, row, total * tirx.const(-self.right_zero, "int32"), 1)

    # -- what differs from weights ------------------------------------------------------------

    def sum(self, acc: Registers, i: int, j: int, channel: Any, place: Any) -> Any:
        lanes = self.dot.lanes
        total = self.total(acc, i, j, channel, place)
        multiplier = splat(float32(self.product.multiplier), lanes)
        return scaled(total, multiplier, lanes, fence=False)


TEMPLATE = KernelTemplate(
    name="q_matmul",
    matches=matches,
    default=default,
    emit=emit,
    scratch=scratch,
    arithmetic="int8",
    accumulator="int32",
)
