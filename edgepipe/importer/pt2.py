"""A look into ``.pt2`` archives before torch opens them.

``torch.export.load`` unpickles sample inputs and some payloads, evaluates symbolic expressions
as Python, looks operators up by dotted name, and loads compiled libraries if there are any. A
program that only consists of tensors and operators needs none of that, so this refuses:

1. archives without a program, of the format before torch 2.8, or with two members of one name
2. compiled libraries (AOTInductor) and custom or opaque objects
3. pickles that torch's restricted unpickler (``weights_only``) does not accept
4. operators outside of ``torch.ops``, ``operator`` and ``math``
5. symbolic expressions that are anything but arithmetic on symbols
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgepipe.errors import UserError

_MAX_BYTES = 2**32
_OPERATOR = re.compile(
    r"torch\.ops\.(?!load_library)(?!.*__)\w+(\.\w+){1,2}|torch\._?sym_(?!.*__)\w+"
    r"|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
# What sympy.srepr writes: constructors with capitals, quoted names and numbers, arithmetic.
# Possessive throughout, so that hostile text costs linear time.
_EXPRESSION = re.compile(r"(?:[A-Z]\w*+\(?+|'[\w.+-]++'|[a-z]\w*+(?!\()|[\d.]++|[()+\-*/,=<> ])*+")


def check(path: Path) -> None:
    """Raise UserError if ``path`` is not a ``.pt2`` program of tensors and operators only."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, path.name)
    except UserError:
        raise
    except Exception:  # whatever zipfile, zlib and a damaged program's own structure lead to
        raise UserError(
            "is not a .pt2 program, or is damaged",
            where=path.name,
            fix="save it with torch.export.save(torch.export.export(module, args), path)",
        ) from None


def _check_archive(archive: zipfile.ZipFile, where: str) -> None:
    infos = archive.infolist()
    names = [i.filename for i in infos]
    if sum(i.file_size for i in infos) > _MAX_BYTES:
        raise UserError("unpacks to more than 4 GiB", where=where)
    members = {name.partition("/")[2]: name for name in names}
    if len(set(names)) != len(names) or len(members) != len(names):
        raise UserError("has two members of one name", where=where, fix="save it again")
    programs = [m for m in members if m.startswith("models/") and m.endswith(".json")]
    if not programs or any(n == "version" or n.startswith("serialized_") for n in names):
        raise UserError(
            "holds no program in the format of torch 2.8 or newer",
            where=where,
            fix="save it again with torch.export.save of the installed torch",
        )
    if any("aotinductor" in name for name in names):
        raise UserError(
            "holds a compiled library, not only a program",
            where=where,
            fix="save the program with torch.export.save",
        )
    for member in programs:
        _check_program(json.loads(archive.read(members[member])), where)
    for member, name in members.items():
        if member.endswith("_config.json"):
            _check_payloads(archive, members, member, where)
        elif member.endswith(".pt"):
            _check_pickle(archive.read(name), member, where)


def _check_program(program: Any, where: str) -> None:
    for target in _find(program, "target"):
        # Others are names of parameters and buffers, which torch does not look up as code.
        looked_up = str(target).startswith(("torch", "_operator", "math", "#"))
        if looked_up and not _OPERATOR.fullmatch(str(target)):
            raise UserError(f"calls '{target}', which is not an operator", where=where)
    for expression in _find(program, "expr_str"):
        if not isinstance(expression, str) or "__" in expression:
            raise UserError(f"has a malformed dimension '{expression}'", where=where)
        if not _EXPRESSION.fullmatch(expression):
            raise UserError(f"has a malformed dimension '{expression[:80]}'", where=where)


def _check_payloads(
    archive: zipfile.ZipFile, members: dict[str, str], member: str, where: str
) -> None:
    folder = member.rpartition("/")[0]
    for payload in json.loads(archive.read(members[member]))["config"].values():
        file = str(payload["path_name"])
        if not file.startswith(("weight_", "tensor_")):
            raise UserError(
                f"holds an object that is not a tensor ({file})",
                where=where,
                fix="keep custom objects out of the exported module",
            )
        if payload["use_pickle"]:
            _check_pickle(archive.read(members[f"{folder}/{file}"]), file, where)


def _check_pickle(content: bytes, member: str, where: str) -> None:
    import torch

    if not content:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception:  # UnpicklingError, RuntimeError, and what damaged bytes lead to
        raise UserError(
            f"member '{member}' holds pickled code or is damaged",
            where=where,
            fix="save it with plain tensors as example inputs",
        ) from None


def _find(tree: Any, key: str) -> Iterator[Any]:
    """Every value under ``key`` anywhere in a JSON tree."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from _find(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _find(value, key)
