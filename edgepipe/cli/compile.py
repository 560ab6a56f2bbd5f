"""Compile a trained network into a bundle."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.cli.settings import apply_settings, parse_settings, parse_shapes, read_config
from edgepipe.display import Progress, pairs, size_text, table
from edgepipe.errors import UserError

if TYPE_CHECKING:
    from edgepipe.bundle import Bundle
    from edgepipe.cli.parser import Parser
    from edgepipe.context import Note
    from edgepipe.recipe import Recipe
    from edgepipe.tuning import Plan


EPILOG = (
    "SRC is an .npz (keys: the input names), a folder of .npy files or images, a name in "
    "calibration/, or a .toml like those. "
    "Exit codes: 0 fine, 1 the result computes something else, 2 your input or environment is at "
    "fault, 3 a bug in edgepipe"
)
#: Warnings printed one by one: a network of hundreds of layers may have one for each.
MOST_WARNINGS = 12


def add_arguments(parser: Parser) -> None:
    """Declare the options of ``edgepipe compile``."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=".onnx file, .pt2 program, package.module:factory, or a name from 'edgepipe models'",
    )
    parser.add_argument(
        "--target", metavar="NAME|FILE.toml", help="a name from 'edgepipe targets', or a file"
    )
    parser.add_argument(
        "--recipe",
        metavar="R|FILE.toml",
        help="number format: fp32 (default), fp16, w8a8, w4a8, w4g32, …, or a file that says more",
    )
    parser.add_argument(
        "--calibration", metavar="SRC", help="data that a quantized recipe takes its ranges from"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="take the first N of them (512)")
    parser.add_argument(
        "--allow-float-fallback",
        action="store_true",
        help="do not refuse quantized operators that no integer kernel executes",
    )
    parser.add_argument(
        "--emit",
        action="append",
        metavar="onnx|tflite",
        help="add the quantized model for other engines to the bundle; may be repeated",
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="INPUT=D0,D1,…",
        help="fix an input's shape; may be repeated (a free batch becomes 1)",
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help="change a value of the target, e.g. target.llvm.mcpu=cortex-a53; may be repeated",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="write the bundle without running its golden inputs first, where that is possible",
    )
    parser.add_argument(
        "--tune",
        type=int,
        metavar="N",
        help="measure N settings of every operator's kernel first (see 'edgepipe tune')",
    )
    parser.add_argument(
        "--records",
        metavar="FILE|none",
        help="tuning records to prefer to those that come along; with --tune they are added to it",
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="bundle folder to write")
    parser.add_argument("--prefix", metavar="P", help="prefix of C symbols and file names")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="say what executes each operator, and why a fusion did not apply",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads that share an inference (1); 0: as many as the device has cores",
    )
    parser.add_argument("--dump", metavar="DIR", help="keep the program after every stage")
    parser.add_argument("--config", metavar="FILE.toml", help="a file with these options")


def execute(options: argparse.Namespace) -> int:
    """Compile and print a summary."""
    values = _merged(options)
    from edgepipe.target import Target

    target = apply_settings(Target.load(values["target"]), parse_settings(values.get("set", ())))
    recipe = _recipe(values)
    if recipe is not None:
        target.check(recipe)
    shapes = parse_shapes(values.get("shape", ()))

    tuning = _tuning(values)
    notes: list[Note] = []
    progress = Progress(quiet=bool(values.get("quiet") or values.get("json")))
    progress("loading the compiler")
    from edgepipe import pipeline

    started = time.perf_counter()
    try:
        bundle = pipeline.compile(
            values["model"],
            target=target,
            recipe=recipe,
            calibration=values.get("calibration"),
            emit=values.get("emit", ()),
            allow_float_fallback=bool(values.get("allow_float_fallback")),
            check=not values.get("no_check"),
            shapes=shapes or None,
            output=values.get("output"),
            prefix=values.get("prefix", "model"),
            dump_dir=Path(values["dump"]) if "dump" in values else None,
            threads=values.get("threads", 1),
            progress=progress,
            notes=notes,
            records=None if tuning is not None else values.get("records"),
            tuning=tuning,
        )
        progress.finish()
    finally:
        progress.abandon()
    seconds = time.perf_counter() - started
    _report(bundle, values, notes, progress.seconds, seconds)
    return 0


