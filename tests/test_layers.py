"""Layer rules: which part of the package may import which, and who may import what is heavy.

One value flows one way (importer → passes → lowering → codegen → bundle); a part that reaches
back, or a heavy import that creeps into the command line, fails here by name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

#: Part of edgepipe → parts it may import. Adding an arrow is a decision; this is where it shows.
MAY_IMPORT: dict[str, set[str]] = {
    "__main__": {"cli"},
    "errors": set(),
    "resources": set(),
    "display": set(),
    "tables": {"errors"},
    "temporary": set(),
    "whole_file": {"temporary"},
    "blob": set(),
    "memory": set(),
    "machine": set(),
    "gpu": set(),
    "roofline": {"codegen.plan", "target"},
    "patterns": {"errors"},
    # Numbers of bilinear resizing, for kernels and for what defines them.
    "bilinear": set(),
    "recipe": {"errors", "patterns", "sparsity.pattern", "tables"},
    "components": {"codegen.link", "resources", "target"},
    "target": {"errors", "gpu", "recipe", "resources", "tables"},
    "records": {"errors", "target"},
    # Records that come along: data, and the folder they are in.
    "tuned": set(),
    "context": {"recipe", "records", "target"},
    # What comes in.
    "zoo": {"errors", "resources", "tables"},
    "importer": {"errors", "onnx_parts", "zoo"},
    # What is done with it. Neither knows where the model came from nor where it goes.
    "passes": {"context", "errors", "importer.opset"},
    "sparsity": {"context", "errors"},
    # Training knows masks.
    "quantization": {"bilinear", "context", "errors", "onnx_session", "patterns", "sparsity"},
    "kernels": {"bilinear", "errors", "target"},
    "lowering": {
        "codegen.plan",
        "codegen.math",
        "context",
        "errors",
        "kernels",
        # The interpreter there is the definition of what integer kernels compute.
        "quantization",
        "records",
        "target",
    },
    "tuning": {
        "codegen",
        "context",
        "errors",
        "gpu",
        "kernels",
        "lowering",
        "records",
        "runners",
        "target",
    },
    "codegen": {"blob", "context", "errors", "gpu", "kernels", "lowering", "target"},
    # What goes out.
    # Reads the Q/DQ graph that quantization writes, through the same questions about graphs.
    "interchange": {"errors", "quantization.config", "quantization.graph", "quantization.layers"},
    "onnx_parts": set(),
    "onnx_session": {"onnx_parts"},
    "golden": {"codegen.plan", "errors", "onnx_parts", "onnx_session"},
    "golden_file": {
        "codegen.plan",
        "golden",
        "importer",
        "integer_reference",
        "prune",
        "quantize",
    },
    "bundle_folder": {"blob", "errors", "temporary"},
    "manifest_file": {
        "blob",
        "bundle_folder",
        "codegen",
        "components",
        "context",
        "errors",
        "importer",
        "prune",
        "quantize",
        "recipe",
        "roofline",
        "tables",
        "target",
    },
    "bundle": {
        "benchmark",
        "blob",
        "bundle_folder",
        "codegen",
        "components",
        "context",
        "errors",
        "golden_file",
        "importer",
        "manifest_file",
        "prune",
        "quantize",
        "recipe",
        "runners",
        "target",
        "validation",
    },
    # The stage between the passes and the lowering: what brings recipe, data and graph together.
    "quantize": {
        "codegen.plan",
        "context",
        "data",
        "errors",
        "importer",
        "onnx_session",
        "patterns",
        "quantization",
        "recipe",
        "target",
        "zoo",
    },
    # The same for sparsity; layers and their moments are those of quantization.
    "prune": {
        "context",
        "errors",
        "importer",
        # What a layer costs with zeros is what the compiler will choose kernels by.
        "kernels.sparse_shared",
        "lowering.groups",
        "lowering.sparsity",
        "quantization.executor",
        # In steps, between which a network is trained.
        "quantization.finetune",
        "quantization.gram",
        "quantization.graph",
        "quantization.layers",
        "quantization.placement",
        "quantize",
        "sparsity",
        "target",
    },
    # Trains what comes in as a recipe has it; what goes out is compiled like any other network.
    "finetune": {
        "context",
        "errors",
        "importer",
        "passes",
        "prune",
        "quantization.finetune",
        "quantization.graph",
        "quantize",
        "recipe",
        "sparsity.pattern",
        "target",
    },
    "emitted": {"context", "errors", "interchange", "quantize", "recipe"},
    "pipeline": {
        "blob",
        "bundle",
        "codegen",
        "context",
        "emitted",
        "errors",
        "golden_file",
        "importer",
        "lowering",
        "memory",
        "passes",
        "prune",
        "quantize",
        "recipe",
        "records",
        "self_check",
        "target",
        "tuning",
    },
    "self_check": {"bundle", "context", "errors", "importer", "runners", "validation"},
    # What is done with a bundle.
    # cuda-local builds a bundle's host program for this machine.
    "runners": {
        *("bundle", "codegen.cuda", "codegen.link", "codegen.plan", "errors"),
        *("golden", "gpu", "target"),
    },
    "data": {"codegen.plan", "errors", "golden", "resources", "tables", "whole_file", "zoo"},
    "float64": {"errors"},
    "metrics": {"float64"},
    "integer_reference": {"data", "quantization.interpreter"},
    "reference": {
        "bundle",
        "context",
        "data",
        "errors",
        "float64",
        "importer",
        "integer_reference",
        "onnx_parts",
        "onnx_session",
        "passes",
        "quantize",
        "recipe",
        "target",
        "zoo",
    },
    "validation_report": {"display"},
    "tally": {"data", "errors", "metrics", "validation_report"},
    "judge": {
        "display",
        "errors",
        "metrics",
        "recipe",
        "reference",
        "tally",
        "validation_report",
    },
    "validation": {
        "bundle",
        "data",
        "errors",
        "importer",
        "integer_reference",
        "judge",
        "metrics",
        "reference",
        "runners",
        "tally",
        "validation_report",
    },
    "layer_report": {"display", "validation_report"},
    "layer_pairs": {"metrics", "quantization.graph"},
    "layer_validation": {
        "bundle",
        "context",
        "data",
        "emitted",
        "errors",
        "layer_pairs",
        "layer_report",
        "metrics",
        "onnx_session",
        "passes",
        "quantization",
        "quantize",
        "recipe",
        "reference",
    },
    "peers": {"bundle", "errors", "machine", "reference", "runners", "zoo"},
    "benchmark": {
        "bundle",
        "codegen.plan",
        "display",
        "errors",
        "machine",
        "metrics",
        "peers",
        "runners",
        "validation_report",
    },
    "op_profile": {"bundle", "display", "errors", "machine", "runners"},
    "report": {
        "benchmark",
        "bundle",
        "display",
        "errors",
        "layer_report",
        "layer_validation",
        "machine",
        "op_profile",
        "runners",
        "validation_report",
    },
    "demo": {"bundle", "bundle_folder", "errors", "pipeline"},
    "doctor": {"codegen.cuda", "codegen.link", "errors", "runners", "target"},
    "cli": {
        "benchmark",
        "bundle",
        "components",
        "context",
        "data",
        "demo",
        "display",
        "doctor",
        "errors",
        "layer_validation",
        "op_profile",
        "pipeline",
        "recipe",
        "records",
        "report",
        "tables",
        "target",
        "tuning",
        "validation",
        "zoo",
        "whole_file",
    },
}

#: Heavy package → parts that may import it.
HEAVY: dict[str, set[str]] = {
    "tvm": {"kernels", "lowering", "tuning", "codegen", "runners"},
    "torch": {"importer", "peers", "quantization", "zoo"},
    "onnxscript": {"importer"},
    "wasmtime": {"runners"},
    "PIL": {"data"},
    "matplotlib": {"report"},
    "sklearn": {"zoo"},
    "nncf": {"quantization"},
    "flatbuffers": {"interchange"},
    "ai_edge_litert": {"peers"},
    "openvino": {"peers"},
    "ncnn": {"peers"},
}

#: Never imported at the top of a module: optional, or slow before the first word is printed.
LAZY_EVERYWHERE = {
    "torch",
    "onnxscript",
    "wasmtime",
    "PIL",
    "sklearn",
    "onnxruntime",
    "nncf",
    "matplotlib",
}
#: Programs that are run, not imported, may import at the top what they are about; so may folders
#: whose ``__init__`` alone is imported before they are asked for.
PROGRAMS = {"zoo"}
ASKED_FOR = {"edgepipe/quantization/finetune"}
#: Parts whose modules must not import even NumPy at the top.
LIGHT = {"__init__", "__main__", "cli", "display", "errors", "recipe", "resources", "target"}
SLOW = LAZY_EVERYWHERE | {"numpy", "onnx", "onnx_ir", "tvm"}


def imported(node: ast.AST) -> list[str]:
    """Dotted names that an import statement may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def statements(tree: ast.Module, *, top_only: bool) -> Iterator[ast.AST]:
    """All statements, or only those executed at import (without ``if TYPE_CHECKING``)."""
    if not top_only:
        yield from ast.walk(tree)
        return
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            pending += [*node.body, *node.orelse]
        if isinstance(node, ast.Try):
            pending += node.body


