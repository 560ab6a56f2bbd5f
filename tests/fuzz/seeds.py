"""What damage starts from: small networks over all of the importer and the passes."""

from __future__ import annotations

import functools

import numpy as np
import onnx
from onnx import numpy_helper, parser

_HEAD = '<ir_version: 8, opset_import: ["" : {opset}]>'

#: Networks as ONNX text; ``@name[shape]`` asks for a He-initialised weight.
_TEXTS = {
    "image": """net (float[n,3,12,12] x) => (float[n,5] y) {
        c = Conv <pads=[1,1,1,1], strides=[2,2]> (x, @w0[8,3,3,3], @b0[8])
        n1 = BatchNormalization (c, @s[8], @b[8], @m[8], @v[8])
        r = Relu (n1)
        d = Conv <group=8, pads=[1,1,1,1]> (r, @w1[8,1,3,3])
        a = Add (d, r)
        p = MaxPool <kernel_shape=[2,2], strides=[2,2]> (a)
        g = GlobalAveragePool (p)
        f = Flatten (g)
        y = Gemm <transB=1> (f, @w2[5,8], @b2[5])
    }""",
    "shapes": """net (float[n,4,6] x) => (float[k,24] y, int64[3] s) {
        s = Shape (x)
        zero = Constant <value = int64[1] {0}> ()
        i = Constant <value = int64 {0}> ()
        b = Gather <axis=0> (s, i)
        u = Unsqueeze (b, zero)
        rest = Constant <value = int64[1] {-1}> ()
        to = Concat <axis=0> (u, rest)
        y = Reshape (x, to)
    }""",
    "branches": """net (float[2,3] x) => (float[2,3] y) {
        c = Constant <value = bool {1}> ()
        y = If (c) <
            then_branch = g1 () => (float[2,3] t) { t = Relu (x) },
            else_branch = g2 () => (float[2,3] e) { e = Neg (x) }
        >
    }""",
    "loop": """net (float[2,3] x) => (float[2,3] y) {
        n = Constant <value = int64 {3}> ()
        c = Constant <value = bool {1}> ()
        y = Loop (n, c, x) <
            body = g (int64 i, bool ci, float[2,3] a) => (bool co, float[2,3] b) {
                co = Identity (ci)
                b = Add (a, a)
            }
        >
    }""",
    "quantized": """net (float[1,4,8,8] x) => (float[1,8,8,8] y) {
        sx = Constant <value = float {0.05}> ()
        zx = Constant <value = uint8 {128}> ()
        q = QuantizeLinear (x, sx, zx)
        d = DequantizeLinear (q, sx, zx)
        sw = Constant <value = float {0.01}> ()
        zw = Constant <value = int8 {0}> ()
        qw = QuantizeLinear (@w[8,4,1,1], sw, zw)
        dw = DequantizeLinear (qw, sw, zw)
        c = Conv (d, dw)
        r = Relu (c)
        qr = QuantizeLinear (r, sx, zx)
        y = DequantizeLinear (qr, sx, zx)
    }""",
    "attention": """net (float[1,6,8] x, int64[1,6] ids) => (float[1,6,8] y) {
        e = Gather (@table[20,8], ids)
        h = Add (x, e)
        m = LayerNormalization <axis=-1> (h, @gamma[8], @beta[8])
        q = MatMul (m, @wq[8,8])
        k = MatMul (m, @wk[8,8])
        kt = Transpose <perm=[0,2,1]> (k)
        s = MatMul (q, kt)
        p = Softmax <axis=-1> (s)
        y = MatMul (p, m)
    }""",
    "recurrent": """net (float[5,1,3] x) => (float[5,1,1,4] y) {
        y = LSTM <hidden_size=4> (x, @w[1,16,3], @r[1,16,4], @b[1,32])
    }""",
    "movement": """net (float[1,2,4,6] x)
        => (float[1,2,8,12] y, float[1,2,4,3] z, float[1,4,4,6] v) {
        scales = Constant <value = float[4] {1,1,2,2}> ()
        y = Resize <mode="nearest"> (x, , scales)
        starts = Constant <value = int64[1] {0}> ()
        ends = Constant <value = int64[1] {9999}> ()
        axes = Constant <value = int64[1] {3}> ()
        steps = Constant <value = int64[1] {2}> ()
        z = Slice (x, starts, ends, axes, steps)
        pads = Constant <value = int64[8] {0,0,1,1,0,0,1,1}> ()
        padded = Pad (x, pads)
        t = ConvTranspose <pads=[2,2,2,2]> (padded, @w[2,4,3,3])
        v = Clip (t)
    }""",
    "constants": """net (float[3] x) => (float[3] y, float[2,3] z) {
        shape = Constant <value = int64[2] {2,3}> ()
        full = ConstantOfShape <value = float[1] {1.5}> (shape)
        start = Constant <value = int64 {0}> ()
        end = Constant <value = int64 {3}> ()
        step = Constant <value = int64 {1}> ()
        r = Range (start, end, step)
        f = Cast <to=1> (r)
        twos = Constant <value = int64[1] {2}> ()
        tiled = Tile (f, twos)
        few = Constant <value = int64[2] {2,3}> ()
        again = Reshape (tiled, few)
        wide = Expand (x, few)
        sum = Add (wide, again)
        z = Mul (sum, full)
        y = Add (x, f)
    }""",
}


@functools.cache
def models() -> dict[str, bytes]:
    """Serialized ModelProtos by name."""
    return {name: _model(text).SerializeToString() for name, text in _TEXTS.items()}


@functools.cache
def conformance() -> dict[str, bytes]:
    """The networks of the onnx package's own cases, collected in some seconds."""
    from tests.onnx_conformance.cases import edge_core

    cases = edge_core().values()
    return {c.name: c.model.SerializeToString() for c in cases if c.model.ByteSize() < 20_000}


def _model(text: str) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    weights = []
    pieces = text.split("@")
    for i, piece in enumerate(pieces[1:], 1):
        name, _, rest = piece.partition("[")
        dims, _, after = rest.partition("]")
        shape = tuple(map(int, dims.split(",")))
        fan_in = max(1, int(np.prod(shape[1:])))
        array = np.abs(random.standard_normal(shape)) * (2 / fan_in) ** 0.5
        weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        pieces[i] = name + after
    proto = parser.parse_model(_HEAD.format(opset=17) + "".join(pieces))
    proto.graph.initializer.extend(weights)
    onnx.checker.check_model(proto)
    return proto
