"""One small network per operator and variant, sizes odd, as the body of an ONNX text.

``x`` is the input; weights are declared as ``float[...] name``. A last convolution or dense layer
reads what the operator writes, so that the quantizer keeps it in integers.
"""

from __future__ import annotations

INPUT = "float[1, 4, 9, 7] x"
HEAD = "z = Conv(y, wz, bz)"
HEAD_WEIGHTS = "float[5,4,1,1] wz, float[5] bz"


def network(body: str, weights: str = "", inputs: str = INPUT, out: str = "float[] z") -> str:
    """The text of a network that ends in ``z``."""
    declared = ", ".join(part for part in (weights, HEAD_WEIGHTS) if part)
    return f"n ({inputs}) => ({out}) <{declared}> {{\n{body}\n}}"


def _conv(attributes: str, weight: str, width: int, inputs: str = INPUT) -> str:
    declared = f"float[{weight}] w, float[{width}] b"
    given = f"<{attributes}>" if attributes else ""
    return f"n ({inputs}) => (float[] z) <{declared}> {{ z = Conv{given}(x, w, b) }}"


def _middle(body: str, weights: str = "") -> str:
    """``body`` computes y [1, 4, h, w] from x; a convolution in front and one behind."""
    front = "float[4,4,1,1] wf, float[4] bf"
    declared = ", ".join(part for part in (front, weights) if part)
    return network(f"f = Conv(x, wf, bf)\n{body}\n{HEAD}", declared)


def _pool(op: str, attributes: str) -> str:
    return network(f"y = {op}<{attributes}>(x)\n{HEAD}")


CONVOLUTIONS = {
    "pointwise": _conv("", "6,4,1,1", 6),
    "same 3x3": _conv("pads=[1,1,1,1]", "6,4,3,3", 6),
    "valid 3x5": _conv("", "6,4,3,5", 6),
    "stride 2, pads before": _conv("pads=[1,1,1,1], strides=[2,2]", "6,4,3,3", 6),
    "stride 2, pads behind": _conv("pads=[0,0,1,1], strides=[2,2]", "6,4,3,3", 6),
    "strides differ": _conv("pads=[1,0,1,0], strides=[1,2]", "6,4,3,3", 6),
    "asymmetric pads": _conv("pads=[2,0,1,3]", "6,4,3,3", 6),
    "pads never reached": _conv("pads=[0,0,1,1], strides=[2,2]", "6,4,1,1", 6),
    "dilated": _conv("pads=[2,2,2,2], dilations=[2,2]", "6,4,3,3", 6),
    "grouped": _conv("pads=[1,1,1,1], group=2", "6,2,3,3", 6),
    "depthwise": _conv("pads=[1,1,1,1], group=4", "4,1,3,3", 4),
    "depthwise, stride 2": _conv("pads=[1,1,1,1], strides=[2,2], group=4", "4,1,3,3", 4),
    "depthwise, dilated": _conv("dilations=[2,1], group=4", "4,1,3,3", 4),
    "depthwise, multiplier 3": _conv("pads=[1,1,1,1], group=4", "12,1,3,3", 12),
    "one input channel": _conv("pads=[1,1,1,1]", "6,1,3,3", 6, "float[1, 1, 9, 7] x"),
    "one axis": _conv("pads=[1,1], strides=[2]", "6,4,3", 6, "float[1, 4, 11] x"),
    "one axis, depthwise": _conv(
        "pads=[2,2], dilations=[2], group=4", "4,1,3", 4, "float[1,4,11] x"
    ),
    "batch": _conv("pads=[1,1,1,1]", "6,4,3,3", 6, "float[3, 4, 9, 7] x"),
}


def _transposed(attributes: str, kernel: str) -> str:
    declared = f"float[4,6,{kernel}] w, float[6] b"
    return f"n ({INPUT}) => (float[] z) <{declared}> {{ z = ConvTranspose<{attributes}>(x, w, b) }}"


