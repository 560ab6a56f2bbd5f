"""Run a bundle on inputs from a file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.display import table
from edgepipe.errors import UserError

if TYPE_CHECKING:
    from edgepipe.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the options of ``edgepipe run``."""
    parser.add_argument("bundle", metavar="BUNDLE", help="a folder that 'edgepipe compile' wrote")
    parser.add_argument(
        "--input", required=True, metavar="IN.npz", help="keys are the model's input names"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT.npz", help="keys will be the output names"
    )
    parser.add_argument("--runner", metavar="NAME", help="how to run it (default: the target's)")


def execute(options: argparse.Namespace) -> int:
    """Run, write the outputs, and list them."""
    from edgepipe.bundle import Bundle
    from edgepipe.data.npz import read_npz, write_npz

    bundle = Bundle.open(options.bundle)
    output = Path(options.output)
    if output.suffix != ".npz":
        raise UserError("must end in .npz", where=f"--output {output}")
    if not output.absolute().parent.is_dir():
        raise UserError("its folder does not exist", where=f"--output {output}")
    outputs = bundle.run(read_npz(Path(options.input), bundle.inputs), runner=options.runner)
    write_npz(output, outputs)
    shapes = {name: {"shape": list(v.shape), "dtype": str(v.dtype)} for name, v in outputs.items()}
    if options.json:
        print(json.dumps({"output": str(output), "arrays": shapes}, indent=1))
    elif not options.quiet:
        rows = [[name, *facts.values()] for name, facts in shapes.items()]
        print(table(["output", "shape", "dtype"], rows))
        print(f"\nwritten to {output}")
    return 0
