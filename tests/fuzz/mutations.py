"""Damage to bytes, to text and to trees of plain values (JSON, TOML)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

INTEGERS = (
    *(0, 1, -1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 65536, 2**31 - 1, 2**31, -(2**31)),
    *(2**32, 2**40, 2**62, 2**63 - 1, -(2**63), 10**6, 10**9),
)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, 3.5e38, 1e308, float("nan"), float("inf"), -1e30)
#: Text that becomes code, a path or a format where somebody forgets to escape it.
TEXTS = (
    "", " ", "x", "y", ".", "..", "../../escaped", "/tmp/escaped", "C:\\escaped", "a/b", "a\\b",
    "\n", "a\nb", "\r", "\t", "\x00", "a\x00b", '"', "'", "`id`", "$(id)", "; touch escaped;",
    "*/ #error escaped /*", '"; int escaped; "', "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>", "${alert(1)}", "%s%s%n", "{0.__class__}", "__import__('os')",
    "é", "名前", "\u2028", "\u202e", "𝕏", "-", "--help", "CON", "a" * 300, "a" * 20000, "[" * 5000,
    "model", "main", "manifest.json", "1e999", "nan", "@prefix@",
)  # fmt: skip


def damaged_bytes(random: Random, data: bytes) -> bytes:
    """``data`` with one to eight things done to it: flipped, cut, doubled, overwritten."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 8))):
        at = random.randrange(len(out) + 1)
        size = random.choice((1, 1, 2, 4, 8, 64, 1024))
        match random.randrange(6):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << random.randrange(8)
            case 1:
                out[at : at + size] = random.randbytes(size)
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = out[at : at + size]
            case 4:
                del out[at:]
            case _:
                out[at : at + 8] = random.choice(INTEGERS).to_bytes(16, "little", signed=True)[:8]
    return bytes(out)


def damaged_text(random: Random, text: str) -> str:
    """``text`` with lines or pieces dropped, doubled, swapped or replaced by hostile ones."""
    if random.random() < 0.5:
        lines = text.split("\n")
        i, j = (random.randrange(len(lines)) for _ in range(2))
        match random.randrange(4):
            case 0:
                del lines[i]
            case 1:
                lines.insert(j, lines[i])
            case 2:
                lines[i], lines[j] = lines[j], lines[i]
            case _:
                lines[i] = random.choice(TEXTS)
        return "\n".join(lines)
    at = random.randrange(len(text) + 1)
    return text[:at] + random.choice(TEXTS) + text[at + random.choice((0, 1, 5)) :]


def value(random: Random, depth: int = 0) -> Any:
    """Any value that JSON and TOML can hold."""
    makers: list[Callable[[], Any]] = [
        lambda: random.choice(INTEGERS),
        lambda: random.choice(FLOATS),
        lambda: random.choice(TEXTS),
        lambda: random.random() < 0.5,
    ]
    if depth < 3:
        makers += [
            lambda: [value(random, depth + 1) for _ in range(random.randrange(4))],
            lambda: {random.choice(TEXTS): value(random, depth + 1) for _ in range(2)},
        ]
    return random.choice(makers)()


def damaged_tree(random: Random, tree: Any) -> Any:
    """A copy of ``tree`` with one to four of its values replaced, removed, moved or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = list(_places(tree))
        if not places:
            return value(random)
        owner, key = random.choice(places)
        match random.randrange(6):
            case 0:
                del owner[key]
            case 1:
                other, name = random.choice(places)
                owner[key] = copy.deepcopy(other[name])
            case 2 if isinstance(owner, dict):
                owner[random.choice(TEXTS)] = owner.pop(key)
            case 3 if isinstance(owner, list):
                owner.append(owner[key])
            case _:
                owner[key] = value(random)
    return tree


def _places(tree: Any) -> Any:
    """(container, key) of every value in ``tree``."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, inner in list(items):
        yield tree, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def toml(tree: Any) -> str:
    """``tree`` as TOML, every value inline; what TOML cannot hold becomes text that is none."""
    if not isinstance(tree, dict):
        return _toml(tree)
    return "".join(f"{_toml(key)} = {_toml(item)}\n" for key, item in tree.items())


def _toml(item: Any) -> str:
    if isinstance(item, bool):
        return str(item).lower()
    if isinstance(item, int | float):
        return repr(item)
    if isinstance(item, str):
        plain = "".join(
            c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in item
        )
        return f'"{plain}"'
    if isinstance(item, dict):
        return "{" + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in item.items()) + "}"
    return "[" + ", ".join(map(_toml, item)) + "]"
