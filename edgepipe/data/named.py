"""Data sets by name: ``calibration/*.toml`` says where the data are and how they become inputs.

A file of the same kind may be anywhere. Keys: ``name``, ``summary``, ``source`` (an ``.npz``, or a
folder of images or ``.npy``, relative to the TOML's folder), ``sha256`` of an ``.npz`` (checked
where it is given);
``images``, the key of uint8 images [N, H, W, C] that ``[preprocessing]`` (as in ``models/*.toml``)
turns into the single input, for an ``.npz`` without the input's own name; and ``[sampler]`` with
``order`` ("file" or "shuffled"), ``count`` (samples to take) and ``seed``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgepipe import tables
from edgepipe.codegen.plan import TensorSpec
from edgepipe.data.folder import apply, open_folder
from edgepipe.data.npz import load, open_npz
from edgepipe.data.samples import Array, Inputs, Samples, check_labels, from_arrays, runs_in
from edgepipe.errors import UserError
from edgepipe.resources import data_folder
from edgepipe.zoo import Preprocessing


@dataclass(frozen=True)
class Sampler:
    """Which samples are taken: the first ``count`` in file order or of a seeded shuffle."""

    order: str = "file"
    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.order not in ("file", "shuffled"):
            raise ValueError(f"sampler.order '{self.order}': known are file and shuffled")
        if self.count is not None and self.count < 1:
            raise ValueError("sampler.count must be positive")
        if self.seed < 0:
            raise ValueError("sampler.seed must be 0 or more")

    def indices(self, available: int) -> Array:
        """Indices of the samples to take out of ``available``."""
        taken = available if self.count is None else min(self.count, available)
        if self.order == "file":
            return np.arange(taken)
        return np.random.default_rng(self.seed).permutation(available)[:taken]


@dataclass(frozen=True)
class DataSet:
    """One file of ``calibration/``."""

    name: str
    summary: str
    source: str
    sha256: str = ""
    images: str = ""
    preprocessing: Preprocessing | None = None
    sampler: Sampler = Sampler()


def names() -> list[str]:
    """Names of the data sets that ship with edgepipe, sorted."""
    return sorted(p.stem for p in data_folder("calibration").glob("*.toml"))


def describe(name: str, folder: Path | None = None) -> DataSet:
    """Read ``name``'s file (in ``calibration/`` by default). Raises UserError."""
    path = (folder or data_folder("calibration")) / f"{name}.toml"
    entry: DataSet = tables.read(DataSet, tables.load_toml(path), path.name)
    return entry


def open_named(name: str, specs: Sequence[TensorSpec], folder: Path | None = None) -> Samples:
    """Samples of the data set ``name`` for a model with inputs ``specs``. Raises UserError."""
    entry = describe(name, folder)
    path = (folder or data_folder("calibration")) / entry.source
    if path.is_dir():
        if entry.sampler != Sampler() or entry.images:
            raise UserError("'sampler' and 'images' belong to an .npz", where=f"data set '{name}'")
        samples = open_folder(path, specs, entry.preprocessing)
        return replace(samples, description=f"data set '{name}': {samples.description}")
    if not path.is_file():
        raise UserError(f"its source '{entry.source}' is not there", where=f"data set '{name}'")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if entry.sha256 and digest != entry.sha256:
        raise UserError(
            f"{path.name} has sha256 {digest[:12]}…, not {entry.sha256[:12]}…",
            where=f"data set '{name}'",
            fix="fetch it again, or correct the file in calibration/",
        )
    if entry.images:
        return _from_images(entry, path, specs)
    samples = open_npz(path, specs)
    if entry.sampler == Sampler():
        return Samples(
            f"data set '{name}': {samples.description}", samples.count, samples.read, samples.labels
        )
    return _take(entry, load(path), specs)


def _from_images(entry: DataSet, path: Path, specs: Sequence[TensorSpec]) -> Samples:
    if len(specs) != 1 or len(specs[0].shape) != 4:
        raise UserError(
            "holds images; the model's input is not one", where=f"data set '{entry.name}'"
        )
    spec, steps = specs[0], entry.preprocessing or Preprocessing(scale=1 / 255)
    arrays = load(path)
    if entry.images not in arrays:
        raise UserError(f"no array '{entry.images}'", where=path.name)
    raw, labels = arrays[entry.images], arrays.get("labels")
    if raw.ndim != 4 or raw.dtype.kind not in "uif":
        raise UserError(f"'{entry.images}' is {raw.dtype}{list(raw.shape)}, not images [N,H,W,C]",
                        where=path.name)  # fmt: skip
    chosen = entry.sampler.indices(len(raw))
    rows = spec.shape[0]
    chosen = chosen[: len(chosen) // rows * rows]
    probe = apply(raw[:1], steps)
    runs_in(spec, (len(chosen), *probe.shape[1:]), probe.dtype, path.name)

    def read() -> Iterator[Inputs]:
        for start in range(0, len(chosen), rows):
            yield {spec.name: apply(raw[chosen[start : start + rows]], steps)}

    if labels is not None and labels.shape != raw.shape[:1]:
        raise UserError(f"'labels' has shape {list(labels.shape)}, not [{len(raw)}]",
                        where=path.name)  # fmt: skip
    taken = None if labels is None else check_labels(labels[chosen], len(chosen), path.name)
    return Samples(
        f"data set '{entry.name}' ({len(chosen)} images)", len(chosen) // rows, read, taken
    )


def _take(entry: DataSet, arrays: dict[str, Array], specs: Sequence[TensorSpec]) -> Samples:
    available = max((len(a) for a in arrays.values() if a.ndim), default=1)
    chosen = entry.sampler.indices(available)
    taken = {k: a[chosen] if a.ndim and len(a) == available else a for k, a in arrays.items()}
    return from_arrays(taken, specs, f"data set '{entry.name}'")