TRANSPOSED = {
    "stride 2, 2x2": _transposed("strides=[2,2]", "2,2"),
    "stride 2, 3x3, cropped": _transposed("strides=[2,2], pads=[1,1,1,1]", "3,3"),
    "stride 2, 4x4, cropped": _transposed("strides=[2,2], pads=[1,1,1,1]", "4,4"),
    "output padding": _transposed("strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]", "3,3"),
    "asymmetric": _transposed("strides=[1,2], pads=[0,1,1,0]", "3,3"),
}

DENSE = {
    "gemm": """n (float[1, 24] x) => (float[] z) <float[24,10] w, float[10] b> {
        z = Gemm(x, w, b) }""",
    "gemm, transposed weight, rows": """n (float[5, 24] x) => (float[] z)
        <float[10,24] w, float[10] b> { z = Gemm<transB=1>(x, w, b) }""",
    "matmul of three axes": """n (float[2, 5, 24] x) => (float[] z) <float[24,10] w> {
        z = MatMul(x, w) }""",
    "two layers with relu": """n (float[1, 24] x) => (float[] z)
        <float[24,16] w, float[16] b, float[16,6] v> {
        a = Gemm(x, w, b)
        r = Relu(a)
        z = MatMul(r, v) }""",
    "flattened image": """n (float[1, 3, 4, 5] x) => (float[] z)
        <float[6,3,1,1] w, float[6] b, float[120,7] v, float[7] c, int64[2] to = {1, -1}> {
        a = Conv(x, w, b)
        f = Reshape(a, to)
        z = Gemm(f, v, c) }""",
    "flattened image, also read otherwise": """n (float[1, 3, 4, 5] x) => (float[] z, float[] u)
        <float[6,3,1,1] w, float[6] b, float[120,7] v, float[7] c, int64[2] to = {1, -1}> {
        a = Conv(x, w, b)
        f = Reshape(a, to)
        z = Gemm(f, v, c)
        u = Sigmoid(f) }""",
    "image to tokens": """n (float[1, 3, 4, 5] x) => (float[] z)
        <float[6,3,1,1] w, float[6] b, float[6,7] v, int64[3] to = {1, 6, 20}> {
        a = Conv(x, w, b)
        f = Reshape(a, to)
        p = Transpose<perm=[0,2,1]>(f)
        z = MatMul(p, v) }""",
    "attention": """n (float[2, 5, 8] x) => (float[] z)
        <float[8,8] wq, float[8,8] wk, float[8,8] wv> {
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        v = MatMul(x, wv)
        t = Transpose<perm=[0,2,1]>(k)
        s = MatMul(q, t)
        p = Softmax<axis=-1>(s)
        z = MatMul(p, v) }""",
    "attention of four axes": """n (float[1, 2, 5, 8] x) => (float[] z) <float[8,8] wq> {
        q = MatMul(x, wq)
        t = Transpose<perm=[0,1,3,2]>(q)
        s = MatMul(q, t)
        p = Softmax<axis=-1>(s)
        z = MatMul(p, q) }""",
}

POOLS = {
    "max": _pool("MaxPool", "kernel_shape=[2,2], strides=[2,2]"),
    "max, same": _pool("MaxPool", "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]"),
    "max, asymmetric": _pool("MaxPool", "kernel_shape=[3,3], strides=[2,2], pads=[0,1,1,0]"),
    "max, ceil": _pool("MaxPool", "kernel_shape=[2,2], strides=[2,2], ceil_mode=1"),
    "average": _pool("AveragePool", "kernel_shape=[2,2], strides=[2,2]"),
    "average, pads counted": _pool(
        "AveragePool", "kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1"
    ),
    "average, pads left out": _pool("AveragePool", "kernel_shape=[3,3], pads=[1,1,1,1]"),
    "average, ceil": _pool("AveragePool", "kernel_shape=[2,2], strides=[2,2], ceil_mode=1"),
    "global": network(f"y = GlobalAveragePool(x)\n{HEAD}"),
    "mean of rows": network(f"y = ReduceMean<keepdims=1>(x, a)\n{HEAD}", "int64[1] a = {2}"),
    "mean of channels": network(
        "f = Conv(x, wz, bz)\nm = ReduceMean<keepdims=0>(f, a)\nz = MatMul(m, v)",
        "int64[1] a = {1}, float[7,3] v",
    ),
    "mean of an image": network(
        "f = Conv(x, wz, bz)\nm = ReduceMean<keepdims=0>(f, a)\nz = MatMul(m, v)",
        "int64[2] a = {2, 3}, float[5,3] v",
    ),
    "mean over a row": network(
        "f = Conv(x, wz, bz)\nm = ReduceMean<keepdims=0>(f, a)\nz = MatMul(m, v)",
        "int64[1] a = {2}, float[7,3] v",
    ),
    "one axis": """n (float[1, 4, 11] x) => (float[] z)
        <float[4,4,3] w, float[4] b, float[4,4,1] wz, float[4] bz> {
        c = Conv(x, w, b)
        r = Relu(c)
        m = MaxPool<kernel_shape=[3], strides=[2], pads=[1,1]>(r)
        g = GlobalAveragePool(m)
        z = Conv(g, wz, bz) }""",
}

