"""A folder of ``.npy`` files or images, one sample each, in the order of their names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.codegen.plan import TensorSpec
from edgepipe.data.npz import DAMAGE
from edgepipe.data.samples import Array, Inputs, Samples, check_numbers, runs_in
from edgepipe.errors import UserError
from edgepipe.zoo import Preprocessing

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm")

#: Larger images are refused before they are unpacked: 300 MB as RGB.
MOST_PIXELS = 100_000_000

#: Without a word on preprocessing, images become RGB in 0…1.
DEFAULT = Preprocessing(raw="RGB, 0…255", scale=1 / 255)


def open_folder(
    path: Path, specs: Sequence[TensorSpec], preprocessing: Preprocessing | None = None
) -> Samples:
    """Samples from the files of ``path`` for a model with a single input. Raises UserError.

    ``.npy`` files hold the input as it is, with or without the batch dimension of 1. Images are
    resized to the input's [N, C, H, W] (bilinear, the whole image) and become
    ``(raw · scale − mean) / std``, raw being RGB, BGR or grey in 0…255 by ``preprocessing.raw``.
    """
    if len(specs) != 1:
        raise UserError(
            f"a folder serves models with one input; this one has {len(specs)}",
            where=str(path),
            fix="give an .npz with a key for each",
        )
    spec = specs[0]
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in (".npy", *IMAGES))
    if not files:
        raise UserError("no .npy files and no images in this folder", where=str(path))
    kinds = {p.suffix.lower() == ".npy" for p in files}
    if len(kinds) > 1:
        raise UserError("both .npy files and images in this folder", where=str(path))
    batch = spec.shape[0] if spec.shape else 1
    if batch > 1 and len(files) % batch:
        raise UserError(
            f"{len(files)} files do not fill batches of {batch}",
            where=str(path),
            fix="add or remove some, or compile with batch 1",
        )
    load = _Images(spec, preprocessing or DEFAULT) if kinds == {False} else _Arrays(spec)

    def read() -> Iterator[Inputs]:
        for start in range(0, len(files), batch):
            rows = [load(file) for file in files[start : start + batch]]
            array = np.concatenate(rows) if batch > 1 else rows[0]
            yield {spec.name: check_numbers(array, spec, start // batch, str(path))}

    how = f", {load.described}" if isinstance(load, _Images) else ""
    return Samples(f"{path.name}/ ({len(files)} files{how})", len(files) // batch, read)


class _Arrays:
    """Reads one row of the batch from an ``.npy`` file."""

    def __init__(self, spec: TensorSpec) -> None:
        shape = (1, *spec.shape[1:]) if spec.shape else ()
        self.row = TensorSpec(spec.name, shape, spec.dtype)

    def __call__(self, file: Path) -> Array:
        try:
            array: Array = np.load(file, allow_pickle=False)
        except DAMAGE as error:
            raise UserError(f"not a readable .npy: {error}", where=file.name) from None
        if array.shape == self.row.shape[1:] and array.shape:
            array = array[np.newaxis]
        if runs_in(self.row, array.shape, array.dtype, file.name) != 1:
            raise UserError(
                f"holds {array.shape[0]} samples", where=file.name, fix="one sample in each file"
            )
        return array


class _Images:
    """Reads one image as [1, C, H, W]."""

    def __init__(self, spec: TensorSpec, preprocessing: Preprocessing) -> None:
        if len(spec.shape) != 4 or spec.shape[1] not in (1, 3):
            raise UserError(
                f"images cannot be input '{spec.name}' of shape {list(spec.shape)}",
                where="--data",
                fix="images fit [N, 3, H, W] and [N, 1, H, W]; give an .npz",
            )
        try:
            from PIL import Image
        except ImportError:
            raise UserError(
                "images need Pillow", where="--data", fix="pip install 'edgepipe[images]'"
            ) from None
        self.image: Any = Image
        self.spec, self.steps = spec, preprocessing
        self.bgr = preprocessing.raw.upper().startswith("BGR")
        order = "grey" if spec.shape[1] == 1 else "BGR" if self.bgr else "RGB"
        self.described = f"{order} · {preprocessing.scale:.6g} − mean / std"

    def __call__(self, file: Path) -> Array:
        _, channels, height, width = self.spec.shape
        try:
            with warnings.catch_warnings(), self.image.open(file) as picture:
                warnings.simplefilter("ignore")
                if picture.width * picture.height > MOST_PIXELS:
                    raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
                resized = picture.convert("L" if channels == 1 else "RGB").resize(
                    (width, height), self.image.Resampling.BILINEAR
                )
                raw = np.asarray(resized, dtype=np.float32).reshape(height, width, channels)
        except Exception as error:  # every format's decoder has error types of its own
            raise UserError(f"not a readable image: {error}", where=file.name) from None
        return apply(raw[..., ::-1] if self.bgr else raw, self.steps).astype(self.spec.dtype)


def apply(raw: Array, steps: Preprocessing) -> Array:
    """``raw`` [H, W, C] (or [N, H, W, C]) → float32 [N, C, H, W] by ``(raw·scale − mean)/std``."""
    batch = raw[np.newaxis] if raw.ndim == 3 else raw
    for name, values in (("mean", steps.mean), ("std", steps.std)):
        if len(values) not in (1, batch.shape[-1]):
            raise UserError(f"{len(values)} values for {batch.shape[-1]} channels",
                            where=f"preprocessing.{name}")  # fmt: skip
    with np.errstate(all="ignore"):
        mean, std = np.array(steps.mean, np.float32), np.array(steps.std, np.float32)
        result = (batch.astype(np.float32) * np.float32(steps.scale) - mean) / std
    if np.isfinite(batch).all() and not np.isfinite(result).all():
        raise UserError("gives numbers that float32 does not hold", where="preprocessing",
                        fix="look at scale, mean and std")  # fmt: skip
    return np.ascontiguousarray(np.moveaxis(result, -1, 1))
