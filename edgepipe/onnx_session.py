"""ONNX Runtime as a reference: one thread, and integer kernels only where they are exact."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepipe.onnx_parts import OnnxParts, is_apart

if TYPE_CHECKING:
    import onnx
    import onnxruntime

#: The version of operators that graphs are brought to, as ``passes.editor`` has it.
OPSET = 23
_UP_TO_21 = frozenset(("GlobalLpPool", "RoiAlign"))
#: What canonical graphs may hold that opset 21 does not have.
_SINCE_22 = frozenset(("Attention", "RMSNormalization", "RotaryEmbedding"))
_LINEAR = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
#: Weights up to here times 8-bit codes, two products summed, fit int16.
_SEVEN_BITS = 63


def open_session(
    model: bytes | OnnxParts,
    integer_kernels: bool | None = None,
    threads: int = 1,
    relayout: bool = True,
) -> onnxruntime.InferenceSession:
    """A session on ``threads`` of the CPU. Raises what ONNX Runtime raises for a bad model.

    By itself ONNX Runtime computes Q/DQ models with integer kernels, rounding as edgepipe does.
    Three times that is something else than the model says: it rounds float weights between Q/DQ
    pairs to 8 bits, and float activations of dequantised weights too (MatMulNBits), and on x86
    without VNNI its sums of two 8-bit products saturate where weights exceed 63. Float operators
    between roundings (``session.disable_quant_qdq``) are the other way to read the model; there
    ties may round differently. None for ``integer_kernels`` takes them where they are exact.
    Where its optimizations turn the model into one that it refuses, it computes what stands there.
    Without ``relayout`` it keeps weights as they are: slower, and less than half the memory.
    """
    import onnxruntime

    parts = OnnxParts.of(model)
    exact = _integer_kernels_are_exact(parts) if integer_kernels is None else integer_kernels
    levels = onnxruntime.GraphOptimizationLevel

    def opened(level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        # The order of additions must not depend on the machine.
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # what it raises says the same
        options.graph_optimization_level = level
        if not exact:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        return parts.session(options, ["CPUExecutionProvider"])

    try:
        return opened(levels.ORT_ENABLE_ALL if relayout else levels.ORT_ENABLE_EXTENDED)
    except Exception:  # its exceptions share no base class
        return opened(levels.ORT_DISABLE_ALL)


def known_opset(operators: Iterable[str]) -> int:
    """The version of ai.onnx to tell ONNX Runtime that ``operators`` of a canonical graph are of:
    the canonical one, or that of those that came later.

    A few it has in their forms up to opset 21 only; what came later are more element types.
    """
    names = set(operators)
    needed = max([OPSET, *map(_since, names)])
    old = names & _UP_TO_21 and not names & _SINCE_22
    return 21 if old and needed == OPSET else needed


def _since(operator: str) -> int:
    """The version that an operator needs, 1 for those the canonical one has."""
    import onnx

    if onnx.defs.has(operator, OPSET, "") or not onnx.defs.has(operator, ""):
        return 1
    return int(onnx.defs.get_schema(operator, "").since_version)


def _integer_kernels_are_exact(model: OnnxParts) -> bool:
    import onnx

    if b"DequantizeLinear" not in model.graph:
        return True
    graph = onnx.load_model_from_string(model.graph).graph
    makers = {output: node for node in graph.node for output in node.output}
    constants = {
        tensor.name: model.weights[tensor.name]
        if is_apart(tensor)
        else onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
    }
    for node in graph.node:
        if node.op_type not in _LINEAR:
            continue
        data, weight = (_dequantize(makers.get(name)) for name in node.input[:2])
        if data is None and weight is None:
            continue
        if data is None or weight is None:
            return False
        if weight.input[0] in constants and not _fits(constants[weight.input[0]]):
            return False
    return True


def _dequantize(node: onnx.NodeProto | None) -> onnx.NodeProto | None:
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _fits(codes: np.ndarray) -> bool:
    """Whether sums of two products with these weights fit int16, or the machine does not mind."""
    if codes.dtype not in (np.int8, np.uint8):
        return True
    largest = np.abs(codes.astype(np.int16)).max(initial=0)
    return bool(largest <= _SEVEN_BITS) or _sums_are_exact()


def _sums_are_exact() -> bool:
    """Whether this machine's 8-bit products go straight to int32."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    return "avx512_vnni" in text or "avx_vnni" in text or "asimddp" in text
