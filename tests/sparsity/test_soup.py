"""Averages of networks: what is averaged, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantization.finetune.tasks import SMALL
from quantization.networks import build

from edgepipe.errors import UserError
from edgepipe.sparsity.soup import average


def value(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def changed(model: ir.Model, name: str, array: np.ndarray) -> ir.Model:
    copy = model.clone()
    copy.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return copy


def test_weights_are_means_and_zeros_stay() -> None:
    start = build(SMALL)
    weight = value(start, "w1").copy()
    weight[::2] = 0
    rng = np.random.default_rng(0)
    arrays = [weight * rng.uniform(0.5, 2, weight.shape).astype(np.float32) for _ in range(3)]
    found = average([changed(start, "w1", a) for a in arrays])
    exact = np.mean(np.stack(arrays).astype(np.float64), 0)
    np.testing.assert_array_equal(value(found, "w1"), exact.astype(np.float32))
    assert not value(found, "w1")[::2].any() and np.array_equal(
        value(found, "w0"), value(start, "w0")
    )
    assert not np.array_equal(value(found, "w1"), arrays[0])


def test_what_has_no_average_is_refused() -> None:
    start = build(SMALL)
    weight = value(start, "w1").copy()
    weight[0, 0, 0, 0] = 0
    with pytest.raises(UserError, match="'w1' has zeros in other places"):
        average([start, changed(start, "w1", weight)])
    other = start.clone()
    next(n for n in other.graph if n.op_type == "Relu").op_type = "Sigmoid"
    with pytest.raises(UserError, match="model 2 is another network"):
        average([start, other])
    with pytest.raises(UserError, match="'flat' is int64 and differs"):
        average([start, changed(start, "flat", np.array([2, 6]))])
    with pytest.raises(UserError, match="no model"):
        average([])