def _recipe(values: Mapping[str, Any]) -> Recipe | None:
    """The recipe given by line or file, with --samples; None where none is."""
    from edgepipe.recipe import Recipe

    text, samples = values.get("recipe"), values.get("samples")
    if samples is not None and samples < 1:
        raise UserError("must be at least 1", where="--samples")
    if text is None and samples is not None:
        raise UserError("there is no recipe to calibrate", where="--samples", fix="give --recipe")
    recipe = None if text is None else Recipe.load(text)
    if recipe is None or samples is None:
        return recipe
    return replace(recipe, settings=replace(recipe.settings, max_samples=samples))


def _tuning(values: Mapping[str, Any]) -> Plan | None:
    """What --tune asks for."""
    if "tune" not in values:
        return None
    if values["tune"] < 1:
        raise UserError("must be at least 1", where="--tune")
    if values.get("records", "none") == "none":
        raise UserError("needs a file to keep what it finds", where="--tune",
                        fix="give --records FILE.jsonl")  # fmt: skip
    from edgepipe.tuning import Plan

    return Plan(values["tune"], Path(values["records"]))


def _merged(options: argparse.Namespace) -> dict[str, Any]:
    """The options, those of --config where the command line is silent."""
    given = {
        key: value
        for key, value in vars(options).items()
        if key not in ("config", "command", "execute", "parser")
        and value is not None
        and value is not False
    }
    values = {**(read_config(Path(options.config)) if options.config else {}), **given}
    for needed, shown in (("model", "MODEL"), ("target", "--target")):
        if needed not in values:
            raise UserError(
                f"{shown} is missing",
                where="edgepipe compile",
                fix="for example: edgepipe compile digits --target host",
            )
    return values


def _report(
    bundle: Bundle,
    values: Mapping[str, Any],
    notes: Sequence[Note],
    stages: Sequence[tuple[str, float]],
    seconds: float,
) -> None:
    warnings = [f"{note.subject}: {note.text}" for note in notes if note.warning]
    if values.get("json"):
        result = {
            "bundle": str(bundle.path),
            "manifest": bundle.manifest,
            "warnings": warnings,
            "seconds": round(seconds, 3),
            "stages": [{"stage": name, "seconds": round(s, 3)} for name, s in stages],
        }
        if values.get("explain"):
            result["notes"] = [vars(note) for note in notes]
        print(json.dumps(result, indent=1))
        return
    if values.get("explain"):
        for note in notes:
            print(f"{note.stage}: {note.subject}: {note.text}")
        if not notes:
            print("nothing to explain: every fusion and template that was tried applied")
        print(audit(bundle.manifest["kernels"], bundle.compiled_threads != 1) + "\n")
        if bundle.manifest.get("gpu"):
            print(gpu_report(bundle.manifest) + "\n")
    if not values.get("quiet"):
        for warning in warnings[:MOST_WARNINGS]:
            print(f"warning: {warning}", file=sys.stderr)
        if (more := len(warnings) - MOST_WARNINGS) > 0:
            print(f"warning: and {more} more; --json and --explain have them all", file=sys.stderr)
        print(summary(bundle, stages, seconds))


def audit(kernels: Sequence[Mapping[str, Any]], threaded: bool = False) -> str:
    """What executes each operator, in order: kernel, arithmetic, accumulator, products, and into
    how many pieces threads can divide it."""
    rows = [
        [k["op"], k["op_type"], k["kernel"], k["arithmetic"], k["accumulator"], k["macs"] or "–"]
        + [k["pieces"]] * threaded
        for k in kernels
    ]
    headers = ["operator", "type", "kernel", "arithmetic", "accumulator", "products"]
    return table(headers + ["pieces"] * threaded, rows)


def gpu_report(manifest: Mapping[str, Any]) -> str:
    """Per operator what ptxas reports of its kernels, the worst of them, and an estimated time."""
    gpu, prefix = manifest["gpu"], manifest["prefix"]
    rows = []
    for op in gpu["estimate"]["ops"]:
        symbol = f"{prefix}_{op['kernel']}"
        own = [k for n, k in gpu["kernels"].items() if n.split("_part")[0] == symbol]
        rows.append(
            [
                *(op["op"], op["kernel"], max(k["registers"] for k in own)),
                *(max(k[key] for k in own) for key in ("shared_bytes", "spill_bytes")),
                f"{100 * min(k['occupancy'] for k in own):.0f} %",
                *(f"{op['us']:.1f}", op["bound"], f"{100 * op.get('share', 0):.0f} %"),
            ]
        )
    headers = ["operator", "kernel", "registers", "shared bytes", "spilled bytes", "occupancy"]
    return "\n".join(
        [
            table([*headers, "estimated us", "bound by", "share of it"], rows),
            f"{gpu['estimate']['ms']:.2f} ms: {gpu['estimate']['assumptions']}",
        ]
    )


