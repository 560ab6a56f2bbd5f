"""Fuzz towards new code: ``python -m tests.fuzz.coverage --kind onnx [--seconds 600]``.

The kinds are those of ``tests.fuzz.run``; what a kind draws at random is read from an input's bytes
here. atheris (libFuzzer) changes the bytes and keeps those inputs that reach code in edgepipe that
none before has reached. ``--corpus`` keeps them for the next run; ``--only FILE`` does one again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import atheris

#: Bytes of an input; what is drawn after they are used up follows from them.
MOST_BYTES = 4096
#: Whose branches count: of libraries there is no end.
_WATCHED = ["edgepipe", "tests.fuzz.kinds"]


class Decisions(Random):
    """Random numbers that are read from bytes, so that a change of one byte changes one of them."""

    def __new__(cls, content: bytes) -> Decisions:
        return super().__new__(cls)

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._content, self._used = content, 0

    def getrandbits(self, k: int) -> int:
        """From the next bytes."""
        count = (k + 7) // 8
        taken = self._content[self._used : self._used + count]
        self._used += count
        if len(taken) < count:
            return super().getrandbits(k)
        return int.from_bytes(taken, "little") >> (count * 8 - k)

    def random(self) -> float:
        """From the next two bytes: shares in our makers are round ones."""
        return self.getrandbits(16) / (1 << 16)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", required=True)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--inputs", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument(
        "--corpus", type=Path, help="a folder of inputs to start from and to add to"
    )
    parser.add_argument("--only", type=Path, help="this input alone")
    options = parser.parse_args()
    given = [str(path.resolve()) for path in (options.only or options.corpus,) if path]
    if options.corpus:
        options.corpus.mkdir(exist_ok=True, parents=True)
    findings = Path.cwd()
    terminal = os.dup(1), os.dup(2)
    folder = Path(tempfile.mkdtemp(prefix="edgepipe-fuzz-"))
    with atheris.instrument_imports(include=_WATCHED, enable_loader_override=False):
        from tests.fuzz.worker import Desk

        desk = Desk(options.kind, folder, wide=False)

    def one(content: bytes) -> None:
        random: Any = Decisions(content)
        result = desk.done(desk.work(random))
        os.dup2(terminal[0], 1)
        os.dup2(terminal[1], 2)
        if result["problems"]:
            raise AssertionError(" | ".join(result["problems"]))

    flags = [f"-max_total_time={options.seconds}", f"-runs={options.inputs}", "-timeout=60",
             f"-max_len={MOST_BYTES}", "-len_control=0",
             f"-artifact_prefix={findings}/", "-rss_limit_mb=0",
             f"-seed={options.seed}"]  # fmt: skip
    atheris.Setup([sys.argv[0], *given, *(flags if not options.only else [])], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
