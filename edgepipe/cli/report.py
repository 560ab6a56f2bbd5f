"""Write one HTML page that shows bundles beside each other."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe import whole_file
from edgepipe.cli.compare import add_measuring, gathered
from edgepipe.errors import UserError

if TYPE_CHECKING:
    from edgepipe.cli.parser import Parser

_MARK = "<!-- edgepipe report -->"


def add_arguments(parser: Parser) -> None:
    """Declare the options of ``edgepipe report``."""
    add_measuring(parser)
    parser.add_argument(
        "--against",
        metavar="PEER,…",
        help="engines to measure in turn with them, where these run here: ort (default), litert, "
        "openvino, ncnn; none",
    )
    parser.add_argument("-o", "--output", metavar="FILE.html", required=True, help="the page")


def execute(options: argparse.Namespace) -> int:
    """Validate and measure each bundle, and write the page."""
    from edgepipe.report import page
    from edgepipe.report.facts import gather_each

    path = Path(options.output)
    if path.exists() and not _is_report(path):
        raise UserError("exists and is not a report, so it is not replaced", where=str(path),
                        fix="choose another file with -o")  # fmt: skip
    against = None if options.against is None else tuple(options.against.split(","))
    how = partial(gather_each, against=against, details=True)
    text = _MARK + "\n" + page.render(gathered(options, how))
    try:
        whole_file.write(path, text.encode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from None
    if options.json:
        print(json.dumps({"report": str(path), "bytes": len(text.encode())}))
    elif not options.quiet:
        print(f"{path}: {len(text.encode()) / 1024:.0f} KB")
    return 0


def _is_report(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as stream:
            return stream.read(len(_MARK)) == _MARK
    except (OSError, UnicodeDecodeError):
        return False
