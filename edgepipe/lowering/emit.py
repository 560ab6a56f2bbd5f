"""Kernel nodes to ``call_tir`` of their template's PrimFunc, with the audit of what was chosen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from edgepipe.codegen.plan import KernelAudit
from edgepipe.context import Context
from edgepipe.errors import Unsupported
from edgepipe.kernels.epilogue import describe
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.ops import MatmulOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs, select
from edgepipe.kernels.weights import FLOAT32
from edgepipe.lowering import pace
from edgepipe.lowering.describe import KernelNode

STAGE = "lowering.kernels"


@dataclass
class Emitter:
    """Emits every kernel node; equal ops share one PrimFunc. ``audit`` is keyed by kernel name
    and node so that the plan can list, per call, what runs."""

    context: Context
    functions: dict[Any, Any] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    audits: dict[str, list[KernelAudit]] = field(default_factory=dict)
    #: Kernels that differ in a variant of the bundle's code: variant → function name → PrimFunc.
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, builder: Any, node: ir.Node, inputs: list[Any]) -> list[Any]:
        kernel: KernelNode = node.meta["kernel"]
        template, reasons = select(kernel.op, self.context.target)
        for reason in reasons:
            self.context.note(STAGE, node.name, reason)
        if template is None:
            raise Unsupported(f"no kernel for {kernel.op_type}", where=node.name)
        knobs, tuned = choose_knobs(template, kernel.op, self.context, node.name)
        var = self._function(builder, template, kernel.op, knobs)
        arguments = _arguments(template, kernel, knobs, inputs)
        self.audits.setdefault(var.name_hint, []).append(
            replace(
                _audit(template, kernel, knobs, var),
                tuned=tuned,
                estimated_instructions=pace.estimates(kernel.op, self.context.target),
            )
        )
        shape = tuple(int(d) for d in node.outputs[0].shape)  # type: ignore[union-attr,arg-type]
        dtype = str(node.outputs[0].dtype.numpy())  # type: ignore[union-attr]
        result = relax.TensorType(shape, dtype)
        scratch = template.scratch(kernel.op, knobs)
        if not scratch:
            return [builder.emit(relax.call_tir(var, arguments, result))]
        types = [result, *(relax.TensorType((size,), "int32") for size in scratch)]
        results = builder.emit(relax.call_tir(var, arguments, types))
        return [builder.emit(relax.TupleGetItem(results, 0))]

    def _function(self, builder: Any, template: KernelTemplate, op: Op, knobs: Knobs) -> Any:
        key = (op, tuple(sorted(knobs.items())))
        if key not in self.functions:
            function = template.emit(op, knobs)
            name = str(function.attrs["edgepipe.template"])
            number = self.names[name] = self.names.get(name, -1) + 1
            function = function.with_attr("op_pattern", 8)  # opaque: never fused by Relax
            var = builder.add_func(function, f"{name}_{number}")
            self.functions[key] = var
            for variant in self.context.target.variants:
                other = template.variant(op, knobs, variant)
                if other is not None:
                    function = template.emit(op, other)
                    self.variants.setdefault(variant, {})[var.name_hint] = function
        return self.functions[key]


def choose_knobs(
    template: KernelTemplate, op: Op, context: Context, name: str | None = None
) -> tuple[Knobs, str]:
    """The knobs of a record for this operator, and whose it is; else those of the default rule.

    A record of another version of the template, or with a setting that it does not offer, is
    stale. Knobs that came after it are as the default rule has them, and as they were when it was
    made: a knob that means another kernel by default raises the version.
    """
    record = context.records.find(template.name, op, context.target)
    default = template.default(op, context.target)
    if record is None:
        return default, ""
    origin = context.records.origin[record.key]
    if record.version == template.version:
        wanted = {**plain(default), **record.knobs}
        for knobs in template.settings(op, context.target):
            if plain(knobs) == wanted:
                return knobs, origin
        why = "its setting is not among those on offer"
    else:
        why = f"made for version {record.version} of {template.name}, this is {template.version}"
    context.note(STAGE, name, f"stale tuning record of {origin} left out: {why}")
    return default, ""


def plain(knobs: Knobs) -> Knobs:
    """Knobs as JSON gives them back."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in knobs.items()}


def _arguments(
    template: KernelTemplate, kernel: KernelNode, knobs: Knobs, inputs: list[Any]
) -> list[Any]:
    remaining = list(inputs)

    def take(array: np.ndarray | None) -> Any:
        return remaining.pop(0) if array is None else relax.const(np.ascontiguousarray(array))

    activations = [take(a) for a in kernel.inputs]
    packed = [relax.const(a) for a in template.pack(kernel.op, knobs, kernel.weights)]
    kernel.weights.clear()  # they are where TVM has them now
    residuals = [take(a) for a in kernel.residuals]
    assert not remaining
    return [*activations, *packed, *residuals]


def _audit(template: KernelTemplate, kernel: KernelNode, knobs: Knobs, var: Any) -> KernelAudit:
    steps = () if not hasattr(kernel.op, "epilogue") else kernel.op.epilogue
    fused = describe(steps)
    if isinstance(kernel.op, MatmulOp) and kernel.op.bias:
        fused = "+".join(filter(None, ["bias", fused]))
    return KernelAudit(
        op="; ".join(kernel.names),
        op_type=kernel.op_type + (f"+{fused}" if fused else ""),
        kernel=var.name_hint,
        arithmetic=template.arithmetic + _weights(kernel.op),
        accumulator=template.accumulator,
        macs=getattr(kernel.op, "macs", 0),
        knobs=",".join(f"{k}={v}" for k, v in sorted(knobs.items())),
        sparsity=kernel.sparsity,
        executed_macs=template.executed(kernel.op, knobs),
    )


def _weights(op: Op) -> str:
    """How weights are stored, where that is not in the type of the arithmetic."""
    if isinstance(op, QConvOp):
        return ", weights int4" if op.bits == 4 and not op.depthwise else ""
    format = getattr(op, "weights", FLOAT32)
    return "" if format == FLOAT32 else f", weights {format}"
