"""nncf's quantizer in our Q/DQ form."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from edgepipe.errors import UserError
from edgepipe.quantization import QuantConfig, nncf_ptq
from edgepipe.quantization.interpreter import Interpreter
from quantization.networks import MIXED, build, quantize, run, samples, snr_db


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"edgepipe\[nncf\]"):
        quantize(build(MIXED), methods=("nncf",))
    with pytest.raises(UserError, match="8 bits"):
        QuantConfig.parse("w4a8", methods=("nncf",))


def test_reading_its_graph() -> None:
    """Per-tensor ranges, per-channel scales and biases of a hand-written Q/DQ graph."""
    import onnx

    held = {
        "s": np.float32(0.5), "z": np.uint8(128), "w": np.ones((2, 3, 1, 1), np.int8),
        "t": np.array([0.1, 0.2], np.float32), "o": np.zeros(2, np.int8),
        "b": np.array([1, 2], np.float32),
    }  # fmt: skip
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        n (float[1,3,4,4] x) => (float[1,2,4,4] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            v = DequantizeLinear<axis=0>(w, t, o)
            y = Conv(d, v, b) }"""
    )
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in held.items()
    )
    found = nncf_ptq._read(model)
    assert found.ranges == {"x": (-64.0, 63.5)}
    np.testing.assert_array_equal(found.scales["y"], held["t"])
    np.testing.assert_array_equal(found.biases["y"], held["b"])


@pytest.mark.slow
@pytest.mark.may_skip
@pytest.mark.parametrize("limit", [63, 127])
def test_it_quantizes(limit: int) -> None:
    pytest.importorskip("nncf", reason="nncf is not installed: pip install 'edgepipe[nncf]'")
    model = build(MIXED)
    result, _ = quantize(model, methods=("nncf",), weight_limit=limit)
    fresh = samples(model, 8, seed=9)
    expected = np.concatenate([run(model, s)[0] for s in fresh])
    found = np.concatenate([run(result, s)[0] for s in fresh])
    assert snr_db(expected, found) > 22
    codes = [
        n.inputs[1].producer().inputs[0].const_value.numpy()
        for n in result.graph
        if n.op_type in ("Conv", "Gemm")
    ]
    assert max(np.abs(c.astype(int)).max() for c in codes) == limit
    kinds = Counter(n.op_type for n in result.graph)
    assert (
        kinds["QuantizeLinear"]
        == Counter(n.op_type for n in quantize(model, methods=())[0].graph)["QuantizeLinear"]
    ), "placement stays ours"
    interpreter = Interpreter(result)
    sample = fresh[0]
    assert snr_db(run(result, sample)[0], interpreter.run(sample)["y"]) > 40
    assert interpreter.floats == []
