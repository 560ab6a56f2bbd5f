"""Bundles: folders that hold a compiled model and say what it is. Whole, or not there at all."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe import bundle_folder
from edgepipe.bundle_folder import FORMAT, MANIFEST
from edgepipe.codegen.plan import Plan, TensorSpec
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.recipe import Recipe
from edgepipe.target import Link, Run, Simd, Target

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgepipe.importer.source import Source

#: Version of the manifest's layout; raised when a reader of the old one would go wrong.
SCHEMA = 1


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. ``manifest`` is its parsed manifest.json; do not change it."""

    path: Path
    manifest: dict[str, Any]
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle folder and check its manifest, file names and sizes.

        The content of a file is checked against its sha256 when ``file`` first hands it out;
        ``verify`` checks all. Raises UserError.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise UserError("no such bundle folder", where=str(path))
        bundle = cls(folder.resolve(), _read_manifest(folder))
        for name, facts in bundle.manifest["files"].items():
            bundle._check_size(name, facts)
        return bundle

    @cached_property
    def target(self) -> Target:
        """The target the bundle was compiled for, as it was then."""
        raw = self.manifest["target"]
        values = {
            **raw,
            "simd": Simd(**raw["simd"]),
            "link": Link(**raw["link"]),
            "run": Run(**{**raw["run"], "runners": tuple(raw["run"]["runners"])}),
            "recipes": tuple(raw["recipes"]),
            "variants": {name: tuple(v) for name, v in raw["variants"].items()},
        }
        return Target(**values)

    @property
    def recipe(self) -> Recipe:
        """The recipe the bundle was compiled with."""
        return Recipe.parse(self.manifest["recipe"])

    @property
    def prefix(self) -> str:
        """What the names of the C functions start with."""
        return str(self.manifest["prefix"])

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs, in order."""
        return _specs(self.manifest["inputs"])

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs, in order."""
        return _specs(self.manifest["outputs"])

    def file(self, name: str) -> Path:
        """Path of one file of the bundle, its content checked. Raises UserError."""
        facts = self.manifest["files"].get(name)
        if facts is None:
            raise UserError(f"the bundle has no {name}", where=str(self.path))
        path = self.path / name
        if name not in self._verified:
            self._check_size(name, facts)
            with path.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != facts["sha256"]:
                    raise UserError(
                        "the file was changed after the bundle was written",
                        where=str(path),
                        fix="compile the model again",
                    )
            self._verified.add(name)
        return path

    def verify(self) -> None:
        """Check the content of every file against the manifest. Raises UserError."""
        for name in self.manifest["files"]:
            self.file(name)

    def golden(self) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, Any]]:
        """Golden inputs and the original model's outputs, both by tensor name."""
        import numpy as np

        with np.load(io.BytesIO(self.file("golden.npz").read_bytes())) as archive:
            inputs = {t.name: archive[f"input_{i}"] for i, t in enumerate(self.inputs)}
            outputs = {
                t.name: archive[f"output_{i}"]
                for i, t in enumerate(self.outputs)
                if f"output_{i}" in archive
            }
        return inputs, outputs

    def run(
        self, inputs: Mapping[str, npt.NDArray[Any]], runner: str | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Execute the model. ``inputs`` and the result are keyed by tensor name.

        A longer leading dimension than the model's runs sample by sample, outputs stacked.
        Raises UserError for inputs that do not fit and for a missing runner.
        """
        from edgepipe import runners

        return runners.run_samples(self, inputs, runner)

    def validate(self, **options: Any) -> Any:
        """Compare with the original model; see ``edgepipe.validation.validate``."""
        from edgepipe import validation

        return validation.validate(self, **options)

    def bench(self, **options: Any) -> Any:
        """Measure latency; see ``edgepipe.benchmark.bench``."""
        from edgepipe import benchmark

        return benchmark.bench(self, **options)

    def _check_size(self, name: str, facts: Any) -> None:
        path = self.path / name
        if not path.is_file() or path.is_symlink():
            raise UserError(f"{name} is missing", where=str(self.path), fix="compile again")
        if path.stat().st_size != facts["bytes"]:
            raise UserError(
                f"{path.stat().st_size} bytes, the manifest says {facts['bytes']}",
                where=str(path),
                fix="compile the model again",
            )


def destination(output: str | Path | None, source: Source, target: Target, recipe: Recipe) -> Path:
    """Where the bundle goes: ``output``, or NAME-TARGET-RECIPE in the working folder.

    Raises UserError early where the bundle could not be written there: the path exists and is
    not a bundle, or its parent cannot be written to.
    """
    name = bundle_folder.safe_name(f"{source.name}-{target.name}-{recipe}")
    path = Path(output) if output is not None else Path.cwd() / name
    bundle_folder.check_replaceable(path)
    bundle_folder.check_writable(path)
    return path


def write(
    destination: Path, source: Source, plan: Plan, objects: Mapping[str, bytes],
    context: Context, prefix: str,
) -> Bundle:  # fmt: skip
    """Link ``objects``, and write the bundle to ``destination``; an older bundle there is replaced.

    ``objects`` maps a variant name ("" is the plain one) to a relocatable object that defines the
    kernels ``plan`` calls. Whatever fails, and on Ctrl-C, ``destination`` is as it was before.
    Raises UserError where the path holds something else or cannot be written.
    """
    from edgepipe.codegen import driver

    bundle_folder.check_replaceable(destination)
    context.progress("link")
    files = _code_files(source.name, plan, objects, context.target, prefix)
    files["weights.bin"] = driver.weights_file(plan)
    files["golden.npz"], reference = _golden_file(source, plan)
    context.progress("write")
    manifest = _manifest(source, plan, context, prefix, files, reference)
    bundle_folder.install(destination, {**files, MANIFEST: _json(manifest)})
    return Bundle.open(destination)


def _code_files(
    name: str, plan: Plan, objects: Mapping[str, bytes], target: Target, prefix: str
) -> dict[str, bytes]:
    from edgepipe.codegen import driver, link

    sources = driver.render(plan, prefix, f"{name} {target.name} edgepipe {_version('edgepipe')}")
    if target.kind == "wasm":
        texts = driver.wasm_files(plan, prefix, sorted(v for v in objects if v))
        code = link.wasm(target, sources, objects, prefix)
    else:
        texts = driver.native_files(plan, prefix)
        code = link.native(target, {**sources, "bench.c": texts["bench.c"]}, objects[""], prefix)
        texts["model.h"] = sources["model.h"]
    return {**code, **{name: text.encode("utf-8") for name, text in texts.items()}}


def _golden_file(source: Source, plan: Plan) -> tuple[bytes, str]:
    from edgepipe import golden

    inputs, outputs, reference = golden.golden(source.proto_bytes(), plan.inputs, plan.outputs)
    arrays = {f"input_{i}": inputs[t.name] for i, t in enumerate(plan.inputs)}
    arrays |= {
        f"output_{i}": outputs[t.name] for i, t in enumerate(plan.outputs) if t.name in outputs
    }
    return golden.npz_bytes(arrays), reference


def _manifest(
    source: Source, plan: Plan, context: Context, prefix: str, files: Mapping[str, bytes],
    reference: str,
) -> dict[str, Any]:  # fmt: skip
    from edgepipe.codegen import driver

    conversions = sum(_is_layout_conversion(k.op_type, k.kernel) for k in plan.audit)
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "versions": {
            name: _version(package)
            for name, package in (
                ("edgepipe", "edgepipe"), ("tvm", "apache-tvm"), ("zig", "ziglang"),
            )
        },
        "target": asdict(context.target),
        "recipe": str(context.recipe),
        "prefix": prefix,
        # The folder a model was read from is no property of the bundle.
        "source": {
            "name": source.name,
            "origin": str(source.origin).replace("\\", "/").rsplit("/", 1)[-1],
            "sha256": source.sha256,
        },
        "golden": {"reference": reference},
        "inputs": [_tensor(t) for t in plan.inputs],
        "outputs": [_tensor(t) for t in plan.outputs],
        "memory": {
            "arena_bytes": driver.arena_bytes(plan),
            "peak_live_bytes": plan.peak_live_bytes,
            "weights_bytes": len(plan.weights),
        },
        "macs": sum(kernel.macs for kernel in plan.audit),
        "layout_conversions": conversions,
        "kernels": [asdict(kernel) for kernel in plan.audit],
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }  # fmt: skip


def _is_layout_conversion(op_type: str, kernel: str) -> bool:
    return "layout" in op_type.lower() or "layout" in kernel.lower()


def _tensor(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}


def _specs(raw: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(t["name"], tuple(t["shape"]), t["dtype"]) for t in raw)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode("utf-8")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = bundle_folder.read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError("not an edgepipe bundle", where=str(folder), fix="give a folder that "
                        "'edgepipe compile' wrote")  # fmt: skip
    if manifest.get("schema") != SCHEMA:
        raise UserError(
            f"manifest schema {manifest.get('schema')}, this edgepipe reads {SCHEMA}",
            where=str(path),
            fix="compile the model again with this version",
        )
    needed = {"files", "inputs", "outputs", "target", "recipe", "prefix", "memory"}
    if lacking := sorted(needed - manifest.keys()):
        raise UserError(f"the manifest lacks {', '.join(lacking)}", where=str(path))
    for name in manifest["files"]:
        if name != bundle_folder.safe_name(name) or name.startswith("."):
            raise UserError(f"the manifest names a file outside the bundle: '{name}'",
                            where=str(path))  # fmt: skip
    return manifest