@cache
def modules(repository: Path) -> list[tuple[str, Path, ast.Module]]:
    """Part, path and tree of every module of the package."""
    root = repository / "edgepipe"
    return [
        (
            path.relative_to(root).parts[0].removesuffix(".py"),
            path.relative_to(repository),
            ast.parse(path.read_text(encoding="utf-8")),
        )
        for path in sorted(root.rglob("*.py"))
    ]


@cache
def imports(repository: Path) -> list[tuple[str, Path, str]]:
    """Part, path and dotted name of everything imported anywhere."""
    return [
        (part, path, name)
        for part, path, tree in modules(repository)
        for node in statements(tree, top_only=False)
        for name in imported(node)
    ]


def allowed(part: str, name: str) -> bool:
    """Whether ``part`` may import ``edgepipe.<name>``."""
    if part == "__init__" or name.split(".", maxsplit=1)[0] in (part, "__version__"):
        return True
    return any(name == rule or name.startswith(f"{rule}.") for rule in MAY_IMPORT[part])


def test_every_part_has_a_rule(repository: Path) -> None:
    unknown = {part for part, _, _ in modules(repository)} - MAY_IMPORT.keys() - {"__init__"}
    assert not unknown, f"add them to MAY_IMPORT: {unknown}"


def test_parts_import_only_what_they_may(repository: Path) -> None:
    wrong = [
        f"{path}: {name}"
        for part, path, name in imports(repository)
        if name.startswith("edgepipe.") and not allowed(part, name.removeprefix("edgepipe."))
    ]
    assert not wrong