BINARIES = {
    "add": _middle("y = Add(x, f)"),
    "add and relu": _middle("a = Add(x, f)\ny = Relu(a)"),
    "add and clip": _middle(
        "a = Add(f, x)\ny = Clip(a, lo, hi)", "float lo = {-0.5}, float hi = {1.5}"
    ),
    "sub": _middle("y = Sub(x, f)"),
    "mul": _middle("y = Mul(x, f)"),
    "mul by an image of one pixel": _middle("g = GlobalAveragePool(f)\ny = Mul(x, g)"),
    "mul by a row of another rank": network(
        "m = ReduceMean<keepdims=0>(x, a)\ny = Mul(x, m)\nz = Conv(y, wz, bz)",
        "int64[3] a = {0, 1, 2}",
    ),
    "constant factor per channel": _middle("y = Mul(f, k)", "float[1,4,1,1] k"),
    "constant number": _middle("y = Add(f, k)", "float k = {0.75}"),
    "squeeze and excite": _middle(
        "g = GlobalAveragePool(f)\nc = Conv(g, ws, bs)"
        "\nh = HardSigmoid<alpha=0.16666667, beta=0.5>(c)\ny = Mul(f, h)",
        "float[4,4,1,1] ws, float[4] bs",
    ),
}

FUNCTIONS = {
    "relu": _middle("m = MaxPool<kernel_shape=[1,1]>(f)\ny = Relu(m)"),
    "clip": _middle("m = Add(f, x)\nn = Identity(m)\ny = Clip(n, lo, hi)",
                    "float lo = {0.0}, float hi = {0.8}"),
    "sigmoid": _middle("y = Sigmoid(f)"),
    "tanh": _middle("y = Tanh(f)"),
    "hard swish": _middle("y = HardSwish(f)"),
    "leaky relu": _middle("y = LeakyRelu<alpha=0.2>(f)"),
    "elu": _middle("y = Elu(f)"),
    "exp": _middle("y = Exp(f)"),
    "hard sigmoid": _middle("y = HardSigmoid<alpha=0.2, beta=0.5>(f)"),
    "gelu": _middle("y = Gelu(f)"),
    "gelu by tanh": _middle('y = Gelu<approximate="tanh">(f)'),
    "softmax of channels": _middle("y = Softmax<axis=1>(f)"),
    "swish": _middle("s = Sigmoid(f)\ny = Mul(f, s)"),
}  # fmt: skip

