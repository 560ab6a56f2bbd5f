"""List what edgepipe, or a bundle, is made of, with licences; with --json as a CycloneDX SBOM."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from edgepipe.display import table
from edgepipe.errors import one_line

if TYPE_CHECKING:
    from edgepipe.cli.parser import Parser

EPILOG = "With --json: a bill of materials in CycloneDX 1.6."


def add_arguments(parser: Parser) -> None:
    """Declare the options of ``edgepipe licences``."""
    parser.add_argument(
        "bundle", nargs="?", metavar="BUNDLE", help="what this bundle contains, not edgepipe itself"
    )


def execute(options: argparse.Namespace) -> int:
    """Print a line per component."""
    from edgepipe import __version__, components
    from edgepipe.bundle import Bundle

    if options.bundle:
        bundle = Bundle.open(options.bundle)
        found, name = bundle.components, str(bundle.manifest["source"]["name"])
        version = str(bundle.manifest["source"]["sha256"])
    else:
        found, name, version = components.installed(), "edgepipe", __version__
    if options.json:
        print(json.dumps(components.cyclonedx(name, version, found), indent=1))
        return 0
    headers = ["component", "version", "licence", "what", *(["in"] if options.bundle else [])]
    rows = [
        [c.name, c.version, c.licence, c.what, *([", ".join(c.files)] if options.bundle else [])]
        for c in found
    ]
    print(table(headers, [[one_line(cell) for cell in row] for row in rows]))
    if options.bundle and components.NOTICES in bundle.manifest["files"]:
        print(f"\ntheir texts: {bundle.path / components.NOTICES}")
    return 0
