"""The sums and differences of Winograd's F(2x2, 3x3) and F(4x4, 3x3), along one side of a tile.

F(2x2) has factors 1 and 1/2 only: rounding is that of a sum, and of fewer terms than the direct
kernel adds. F(4x4) interpolates at 0, ±√½, ±√2 and infinity, which costs a bit (6 dB in 120); with
the usual 0, ±1, ±2 it would be more than two. Matrices are named as in Lavin and Gray 2016
(arXiv 1509.09308); points are in the order 0, √½, −√½, √2, −√2, infinity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgepipe.kernels.builder import Registers, float32, fma, splat


def kept(values: Sequence[Any], lanes: int, dtype: str = "float32") -> list[Any]:
    """``values`` in registers: an expression that is used twice would be computed twice."""
    held = Registers(len(values), lanes, dtype)
    for i, value in enumerate(values):
        held[i] = value
    return [held[i] for i in range(len(values))]


class Transforms:
    """Of tiles of ``side`` outputs, 2 or 4, as expressions of float32 with ``lanes`` lanes;
    ``fused`` multiply-adds round once."""

    def __init__(self, side: int, lanes: int, fused: bool) -> None:
        self.side, self.lanes, self.fused = side, lanes, fused

    def filtered(self, g: Sequence[Any]) -> list[Any]:
        """G of three taps."""
        if self.side == 2:  # the outer ones, and half of the sums with either sign between them
            half = self.constant(0.5)
            held = self.kept([g[0], g[1], g[2], g[0] + g[2]])
            near = (held[3] + held[1]) * half, (held[3] - held[1]) * half
            return self.kept([held[0], *near, held[2]])
        first, middle, last = self.kept(g)
        even, odd, far, away = self.kept(
            [
                self.times(last, -1 / 3, first * self.constant(-2 / 3)),
                middle * self.constant(-(2**0.5) / 3),
                self.times(last, 1 / 3, first * self.constant(1 / 6)),
                middle * self.constant(2**0.5 / 6),
            ]
        )
        return self.kept([first, even + odd, even - odd, far + away, far - away, last])

    def constant(self, value: float) -> Any:
        return splat(float32(value), self.lanes)

    def times(self, x: Any, factor: float, y: Any) -> Any:
        """x · factor + y."""
        return fma(x, self.constant(factor), y, self.lanes, self.fused)

    def differences(self, d: Sequence[Any]) -> list[Any]:
        """Bᵀ of a row of inputs."""
        d = self.kept(d)
        if self.side == 2:
            return self.kept([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]])
        even, odd, far, away = self.kept(
            [
                self.times(d[2], -2, d[4]),
                self.times(d[1], -2, d[3]) * self.constant(0.5**0.5),
                self.times(d[2], -0.5, d[4]),
                self.times(d[1], -0.5, d[3]) * self.constant(2**0.5),
            ]
        )
        first, last = self.times(d[2], -2.5, d[0] + d[4]), self.times(d[3], -2.5, d[1] + d[5])
        return self.kept([first, even + odd, even - odd, far + away, far - away, last])

    def sums(self, m: Sequence[Any]) -> list[Any]:
        """Aᵀ of a row of products."""
        m = self.kept(m)
        if self.side == 2:
            return self.kept([m[0] + m[1] + m[2], m[1] - m[2] - m[3]])
        near, across, far, away = self.kept([m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]])
        a, b = 0.5**0.5, 2**0.5
        return self.kept(
            [
                m[0] + near + far,
                self.times(across, a, away * self.constant(b)),
                self.times(near, a**2, far * self.constant(b**2)),
                self.times(across, a**3, self.times(away, b**3, m[5])),
            ]
        )

    def kept(self, values: Sequence[Any]) -> list[Any]:
        """``kept`` of its own vectors."""
        return kept(values, self.lanes)
