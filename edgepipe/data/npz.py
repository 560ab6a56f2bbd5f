"""An ``.npz`` as a stream: members are read run by run, so that it need not fit into memory."""

from __future__ import annotations

import lzma
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from edgepipe import whole_file
from edgepipe.codegen.plan import TensorSpec
from edgepipe.data.samples import (
    Array,
    Inputs,
    Samples,
    check_labels,
    check_names,
    check_numbers,
    common_count,
    runs_in,
)
from edgepipe.errors import UserError

#: What zipfile, zlib and NumPy's parser of headers, a Python expression, make of damaged bytes.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, KeyError,
    TypeError, SyntaxError, NotImplementedError, RuntimeError, RecursionError, OverflowError,
    tokenize.TokenError,
)  # fmt: skip


@dataclass(frozen=True)
class _Member:
    """Header of one array in an ``.npz``."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool


def open_npz(path: Path, specs: Sequence[TensorSpec]) -> Samples:
    """Samples from an ``.npz``, read run by run. Pickled objects are refused. Raises UserError."""
    where = path.name
    if not path.is_file():
        raise UserError("no such file", where=str(path), fix="give an .npz, a folder or a data set")
    members = _headers(path)
    check_names(list(members), specs, where, labels=True)
    counts = {
        s.name: runs_in(s, members[s.name].shape, members[s.name].dtype, where) for s in specs
    }
    count = common_count(counts, where)
    labels = None
    if "labels" in members:
        rows = count * (specs[0].shape[0] if specs and specs[0].shape else 1)
        if (found := members["labels"]).shape != (rows,):
            what = f"'labels' is {found.dtype}{list(found.shape)}"
            fix = f"it must hold one class index per sample: int64[{rows}]"
            raise UserError(what, where=where, fix=fix)
        labels = check_labels(load(path, ["labels"])["labels"], rows, where)

    def read() -> Iterator[Inputs]:
        streams = {s.name: _stream(path, s, members[s.name], counts[s.name], count) for s in specs}
        for run in range(count):
            yield {
                spec.name: check_numbers(next(streams[spec.name]), spec, run, where)
                for spec in specs
            }

    return Samples(f"{where} ({count} {'run' if count == 1 else 'runs'})", count, read, labels)


def load(path: Path, names: Sequence[str] | None = None) -> dict[str, Array]:
    """Arrays of an ``.npz`` by name, all of them by default. Pickled objects are refused. Raises
    UserError."""
    members = _headers(path)
    for name in names or ():
        if name not in members:
            raise UserError(f"no array '{name}'", where=path.name)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in (members if names is None else names)}
    except DAMAGE as error:
        raise UserError(f"damaged .npz: {error}", where=path.name) from None


def _headers(path: Path) -> dict[str, _Member]:
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for name in archive.namelist():
                with archive.open(name) as stream:
                    found[name.removesuffix(".npy")] = _header(stream)
            return found
    except DAMAGE as error:
        raise UserError(f"not a readable .npz: {error}", where=path.name) from None


def _header(stream: IO[bytes]) -> _Member:
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never unpickled")
    return _Member(shape, dtype, fortran)


def _stream(
    path: Path, spec: TensorSpec, member: _Member, count: int, runs: int
) -> Iterator[Array]:
    """Yield the array of each of ``runs`` runs without holding the whole member."""
    if count == 1 or member.fortran:
        whole = np.ascontiguousarray(load(path, [spec.name])[spec.name])
        for run in range(runs):
            yield whole if count == 1 else whole[run * spec.shape[0] : (run + 1) * spec.shape[0]]
        return
    size = int(np.prod(spec.shape, dtype=np.int64)) * member.dtype.itemsize
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{spec.name}.npy") as stream:
            _header(stream)
            for _ in range(runs):
                data = stream.read(size)
                if len(data) < size:
                    raise EOFError("it ends too early")
                yield np.frombuffer(data, member.dtype).reshape(spec.shape)
    except DAMAGE as error:
        raise UserError(f"damaged .npz: {error}", where=path.name) from None


def read_npz(path: Path, specs: Sequence[TensorSpec]) -> Inputs:
    """All inputs of a model from an ``.npz``, checked, with their leading dimensions as they are.

    ``labels`` may be present and is left out. Raises UserError.
    """
    open_npz(path, specs)  # checks names, shapes and dtypes
    return load(path, [spec.name for spec in specs])


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write ``arrays`` to ``path``, whole or not at all. Raises OSError."""
    from edgepipe.golden import npz_bytes

    whole_file.write(path, npz_bytes(arrays))
