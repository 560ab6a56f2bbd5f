"""Test models as ONNX text, run through chosen passes, with a numerical comparison."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx.reference import ReferenceEvaluator

from edgepipe.passes import inline, opset, shapes
from edgepipe.passes.editor import Editor

Array = np.ndarray

#: Largest relative error (L2) of the rewritten model, by the reason for it.
TOLERANCES = {
    "moves data only": 0.0,
    "float32 sums in another order": 2e-6,
    "float32 weights rounded once more": 2e-6,
    "another formula of the same function": 5e-6,
}
DEFAULT = "float32 sums in another order"


@dataclass
class Rewritten:
    """A model before and after passes, with what they noted."""

    before: ir.Model
    after: ir.Model
    notes: list[str] = field(default_factory=list)

    @property
    def ops(self) -> list[str]:
        """Operator types of the result in order."""
        return [node.op_type for node in self.after.graph]

    def node(self, op_type: str) -> ir.Node:
        """The only node of this type."""
        found = [node for node in self.after.graph.all_nodes() if node.op_type == op_type]
        assert len(found) == 1, f"{len(found)} {op_type} nodes"
        return found[0]

    def constant(self, op_type: str, index: int) -> Array:
        """The constant at an input of the only node of this type."""
        value = self.node(op_type).inputs[index]
        assert value is not None and value.const_value is not None
        return value.const_value.numpy()


def model(text: str, opset_version: int = 17, **weights: Array) -> ir.Model:
    """Parse ``text`` (graph only); ``weights`` fill those declared in its < > list and used."""
    header = f'<ir_version: 8, opset_import: ["" : {opset_version}]>\n'
    tensors = [
        ir.tensor(np.asarray(array), name=name)
        for name, array in weights.items()
        if len(re.findall(rf"\b{name}\b", text)) > 1
    ]
    return ir.from_onnx_text(header + text, initializers=tensors)


def rewrite(
    source: ir.Model | str,
    *passes: Callable[[Editor], int],
    opset_version: int = 17,
    **weights: Array,
) -> Rewritten:
    """Run the preparing passes and then ``passes`` on a copy of the model."""
    before = model(source, opset_version, **weights) if isinstance(source, str) else source
    notes: list[str] = []
    edit = Editor(before.clone(), lambda subject, reason: notes.append(reason))
    for step in (inline.run, opset.run, *passes):
        step(edit)
    result = Rewritten(before, edit.model, notes)
    assert not shapes.unknown(result.after), "every value must keep a static shape"
    return result


def normal(*shape: int, seed: int = 0, scale: float | None = None) -> Array:
    """He-like float32 weights: the spread keeps activations at their size."""
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    spread = np.sqrt(2 / max(fan_in, 1)) if scale is None else scale
    generator = np.random.default_rng(zlib.crc32(repr((shape, seed)).encode()))
    return (generator.standard_normal(shape) * spread).astype(np.float32)


def inputs_of(source: ir.Model, seed: int = 0) -> dict[str, Array]:
    """Random inputs for every graph input that is not an initializer."""
    generator = np.random.default_rng(seed)
    feeds = {}
    for value in source.graph.inputs:
        if value.name in source.graph.initializers:
            continue
        shape, dtype = [int(d) for d in value.shape], value.dtype.numpy()
        if dtype.kind == "f":
            feeds[value.name] = generator.standard_normal(shape).astype(dtype)
        elif dtype.kind == "b":
            feeds[value.name] = np.asarray(generator.random(shape) < 0.5)
        else:
            feeds[value.name] = generator.integers(0, 5, shape).astype(dtype)
    return feeds


def execute(source: ir.Model, feeds: dict[str, Array]) -> list[Array]:
    """Run by ONNX Runtime without graph optimisations; the reference where it lacks an op."""
    proto = ir.serde.serialize_model(source)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception:
        with np.errstate(all="ignore"):
            return ReferenceEvaluator(proto).run(None, feeds)
    return session.run(None, feeds)


def relative_error(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    """Largest ‖actual − expected‖ / ‖expected‖ over the outputs; inf for another shape."""
    worst = 0.0
    for a, b in zip(expected, actual, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
        worst = max(worst, float(np.linalg.norm(a64 - b64) / max(np.linalg.norm(a64), 1e-30)))
    return worst


def assert_equal(result: Rewritten, reason: str = DEFAULT, seed: int = 0) -> None:
    """The rewritten model is valid and computes what the original computes."""
    proto = ir.serde.serialize_model(result.after)
    onnx.checker.check_model(proto, full_check=True)
    assert {n.domain for n in result.after.graph.all_nodes()} <= {""}
    feeds = inputs_of(result.before, seed)
    expected = execute(result.before, feeds)
    error = relative_error(expected, execute(result.after, feeds))
    assert error <= TOLERANCES[reason], f"relative error {error:.2e} ({reason})"


def squeeze_text(source: ir.Model) -> str:
    """The model as text without spaces, for comparing that it did not change."""
    return re.sub(r"\s+", " ", str(source))
