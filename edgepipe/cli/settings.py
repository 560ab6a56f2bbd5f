"""Options that hold more than a word: ``--shape``, ``--set`` and ``--config``."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgepipe import tables
from edgepipe.errors import UserError, did_you_mean
from edgepipe.target import Target

#: Parts of a target that ``--set`` may change; the rest says what the device *is*.
_SECTIONS = ("llvm", "simd", "link", "run", "facts")
#: Keys of ``[llvm]`` that TVM's LLVM targets take, settable also where a file leaves them out.
_LLVM_KEYS = ("mtriple", "mcpu", "mattr", "mabi", "mfloat-abi", "vector-width", "opt-level")

#: Endings of values that are paths; others are names.
_PATHS = (".onnx", ".pt2", ".toml", ".npz", ".jsonl")

_CONFIG_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "target": str,
    "recipe": str,
    "calibration": str,
    "samples": int,
    "threads": int,
    "tune": int,
    "records": str,
    "allow_float_fallback": bool,
    "no_check": bool,
    "emit": list,
    "shape": (dict, list),
    "set": (dict, list),
    "output": str,
    "prefix": str,
    "explain": bool,
    "dump": str,
    "json": bool,
    "quiet": bool,
}


def parse_shapes(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """``["x=1,3,224,224"]`` → ``{"x": (1, 3, 224, 224)}``; ``x=`` is a scalar. Raises UserError."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, dims = text.rpartition("=")
        parts = [part.strip() for part in dims.split(",")] if dims.strip() else []
        if not equals or not name or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise UserError(
                f"'{text}' is not NAME=D0,D1,… with positive whole numbers",
                where="--shape",
                fix="for example --shape x=1,3,224,224",
            )
        if name in shapes:
            raise UserError(f"input '{name}' is given twice", where="--shape")
        shapes[name] = tuple(int(part) for part in parts)
    return shapes


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """``["target.run.qemu_cpu=cortex-a53"]`` → a dict; values are TOML, a bare word is a string."""
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(
                f"'{text}' is not KEY=VALUE",
                where="--set",
                fix="for example --set target.llvm.mcpu=cortex-a53",
            )
        try:
            settings[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            settings[key.strip()] = value
    return settings


def settable(target: Target) -> dict[str, Any]:
    """The keys that ``--set`` knows for ``target``, with their present values."""
    known: dict[str, Any] = {f"target.llvm.{key}": None for key in _LLVM_KEYS}
    for section in _SECTIONS:
        part = getattr(target, section)
        values = part if isinstance(part, dict) else vars(part)
        known |= {f"target.{section}.{key}": value for key, value in values.items()}
    return known


def apply_settings(target: Target, settings: Mapping[str, Any]) -> Target:
    """Return ``target`` with ``settings`` (keys ``target.SECTION.KEY``) put in place.

    Raises UserError for a key the target does not have and a value of another type.
    """
    known = settable(target)
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"unknown key '{key}'", where="--set", fix=did_you_mean(key, known))
        before = known[key]
        new = tuple(value) if isinstance(before, tuple) and isinstance(value, list) else value
        if before is not None and type(new) is not type(before):
            raise UserError(
                f"'{key}' is {_kind(before)}, not {_kind(new)}",
                where="--set",
                fix=f"it is {before!r} now",
            )
        _, section, name = key.split(".", 2)
        part = getattr(target, section)
        changed = {**part, name: new} if isinstance(part, dict) else replace(part, **{name: new})
        sections: dict[str, Any] = {section: changed}
        target = replace(target, **sections)
    return target


def _kind(value: object) -> str:
    names = {str: "a string", bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else "a table")


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML file with the keys of ``edgepipe compile``'s options.

    ``shape`` and ``set`` may be tables or lists of the option's text. Paths to files are
    relative to the config file's folder. Raises UserError.
    """
    raw = tables.load_toml(path)
    for key, value in raw.items():
        if key not in _CONFIG_TYPES:
            raise UserError(
                f"unknown key '{key}'", where=str(path), fix=did_you_mean(key, _CONFIG_TYPES)
            )
        truth = _CONFIG_TYPES[key] is not bool and isinstance(value, bool)
        if truth or not isinstance(value, _CONFIG_TYPES[key]):
            raise UserError(f"'{key}' cannot be {_kind(value)}", where=str(path))
    if isinstance(raw.get("shape"), dict):
        raw["shape"] = [_shape_text(path, *item) for item in raw["shape"].items()]
    if isinstance(raw.get("set"), dict):
        raw["set"] = [f"{key}={_toml_text(value)}" for key, value in _flat(raw["set"])]
    for key in ("shape", "set"):
        if not all(isinstance(text, str) for text in raw.get(key, ())):
            raise UserError(f"'{key}' must be a table or a list of texts", where=str(path))
    if not all(isinstance(kind, str) for kind in raw.get("emit", ())):
        raise UserError("'emit' must be a list of formats", where=str(path))
    for key in ("model", "target", "recipe", "calibration", "records", "output", "dump"):
        if key in raw:
            raw[key] = _beside(path, key, raw[key])
    return raw


def _shape_text(path: Path, name: str, dims: object) -> str:
    if not isinstance(dims, list) or not all(type(dim) is int for dim in dims):
        raise UserError(f"'shape.{name}' must be a list of whole numbers", where=str(path))
    return f"{name}={','.join(map(str, dims))}"


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _toml_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_text, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _beside(config: Path, key: str, value: str) -> str:
    """A path relative to the config's folder; names (of a zoo model, a target, a recipe, a data
    set) stay as they are."""
    path = config.parent / value
    is_path = key in ("output", "dump") or Path(value).suffix in _PATHS
    return str(path) if is_path or (key == "calibration" and path.is_dir()) else value
