"""What people see: tables, sizes and progress. Results go to stdout, progress to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

_CLEAR_LINE = "\r\x1b[K"


def table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, markdown: bool = False
) -> str:
    """Lay ``rows`` out in aligned columns; columns of numbers are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(headers), *cells]) for i in range(len(headers))]
    numeric = [
        bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(headers))
    ]

    def line(row: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return f"| {' | '.join(parts)} |" if markdown else "  ".join(parts).rstrip()

    rule = [
        "-" * (w - 1) + ":" if right else "-" * w for w, right in zip(widths, numeric, strict=True)
    ]
    ruled = f"| {' | '.join(rule)} |" if markdown else "  ".join("-" * w for w in widths)
    return "\n".join([line(headers), ruled, *map(line, cells)])


def pairs(items: Iterable[tuple[str, object]]) -> str:
    """Lay out ``name  value`` lines with the values in one column."""
    rows = [(name, str(value)) for name, value in items]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def size_text(count_bytes: int) -> str:
    """Bytes in the unit a reader would pick (1 KB = 1024 bytes)."""
    if count_bytes < 1024:
        return f"{count_bytes} B"
    if count_bytes < 1024**2:
        return f"{count_bytes / 1024:.1f} KB"
    return f"{count_bytes / 1024**2:.2f} MB"


def db_text(value: float) -> str:
    """A signal-to-noise ratio in dB; ``exact`` where there is no noise at all."""
    return "exact" if value == float("inf") else f"{value:.1f}"


def _is_number(cell: str) -> bool:
    bare = cell.split(" ", maxsplit=1)[0].rstrip("%x×")
    if bare in ("-", "–", "exact", "inf", "-inf", "nan"):
        return True
    try:
        float(bare)
    except ValueError:
        return False
    return True


@dataclass
class Progress:
    """Stage lines of long work and how long each stage took.

    On a terminal the current stage overwrites itself and stays with its time when it ends;
    elsewhere (a log, a pipe) every stage is one plain line. ``seconds`` lists (stage, seconds)
    in order of execution whether anything is printed or not.
    """

    quiet: bool = False
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    seconds: list[tuple[str, float]] = field(default_factory=list)
    _stage: str | None = None
    _since: float = 0.0

    @property
    def _terminal(self) -> bool:
        return self.stream.isatty()

    def __call__(self, stage: str) -> None:
        """End the current stage and start ``stage``."""
        self.finish()
        self._stage, self._since = stage, time.perf_counter()
        if not self.quiet:
            self.stream.write(f"{stage} …" if self._terminal else f"{stage}\n")
            self.stream.flush()

    def step(self, done: int, total: int | None) -> None:
        """Show ``done`` of ``total`` within the current stage; only a terminal sees it."""
        if not self.quiet and self._terminal and self._stage is not None:
            of = f" of {total}" if total else ""
            self.stream.write(f"{_CLEAR_LINE}{self._stage} … {done}{of}")
            self.stream.flush()

    def finish(self) -> None:
        """End the current stage, if any."""
        if self._stage is None:
            return
        spent = time.perf_counter() - self._since
        self.seconds.append((self._stage, spent))
        if not self.quiet and self._terminal:
            self.stream.write(f"{_CLEAR_LINE}{self._stage}  {spent:.1f} s\n")
            self.stream.flush()
        self._stage = None

    def abandon(self) -> None:
        """Clear a half-written stage line so that an error message starts on its own line."""
        if self._stage is not None and not self.quiet and self._terminal:
            self.stream.write(_CLEAR_LINE)
            self.stream.flush()
        self._stage = None
