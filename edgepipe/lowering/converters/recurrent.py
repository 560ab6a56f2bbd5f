"""RNN, GRU and LSTM: the input product for all steps at once, then one loop kernel per direction.

Gate order, equations and the meaning of every input are those of the ONNX operators. The hidden
product runs over a transposed R, so that its inner loop walks memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from edgepipe.errors import UserError
from edgepipe.lowering.converters.gates import Activation, activations
from edgepipe.lowering.converters.loops import If, Kernel, Tensor
from edgepipe.lowering.converters.op import Expr, Op, cast, const
from edgepipe.lowering.converters.registry import converts
from edgepipe.lowering.converters.rows import sweep

_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@dataclass(frozen=True)
class _Sizes:
    """Steps, batch, input, hidden, gates and directions; ``batch_major`` is layout=1."""

    steps: int
    batch: int
    features: int
    hidden: int
    gates: int
    directions: int
    batch_major: bool


@dataclass(frozen=True)
class _Cell:
    """What a direction's kernel needs besides its tensors."""

    sizes: _Sizes
    direction: int
    reverse: bool
    activations: tuple[Activation, ...]
    clip: float
    linear_before_reset: bool
    input_forget: bool


@converts("RNN", "GRU", "LSTM")
def _recurrent(op: Op) -> list[Expr | None]:
    if op.dtype() != "float32":
        raise op.unsupported(f"dtype {op.dtype()}", "use float32")
    batch_major = bool(op.attr("layout", 0))
    first, second, features = op.shape()
    steps, batch = (second, first) if batch_major else (first, second)
    directions, gates = op.shape(1)[0], _GATES[op.type]
    sizes = _Sizes(steps, batch, features, op.shape(2)[2], gates, directions, batch_major)
    _check_shapes(op, sizes)
    direction = op.attr("direction", "forward")
    functions = activations(op, directions)
    projected = _input_product(op, sizes)
    hidden_weights = _transposed_hidden(op, sizes)
    parts = []
    for d in range(directions):
        cell = _Cell(
            sizes,
            d,
            direction == "reverse" or d == 1,
            functions[d],
            float(op.attr("clip", 0.0)),
            bool(op.attr("linear_before_reset", 0)),
            bool(op.attr("input_forget", 0)),
        )
        parts.append(_direction(op, cell, projected, hidden_weights))
    return _gather(op, sizes, parts)


def _check_shapes(op: Op, s: _Sizes) -> None:
    """Shape inference takes what it is given here, and kernels would read behind the ends."""
    rows = s.gates * s.hidden
    state = (s.batch, s.directions) if s.batch_major else (s.directions, s.batch)
    wanted = {
        1: (s.directions, rows, s.features),
        2: (s.directions, rows, s.hidden),
        3: (s.directions, 2 * rows),
        4: (s.batch,),
        5: (*state, s.hidden),
        6: (*state, s.hidden),
        7: (s.directions, 3 * s.hidden),
    }
    for number, shape in wanted.items():
        if op.has(number) and (found := op.shape(number)) != shape:
            raise UserError(
                f"input {number} of {op.type} has shape {list(found)}, not {list(shape)}",
                where=op.node.name or None,
                fix="export the model again",
            )
    both = op.attr("direction", "forward") == "bidirectional"
    if s.directions != 1 + both:
        raise UserError(
            f"{op.type} has weights for {s.directions} directions, not {1 + both}",
            where=op.node.name or None,
            fix="export the model again",
        )


def _input_product(op: Op, s: _Sizes) -> Expr:
    """[steps, batch, directions, gates·hidden] = x · Wᵀ + Wb (+ Rb unless it is reset-scaled)."""
    rows = s.gates * s.hidden
    late = op.type == "GRU" and bool(op.attr("linear_before_reset", 0))

    def project(x: Any, w: Any, bias: Any) -> Any:
        k = te.reduce_axis((0, s.features), "k")

        def element(t: Any, b: Any, d: Any, j: Any) -> Any:
            source = x(b, t, k) if s.batch_major else x(t, b, k)
            return te.sum(source * w(d, j, k), axis=k)

        shape = (s.steps, s.batch, s.directions, rows)
        product = te.compute(shape, element, name="project")
        if bias is None:
            return product

        def biased(t: Any, b: Any, d: Any, j: Any) -> Any:
            recurrent = bias(d, rows + j)
            if late:  # the bias of the hidden gate stays inside the reset product
                recurrent = tirx.Select(j < 2 * s.hidden, recurrent, const(0, "float32"))
            return product(t, b, d, j) + bias(d, j) + recurrent

        return te.compute(shape, biased, name="biased")

    return op.te(project, op.tensor(0), op.tensor(1), op.tensor(3) if op.has(3) else None)


