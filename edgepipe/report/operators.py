"""One bundle, operator by operator: the waterline, layers against float, zeros, the arena."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgepipe.layer_report import LayersReport
from edgepipe.op_profile import OpProfile, Profile
from edgepipe.report.facts import Facts
from edgepipe.report.figure import COLOURS, INK, figure, legend, svg

#: Bars above this multiple of the peak's time are cut, or earlier: where those above are a
#: hundredth of all operations.
_HIGHEST = 8.0
_KINDS = ("convolution", "pointwise", "depthwise", "dense", "other")


def waterline(profile: Profile, name: str) -> str:
    """What one operation takes in each operator, in units of the core's peak, over the operations
    in order: areas are times. The line at 1 is the peak; what moving the operator's tensors alone
    would take is drawn across. After the waterline analysis of Lavin, On the Efficiency of
    Convolutional Neural Networks (2024), the roofline of a sequence of kernels. "" where nothing
    multiplies."""
    ops = [op for op in profile.ops if op.ideal_us > 0]
    if not ops:
        return ""
    made, axes = figure(3.1)
    top, left, edges = _cut(ops), 0.0, [0.0]
    drawn: set[str] = set()
    for op in ops:
        width, kind = 2 * op.macs / 1e6, _kind(op)
        axes.bar(left, min(op.us / op.ideal_us, top), width, align="edge", lw=0,
                 color=COLOURS[_KINDS.index(kind)], alpha=0.75,
                 label=kind if kind not in drawn else None)  # fmt: skip
        drawn.add(kind)
        left += width
        edges.append(left)
    moving = [min(op.moving_us / op.ideal_us, top) for op in ops]
    axes.stairs(moving, edges, color=INK, lw=0.9, label="moving its bytes")
    axes.axhline(1, color=INK, lw=1, ls="--", label="the core's peak")
    axes.set_xlim(0, left)
    axes.set_ylim(0, 1.05 * top)
    axes.set_xlabel("million operations, in order")
    axes.set_ylabel("time per operation\n(peak = 1)")
    legend(made, 2)
    return svg(made, name)


def beside_the_waterline(profile: Profile) -> str:
    """In words what the plot leaves out."""
    whole = sum(op.us for op in profile.ops) or 1.0
    idle = sum(op.us for op in profile.ops if op.ideal_us == 0)
    text = f"{100 * idle / whole:.1f} % of the time goes to operators that do not multiply."
    ops = [op for op in profile.ops if op.ideal_us > 0]
    cut = _cut(ops) if ops else 0.0
    over = sum(1 for op in ops if op.us / op.ideal_us > cut)
    return text + (f" Cut at {cut:.1f}: {over} of {len(ops)}." if over else "")


def _cut(ops: Sequence[OpProfile]) -> float:
    """The height of the tallest bar, without those at the top that hold a hundredth of the
    operations."""
    left = sum(op.macs for op in ops) / 100
    for op in sorted(ops, key=lambda op: -op.us / op.ideal_us):
        left -= op.macs
        if left < 0:
            return max(1.4, min(1.1 * op.us / op.ideal_us, _HIGHEST))
    return _HIGHEST


def _kind(op: OpProfile) -> str:
    kernel = op.kernel.removeprefix("q_")
    for kind in ("pointwise", "depthwise", "dense"):
        if kernel.startswith((kind, f"sparse_{kind}")):
            return kind
    return (
        "convolution" if "onv" in op.op_type or kernel.startswith(("conv", "sparse")) else "other"
    )


def layer_noise(layers: LayersReport, name: str) -> str:
    """SNR of every rounded tensor against the float network, in graph order."""
    values = [x.snr_db for x in layers.layers]
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    top = max(finite)
    made, axes = figure(2.4)
    places = range(1, len(values) + 1)
    axes.plot(places, [min(v, top) for v in values], "-", color=COLOURS[0], lw=1, marker="o", ms=3)
    for x in layers.worst:
        at = layers.layers.index(x)
        axes.plot([at + 1], [min(x.snr_db, top)], "o", color=COLOURS[1], ms=7, mfc="none")
    axes.set_xlabel("layer (circles: where most is lost)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("SNR, dB")
    axes.margins(x=0.03, y=0.12)
    return svg(made, name)


def layer_ranges(layers: LayersReport, name: str) -> str:
    """Of every rounded tensor the float values seen (line) and what its codes reach (bar); "" where
    channels were rescaled."""
    shown = [
        (i + 1, x.values, x.codes) for i, x in enumerate(layers.layers) if x.values and x.codes
    ]
    if not shown:
        return ""
    made, axes = figure(2.6)
    places = [i for i, _, _ in shown]
    axes.bar(places, [c[1] - c[0] for _, _, c in shown], 0.7, bottom=[c[0] for _, _, c in shown],
             color=COLOURS[0], alpha=0.55, lw=0, label="codes")  # fmt: skip
    axes.vlines(places, [v[0] for _, v, _ in shown], [v[1] for _, v, _ in shown], color=INK, lw=1,
                label="float values")  # fmt: skip
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("value")
    axes.margins(x=0.03)
    legend(made, 2)
    return svg(made, name)


def zeros(f: Facts, name: str) -> str:
    """Share of zero weights by layer, and whether a sparse kernel leaves them out; "" without."""
    found = [k["sparsity"] for k in f.kernels if k.get("sparsity")]
    if not found:
        return ""
    made, axes = figure(2.4)
    for skipped, label, colour in (
        (True, "left out", COLOURS[2]),
        (False, "multiplied", COLOURS[7]),
    ):
        at = [i for i, s in enumerate(found) if (s["form"] != "dense") is skipped]
        if at:
            axes.bar([i + 1 for i in at], [100 * found[i]["zeros"] for i in at], 0.7, color=colour,
                     lw=0, label=label)  # fmt: skip
    axes.set_ylim(0, 100)
    axes.set_xlabel("layer with zeros")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("zero weights, %")
    axes.margins(x=0.03)
    legend(made, 2)
    return svg(made, name)


def arena(f: Facts, name: str) -> str:
    """The memory plan: each tensor's place in the arena over the kernels it is alive at."""
    if not f.arena:
        return ""
    from matplotlib.collections import PolyCollection

    made, axes = figure(2.6)
    shapes, colours = [], []
    for i, (offset, size, first, last) in enumerate(f.arena):
        low, high = offset / 1024, (offset + size) / 1024
        shapes.append([(first, low), (last + 1, low), (last + 1, high), (first, high)])
        colours.append(COLOURS[i % len(COLOURS)])
    axes.add_collection(PolyCollection(shapes, facecolors=colours, alpha=0.7, lw=0))
    axes.axhline(f.arena_bytes / 1024, color=INK, lw=1, ls="--")
    axes.set_xlim(0, max(last for *_, last in f.arena) + 1)
    axes.set_ylim(0, 1.06 * f.arena_bytes / 1024)
    axes.set_xlabel("kernel, in order of execution")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("arena, KB")
    return svg(made, name)


def plots_of(f: Facts, index: int) -> Sequence[tuple[str, str]]:
    """Caption and figure of everything there is of a bundle; ``index`` makes their ids its own."""
    found: list[tuple[str, str]] = []
    if f.profile is not None:
        caption = ("Waterline: areas are times, the area under the dashed line what the core needs "
                   f"at its peak. {beside_the_waterline(f.profile)}")  # fmt: skip
        found.append((caption, waterline(f.profile, f"waterline-{index}")))
    if f.layers is not None:
        where = f"{f.layers.data}" + (" – synthetic" if f.layers.synthetic else "")
        found.append((f"Each layer against the float network; {f.layers.runs} runs of {where}",
                      layer_noise(f.layers, f"noise-{index}")))  # fmt: skip
        found.append(("What its values need, and what its codes reach",
                      layer_ranges(f.layers, f"ranges-{index}")))  # fmt: skip
    found.append(("Zero weights by layer", zeros(f, f"zeros-{index}")))
    found.append(("Memory plan: tensors in the arena, over time", arena(f, f"arena-{index}")))
    return [(caption, plot) for caption, plot in found if plot]
