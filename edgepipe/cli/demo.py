"""Build a page that classifies drawn digits in the browser, and serve it."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.display import Progress

if TYPE_CHECKING:
    from edgepipe.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the options of ``edgepipe demo``."""
    parser.add_argument("-o", "--output", metavar="DIR", default="edgepipe-demo",
                        help="the page's folder (edgepipe-demo)")  # fmt: skip
    parser.add_argument("--serve", action="store_true", help="serve it here until Ctrl-C")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="where (8000; 0: any)")


def execute(options: argparse.Namespace) -> int:
    """Compile the networks, write the page, and with --serve serve it."""
    from edgepipe import demo

    folder = Path(options.output)
    progress = Progress(quiet=options.quiet or options.json)
    try:
        demo.build(folder, progress)
        progress.finish()
    finally:
        progress.abandon()
    if options.serve:
        with demo.server(folder, options.port) as server, contextlib.suppress(KeyboardInterrupt):
            print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
            server.serve_forever()
    elif options.json:
        print(json.dumps({"folder": str(folder)}))
    elif not options.quiet:
        print(f"{folder}: put it behind any static file server, or: edgepipe demo --serve")
    return 0