def _transposed_hidden(op: Op, s: _Sizes) -> Expr:
    """R as [directions, hidden, gates·hidden]."""
    value = op.constant(2)
    if value is not None:
        return op.const(np.ascontiguousarray(value.transpose(0, 2, 1)))
    shape = (s.directions, s.hidden, s.gates * s.hidden)
    return op.compute(shape, lambda i, r: r(i[0], i[2], i[1]), op.tensor(2))


def _direction(op: Op, cell: _Cell, projected: Expr, weights: Expr) -> list[Expr]:
    """Y [steps, batch, hidden], Y_h and, for LSTM, Y_c [batch, hidden] of one direction."""
    s, d = cell.sizes, cell.direction
    optional = {
        name: op.inputs[i] if op.has(i) else None
        for name, i in (("bias", 3), ("lengths", 4), ("h0", 5), ("c0", 6), ("peepholes", 7))
    }
    if op.type != "LSTM":
        optional["c0"] = optional["peepholes"] = None
    if not (op.type == "GRU" and cell.linear_before_reset):
        optional["bias"] = None
    state = ((s.batch, s.hidden), "float32")
    outputs = [((s.steps, s.batch, s.hidden), "float32"), state]
    outputs += [state] if op.type == "LSTM" else []
    given = [projected, weights, *optional.values()]
    with Kernel(op, op.type.lower(), outputs=outputs, inputs=given) as k:
        tensors = {
            name: k.input(2 + i) for i, name in enumerate(optional) if optional[name] is not None
        }
        y, h = k.output(0), k.output(1)
        c = k.output(2) if op.type == "LSTM" else None
        gate = k.scratch((s.gates * s.hidden,), "float32")
        fresh = k.scratch((s.hidden,), "float32")
        for state_out, name in ((h, "h0"), (c, "c0")):
            if state_out is not None:
                _initial(k, cell, state_out, tensors.get(name))
        with k.each(s.batch) as b, k.each(s.steps) as step:
            length = cast(tensors["lengths"][b], "int32") if "lengths" in tensors else s.steps
            t = length - 1 - step if cell.reverse else step
            with _when(step, length, y, b, s):
                step_ = {"RNN": _rnn_step, "GRU": _gru_step, "LSTM": _lstm_step}[op.type]
                step_(k, cell, tensors, (gate, fresh, h, c), (t, b, d))
                with k.each(s.hidden) as j:
                    y[t, b, j] = h[b, j]
    return k.results


class _when:
    """Steps beyond a sequence's length write zeros to Y and leave the state alone."""

    def __init__(self, step: Any, length: Any, y: Tensor, b: Any, s: _Sizes) -> None:
        self.always = isinstance(length, int)
        self.condition = None if self.always else step < length
        self.zero = (step, y, b, s)
        self.frame: Any = None

    def __enter__(self) -> None:
        from tvm.script.ir_builder import tirx as T

        if not self.always:
            step, y, b, s = self.zero
            with If(tirx.Not(self.condition)), T.serial(0, s.hidden) as j:
                y[step, b, j] = const(0, "float32")
        self.frame = If(self.condition)
        self.frame.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.frame.__exit__(*error)


def _initial(k: Kernel, cell: _Cell, state: Tensor, given: Tensor | None) -> None:
    s, d = cell.sizes, cell.direction
    with k.nest(s.batch, s.hidden) as (b, j):
        if given is None:
            state[b, j] = const(0, "float32")
        else:
            state[b, j] = given[b, d, j] if s.batch_major else given[d, b, j]


def _clipped(cell: _Cell, value: Any) -> Any:
    if cell.clip <= 0:
        return value
    bound = const(cell.clip, "float32")
    return tirx.max(tirx.min(value, bound), const(-cell.clip, "float32"))


def _hidden_product(
    k: Kernel, cell: _Cell, source: Any, target: Tensor, span: tuple[int, int], d: Any
) -> None:
    """target[j] += Σ_m source(m) · R[j, m] for j in ``span``."""
    weights = k.input(1)
    low, high = span
    with k.each(cell.sizes.hidden) as m:

        def add(j: Any, lane: Any) -> None:
            target[low + j] = target[low + j] + source(m) * weights[d, m, low + j]

        sweep(k, high - low, add)


