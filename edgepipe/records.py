"""Tuning records: which knobs of a kernel template were found to be fast, for which operator.

A file of records has one JSON object a line, keyed by the template, the operator (shapes, layouts,
dtypes, formats of weights, epilogue) and what its target can do. Lines are only ever appended,
each by one write, so that an interrupted tuning leaves whole lines and at most one torn line, which
readers pass over. Of several records with one key the last one counts.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from edgepipe.errors import UserError
from edgepipe.target import Target

#: Fields of operators that follow from data, not from shapes: the same knobs serve all values.
_DATA = frozenset({"limits", "multiplier", "zero", "short_sums", "scale"})


@dataclass(frozen=True)
class Record:
    """One operator on one kind of core.

    ``ratio`` is what the kernel takes with ``knobs``, with the default rule's knobs = 1; both were
    measured in turn, as ``unit`` says: ``ns``, or ``instructions`` counted under an emulator, which
    is no time. ``measured_on`` names the core or emulator. ``trials`` candidates were drawn from
    all settings with ``seed``; ``version`` is that of the template.
    """

    template: str
    version: int
    op: str
    features: str
    knobs: dict[str, Any]
    ratio: float
    value: float
    unit: str
    measured_on: str
    trials: int
    seed: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What the record is looked up by."""
        return self.template, self.op, self.features


@dataclass(frozen=True)
class Records:
    """Records by key; ``origin`` says where each came from."""

    by_key: Mapping[tuple[str, str, str], Record] = field(default_factory=dict)
    origin: Mapping[tuple[str, str, str], str] = field(default_factory=dict)
    #: What was passed over while reading, one line each.
    remarks: tuple[str, ...] = ()

    def find(self, template: str, op: Any, target: Target) -> Record | None:
        """The record of ``op`` on a core like that of ``target``."""
        if not self.by_key:
            return None
        return self.by_key.get((template, op_key(op), features(target)))


NO_RECORDS = Records()


def op_key(op: Any) -> str:
    """An operator without what depends on data, as text: ``ConvOp(x=1x32x112x112c8, …)``."""
    if is_dataclass(op) and type(op).__str__ is object.__str__:
        parts = [
            f"{f.name}={op_key(value)}"
            for f in fields(op)
            if f.name not in _DATA and (value := getattr(op, f.name)) != f.default
        ]
        return f"{type(op).__name__}({', '.join(parts)})"
    if isinstance(op, tuple):
        return "[" + ", ".join(map(op_key, op)) + "]"
    return str(op)


def features(target: Target) -> str:
    """What kernels and their compiler know of a target's core; of a GPU, its sm and how many
    multiprocessors share the work."""
    if target.cuda is not None:
        return f"sm_{target.cuda.sm} {target.cuda.processors}"
    llvm = target.llvm
    cpu = llvm.get("mcpu", "")
    simd = f"{target.simd.lanes_f32}x{target.simd.registers}"
    attributes = sorted(llvm.get("mattr", ()))
    return " ".join(filter(None, [target.arch, cpu, *attributes, simd, target.integer.dot]))


def read(path: Path) -> Records:
    """Records of the file ``path``. Raises UserError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return _parse(text, path.name)


def shipped() -> Records:
    """Those that come with the package."""
    parts = []
    for entry in sorted(resources.files("edgepipe.tuned").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".jsonl"):
            parts.append(_parse(entry.read_text("utf-8"), f"shipped {entry.name}"))
    return merged(parts)


def merged(parts: Iterable[Records]) -> Records:
    """All of ``parts``; later ones replace earlier ones."""
    by_key: dict[tuple[str, str, str], Record] = {}
    origin: dict[tuple[str, str, str], str] = {}
    remarks: list[str] = []
    for part in parts:
        by_key |= part.by_key
        origin |= part.origin
        remarks += part.remarks
    return Records(by_key, origin, tuple(remarks))


def _parse(text: str, name: str) -> Records:
    by_key, remarks = {}, []
    known = {f.name for f in fields(Record)}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        record = None
        with contextlib.suppress(ValueError, TypeError):
            raw = json.loads(line)
            if isinstance(raw, dict) and raw.keys() == known and isinstance(raw["knobs"], dict):
                record = Record(**raw)
        if record is None:
            remarks.append(f"{name}, line {number}: no whole record of this version; left out")
        else:
            by_key[record.key] = record
    return Records(by_key, dict.fromkeys(by_key, name), tuple(remarks))


def append(path: Path, record: Record) -> None:
    """Add ``record`` to the file ``path`` by one write, after a torn line on a line of its own.

    Raises UserError where the file cannot be written.
    """
    line = json.dumps(asdict(record), sort_keys=True) + "\n"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = "\n" + line
            os.write(handle, line.encode("utf-8"))
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from None