MOVEMENTS = {
    "concat": _middle("c = Concat<axis=1>(f, x)\ny = Conv(c, wc)", "float[4,8,1,1] wc"),
    "concat of rows": _middle("y = Concat<axis=2>(f, x)"),
    "pad": _middle("y = Pad(f, p)", "int64[8] p = {0, 0, 1, 2, 0, 0, 0, 3}"),
    "pad with a value": _middle(
        "y = Pad(f, p, v)", "int64[8] p = {0, 0, 1, 0, 0, 0, 0, 1}, float v = {0.5}"
    ),
    "pad by reflection": _middle(
        'y = Pad<mode="reflect">(f, p)', "int64[8] p = {0, 0, 1, 2, 0, 0, 2, 1}"
    ),
    "slice": _middle(
        "y = Slice(f, s, e, a)", "int64[2] s = {1, 2}, int64[2] e = {-1, 6}, int64[2] a = {2, 3}"
    ),
    "slice of every second": _middle(
        "y = Slice(f, s, e, a, t)",
        "int64[1] s = {1}, int64[1] e = {100}, int64[1] a = {3}, int64[1] t = {2}",
    ),
    "slice of rows and columns": _middle(
        "y = Slice(f, s, e, a, t)",
        "int64[2] s = {0, 0}, int64[2] e = {100, 100}, int64[2] a = {2, 3}, int64[2] t = {2, 3}",
    ),
    "slice of channels": _middle(
        "c = Slice(f, s, e, a, t)\ny = Concat<axis=1>(c, c)",
        "int64[1] s = {1}, int64[1] e = {4}, int64[1] a = {1}, int64[1] t = {2}",
    ),
    "split": _middle(
        "a, b = Split<axis=1, num_outputs=2>(f)\nc = Concat<axis=1>(b, a)\ny = Identity(c)"
    ),
    "shuffle": _middle(
        "a = Reshape(f, s)\nb = Transpose<perm=[0,2,1,3,4]>(a)\ny = Reshape(b, u)",
        "int64[5] s = {1, 2, 2, 9, 7}, int64[4] u = {1, 4, 9, 7}",
    ),
    "transpose": _middle("a = Transpose<perm=[0,1,3,2]>(f)\ny = Identity(a)"),
    "depth to space": _middle(
        "d = DepthToSpace<blocksize=2>(f)\ny = Conv(d, wd)", "float[4,1,1,1] wd"
    ),
    "space to depth": """n (float[1, 4, 8, 6] x) => (float[] z)
        <float[2,4,1,1] w, float[3,8,1,1] v> {
        f = Conv(x, w)
        d = SpaceToDepth<blocksize=2>(f)
        z = Conv(d, v) }""",
}

#: Attributes of Resize, and the size (height, width) that [.., 9, 7] becomes.
RESIZES = {
    "nearest, asymmetric": (
        'mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"',
        18,
        21,
    ),
    "nearest, half pixel": ('mode="nearest"', 18, 28),
    "nearest, corners": (
        'mode="nearest", coordinate_transformation_mode="align_corners",'
        ' nearest_mode="round_prefer_ceil"',
        13,
        11,
    ),
    "linear, half pixel": ('mode="linear"', 18, 14),
    "linear, smaller": ('mode="linear"', 6, 5),
    "linear, corners": ('mode="linear", coordinate_transformation_mode="align_corners"', 13, 11),
    "linear, asymmetric": ('mode="linear", coordinate_transformation_mode="asymmetric"', 18, 14),
}
MOVEMENTS |= {
    f"resize, {name}": _middle(
        f"y = Resize<{attributes}>(f, , , k)", f"int64[4] k = {{1, 4, {height}, {width}}}"
    )
    for name, (attributes, height, width) in RESIZES.items()
}

#: What stays in float behind the last integer operator.
TAILS = {
    "softmax": network("c = Conv(x, wz, bz)\nz = Softmax<axis=1>(c)"),
    "sigmoid": network("c = Conv(x, wz, bz)\nz = Sigmoid(c)"),
    "scaled": network(
        "c = Conv(x, wz, bz)\nm = Mul(c, k)\ne = Exp(m)\nz = Div(e, k)", "float k = {0.125}"
    ),
    "transposed": network("c = Conv(x, wz, bz)\nz = Transpose<perm=[0,2,3,1]>(c)"),
    "two outputs": network(
        "c = Conv(x, wz, bz)\nr = Relu(c)\nz = Conv(r, wv)\nu = Sub(c, k)",
        "float[3,5,1,1] wv, float k = {0.5}",
        out="float[] z, float[] u",
    ),
    "cut": network(
        "c = Conv(x, wz, bz)\ns = Softmax<axis=1>(c)\nz = Clip(s, lo, hi)",
        "float lo = {0.1}, float hi = {0.3}",
    ),
}
