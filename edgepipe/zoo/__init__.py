"""The zoo: networks by name, described by ``models/*.toml``. Adding one is adding a file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edgepipe import tables
from edgepipe.errors import UserError, did_you_mean
from edgepipe.resources import data_folder


@dataclass(frozen=True)
class ZooInput:
    """An input: its ONNX name, static shape (row-major) and NumPy dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Preprocessing:
    """How raw data becomes the input: ``(raw · scale − mean) / std``, per channel.

    ``raw`` says what the raw data are (such as "RGB, 0…255"); ``mean`` and ``std`` have one
    entry per channel, or one for all.
    """

    raw: str = ""
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if 0 in self.std:
            raise ValueError("preprocessing.std must not be 0")


@dataclass(frozen=True)
class ZooEntry:
    """One network.

    Either ``builder`` ("package.module:function", a torch builder with random weights) or
    ``file`` (an ONNX file in ``models/``) is set. ``outputs`` are the ONNX names. ``macs``
    counts multiply-accumulates of convolutions, dense layers, matrix products and recurrent
    cells at the shapes of ``inputs``;
    ``parameters`` counts trainable numbers. ``accuracy`` is the float top-1 (0…1) on
    ``test_data``, an ``.npz`` in ``models/`` with the input's name and ``labels`` as keys.
    """

    name: str
    summary: str
    inputs: tuple[ZooInput, ...]
    outputs: tuple[str, ...]
    macs: int
    parameters: int
    preprocessing: Preprocessing
    builder: str = ""
    file: str = ""
    accuracy: float | None = None
    test_data: str = ""

    @property
    def trained(self) -> bool:
        """Whether the weights come from training; networks with a builder are He-initialised."""
        return bool(self.file)

    def path(self, file: str) -> Path:
        """The path of a data file of this entry (``file`` or ``test_data``)."""
        return data_folder("models") / file


def names() -> list[str]:
    """Names of all networks of the zoo, sorted."""
    return sorted(p.stem for p in data_folder("models").glob("*.toml"))


def describe(name: str) -> ZooEntry:
    """Read one entry. Raises UserError for an unknown name or a malformed file."""
    if name not in names():
        raise UserError(f"unknown model '{name}'", where="MODEL", fix=did_you_mean(name, names()))
    path = data_folder("models") / f"{name}.toml"
    try:
        return _entry(tables.load_toml(path), path)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"bad or missing key: {error}", where=path.name) from None


def _entry(raw: dict[str, Any], path: Path) -> ZooEntry:
    known = {f.name for f in fields(ZooEntry)}
    for key in raw:
        if key not in known:
            raise UserError(f"unknown key '{key}'", where=path.name, fix=did_you_mean(key, known))
    if raw["name"] != path.stem or bool(raw.get("builder")) == bool(raw.get("file")):
        raise ValueError("name must be the file's, and one of builder and file is needed")
    inputs = tuple(ZooInput(**{**i, "shape": tuple(i["shape"])}) for i in raw["inputs"])
    outputs = tuple(raw["outputs"])
    steps: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in raw.get("preprocessing", {}).items()
    }
    parts = {"inputs": inputs, "outputs": outputs, "preprocessing": Preprocessing(**steps)}
    return ZooEntry(**{**raw, **parts})
