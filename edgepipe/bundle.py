"""Bundles: folders that hold a compiled model and say what it is. Whole, or not there at all."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe import bundle_folder, manifest_file
from edgepipe.blob import Blob
from edgepipe.bundle_folder import MANIFEST
from edgepipe.codegen.plan import Plan, TensorSpec
from edgepipe.components import NOTICES, Component, notices
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.golden_file import GoldenFile
from edgepipe.recipe import Recipe
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgepipe.importer.source import Source
    from edgepipe.prune import Pruned
    from edgepipe.quantize import Quantized


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. ``manifest`` is its parsed manifest.json; do not change it."""

    path: Path
    manifest: dict[str, Any]
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)
    _threads: int | None = None

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
        return manifest_file.recipe(self.manifest)

    @property
    def prefix(self) -> str:
        """What the names of the C functions start with."""
        return str(self.manifest["prefix"])

    @property
    def code_file(self) -> str:
        """The file with the code that a runner prefers."""
        return next(name for name in manifest_file.CODE if name in self.manifest["files"])

    @property
    def threads(self) -> int:
        """Threads that share an inference; 0: as many as the device has cores."""
        return self.compiled_threads if self._threads is None else self._threads

    @property
    def compiled_threads(self) -> int:
        """``threads`` as the bundle was compiled; 1 where no others can share."""
        return int(self.manifest.get("threads", 1))

    def with_threads(self, threads: int) -> Bundle:
        """The same bundle, run by ``threads``. Raises UserError where it cannot be."""
        from edgepipe.codegen.plan import MOST_THREADS

        most = self.compiled_threads or MOST_THREADS
        if threads < (1 if self.compiled_threads else 0) or threads > most:
            what = f"was compiled for {f'up to {most} threads' if most > 1 else 'one thread'}"
            raise UserError(what, where=self.path.name, fix=f"compile with --threads {threads}")
        return replace(self, _threads=threads)

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The model's inputs, in order."""
        return manifest_file.tensors(self.manifest["inputs"])

    @cached_property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The model's outputs, in order."""
        return manifest_file.tensors(self.manifest["outputs"])

    @property
    def components(self) -> list[Component]:
        """What is in the bundle, with licences."""
        return manifest_file.components_of(self.manifest)

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
        """Golden inputs and what the reference answers to them, both by tensor name: the original
        model, of a quantized bundle the Q/DQ model."""
        return self._golden("input", self.inputs), self._golden("output", self.outputs)

    def golden_floats(self) -> dict[str, Any]:
        """The float model's outputs for the golden inputs of a quantized bundle; else empty."""
        return self._golden("float", self.outputs)

    def golden_integers(self) -> dict[str, Any]:
        """What integers give for the golden inputs, by definition; else empty."""
        return self._golden("integer", self.outputs)

    def _golden(self, stem: str, tensors: tuple[TensorSpec, ...]) -> dict[str, Any]:
        import numpy as np

        with np.load(io.BytesIO(self.file("golden.npz").read_bytes())) as archive:
            names = {f"{stem}_{i}": t.name for i, t in enumerate(tensors)}
            return {name: archive[key] for key, name in names.items() if key in archive}

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


def contents(
    source: Source, plan: Plan, objects: Mapping[str, bytes], context: Context, prefix: str,
    golden: GoldenFile, quantized: Quantized | None = None,
    extra: Mapping[str, bytes] | None = None, pruned: Pruned | None = None,
) -> dict[str, bytes | Blob]:  # fmt: skip
    """Link ``objects``, and return the files of the bundle by name.

    ``objects`` maps a variant name ("" is the plain one) to a relocatable object that defines the
    kernels ``plan`` calls. ``quantized`` and ``pruned`` are what the manifest says about them;
    ``extra`` are further files by name. The weights are those of ``plan``, not a copy.
    Raises UserError.
    """
    from edgepipe.codegen import driver

    context.progress("link")
    try:
        code = _code_files(source.name, plan, objects, context, prefix)
    except OSError as error:  # temporary files: nothing else is written there
        raise UserError(
            f"cannot write temporary files: {error.strerror}",
            where=tempfile.gettempdir(),
            fix="free some space, or set TMPDIR to another folder",
        ) from None
    context.progress("write")
    files: dict[str, bytes | Blob] = {
        **code, "weights.bin": driver.weights_file(plan), "golden.npz": golden.content,
        **(extra or {}),
    }  # fmt: skip
    files[NOTICES] = notices(manifest_file.made_of(context.target, files))
    manifest = manifest_file.describe(
        source, plan, context, prefix, files, golden.references, quantized, pruned
    )
    return {**files, MANIFEST: manifest_file.encode(manifest)}


def install(
    destination: Path,
    files: dict[str, bytes | Blob],
    check: Callable[[Path], None] = lambda folder: None,
) -> Bundle:
    """Write ``files``, which this empties, to ``destination``; an older bundle there is replaced.

    ``check`` looks at the bundle before it takes its place. Whatever fails, and on Ctrl-C,
    ``destination`` is as it was before.
    Raises UserError where the path holds something else or cannot be written.
    """
    bundle_folder.install(destination, files, check)
    return Bundle.open(destination)


def _code_files(
    name: str, plan: Plan, objects: Mapping[str, bytes], context: Context, prefix: str
) -> dict[str, bytes]:
    from edgepipe.codegen import driver, link, loader, peaks

    target = context.target
    version = f"{name} {target.name} edgepipe {manifest_file.version_of('edgepipe')}"
    if target.kind == "cuda":
        return _gpu_files(plan, objects, context, prefix, version)
    bench = peaks.build(target, prefix)
    sources = driver.render(plan, prefix, version)
    if target.kind == "wasm":
        texts = loader.files(plan, prefix, sorted(v for v in objects if v), bench)
        code = link.wasm(target, sources, objects, prefix, bench.objects, driver.is_warmed(plan))
    else:
        texts = driver.native_files(plan, prefix, bench)
        programs = ("bench.c", "profile.c", *driver.POOL)
        sources |= {name: texts[name] for name in programs if name in texts}
        code = link.native(
            target, sources, objects[""], prefix, context.progress, bench.objects[""]
        )
        texts["model.h"] = sources["model.h"]
    return {**code, **{name: text.encode("utf-8") for name, text in texts.items()}}


def _gpu_files(
    plan: Plan, code: Mapping[str, bytes], context: Context, prefix: str, version: str
) -> dict[str, bytes]:
    """Programs, and all that it takes to build them for another machine: runner cuda-local."""
    from edgepipe.codegen import cuda, driver, link
    from edgepipe.codegen.cuda import host

    assert context.target.cuda is not None
    cuda.check_memory(host.Block(plan).bytes, context.target)
    sources = host.render(plan, prefix, version, context.target.cuda, code)
    sources |= driver.native_files(plan, prefix)
    built = link.gpu(context.target.link.zig_target, sources, code)
    return {**built, **code, **{name: text.encode() for name, text in sources.items()}}
