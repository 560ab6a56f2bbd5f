"""Compare a bundle with ONNX Runtime on the original model."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from edgepipe.display import Progress

if TYPE_CHECKING:
    from edgepipe.cli.parser import Parser

EPILOG = (
    "SRC is an .npz (keys: the input names, optionally labels), a folder of .npy files or images, "
    "a name in calibration/, or a .toml like those. Without it the golden inputs in the bundle are "
    "used."
)


def add_arguments(parser: Parser) -> None:
    """Declare the options of ``edgepipe validate``."""
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder that 'edgepipe compile' wrote")
    parser.add_argument("--data", metavar="SRC", help="what to run it on")
    parser.add_argument("--min-snr-db", type=float, metavar="X", help="floor of every output's SNR")
    parser.add_argument(
        "--max-top1-drop",
        type=float,
        metavar="X",
        help="percentage points of accuracy (without labels: of agreement) that may be lost",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="compare every layer of a quantized network with the float one, and say what to try",
    )
    parser.add_argument("--runner", metavar="NAME", help="how to run it (default: the target's)")
    parser.add_argument(
        "--model", metavar="MODEL", help="the original model, where it is not found by its name"
    )


def execute(options: argparse.Namespace) -> int:
    """Validate and print the report; 1 below the floor."""
    from edgepipe.bundle import Bundle
    from edgepipe.layer_validation import validate_layers
    from edgepipe.validation import validate

    progress = Progress(quiet=options.quiet or options.json)
    bundle = Bundle.open(options.bundle)
    progress(f"validating {bundle.path.name}")
    try:
        report = validate(
            bundle,
            options.data,
            min_snr_db=options.min_snr_db,
            max_top1_drop=options.max_top1_drop,
            runner=options.runner,
            model=options.model,
            step=progress.step,
        )
        layers = None
        if options.layers:
            progress("comparing layers")
            layers = validate_layers(bundle, options.data, model=options.model, step=progress.step)
        progress.finish()
    finally:
        progress.abandon()
    if options.json:
        found = report.to_json() | ({"layers": layers.to_json()} if layers is not None else {})
        print(json.dumps(found, indent=1))
    elif not options.quiet:
        print(report)
        if layers is not None:
            print(f"\n{layers}")
    return 0 if report.ok else 1
