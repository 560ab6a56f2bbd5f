"""Measure settings of a network's kernels and record what is faster."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.cli.settings import apply_settings, parse_settings, parse_shapes
from edgepipe.display import Progress, table
from edgepipe.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgepipe.cli.parser import Parser
    from edgepipe.records import Record

EPILOG = (
    "Records are lines of JSON; tuning that was interrupted goes on where it stopped. "
    "'edgepipe compile --records FILE' uses them."
)


def add_arguments(parser: Parser) -> None:
    """Declare the options of ``edgepipe tune``."""
    parser.add_argument("model", metavar="MODEL", help="as for 'edgepipe compile'")
    parser.add_argument(
        "--target", required=True, metavar="NAME|FILE.toml", help="what to tune for"
    )
    parser.add_argument("--records", required=True, metavar="FILE", help="file to add records to")
    parser.add_argument(
        "--trials", type=int, default=16, metavar="N", help="settings per operator (16)"
    )
    parser.add_argument(
        "--runner",
        metavar="NAME",
        help="what measures: local, node, qemu (counts instructions) or rpc:HOST:PORT[,key=NAME]",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (0)")
    parser.add_argument("--recipe", metavar="R|FILE.toml", help="number format (fp32)")
    parser.add_argument("--calibration", metavar="SRC", help="data for a quantized recipe")
    parser.add_argument(
        "--shape", action="append", metavar="INPUT=D0,D1,…", help="fix an input's shape"
    )
    parser.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="change a value of the target"
    )


def execute(options: argparse.Namespace) -> int:
    """Tune and print a line per operator."""
    from edgepipe.target import Target

    if options.trials < 1:
        raise UserError("must be at least 1", where="--trials")
    target = apply_settings(Target.load(options.target), parse_settings(options.set or ()))
    shapes = parse_shapes(options.shape or ())
    progress = Progress(quiet=options.quiet or options.json)
    progress("loading the compiler")
    from edgepipe import pipeline
    from edgepipe.tuning import Plan

    try:
        found = pipeline.tune(
            options.model,
            target=target,
            tuning=Plan(options.trials, Path(options.records), options.runner, options.seed),
            recipe=options.recipe,
            calibration=options.calibration,
            shapes=shapes or None,
            progress=progress,
        )
        progress.finish()
    finally:
        progress.abandon()
    if options.json:
        print(json.dumps([asdict(record) for record in found], indent=1))
    elif not options.quiet:
        print(summary(found, options.records))
    return 0


def summary(found: Sequence[Record], file: str) -> str:
    """A line per operator and how many are faster than by the default rule."""
    if not found:
        return "this network has no kernels with settings to search"
    rows = [
        [r.op if len(r.op) <= 72 else r.op[:71] + "…", r.template, r.trials, f"{r.value:g}",
         f"{r.ratio:.3f}" if r.ratio < 1 else "default is best"]
        for r in found
    ]  # fmt: skip
    better = sum(record.ratio < 1 for record in found)
    headers = ["operator", "kernel", "settings", found[0].unit, "of the default rule's"]
    proxy = " (counted under an emulator: no time)" if found[0].unit == "instructions" else ""
    return "\n".join([
        table(headers, rows),
        "",
        f"{better} of {len(found)} operators are faster than by the default rule{proxy}",
        f"measured on {found[0].measured_on}; recorded in {file}",
    ])  # fmt: skip
