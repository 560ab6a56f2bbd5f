"""Loops that threads share: every piece exactly once, whatever the number of parts."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tvm import tirx

from edgepipe.codegen.primfunc import build_object
from edgepipe.kernels.builder import Registers, kernel, load, loop, parallel, store
from edgepipe.target import Target

#: Extents of marked loops, and of a plain one inside of them.
NESTS = [((7,), 1), ((2, 3), 1), ((3, 1, 5), 2), ((2, 3, 4), 1), ((1, 13), 3), ((64,), 1)]
ALONE = len(NESTS)


def _nest(y: object, extents: tuple[int, ...], inner: int, first: int) -> None:
    """Add one to every element from ``first`` on."""

    def walk(depth: int, at: object) -> None:
        if depth < len(extents):
            with parallel(extents[depth]) as i:
                walk(depth + 1, at * extents[depth] + i)  # type: ignore[operator]
            return
        with loop(inner) as j:
            place = first + at * inner + j  # type: ignore[operator]
            store(y, place, load(y, place, 1) + 1, 1)

    walk(0, 0)


def _size(number: int) -> int:
    extents, inner = NESTS[number]
    return int(np.prod(extents)) * inner


def built(folder: Path) -> tuple[ctypes.CDLL, dict[str, int]]:
    """One kernel per nest; one of a nest, a plain loop and another nest; one without any mark."""
    functions = {
        f"k{i}": kernel("k", [("y", _size(i), "int32")], lambda y, n=nest: _nest(y, *n, 0))
        for i, nest in enumerate(NESTS)
    }

    def mixed(y: object) -> None:
        _nest(y, (5,), 1, 0)
        with loop(5) as i:
            store(y, 5 + i, load(y, 5 + i, 1) + 1, 1)
        _nest(y, (2, 2), 1, 10)

    def plain(y: object) -> None:
        with loop(4) as i:
            store(y, i, load(y, i, 1) + 1, 1)

    def filled(y: object) -> None:
        """Registers that are filled before the loop that reads them."""
        kept = Registers(1, 1, "int32")
        kept[0] = tirx.const(1, "int32") + load(y, 6, 1)
        with parallel(6) as i:
            store(y, i, load(y, i, 1) + kept[0], 1)

    functions["filled"] = kernel("k", [("y", 7, "int32")], filled)
    functions["mixed"] = kernel("k", [("y", 14, "int32")], mixed)
    functions["plain"] = kernel("k", [("y", 4, "int32")], plain)
    pieces = dict.fromkeys(functions, 1)
    blob, _ = build_object(functions, Target.load("host"), pieces=pieces)
    (folder / "k.o").write_bytes(blob)
    command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-o", "k.so", "k.o"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return ctypes.CDLL(str(folder / "k.so")), pieces


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, dict[str, int]]:
    return built(tmp_path_factory.mktemp("parts"))


def counted(library: ctypes.CDLL, name: str, size: int, chosen: list[int], of: int) -> list[int]:
    y = np.zeros(size, np.int32)
    for part in chosen:
        getattr(library, name)(ctypes.c_void_p(y.ctypes.data), part, of)
    return [int(v) for v in y]


@pytest.mark.parametrize("several", [1, 2, 3, 5, 16])
def test_every_piece_once(library: tuple[ctypes.CDLL, dict[str, int]], several: int) -> None:
    code, pieces = library
    everyone = list(range(several))
    for i, (extents, inner) in enumerate(NESTS):
        assert pieces[f"k{i}"] == np.prod(extents)
        assert counted(code, f"k{i}", _size(i), everyone, several) == [1] * _size(i)
        shares = [sum(counted(code, f"k{i}", _size(i), [p], several)) // inner for p in everyone]
        assert max(shares) - min(shares) <= 1, shares
    assert counted(code, "mixed", 14, everyone, several) == [1] * 14


def test_what_is_not_marked_is_done_by_the_first(
    library: tuple[ctypes.CDLL, dict[str, int]],
) -> None:
    code, pieces = library
    assert counted(code, "mixed", 14, [1], 2)[5:10] == [0] * 5
    assert counted(code, "mixed", 14, [0], 2)[5:10] == [1] * 5
    assert pieces["plain"] == 1  # it takes no part


def test_registers_are_filled_by_every_part(
    library: tuple[ctypes.CDLL, dict[str, int]],
) -> None:
    assert counted(library[0], "filled", 7, [2, 1, 0], 3) == [1] * 6 + [0]
    assert counted(library[0], "filled", 7, [1], 3) == [0, 0, 1, 1, 0, 0, 0]


def test_a_part_left_out_shows(library: tuple[ctypes.CDLL, dict[str, int]]) -> None:
    """Positive control."""
    assert 0 in counted(library[0], "k0", _size(0), [0, 2], 3)
