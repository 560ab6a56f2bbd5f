"""manifest.json: what a bundle says about itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe import bundle_folder, components, roofline, tables
from edgepipe.blob import Blob
from edgepipe.bundle_folder import FORMAT, MANIFEST
from edgepipe.codegen.plan import KernelAudit, Plan, TensorSpec
from edgepipe.components import Component
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.recipe import Recipe
from edgepipe.target import Target

if TYPE_CHECKING:
    from edgepipe.importer.source import Source
    from edgepipe.prune import Pruned
    from edgepipe.quantize import Quantized

#: Version of the manifest's layout; raised when a reader of the old one would go wrong.
SCHEMA = 2

#: The first of these that a bundle has is its code; of a GPU's all is in its program.
CODE = ("model.relaxed.wasm", "model.wasm", "model.so", "bench")

#: Largest tensor: WebAssembly and 32-bit Arm address no more in one piece.
MAX_BYTES = 2**31

_NEEDED = frozenset({"files", "inputs", "outputs", "target", "recipe", "prefix", "memory"})


@dataclass(frozen=True)
class _Source:
    name: str
    origin: str
    sha256: str


@dataclass(frozen=True)
class _File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Memory:
    arena_bytes: int
    weights_bytes: int
    peak_live_bytes: int
    arena: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class _Quantization:
    integer: bool
    imported: bool
    output_steps: dict[str, float]


@dataclass(frozen=True)
class _Checked:
    """What readers of a manifest rely on."""

    prefix: str
    recipe: str
    recipe_settings: dict[str, Any]
    source: _Source
    files: dict[str, _File]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    memory: _Memory
    kernels: tuple[KernelAudit, ...]
    macs: int
    golden: dict[str, str]
    quantization: _Quantization | None = None
    sparsity: dict[str, Any] | None = None
    gpu: dict[str, Any] | None = None
    components: tuple[Component, ...] = ()


def describe(
    source: Source, plan: Plan, context: Context, prefix: str,
    files: Mapping[str, bytes | Blob],
    golden: Mapping[str, str], quantized: Quantized | None = None,
    pruned: Pruned | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a bundle with ``files``; ``golden`` names what made the golden outputs.

    Nothing in it depends on when or where the bundle was made.
    """
    from edgepipe.codegen import driver

    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "versions": versions(),
        "components": [c.to_json() for c in made_of(context.target, files)],
        "target": asdict(context.target),
        "recipe": str(context.recipe),
        "recipe_settings": context.recipe.settings.to_json(),
        "quantization": None if quantized is None else quantized.manifest,
        "sparsity": None if pruned is None else pruned.manifest,
        "prefix": prefix,
        "threads": plan.threads,
        # The folder a model was read from is no property of the bundle.
        "source": {
            "name": source.name,
            "origin": str(source.origin).replace("\\", "/").rsplit("/", 1)[-1],
            "sha256": source.sha256,
        },
        "golden": dict(golden),
        "inputs": [_tensor(t) for t in plan.inputs],
        "outputs": [_tensor(t) for t in plan.outputs],
        "memory": {
            "arena_bytes": driver.arena_bytes(plan),
            "peak_live_bytes": plan.peak_live_bytes,
            "weights_bytes": len(plan.weights),
            "arena": [list(astuple(tensor)) for tensor in plan.arena],
        },
        "macs": sum(kernel.macs for kernel in plan.audit),
        "layout_conversions": sum(_converts_layout(k.op_type, k.kernel) for k in plan.audit),
        "kernels": [asdict(kernel) for kernel in plan.audit],
        "gpu": _gpu(plan, context.target),
        "files": {
            name: {"bytes": len(data), "sha256": _sha256(Blob.of(data))}
            for name, data in files.items()
        },
    }