def summary(bundle: Bundle, stages: Sequence[tuple[str, float]], seconds: float) -> str:
    """The lines that ``compile`` prints about a bundle."""
    manifest, target = bundle.manifest, bundle.target
    memory, kernels = manifest["memory"], manifest["kernels"]
    sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    code = [name for name in ("model.so", "model.wasm") if name in sizes]
    rows: list[tuple[str, object]] = [
        ("bundle", _shown(bundle.path)),
        ("target", f"{target.name} ({target.llvm.get('mcpu', target.arch)})"),
        ("recipe", _recipe_text(bundle.recipe)),
        *_calibration_rows(manifest["quantization"]),
        (
            "size",
            ", ".join(f"{name} {size_text(sizes[name])}" for name in [*code, "weights.bin"])
            + f", {size_text(sum(sizes.values()))} in all",
        ),
        (
            "arena",
            f"{size_text(memory['arena_bytes'])} (tensors alive at once: "
            f"{size_text(memory['peak_live_bytes'])})",
        ),
        ("kernels", _kernel_text(kernels)),
        *_thread_rows(bundle.compiled_threads, kernels),
        *_gpu_rows(manifest.get("gpu")),
        ("time", f"{seconds:.1f} s ({_stage_text(stages)})"),
    ]
    return pairs(rows)


def _stage_text(stages: Sequence[tuple[str, float]]) -> str:
    """What took time; stages that only count ("layer 3 of 50") are one."""
    total: dict[str, float] = {}
    for name, seconds in stages:
        counted = re.sub(r"\b\d+ of (\d+)\b", r"1–\1", name)
        total[counted] = total.get(counted, 0.0) + seconds
    return ", ".join(f"{name} {s:.1f}" for name, s in total.items() if s >= 0.05)


def _thread_rows(threads: int, kernels: Sequence[Mapping[str, Any]]) -> list[tuple[str, object]]:
    if threads == 1:
        return []
    shared = sum(kernel["pieces"] > 1 for kernel in kernels)
    return [("threads", f"{threads or 'as many as cores'}, share {shared} of the kernels")]


def _gpu_rows(gpu: Mapping[str, Any] | None) -> list[tuple[str, object]]:
    if gpu is None:
        return []
    spilled = sum(kernel["spill_bytes"] for kernel in gpu["kernels"].values())
    estimated = gpu["estimate"]
    return [
        ("gpu", f"{size_text(gpu['memory_bytes'])} of memory, {gpu['launches']} launches, "
                f"{spilled} bytes spilled"),
        ("estimate", f"{estimated['ms']:.2f} ms ({estimated['assumptions']})"),
    ]  # fmt: skip


def _recipe_text(recipe: Recipe) -> str:
    changed = recipe.settings.to_json()
    return f"{recipe} with {', '.join(changed)}" if changed else str(recipe)


def _calibration_rows(facts: Mapping[str, Any] | None) -> list[tuple[str, object]]:
    if facts is None:
        return []
    if facts["imported"]:
        return [("scales", "those of the model's own Q/DQ nodes")]
    used = facts["calibration"]
    said = " – synthetic: accuracy may suffer" if used["synthetic"] else ""
    return [("calibrated", f"{used['samples']} samples of {used['data']}{said}")]


def _kernel_text(kernels: Sequence[Mapping[str, Any]]) -> str:
    # Kernels of one kind and different sizes are numbered: conv_0, conv_1.
    counts = Counter(kernel["kernel"].rstrip("0123456789").rstrip("_") for kernel in kernels)
    most = ", ".join(
        f"{count} {name if len(name) <= 32 else name[:31] + '…'}"
        for name, count in counts.most_common(8)
    )
    return f"{len(kernels)}: {most}{', …' if len(counts) > 8 else ''}"


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
