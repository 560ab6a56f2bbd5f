"""Share of the core's peak by kind of operator, and the pointwise convolutions below 85 % of it.

Each pair is profiled by ``edgepipe bench --per-op``: rates of warm repetitions against what this
core reached in the same run in kernels that only multiply. Of ``--repeats`` profiles each operator
and each peak keeps its fastest time, since other programs slow down now the one and now the other.
"of peak" is of all operators of a kind together; shares of time are those of whole inferences.
"data moved" is what operators take in their places beyond warm repetitions: no more than that
could be saved by fusing operators, so that what lies between them stays in a cache.

  of_peak.py [--models mobilenet-v1,mobilenet-v2] [--places all] [--runs 100] [--repeats 3]
             [--json FILE]
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engines import recipe_file
from harness import arguments, bundle_folder, chosen_models, compile_apart, finish, head, progress

from edgepipe.bundle import Bundle
from edgepipe.errors import EdgepipeError
from edgepipe.op_profile import OpProfile, Profile, profile

HEADERS = ["model", "format", "place", "pointwise of peak", "≥ 85 %", "pointwise of time",
           "other convolutions of peak", "of time", "all of peak", "data moved"]  # fmt: skip
#: Place, target and runner.
PLACES = [("host", "host", "local"), ("browser", "wasm-simd", "browser"),
          ("browser", "wasm-relaxed", "browser")]  # fmt: skip
ENOUGH = 0.85


def measure(name: str, model: str, recipe: str, target: str, runner: str, options: Namespace,
            folder: Path) -> Profile:  # fmt: skip
    """Compile and profile. Raises EdgepipeError."""
    path = folder / f"{name}-{target}-{recipe}"
    if not path.exists():
        words = ("--recipe", recipe_file(folder, recipe), "--no-check")
        compiled = compile_apart(model, target, path, *words)
        if compiled.error:
            raise EdgepipeError(compiled.error)
    bundle = Bundle.open(path)
    return fastest(
        [profile(bundle, runner=runner, runs=options.runs) for _ in range(options.repeats)]
    )


def fastest(profiles: Sequence[Profile]) -> Profile:
    """Of each operator and each peak the fastest."""
    peaks = {kind: max(p.peaks[kind] for p in profiles) for kind in profiles[0].peaks}
    ops = []
    for same in zip(*(p.ops for p in profiles), strict=True):
        best = min(same, key=lambda op: op.warm_us)
        peak = max((op.peak_per_s for op in same if op.peak_per_s), default=None)
        ops.append(replace(best, us=min(op.us for op in same), peak_per_s=peak))
    least = min(p.inference_us for p in profiles)
    return replace(profiles[0], ops=tuple(ops), peaks=peaks, inference_us=least)


def is_pointwise(op: OpProfile) -> bool:
    """A convolution with a window of one pixel; dense layers are bound by their weights."""
    return "pointwise" in op.kernel and op.op_type.startswith("Conv")


def together(ops: Sequence[OpProfile]) -> str:
    """Operations at the peak over what they take."""
    taken = sum(op.warm_us for op in ops)
    return f"{100 * sum(op.ideal_us for op in ops) / taken:.0f} %" if taken else "–"


def summary(found: Profile) -> list[str]:
    whole = sum(op.us for op in found.ops)
    pointwise = [op for op in found.ops if is_pointwise(op)]
    others = [op for op in found.ops if op.op_type.startswith("Conv") and not is_pointwise(op)]
    enough = sum((op.of_peak or 0) >= ENOUGH for op in pointwise)
    share = [f"{100 * sum(op.us for op in ops) / whole:.0f} %" for ops in (pointwise, others)]
    moved = 100 * (1 - sum(op.warm_us for op in found.ops) / whole)
    return [together(pointwise), f"{enough} of {len(pointwise)}", share[0], together(others),
            share[1], f"{100 * found.ideal_us / whole:.0f} %", f"{moved:.0f} %"]  # fmt: skip


def below(found: Profile) -> list[str]:
    """A line for each pointwise convolution that is not near the peak."""
    return [
        f"  {op.op.split(';')[0]}, {op.kernel}: {100 * op.of_peak:.0f} %, "
        f"{op.macs / 1e6:.1f} MMAC, {op.warm_us:.0f} µs, {100 * (op.of_copy or 0):.0f} % of copies"
        for op in found.ops
        if is_pointwise(op) and op.of_peak is not None and op.of_peak < ENOUGH
    ]


def main() -> int:
    options = arguments(
        __doc__, models="mobilenet-v1,mobilenet-v2", places="all", runs="100", repeats="3"
    )
    head("Share of the core's peak")
    rows, results, lines, failed = [], [], [], False
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            for recipe in ("fp32", "w8a8"):
                for place, target, runner in PLACES:
                    if options.places not in ("all", place):
                        continue
                    row = [name, recipe, f"{place}, {target}"]
                    try:
                        found = measure(name, model, recipe, target, runner, options, folder)
                    except EdgepipeError as error:
                        failed = True
                        rows.append([*row, str(error), *"––––––"])
                        continue
                    rows.append([*row, *summary(found)])
                    progress("  ".join(rows[-1]))
                    lines += [" ".join(row) + ":", *below(found)]
                    results.append({"target": target, "recipe": recipe, **found.to_json()})
    finish(HEADERS, rows, results, options.json)
    print("\nPointwise below 85 %\n", *lines, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
