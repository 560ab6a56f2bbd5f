"""A quantized graph as an int8 ``.tflite`` file, which LiteRT runs in integers with XNNPACK.

``config`` says what the quantizer must be told, ``write`` turns its result into the file:

    graph = quantization.apply(model, tflite.config(QuantConfig.parse("w8a8")), samples, context)
    Path("net.tflite").write_bytes(tflite.write(graph))

*What is in the file.* Inputs and outputs are float32 and keep the names and the order of the
model; tensors with four axes are channels last, [N, H, W, C], all others have the shape of the
model. Between the QUANTIZE at the inputs and the DEQUANTIZE at the outputs everything is int8:
activations asymmetric per tensor, weights symmetric per output channel, biases int32. What the
quantizer left in float behind the last integer operator (a Softmax at the end, say) is a float
operator behind the DEQUANTIZE. 4-bit weights are stored as bytes.

*How near it is.* Scales and codes are those of the graph. Where tflite prescribes the grid of an
operator's result (LOGISTIC, TANH and SOFTMAX have fixed ones; AVERAGE_POOL_2D, RESIZE_BILINEAR
keep their input's), that one is taken: a second rounding would only lose. XNNPACK requantises in
float32 and mostly gives the codes of ONNX Runtime; the interpreter's own kernels use fixed-point
multipliers, so that single codes differ by one.

*How it is written.* Directly as flatbuffer tables (``schema``, ``network``): the schema is public
and its slots never change, while the generated Python schema comes only inside interpreter
packages of 60 MB, as a private module. The ``flatbuffers`` package is 100 KB of Python that ONNX
Runtime needs anyway.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgepipe.errors import UserError
from edgepipe.quantization.config import QuantConfig

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["config", "write"]


def config(base: QuantConfig) -> QuantConfig:
    """``base`` with what tflite wants: int8 codes, and a rounding behind every operator.

    Raises UserError for recipes whose activations stay float.
    """
    if base.activation_bits is None:
        raise UserError(
            "weight-only recipes compute in float, which this .tflite writer does not do",
            where="tflite",
            fix="use w8a8 or w4a8",
        )
    return replace(base, signed_activations=True, fuse_residual=False, quantize_outputs=True)


def write(model: ir.Model) -> bytes:
    """The .tflite file of a Q/DQ graph (see the module's docstring for its layout).

    ``model``: static shapes, as ``edgepipe.quantization.apply`` with ``config`` writes it.
    Raises Unsupported, naming the operator, for what tflite cannot compute in int8, and for
    graphs that do not round behind every operator.
    """
    from edgepipe import __version__
    from edgepipe.interchange.tflite.graph import translate

    return translate(model.graph).serialise(f"edgepipe {__version__}")
