"""What changed between bundles: accuracy, latency, sizes, and the kernels of each operator."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from edgepipe.display import db_text, size_text, table
from edgepipe.report.facts import Facts, slower

#: What the quantization appends to the names of tensors; exporters use slashes as well.
_QUANTIZED = re.compile(r"/(codes|rounded|float)(/\w+)?$")


def compare(bundles: Sequence[Facts]) -> str:
    """Tables of two or more bundles, each beside the first."""
    rows = [
        [title, *(_cell(f, bundles[0], value, text, ratio) for f in bundles)]
        for title, value, text, ratio in _ROWS
        if any(value(f) is not None for f in bundles)
    ]
    parts = [table(["", *(f.name for f in bundles)], rows)]
    parts += [f"{f.name}: {f.why_not}" for f in bundles if f.why_not]
    parts += slower(bundles)
    parts += [_kernels(bundles[0], other) for other in bundles[1:]]
    return "\n\n".join(parts)


def changed_kernels(first: Facts, other: Facts) -> list[tuple[str, str, str]]:
    """(operator, what executes it in ``first``, in ``other``) where these differ; "–" is nothing.

    An operator is known by its first name: fusion and quantization append others to it.
    """
    ours, theirs = _by_operator(first), _by_operator(other)
    return [
        (name, ours.get(name, "–"), theirs.get(name, "–"))
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]


def _by_operator(facts: Facts) -> dict[str, str]:
    return {_operator(k): f"{k['kernel'].rstrip('0123456789_')} {k['arithmetic']}"
            for k in facts.kernels}  # fmt: skip


def _operator(kernel: dict[str, Any]) -> str:
    name = _QUANTIZED.sub("", kernel["op"].split(";")[0].strip())
    return f"{name} ({kernel['op_type'].split('+')[0]})"


def _kernels(first: Facts, other: Facts) -> str:
    changes = changed_kernels(first, other)
    if not changes:
        return f"{other.name}: every operator is executed as in {first.name}"
    title = f"{len(changes)} operators are executed otherwise in {other.name}:"
    return f"{title}\n{table(['operator', first.name, other.name], changes)}"


_Value = Callable[[Facts], float | None]
_ROWS: tuple[tuple[str, _Value, Callable[[float], str], bool], ...] = (
    ("accuracy", lambda f: f.accuracy, lambda v: f"{100 * v:.2f} %", False),
    ("SNR dB", lambda f: f.snr_db, db_text, False),
    ("median latency", lambda f: f.latency_ms, lambda v: f"{v:.3f} ms", True),
    ("code", lambda f: f.code_bytes, lambda v: size_text(int(v)), True),
    ("weights", lambda f: f.weights_bytes, lambda v: size_text(int(v)), True),
    ("arena", lambda f: f.arena_bytes, lambda v: size_text(int(v)), True),
)


def _cell(
    facts: Facts, first: Facts, value: _Value, text: Callable[[float], str], ratio: bool
) -> str:
    here, before = value(facts), value(first)
    if here is None:
        return "–"
    if facts is first or before is None or not ratio or not before:
        return text(here)
    return f"{text(here)} ({here / before:.2f} ×)"
