"""List the networks of the zoo, or show one."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from edgepipe.display import pairs, table

if TYPE_CHECKING:
    from edgepipe.cli.parser import Parser
    from edgepipe.zoo import ZooEntry


def add_arguments(parser: Parser) -> None:
    """Declare the options of ``edgepipe models``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this one")


def execute(options: argparse.Namespace) -> int:
    """Print a table of all networks, or everything about one."""
    from edgepipe import zoo

    if options.name:
        entry = zoo.describe(options.name)
        print(json.dumps(asdict(entry), indent=1) if options.json else _details(entry))
        return 0
    entries = [zoo.describe(name) for name in zoo.names()]
    if options.json:
        print(json.dumps({entry.name: asdict(entry) for entry in entries}, indent=1))
    else:
        rows = [
            [e.name, _inputs(e), _millions(e.macs), _millions(e.parameters), e.summary]
            for e in entries
        ]
        print(table(["model", "inputs", "M MACs", "M parameters", "what it is"], rows))
    return 0


def _details(entry: ZooEntry) -> str:
    steps = entry.preprocessing
    rows: list[tuple[str, object]] = [
        ("name", entry.name),
        ("what it is", entry.summary),
        ("inputs", _inputs(entry)),
        ("multiply-adds", f"{entry.macs:,}"),
        ("parameters", f"{entry.parameters:,}"),
        ("weights", "trained" if entry.trained else "random, He-initialised"),
        ("comes from", entry.file or entry.builder),
    ]
    if steps.raw:
        formula = f"({steps.raw} · {steps.scale:.6g} − {list(steps.mean)}) / {list(steps.std)}"
        rows.append(("preprocessing", formula))
    if entry.accuracy is not None:
        rows.append(("accuracy", f"{100 * entry.accuracy:.2f} % top-1 on {entry.test_data}"))
    return pairs(rows)


def _inputs(entry: ZooEntry) -> str:
    return ", ".join(
        f"{i.name}[{','.join(map(str, i.shape))}]{'' if i.dtype == 'float32' else ' ' + i.dtype}"
        for i in entry.inputs
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"
