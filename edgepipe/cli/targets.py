"""List the targets, or show one."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from edgepipe.display import pairs, table
from edgepipe.errors import UserError
from edgepipe.target import Target, target_names

if TYPE_CHECKING:
    from edgepipe.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Declare the options of ``edgepipe targets``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="show this one (or FILE.toml)")


def execute(options: argparse.Namespace) -> int:
    """Print a table of all targets, or everything about one."""
    if options.name:
        target = Target.load(options.name)
        print(json.dumps(asdict(target), indent=1) if options.json else _details(target))
        return 0
    targets = {name: _load(name) for name in target_names()}
    if options.json:
        known = {name: asdict(t) for name, t in targets.items() if isinstance(t, Target)}
        print(json.dumps(known, indent=1))
    else:
        rows = [_row(name, target) for name, target in targets.items()]
        print(table(["target", "CPU", "f32 lanes", "recipes", "runners", "what it is"], rows))
    return 0


def _load(name: str) -> Target | str:
    """The target, or why this machine cannot say what it is (``host`` on another architecture)."""
    try:
        return Target.load(name)
    except UserError as error:
        return error.what


def _row(name: str, target: Target | str) -> list[object]:
    if isinstance(target, str):
        return [name, "–", "–", "–", "–", target]
    return [
        name,
        target.llvm.get("mcpu", target.arch),
        target.simd.lanes_f32,
        ", ".join(target.recipes),
        ", ".join(target.run.runners),
        target.summary,
    ]


def _details(target: Target) -> str:
    rows: list[tuple[str, object]] = [
        ("name", target.name),
        ("what it is", target.summary),
        ("architecture", target.arch),
        ("LLVM", " ".join(f"{key}={_text(value)}" for key, value in target.llvm.items())),
        (
            "SIMD",
            f"{target.simd.lanes_f32} float32 lanes, {target.simd.registers} registers, "
            f"{'fused' if target.simd.fma else 'no fused'} multiply-add",
        ),
        ("links for", target.link.zig_target),
        ("runners", ", ".join(target.run.runners)),
        ("recipes", ", ".join(target.recipes)),
    ]
    rows += _gpu(target)
    if target.run.qemu:
        rows.append(("emulated by", f"{target.run.qemu} -cpu {target.run.qemu_cpu}"))
    rows += [(f"variant {name}", " ".join(extra)) for name, extra in target.variants.items()]
    rows += [(key.replace("_", " "), value) for key, value in target.facts.items()]
    return pairs(rows)


def _gpu(target: Target) -> list[tuple[str, object]]:
    cuda = target.cuda
    if cuda is None:
        return []
    peaks = {
        "float32": cuda.peak_gflops_f32,
        "float16": cuda.peak_gflops_f16,
        "int8": cuda.peak_gops_s8,
    }
    told = ", ".join(f"{name} {peak:g}" if peak else f"no {name}" for name, peak in peaks.items())
    code = f"PTX for sm_{cuda.virtual_sm}" if cuda.ptx_sm else f"PTX and code for sm_{cuda.sm}"
    return [
        ("GPU", f"sm_{cuda.sm}, {cuda.processors} multiprocessors, {code}"),
        ("driver", f"CUDA {cuda.driver}, PTX ISA {cuda.ptx_isa}"),
        ("memory", f"{cuda.memory_gb:g} GB, {cuda.bandwidth_gb_s:g} GB/s"),
        ("peaks", f"{told} (1e9 operations per second, without tensor cores)"),
    ]


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
