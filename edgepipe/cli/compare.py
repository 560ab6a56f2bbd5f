"""Tell what changed between bundles: accuracy, latency, sizes, kernels."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgepipe.display import Progress
from edgepipe.errors import UserError

if TYPE_CHECKING:
    from edgepipe.cli.parser import Parser
    from edgepipe.report.facts import Facts


def add_arguments(parser: Parser) -> None:
    """Declare the options of ``edgepipe compare``."""
    add_measuring(parser)


def add_measuring(parser: Parser) -> None:
    """Bundles and how they are measured; shared with ``edgepipe report``."""
    parser.add_argument("bundles", metavar="BUNDLE", nargs="+", help="folders to compare")
    parser.add_argument("--data", metavar="SRC", help="data to validate on (see 'validate')")
    parser.add_argument("--runner", metavar="NAME", help="how to run them (default: each target's)")
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="timed inferences (200)")
    parser.add_argument(
        "--no-measure", action="store_true", help="only what the manifests say: run nothing"
    )


def execute(options: argparse.Namespace) -> int:
    """Print a table of the bundles and of the operators that are executed otherwise."""
    from edgepipe.report.compare import changed_kernels, compare
    from edgepipe.report.facts import gather_in_turn, slower_than_float

    if len(options.bundles) < 2:
        raise UserError("one bundle has nothing to be compared with", where="edgepipe compare",
                        fix="name two or more")  # fmt: skip
    facts = gathered(options, gather_in_turn)
    if options.json:
        print(json.dumps([
            {**_json(f, changed_kernels(facts[0], f)), "slower": slower_than_float(f, facts)}
            for f in facts
        ], indent=1))  # fmt: skip
    elif not options.quiet:
        print(compare(facts))
    return 0


def gathered(options: argparse.Namespace, how: Callable[..., list[Facts]]) -> list[Facts]:
    """The facts of every bundle named, by ``how`` (see ``edgepipe.report.facts``). Raises
    UserError."""
    from edgepipe.bundle import Bundle

    if options.runs < 1:
        raise UserError("must be at least 1", where="--runs")
    progress = Progress(quiet=options.quiet or options.json)
    bundles = [Bundle.open(path) for path in options.bundles]
    try:
        facts = how(bundles, data=options.data, runner=options.runner, runs=options.runs,
                    measure=not options.no_measure, progress=progress)  # fmt: skip
        progress.finish()
    finally:
        progress.abandon()
    return facts


def _json(f: Facts, changes: list[tuple[str, str, str]]) -> dict[str, object]:
    from edgepipe.display import db_text

    return {
        "name": f.name, "target": f.target, "recipe": f.recipe, "accuracy": f.accuracy,
        "snr_db": None if f.snr_db is None else db_text(f.snr_db), "latency_ms": f.latency_ms,
        "code_bytes": f.code_bytes, "weights_bytes": f.weights_bytes, "arena_bytes": f.arena_bytes,
        "changed_kernels": [list(change) for change in changes], "why_not": f.why_not,
    }  # fmt: skip
