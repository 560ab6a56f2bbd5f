"""Measure a bundle's speed, beside a peer in the same run."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from edgepipe.display import Progress
from edgepipe.errors import UserError

if TYPE_CHECKING:
    from edgepipe.benchmark import Benchmark
    from edgepipe.bundle import Bundle
    from edgepipe.cli.parser import Parser
    from edgepipe.op_profile import Profile


def add_arguments(parser: Parser) -> None:
    """Declare the options of ``edgepipe bench``."""
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder that 'edgepipe compile' wrote")
    parser.add_argument("--runner", metavar="NAME", help="how to run it (default: the target's)")
    parser.add_argument(
        "--against",
        metavar="PEER,…",
        help="engines to measure in turn with it: ort (default), litert, openvino, ncnn, for wasm "
        "ort-web, litert-js, tfjs; none",
    )
    parser.add_argument(
        "--per-op",
        action="store_true",
        help="time every operator instead, beside what the core can do",
    )
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="timed inferences (200)")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads that share an inference, of the bundle and of each engine (as compiled)",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="the original model, where it is not found by its name"
    )


def execute(options: argparse.Namespace) -> int:
    """Measure and print medians, spread and ratio, or what each operator takes."""
    from edgepipe.bundle import Bundle

    if options.runs < 1:
        raise UserError("must be at least 1", where="--runs")
    progress = Progress(quiet=options.quiet or options.json)
    if options.per_op and options.against:
        raise UserError("measures this bundle alone", where="--per-op", fix="leave out --against")
    if options.per_op and options.threads is not None:
        raise UserError("profiles one thread", where="--per-op", fix="leave out --threads")
    bundle = Bundle.open(options.bundle)
    progress(f"measuring {bundle.path.name}")
    try:
        result = _measure(bundle, options)
        progress.finish()
    finally:
        progress.abandon()
    if options.json:
        print(json.dumps(result.to_json(), indent=1))
    elif not options.quiet:
        print(result)
    return 0


def _measure(bundle: Bundle, options: argparse.Namespace) -> Benchmark | Profile:
    if options.per_op:
        from edgepipe.op_profile import profile

        return profile(bundle, runner=options.runner, runs=options.runs)
    from edgepipe.benchmark import bench

    against = None if options.against is None else tuple(options.against.split(","))
    return bench(
        bundle,
        runner=options.runner,
        against=against,
        runs=options.runs,
        model=options.model,
        threads=options.threads,
    )
