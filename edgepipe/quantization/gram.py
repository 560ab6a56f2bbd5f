"""Second moments of a layer's input and their product with its output, from a stream."""

from __future__ import annotations

import numpy as np

from edgepipe.quantization.graph import Array


class Gram:
    """Accumulates moments of rows x [groups, rows, K] and y [groups, rows, outputs].

    Products are taken in float32 per chunk and summed in float64.
    """

    def __init__(self, groups: int, outputs: int, inputs: int) -> None:
        self.count = 0
        self._xx = np.zeros((groups, inputs, inputs))
        self._yx = np.zeros((groups, outputs, inputs))
        self._x = np.zeros((groups, inputs))
        self._y = np.zeros((groups, outputs))
        self._yy = np.zeros((groups, outputs))

    def add(self, x: Array, y: Array) -> None:
        """One chunk of rows."""
        transposed = x.transpose(0, 2, 1)
        self._xx += transposed @ x
        self._yx += (transposed @ y).transpose(0, 2, 1)
        self._x += x.sum(1, dtype=np.float64)
        self._y += y.sum(1, dtype=np.float64)
        self._yy += (y * y).sum(1, dtype=np.float64)
        self.count += x.shape[1]

    def with_outputs(self, x: Array, y: Array) -> Gram:
        """The same inputs with other outputs, of the same rows."""
        other = Gram.__new__(Gram)
        other.count, other._xx, other._x = self.count, self._xx, self._x
        other._yx = (x.transpose(0, 2, 1) @ y).transpose(0, 2, 1).astype(np.float64)
        other._y = y.sum(1, dtype=np.float64)
        other._yy = (y * y).sum(1, dtype=np.float64)
        return other

    @property
    def mean_x(self) -> Array:
        """[groups, K]."""
        return self._x / self.count

    @property
    def mean_y(self) -> Array:
        """[groups, outputs]."""
        return self._y / self.count

    @property
    def variance_y(self) -> Array:
        """[groups, outputs]."""
        result: Array = np.maximum(self._yy / self.count - self.mean_y**2, 0.0)
        return result

    @property
    def hessian(self) -> Array:
        """Covariance of x [groups, K, K]."""
        mean = self.mean_x
        result: Array = self._xx / self.count - mean[:, :, None] * mean[:, None, :]
        return result

    @property
    def cross(self) -> Array:
        """Covariance of y with x [groups, outputs, K]."""
        result: Array = self._yx / self.count - self.mean_y[:, :, None] * self.mean_x[:, None, :]
        return result
