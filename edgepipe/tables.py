"""Tables that people and other programs write (TOML, JSON) as dataclasses, every value checked."""

from __future__ import annotations

import tomllib
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from edgepipe.errors import UserError, did_you_mean

_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
_INT64 = 2**63
_LARGEST = 1e300  # neither infinite nor NaN, nor an integer that no float holds


def load_toml(path: Path) -> dict[str, Any]:
    """The file as plain values. Raises UserError where it is not there or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not a readable TOML file: {error}", where=str(path)) from None
    except RecursionError:
        raise UserError("not a readable TOML file: nested too deep", where=str(path)) from None


def read(kind: type[Any], raw: Any, where: str, *, extra: bool = False) -> Any:
    """``raw`` as the dataclass ``kind``, nested ones and tuples of them included.

    Values must have the types of the fields' annotations: a whole number may stand for a float, a
    list becomes a tuple; floats must be finite and integers fit 64 bits. With ``extra`` unknown
    keys are left out, which another version may have written. Raises UserError that names
    ``where``, the key and what was expected.
    """
    return _value(kind, raw, where, "", extra)


def _value(kind: Any, raw: Any, where: str, key: str, extra: bool) -> Any:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return raw
    if is_dataclass(kind):
        return _record(kind, raw, where, key, extra)
    if origin in (typing.Union, types.UnionType):
        if raw is None and type(None) in parts:
            return None
        (kind,) = (part for part in parts if part is not type(None))
        return _value(kind, raw, where, key, extra)
    if origin is tuple and isinstance(raw, list | tuple):
        return tuple(_value(parts[0], item, where, f"{key}[{i}]", extra)
                     for i, item in enumerate(raw))  # fmt: skip
    if origin is dict and isinstance(raw, dict) and all(isinstance(name, str) for name in raw):
        return {name: _value(parts[1], item, where, f"{key}.{name}", extra)
                for name, item in raw.items()}  # fmt: skip
    if kind is float and type(raw) in (int, float) and abs(raw) < _LARGEST:
        return float(raw)
    if type(raw) is kind and kind in (str, bool):
        return raw
    if type(raw) is kind is int and abs(raw) < _INT64:
        return raw
    wanted = _NAMES.get(kind, "a list" if origin is tuple else "a table")
    raise UserError(f"'{key}' must be {wanted}, not {_shown(raw)}", where=where)


def _record(kind: Any, raw: Any, where: str, key: str, extra: bool) -> Any:
    if not isinstance(raw, dict):
        raise UserError(f"'{key}' must be a table, not {_shown(raw)}", where=where)
    hints = typing.get_type_hints(kind)
    within = f" in '{key}'" if key else ""
    if unknown := [name for name in raw if name not in hints]:
        if not extra:
            fix = did_you_mean(unknown[0], hints)
            raise UserError(f"unknown key '{unknown[0]}'{within}", where=where, fix=fix)
        raw = {name: item for name, item in raw.items() if name in hints}
    for field in fields(kind):
        if field.name not in raw and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"missing key '{field.name}'{within}", where=where)
    prefix = f"{key}." if key else ""
    values = {name: _value(hints[name], item, where, prefix + name, extra)
              for name, item in raw.items()}  # fmt: skip
    try:
        return kind(**values)
    except UserError as error:  # what a dataclass refuses itself
        raise UserError(error.what, where=where, fix=error.fix) from None
    except ValueError as error:
        raise UserError(str(error), where=where) from None


def _shown(raw: Any) -> str:
    text = repr(raw)
    return text if len(text) <= 60 else text[:57] + "..."