def _load_input(k: Kernel, target: Tensor, where: Any, span: tuple[int, int]) -> None:
    t, b, d = where
    low, high = span
    with k.each(high - low) as j:
        target[low + j] = k.input(0)[t, b, d, low + j]


def _rnn_step(k: Kernel, cell: _Cell, tensors: Any, state: Any, where: Any) -> None:
    gate, _, h, _ = state
    _, b, d = where
    n = cell.sizes.hidden
    _load_input(k, gate, where, (0, n))
    _hidden_product(k, cell, lambda m: h[b, m], gate, (0, n), d)
    with k.each(n) as j:
        h[b, j] = cell.activations[0](_clipped(cell, gate[j]))


def _gru_step(k: Kernel, cell: _Cell, tensors: Any, state: Any, where: Any) -> None:
    """Gates z, r, h: h' = (1 − z) ∘ h̃ + z ∘ h."""
    gate, fresh, h, _ = state
    _, b, d = where
    n = cell.sizes.hidden
    f, g = cell.activations
    _load_input(k, gate, where, (0, 3 * n))
    _hidden_product(k, cell, lambda m: h[b, m], gate, (0, 2 * n), d)
    with k.each(2 * n) as j:
        gate[j] = f(_clipped(cell, gate[j]))
    if cell.linear_before_reset:
        with k.each(n) as j:
            bias = tensors["bias"][d, 5 * n + j] if "bias" in tensors else const(0, "float32")
            fresh[j] = bias
        weights = k.input(1)
        with k.each(n) as m:

            def add(j: Any, lane: Any, m: Any = m) -> None:
                fresh[j] = fresh[j] + h[b, m] * weights[d, m, 2 * n + j]

            sweep(k, n, add)
        with k.each(n) as j:
            gate[2 * n + j] = gate[2 * n + j] + gate[n + j] * fresh[j]
    else:
        _hidden_product(k, cell, lambda m: gate[n + m] * h[b, m], gate, (2 * n, 3 * n), d)
    with k.each(n) as j:
        candidate = g(_clipped(cell, gate[2 * n + j]))
        z = gate[j]
        h[b, j] = (const(1, "float32") - z) * candidate + z * h[b, j]


def _lstm_step(k: Kernel, cell: _Cell, tensors: Any, state: Any, where: Any) -> None:
    """Gates i, o, f, c; peepholes i, o, f."""
    gate, _, h, c = state
    _, b, d = where
    n = cell.sizes.hidden
    f, g, out = cell.activations
    _load_input(k, gate, where, (0, 4 * n))
    _hidden_product(k, cell, lambda m: h[b, m], gate, (0, 4 * n), d)

    def peephole(number: int, j: Any) -> Any:
        if "peepholes" not in tensors:
            return const(0, "float32")
        return tensors["peepholes"][d, number * n + j] * c[b, j]

    with k.each(n) as j:
        gate[j] = f(_clipped(cell, gate[j] + peephole(0, j)))
        if cell.input_forget:
            gate[2 * n + j] = const(1, "float32") - gate[j]
        else:
            gate[2 * n + j] = f(_clipped(cell, gate[2 * n + j] + peephole(2, j)))
        gate[3 * n + j] = g(_clipped(cell, gate[3 * n + j]))
        c[b, j] = gate[2 * n + j] * c[b, j] + gate[j] * gate[3 * n + j]
        gate[n + j] = f(_clipped(cell, gate[n + j] + peephole(1, j)))
        h[b, j] = gate[n + j] * out(c[b, j])


def _gather(op: Op, s: _Sizes, parts: list[list[Expr]]) -> list[Expr | None]:
    """Directions side by side in the layout ONNX wants; outputs without a name stay None."""
    results: list[Expr | None] = []
    for number in range(len(parts[0])):
        if not op.wants(number):
            results.append(None)
            continue
        out = op.out_shape(number)
        pieces = [p[number] for p in parts]

        def element(i: Any, *tensors: Any, number: int = number) -> Any:
            if number == 0:
                b, t, d, j = i if s.batch_major else (i[2], i[0], i[1], i[3])
                where = [t, b, j]
            else:
                b, d, j = i if s.batch_major else (i[1], i[0], i[2])
                where = [b, j]
            if len(tensors) == 1:
                return tensors[0](*where)
            return tirx.if_then_else(d == 0, tensors[0](*where), tensors[1](*where))

        moved = len(pieces) > 1 or (s.batch_major and number == 0 and s.batch > 1 and s.steps > 1)
        if moved:
            results.append(op.compute(out, element, *[op.as_tensor(p) for p in pieces]))
        else:
            results.append(op.reshape(pieces[0], out))
    return results
