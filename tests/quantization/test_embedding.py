"""Tables of embeddings as codes, and the warning where most weights stay float."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe import quantization
from edgepipe.quantization import QuantConfig
from quantization.networks import Array, build, context, run, snr_db

TEXT = """n (int64[1,6] i) => (float[1,6,8] y)
<float[200,16] t, float[16,8] w> {
    e = Gather(t, i)
    y = MatMul(e, w) }"""


def quantize(model: ir.Model, **changes: object) -> tuple[ir.Model, list[str]]:
    used, ids = context(), np.random.default_rng(2)
    feeds = [{"i": ids.integers(0, 200, (1, 6))} for _ in range(16)]
    config = QuantConfig.parse("w8a8", **changes)
    result = quantization.apply(model, config, feeds, used)
    return result, [f"{n.subject}: {n.text}" for n in used.notes if n.warning]


def kinds(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {str(v.name): v.dtype for v in model.graph.initializers.values()}


def table(rows: float = 1.0) -> Array:
    """Columns of different size, and one that is zero."""
    columns = np.exp(np.random.default_rng(3).standard_normal(16) * 2) * rows
    columns[5] = 0
    return np.random.default_rng(4).standard_normal((200, 16)) * columns


def test_a_table_is_codes_with_a_scale_per_column() -> None:
    model = build(TEXT, t=table())
    quantized, warnings = quantize(model)
    assert kinds(quantized)["t/codes"] == ir.DataType.INT8
    assert "t" not in kinds(quantized)
    assert not any("of them are quantized" in w for w in warnings)
    feeds = {"i": np.arange(6)[None]}
    assert snr_db(run(model, feeds)[0], run(quantized, feeds)[0]) > 30
    wrong = quantized.clone()
    codes = wrong.graph.initializers["t/codes"].const_value
    assert codes is not None
    wrong.graph.initializers["t/codes"].const_value = ir.tensor(codes.numpy() // 2)
    assert snr_db(run(model, feeds)[0], run(wrong, feeds)[0]) < 10


def test_an_override_keeps_it_float_and_that_is_said() -> None:
    quantized, warnings = quantize(build(TEXT, t=table()), overrides=(("Gather", "float"),))
    assert kinds(quantized)["t"] == ir.DataType.FLOAT
    assert [w for w in warnings if w.startswith("weights: only")] == [
        "weights: only 0% of them are quantized; float32 are those of Gather"
    ]
