"""Bundles: folders that hold a compiled model and say what it is. Whole, or not there at all."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe import bundle_folder, manifest_file
from edgepipe.bundle_folder import MANIFEST
from edgepipe.codegen.plan import Plan, TensorSpec
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.recipe import Recipe
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgepipe.importer.source import Source


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
        bundle = cls(folder.resolve(), manifest_file.read(folder))
        for name, facts in bundle.manifest["files"].items():
            bundle._check_size(name, facts)
        return bundle

    @cached_property
    def target(self) -> Target:
        """The target the bundle was compiled for, as it was then."""
        return manifest_file.target(self.manifest)

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
        return manifest_file.tensors(self.manifest["inputs"])

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs, in order."""
        return manifest_file.tensors(self.manifest["outputs"])

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
    try:
        files = _code_files(source.name, plan, objects, context, prefix)
    except OSError as error:  # temporary files: nothing else is written there
        raise UserError(
            f"cannot write temporary files: {error.strerror}",
            where=tempfile.gettempdir(),
            fix="free some space, or set TMPDIR to another folder",
        ) from None
    files["weights.bin"] = driver.weights_file(plan)
    files["golden.npz"], reference = _golden_file(source, plan)
    context.progress("write")
    manifest = manifest_file.describe(source, plan, context, prefix, files, reference)
    bundle_folder.install(destination, {**files, MANIFEST: manifest_file.encode(manifest)})
    return Bundle.open(destination)


def _code_files(
    name: str, plan: Plan, objects: Mapping[str, bytes], context: Context, prefix: str
) -> dict[str, bytes]:
    from edgepipe.codegen import driver, link

    target = context.target
    sources = driver.render(
        plan, prefix, f"{name} {target.name} edgepipe {manifest_file.version_of('edgepipe')}"
    )
    if target.kind == "wasm":
        texts = driver.wasm_files(plan, prefix, sorted(v for v in objects if v))
        code = link.wasm(target, sources, objects, prefix)
    else:
        texts = driver.native_files(plan, prefix)
        sources["bench.c"] = texts["bench.c"]
        code = link.native(target, sources, objects[""], prefix, context.progress)
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
