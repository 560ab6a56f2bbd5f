"""Second moments of a layer's input and their product with its output, from a stream."""

from __future__ import annotations

import numpy as np

from edgepipe.quantization.graph import Array

#: Squares of numbers in this range, and sums of very many of them, are fine in float32.
MODEST = (1e-12, 1e12)


class Gram:
    """Accumulates moments of rows x [groups, rows, K] and y [groups, rows, outputs].

    Products are taken in float32 per chunk and summed in float64. Everything is shifted by the
    mean of the first chunk, so that variances far below the squared mean survive.
    """

    def __init__(self, groups: int, outputs: int, inputs: int) -> None:
        self.count = 0
        self._xx = np.zeros((groups, inputs, inputs))
        self._yx = np.zeros((groups, outputs, inputs))
        self._x = np.zeros((groups, inputs))
        self._y = np.zeros((groups, outputs))
        self._yy = np.zeros((groups, outputs))
        self._shift_x: Array = np.zeros((groups, inputs))
        self._shift_y: Array = np.zeros((groups, outputs))

    def add(self, x: Array, y: Array) -> None:
        """One chunk of rows."""
        if not MODEST[0] < float(np.abs(x).max(initial=0.0)) < MODEST[1]:
            x, y = x.astype(np.float64), y.astype(np.float64)
        if self.count == 0:
            self._shift_x, self._shift_y = x.mean(1), y.mean(1)
        x, y = x - self._shift_x[:, None, :], y - self._shift_y[:, None, :]
        self._xx += x.transpose(0, 2, 1) @ x
        self._x += x.sum(1, dtype=np.float64)
        self.count += x.shape[1]
        self._add_outputs(x, y)

    def _add_outputs(self, x: Array, y: Array) -> None:
        self._yx += (x.transpose(0, 2, 1) @ y).transpose(0, 2, 1)
        self._y += y.sum(1, dtype=np.float64)
        self._yy += np.einsum("gro,gro->go", y, y, dtype=np.float64)

    def with_outputs(self, x: Array, y: Array) -> Gram:
        """The same inputs with other outputs; ``x`` are all the rows that were added."""
        other = Gram(y.shape[0], y.shape[2], x.shape[2])
        other.count, other._xx, other._x = self.count, self._xx, self._x
        other._shift_x, other._shift_y = self._shift_x, y.mean(1)
        other._add_outputs(x - other._shift_x[:, None, :], y - other._shift_y[:, None, :])
        return other

    @property
    def mean_x(self) -> Array:
        """[groups, K]."""
        return self._x / self.count + self._shift_x

    @property
    def mean_y(self) -> Array:
        """[groups, outputs]."""
        return self._y / self.count + self._shift_y

    @property
    def variance_y(self) -> Array:
        """[groups, outputs]."""
        result: Array = np.maximum(self._yy / self.count - (self._y / self.count) ** 2, 0.0)
        return result

    @property
    def hessian(self) -> Array:
        """Covariance of x [groups, K, K]."""
        mean = self._x / self.count
        result: Array = self._xx / self.count - mean[:, :, None] * mean[:, None, :]
        return result

    @property
    def cross(self) -> Array:
        """Covariance of y with x [groups, outputs, K]."""
        x, y = self._x / self.count, self._y / self.count
        result: Array = self._yx / self.count - y[:, :, None] * x[:, None, :]
        return result
