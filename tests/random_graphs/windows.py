"""Makers of convolutions, pooling, normalization and resampling of images."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.random_graphs.builder import Builder, RejectedError, Value
from tests.random_graphs.makers import maker

CHANNELS = (1, 2, 3, 4, 5, 7, 8, 11, 12, 16, 17, 20)


def window(g: Builder, rank: int, *, pooling: bool = False) -> dict[str, Any]:
    """Attributes kernel_shape, strides, dilations, and pads or auto_pad; some are left out."""
    kernel = [g.rng.choice([1, 2, 3, 3, 3, 4, 5]) for _ in range(rank)]
    if g.rng.random() < 0.4:
        kernel = [kernel[0]] * rank
    strides = [g.rng.choice([1, 1, 1, 2, 2, 3]) for _ in range(rank)]
    found: dict[str, Any] = {"kernel_shape": kernel, "strides": strides}
    if (not pooling or g.opset >= 10) and g.rng.random() < 0.3:
        found["dilations"] = [g.rng.choice([1, 2, 3]) for _ in range(rank)]
    reach = [(k - 1) * d for k, d in zip(kernel, found.get("dilations", [1] * rank), strict=True)]
    if pooling:
        reach = [k - 1 for k in kernel]
    choice = g.rng.random()
    if choice < 0.2:
        found["auto_pad"] = g.rng.choice(["SAME_UPPER", "SAME_LOWER", "VALID"])
        if found["auto_pad"] != "VALID":
            found.pop("dilations", None)
    elif choice < 0.55:
        found["pads"] = [r // 2 for r in reach] * 2
    elif choice < 0.85:
        found["pads"] = [g.rng.randint(0, r) for r in reach + reach]
    if g.rng.random() < 0.2 and all(s == 1 for s in strides):
        del found["strides"]
    return found


def bias(g: Builder, x: Value, channels: int) -> list[Value]:
    """None, or one that is not small."""
    return [g.normal(channels, dtype=x.dtype)] if g.rng.random() < 0.7 else []


@maker(image=10)
def conv(g: Builder) -> None:
    x = g.pick("f", least=4, most=4)
    settings = window(g, 2)
    if g.rng.random() < 0.35:
        settings = {"kernel_shape": [1, 1]}
    convolve(g, x, settings)


@maker(image=3)
def wide_conv(g: Builder) -> None:
    """So many channels and pixels that minimal filtering pays, from few and back to few."""
    x = g.pick("f", least=4, most=4)
    channels, wide = x.shape[1], g.rng.choice([32, 35, 40])
    scales = [-(-14 // max(side, 1)) for side in x.shape[2:]]
    if x.shape[0] > 2 or max(x.shape[2:]) > 20:
        raise RejectedError("too large")
    g.largest = 50_000
    up = g.normal(channels, wide, *scales, dtype=x.dtype, fan_in=channels)
    (y,) = g.add("ConvTranspose", [x, up], strides=scales, kernel_shape=scales)
    out, pads = g.rng.choice([32, 36]), g.rng.choice([[1] * 4, [1] * 4, [0] * 4, [2, 0, 1, 1]])
    weight = g.normal(out, wide, 3, 3, dtype=x.dtype, fan_in=9 * wide)
    (y,) = g.add("Conv", [y, weight, *bias(g, y, out)], pads=pads)
    if out == wide and pads == [1] * 4 and g.rng.random() < 0.5:
        (y,) = g.add("Add", [y, g.values[-2]])
    (y,) = g.add("Relu", [y])
    g.add("Conv", [y, g.normal(2, out, 1, 1, dtype=x.dtype, fan_in=out)])


@maker(image=1)
def conv_of_other_rank(g: Builder) -> None:
    x = g.pick("f", least=3, most=5)
    convolve(g, x, window(g, x.array.ndim - 2))


@maker(any=1)
def conv_anywhere(g: Builder) -> None:
    conv_of_other_rank(g)


def convolve(g: Builder, x: Value, settings: dict[str, Any]) -> Value:
    """A convolution of ``x``, dense, grouped or depthwise, and what often follows it."""
    channels = x.shape[1]
    divisors = [d for d in range(2, channels + 1) if channels % d == 0]
    groups = g.rng.choice([*divisors, channels]) if divisors and g.rng.random() < 0.35 else 1
    out = groups * g.rng.choice([1, 1, 2]) if groups > 1 else g.rng.choice(CHANNELS)
    taps = int(np.prod(settings["kernel_shape"]))
    inner = channels // groups
    weight = g.normal(out, inner, *settings["kernel_shape"], dtype=x.dtype, fan_in=inner * taps)
    kept = dict(settings)
    if g.rng.random() < 0.5:
        del kept["kernel_shape"]
    (y,) = g.add("Conv", [x, weight, *bias(g, x, out)], group=groups, **kept)
    follow(g, y)
    return y


def follow(g: Builder, y: Value) -> None:
    """BatchNormalization, Relu, Clip, a constant factor: what compilers fuse."""
    choice = g.rng.random()
    if choice < 0.2:
        (y,) = g.add("BatchNormalization", [y, *statistics(g, y)])
    elif choice < 0.3:
        scale = g.contents((y.shape[1], *(1,) * (y.array.ndim - 2)), y.dtype)
        (y,) = g.add(g.rng.choice(["Mul", "Add"]), [y, g.constant(scale)])
    if g.rng.random() < 0.4:
        g.add("Relu", [y])


def statistics(g: Builder, x: Value) -> list[Value]:
    """Scale, bias, mean and variance of each channel."""
    channels = x.shape[1]
    scale, bias, mean = (g.contents((channels,), x.dtype) for _ in range(3))
    variance = g.numbers.uniform(0.3, 2, channels).astype(x.dtype)
    return [g.constant(a) for a in (scale, bias, mean, variance)]


@maker(image=2, any=1)
def batch_norm(g: Builder) -> None:
    x = g.pick("f", least=2)
    epsilon = g.rng.choice([None, 1e-3])
    g.add("BatchNormalization", [x, *statistics(g, x)], epsilon=epsilon)


@maker(image=3)
def conv_transpose(g: Builder) -> None:
    x = g.pick("f", least=3, most=4)
    rank, channels = x.array.ndim - 2, x.shape[1]
    settings = window(g, rank)
    strides = settings.get("strides", [1] * rank)
    groups = g.rng.choice([k for k in range(1, channels + 1) if channels % k == 0])
    groups = groups if g.rng.random() < 0.4 else 1
    out = g.rng.choice([1, 2, 3, 8])
    if g.rng.random() < 0.3:
        settings["output_padding"] = [g.rng.randint(0, s - 1) for s in strides]
    kernel = settings["kernel_shape"]
    fan_in = channels // groups * int(np.prod(kernel))
    weight = g.normal(channels, out, *kernel, dtype=x.dtype, fan_in=fan_in)
    g.add("ConvTranspose", [x, weight, *bias(g, x, out * groups)], group=groups, **settings)


@maker(image=4, any=1)
def pool(g: Builder) -> None:
    x = g.pick("f", least=3, most=5)
    op = g.rng.choice(["MaxPool", "MaxPool", "AveragePool", "AveragePool", "LpPool"])
    settings = window(g, x.array.ndim - 2, pooling=True)
    if op != "MaxPool" and g.opset < (19 if op == "AveragePool" else 18):
        settings.pop("dilations", None)
    if op == "AveragePool":
        settings["count_include_pad"] = g.rng.choice([0, 1])
    if op == "LpPool":
        settings["p"] = g.rng.choice([1, 2, 3])
    if g.rng.random() < 0.3 and "auto_pad" not in settings:
        if g.opset < (18 if op == "LpPool" else 10):
            raise RejectedError("not yet there")
        settings["ceil_mode"] = 1
    g.add(op, [x], outputs=2 if op == "MaxPool" and g.rng.random() < 0.05 else 1, **settings)


@maker(image=1)
def global_pool(g: Builder) -> None:
    x = g.pick("f", least=3, most=5)
    ops = ["GlobalAveragePool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"]
    g.add(g.rng.choice(ops), [x])


@maker(image=2)
def gate(g: Builder) -> None:
    """Squeeze and excitation."""
    x = g.pick("f", least=4, most=4)
    channels, inner = x.shape[1], g.rng.choice([1, 2, 4, 5])
    (y,) = g.add("GlobalAveragePool", [x])
    (y,) = g.add("Conv", [y, g.normal(inner, channels, 1, 1, dtype=x.dtype, fan_in=channels)])
    (y,) = g.add("Relu", [y])
    (y,) = g.add("Conv", [y, g.normal(channels, inner, 1, 1, dtype=x.dtype, fan_in=inner)])
    (y,) = g.add(g.rng.choice(["Sigmoid", "HardSigmoid"]), [y])
    g.add("Mul", g.rng.sample([x, y], 2))


@maker(image=2, any=1)
def normalization(g: Builder) -> None:
    x = g.pick("f", least=3, most=5)
    channels = x.shape[1]
    scale, shift = (g.constant(g.contents((channels,), x.dtype)) for _ in range(2))
    op = g.rng.choice(["InstanceNormalization", "LRN", "GroupNormalization", "LpNormalization",
                       "MeanVarianceNormalization"])  # fmt: skip
    if op == "InstanceNormalization":
        if np.prod(x.shape[2:]) == 1:  # the shift remains, which ONNX Runtime rounds
            raise RejectedError("nothing to normalise")
        g.add(op, [x, scale, shift], epsilon=g.rng.choice([1e-3, 1e-5]))
    elif op == "LRN":
        g.add(op, [x], size=g.rng.choice([1, 3, 5]), alpha=0.1, beta=0.75, bias=1.0)
    elif op == "GroupNormalization":
        if g.opset < 21:
            raise RejectedError("not yet there")
        groups = g.rng.choice([k for k in range(1, channels + 1) if channels % k == 0])
        g.add(op, [x, scale, shift], num_groups=groups)
    elif op == "LpNormalization":
        g.add(op, [x], axis=g.rng.randrange(-1, x.array.ndim), p=g.rng.choice([1, 2]))
    elif g.opset >= 9:
        g.add(op, [x], axes=g.rng.choice([[0, 2, 3], [2, 3], [1], [-1]]))


def comparable(settings: dict[str, Any], sizes: list[int]) -> None:
    """Reject what ONNX Runtime computes otherwise than ONNX's reference: a single antialiased
    place of ``pytorch_half_pixel``, which by the definition lies at 0."""
    single = settings["coordinate_transformation_mode"] == "pytorch_half_pixel" and 1 in sizes[2:]
    if single and settings.get("antialias"):
        raise RejectedError("engines differ")


@maker(image=3, any=1)
def resize(g: Builder) -> None:
    x = g.pick("f", least=3, most=4, size=1000)
    if g.opset < 11:
        if g.opset not in (9, 10):
            raise RejectedError("scales are attributes")
        scales = np.float32([1, 1, *(g.rng.choice([1, 2, 3]) for _ in x.shape[2:])])
        mode = g.rng.choice(["nearest", "linear"])
        g.add("Upsample" if g.opset == 9 else "Resize", [x, g.constant(scales)], mode=mode)
        return
    mode = g.rng.choice(["nearest", "nearest", "linear", "linear", "cubic"])
    settings: dict[str, Any] = {"mode": mode}
    modes = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]
    if g.opset >= 19:
        modes.append("half_pixel_symmetric")
    settings["coordinate_transformation_mode"] = g.rng.choice(modes)
    if mode == "nearest":
        roundings = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
        settings["nearest_mode"] = g.rng.choice(roundings)
    if mode == "cubic":
        settings |= {"cubic_coeff_a": g.rng.choice([-0.75, -0.5]),
                     "exclude_outside": g.rng.choice([0, 1])}  # fmt: skip
    if g.opset >= 18 and mode != "nearest" and g.rng.random() < 0.3:
        settings["antialias"] = 1
    roi = None if g.opset >= 13 else g.constant(np.zeros(0, np.float32))
    # By scales ONNX Runtime aligns other corners than ONNX's reference where sizes are not whole.
    aligned = settings["coordinate_transformation_mode"] == "align_corners"
    if not aligned and g.rng.random() < 0.5:
        scales = [1.0, 1.0, *(g.rng.choice([0.5, 0.75, 1.0, 1.5, 2.0, 3.0]) for _ in x.shape[2:])]
        comparable(settings, [int(d * s) for d, s in zip(x.shape, scales, strict=True)])
        g.add("Resize", [x, roi, g.constant(np.float32(scales))], **settings)
    else:
        sizes = [*x.shape[:2], *(g.rng.randint(1, 2 * d + 1) for d in x.shape[2:])]
        comparable(settings, sizes)
        empty = None if g.opset >= 13 else g.constant(np.zeros(0, np.float32))
        g.add("Resize", [x, roi, empty, g.integers(sizes)], **settings)


@maker(image=1)
def sample_grid(g: Builder) -> None:
    x = g.pick("f", least=4, most=4)
    if g.opset < 16:
        raise RejectedError("not yet there")
    grid = g.numbers.uniform(-1.2, 1.2, (x.shape[0], 3, 4, 2)).astype(x.dtype)
    linear = "bilinear" if g.opset < 20 else "linear"
    g.add("GridSample", [x, g.constant(grid)], mode=g.rng.choice([linear, "nearest"]),
          padding_mode=g.rng.choice(["zeros", "border", "reflection"]),
          align_corners=g.rng.choice([0, 1]))  # fmt: skip


@maker(image=1)
def roi_align(g: Builder) -> None:
    x = g.pick("f", least=4, most=4)
    if g.opset < 10:
        raise RejectedError("not yet there")
    low = g.numbers.uniform(0, 2, (3, 2))
    boxes = np.concatenate([low, low + g.numbers.uniform(1, 4, (3, 2))], 1).astype(x.dtype)
    extra: dict[str, Any] = {}
    if g.opset >= 16:
        choices = ["half_pixel", "output_half_pixel"]
        extra = {"coordinate_transformation_mode": g.rng.choice(choices)}
    images = g.integers(g.numbers.integers(0, x.shape[0], 3))
    g.add("RoiAlign", [x, g.constant(boxes), images], output_height=2, output_width=3,
          sampling_ratio=g.rng.choice([0, 2]), **extra)  # fmt: skip


@maker(any=1)
def fold_columns(g: Builder) -> None:
    if g.opset < 18:
        raise RejectedError("not yet there")
    x = g.pick("f", least=2, most=4)
    block, image = [2, 2], [g.rng.randint(2, 4), g.rng.randint(2, 4)]
    count = (image[0] - 1) * (image[1] - 1)
    if x.array.size % (4 * count):
        raise RejectedError("its size")
    (y,) = g.add("Reshape", [x, g.integers([1, -1, count])])
    g.add("Col2Im", [y, g.integers(image), g.integers(block)])