def _sha256(data: Blob) -> str:
    digest = hashlib.sha256()
    for piece in data.pieces:
        digest.update(piece)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of what makes bundles."""
    packages = {"edgepipe": "edgepipe", "tvm": "apache-tvm", "zig": "ziglang"}
    return {name: version_of(package) for name, package in packages.items()}


def made_of(target: Target, files: Iterable[str]) -> list[Component]:
    """What a bundle with ``files`` for ``target`` contains, with licences."""
    return components.of_bundle(target, files, versions())


def encode(manifest: dict[str, Any]) -> bytes:
    """The manifest as JSON, keys sorted."""
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode("utf-8")


def read(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of the bundle ``folder``. Raises UserError.

    After it ``target``, ``tensors`` and the recipe of the result can be read without error, and
    every key of ``files`` is a plain file name.
    """
    path = folder / MANIFEST
    manifest = bundle_folder.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            "not an edgepipe bundle",
            where=str(folder),
            fix="give a folder that 'edgepipe compile' wrote",
        )
    again = "compile the model again with this version"
    if manifest.get("schema") != SCHEMA:
        what = f"manifest schema {manifest.get('schema')}, this edgepipe reads {SCHEMA}"
        raise UserError(what, where=str(path), fix=again)
    if lacking := sorted(_NEEDED - manifest.keys()):
        raise UserError(f"the manifest lacks {', '.join(lacking)}", where=str(path), fix=again)
    try:
        _check(manifest)
    except UserError as error:
        raise UserError(error.what, where=str(path), fix=again) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"the manifest is damaged: {type(error).__name__} {error}"
        raise UserError(what, where=str(path), fix=again) from None
    return manifest


def target(manifest: Mapping[str, Any]) -> Target:
    """The target in ``manifest``; entries of other versions of edgepipe are left out."""
    read: Target = tables.read(Target, manifest["target"], "target", extra=True)
    return read


def recipe(manifest: Mapping[str, Any]) -> Recipe:
    """The recipe in ``manifest``, with what a recipe file changed."""
    return Recipe.read(manifest["recipe"], manifest.get("recipe_settings", {}))


def tensors(raw: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    """The manifest's inputs or outputs."""
    return tuple(tables.read(TensorSpec, tensor, "tensor", extra=True) for tensor in raw)


def components_of(manifest: Mapping[str, Any]) -> list[Component]:
    """What the bundle contains, with licences; empty where another version did not write it."""
    raw = manifest.get("components", [])
    return [tables.read(Component, entry, "component", extra=True) for entry in raw]


def version_of(package: str) -> str:
    """The installed version of ``package``, or ``unknown``."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _check(manifest: dict[str, Any]) -> None:
    from edgepipe.codegen import driver

    tables.read(_Checked, manifest, MANIFEST, extra=True)
    target(manifest)
    recipe(manifest)
    driver.check_prefix(manifest["prefix"])
    if type(manifest.get("threads", 1)) is not int:
        raise TypeError("threads")
    for tensor in (*tensors(manifest["inputs"]), *tensors(manifest["outputs"])):
        if any(extent < 0 for extent in tensor.shape) or driver.tensor_bytes(tensor) > MAX_BYTES:
            raise UserError(f"a tensor of shape {list(tensor.shape)}")
    for name in manifest["files"]:
        if not name or name != bundle_folder.safe_name(name) or name.startswith("."):
            raise UserError(f"names a file outside the bundle: '{name}'")
    if "weights.bin" not in manifest["files"]:
        raise UserError("the manifest names no weights.bin")
    if not any(name in manifest["files"] for name in CODE):
        raise UserError(f"the manifest names no code: none of {', '.join(CODE)}")


def _converts_layout(op_type: str, kernel: str) -> bool:
    return "layout" in op_type.lower() or "layout" in kernel.lower()


def _gpu(plan: Plan, target: Target) -> dict[str, Any] | None:
    if target.cuda is None:
        return None
    from edgepipe.codegen.cuda import host

    return roofline.to_json(plan, target.cuda, host.Block(plan).bytes)


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}
