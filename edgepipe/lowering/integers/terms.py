"""What a value of a Q/DQ graph stands for while the graph is read: sums of scaled integers.

The forms and rules are those of ``edgepipe.quantization.interpreter``; here the integers are
described instead of computed, so that a kernel can compute them at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepipe.lowering.weights import channel_axis
from edgepipe.quantization.graph import Array

#: Domain of the nodes that compute in integers.
DOMAIN = "edgepipe.integer"
#: Key of ``ir.Node.meta`` that holds the ``Integer`` of such a node.
META = "integer"
#: Key of ``ir.Node.meta`` of a ReduceMean in DOMAIN: its axes.
AXES = "edgepipe.axes"
#: Key of ``ir.Value.meta`` of a tensor of codes: its zero point.
ZERO = "edgepipe.zero"


@dataclass(frozen=True, eq=False)
class Codes:
    """A tensor of 8-bit codes, ``value``: (code − zero) · scale each."""

    value: ir.Value
    scale: Array
    zero: int

    def same_grid(self, scale: Array, zero: int) -> bool:
        """Whether codes on the grid (scale, zero) mean the same."""
        return bool(self.scale == scale) and self.zero == zero


@dataclass(frozen=True, eq=False)
class Weights:
    """Constant integers in ONNX layout; ``scale`` is one float32, or one per index of ``axis``."""

    codes: Array
    scale: Array
    axis: int


@dataclass(frozen=True, eq=False)
class Term:
    """One addend: int32 computed from ``inputs`` as ``kind`` says, times ``scale``.

    ``kind``: ``codes`` (code − zero), ``product`` (of ``node``, a linear operator, with ``weights``
    and ``bias``, or of two tensors of codes), ``multiply`` (elementwise), ``average`` (the sum that
    ``node`` divides; the count is in the scale), ``resize`` (float32 between two codes − zero, by
    ``bilinear.interpolate``) or ``table`` (a function of one code: ``table`` has its 256 values).
    ``scale`` broadcasts against the result.
    """

    kind: str
    inputs: tuple[Codes, ...]
    scale: Array
    node: ir.Node | None = None
    weights: Weights | None = None
    bias: Array | None = None
    table: Array | None = None

    def weight_sums(self) -> Array:
        """float64 Σ|w| of every output channel of a product with weights. The axis of their scale
        is not asked: one scale for all has any."""
        assert self.weights is not None and self.node is not None
        codes = np.abs(self.weights.codes.astype(np.float64))
        if codes.ndim < 2:
            return np.atleast_1d(codes.sum())
        # Inputs of nodes that were replaced are gone, which ``channel_axis`` would ask of MatMul.
        axis = codes.ndim - 1 if self.node.op_type == "MatMul" else channel_axis(self.node)
        sums: Array = codes.sum(tuple(i for i in range(codes.ndim) if i != axis))
        return sums


@dataclass(frozen=True, eq=False)
class Sum:
    """A float tensor that has not been rounded: terms added up, then cut to ``low`` … ``high``."""

    terms: tuple[Term, ...]
    low: float = -np.inf
    high: float = np.inf
    names: tuple[str, ...] = ()

    @property
    def cut(self) -> bool:
        return self.low > -np.inf or self.high < np.inf

    @property
    def single(self) -> Term | None:
        """The only term of an uncut tensor with one scale."""
        alone = len(self.terms) == 1 and not self.cut and self.terms[0].scale.size == 1
        return self.terms[0] if alone else None

    @property
    def codes(self) -> Codes | None:
        """The tensor of codes that this is, if it is one."""
        term = self.single
        return term.inputs[0] if term is not None and term.kind == "codes" else None


@dataclass(frozen=True, eq=False)
class Integer:
    """What a node of DOMAIN computes from its inputs, all of them codes.

    ``term`` is the first addend; the others are ``residuals``: tensors of codes. Inputs of the
    node are those of the term, then the residuals. Each addend is multiplied by its float32
    multiplier; then, where ``zero`` is given, y = clip(round(Σ) , low, high) + zero with
    integers low and high, stored as the output's type; else y = clip(Σ, low, high) in float32.
    """

    term: Term
    residuals: tuple[Codes, ...]
    multipliers: tuple[Array, ...]
    low: float
    high: float
    zero: int | None
    names: tuple[str, ...]

    @property
    def rounds(self) -> bool:
        """Whether the result is codes."""
        return self.zero is not None


def integer_of(node: ir.Node) -> Integer:
    """The ``Integer`` of a node of DOMAIN."""
    found: Integer = node.meta[META]
    return found
