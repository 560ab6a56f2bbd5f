"""Data to run a model on: SRC on the command line, as a stream of single runs.

SRC is an ``.npz`` whose keys are the input names (plus optional ``labels``), a folder of
``.npy`` files or images, a name in ``calibration/``, or a ``.toml`` of the same kind (``named``),
which also says how images become inputs. Without one the data are synthetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepipe.codegen.plan import TensorSpec
from edgepipe.data import named
from edgepipe.data.folder import open_folder
from edgepipe.data.npz import open_npz
from edgepipe.data.samples import Array, Inputs, Samples, from_arrays
from edgepipe.data.synthetic import synthetic
from edgepipe.errors import UserError, did_you_mean
from edgepipe.zoo import Preprocessing

__all__ = ["Inputs", "Samples", "check_source", "from_arrays", "open_data", "synthetic"]


def open_data(
    source: str | Path | Mapping[str, Array],
    specs: Sequence[TensorSpec],
    preprocessing: Preprocessing | None = None,
) -> Samples:
    """Open SRC for a model with the inputs ``specs``.

    ``preprocessing`` says how images become inputs (default: RGB / 255).
    Raises UserError where the data cannot be the model's input, also later, while reading.
    """
    if isinstance(source, Mapping):
        return from_arrays(source, specs, "arrays")
    check_source(source)
    path = Path(source)
    if path.is_dir():
        return open_folder(path, specs, preprocessing)
    if path.suffix == ".toml":
        return named.open_named(path.stem, specs, path.parent)
    if path.is_file() or path.suffix == ".npz":
        return open_npz(path, specs)
    return named.open_named(str(source), specs)


def check_source(source: str | Path) -> None:
    """Refuse a SRC that is not there, before any work. Raises UserError."""
    path, known = Path(source), named.names()
    if path.exists() or str(source) in known:
        return
    if path.suffix in (".npz", ".toml"):
        raise UserError("no such file", where=str(path), fix="give an .npz, a folder or a data set")
    raise UserError(
        "no such file, folder or data set",
        where=str(source),
        fix=did_you_mean(str(source), known) if known else "give an .npz or a folder",
    )