@pytest.mark.slow
def test_heavy_packages_stay_where_they_belong(repository: Path) -> None:
    wrong = [
        f"{path}: {name}"
        for part, path, name in imports(repository)
        if part not in HEAVY.get(name.split(".")[0], {part})
    ]
    assert not wrong


def test_what_is_slow_or_optional_is_imported_late(repository: Path) -> None:
    wrong = []
    for part, path, tree in modules(repository):
        asked_for = path.parent.as_posix() in ASKED_FOR and path.stem != "__init__"
        late = SLOW if part in LIGHT else LAZY_EVERYWHERE
        late = set() if part in PROGRAMS or asked_for else late
        for node in statements(tree, top_only=True):
            wrong += [f"{path}: {name}" for name in imported(node) if name.split(".")[0] in late]
    assert not wrong


@pytest.mark.parametrize(
    ("part", "name", "verdict"),
    [
        ("passes", "lowering.lower", False),
        ("lowering", "codegen.plan.Plan", True),
        ("lowering", "codegen.link", False),
        ("kernels", "kernels.layout", True),
        ("cli", "runners", False),
    ],
)
def test_the_rules_can_refuse(part: str, name: str, verdict: bool) -> None:
    assert allowed(part, name) is verdict


def test_top_level_imports_are_told_from_late_ones() -> None:
    tree = ast.parse(
        "import torch\nif TYPE_CHECKING:\n import tvm\nelse:\n import onnx\n"
        "def f():\n import numpy\ntry:\n import PIL\nexcept ImportError: pass"
    )
    top = {name for node in statements(tree, top_only=True) for name in imported(node)}
    assert top == {"torch", "PIL"}
