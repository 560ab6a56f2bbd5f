"""``digits``: trained weights, measured accuracy, no torch and no scikit-learn needed."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import pytest

from edgepipe import importer, zoo
from edgepipe.zoo import ZooEntry


@pytest.fixture(scope="module")
def entry() -> ZooEntry:
    return zoo.describe("digits")


@pytest.fixture(scope="module")
def held_out(entry: ZooEntry) -> dict[str, np.ndarray]:
    with np.load(entry.path(entry.test_data)) as data:
        return dict(data)


def accuracy(images: np.ndarray, labels: np.ndarray) -> float:
    source = importer.load("digits", {"image": images.shape})
    logits = onnxruntime.InferenceSession(source.proto_bytes()).run(None, {"image": images})[0]
    return float((logits.argmax(1) == labels).mean())


def test_accuracy_is_what_the_entry_says(entry: ZooEntry, held_out: dict[str, np.ndarray]) -> None:
    measured = accuracy(held_out["image"], held_out["labels"])
    assert round(measured, 4) == entry.accuracy
    assert measured > 0.98


def test_accuracy_can_fail(held_out: dict[str, np.ndarray]) -> None:
    assert accuracy(held_out["image"], np.roll(held_out["labels"], 1)) < 0.3
    assert accuracy(held_out["image"][..., ::-1].copy(), held_out["labels"]) < 0.8


def test_files(entry: ZooEntry, held_out: dict[str, np.ndarray]) -> None:
    assert entry.path(entry.file).stat().st_size < 100_000
    assert entry.path(entry.test_data).stat().st_size < 150_000
    assert held_out["image"].shape == (450, 1, 8, 8) and held_out["image"].dtype == np.float32
    assert held_out["labels"].shape == (450,) and held_out["labels"].dtype == np.int64


def test_network_exercises_the_compiler() -> None:
    kinds = {node.op_type for node in importer.load("digits").model.graph}
    assert {"Conv", "BatchNormalization", "Relu", "Add", "MaxPool", "Gemm"} <= kinds


def test_loading_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "onnxscript", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    importer.load("digits")


@pytest.mark.slow
@pytest.mark.needs_torch
def test_held_out_images_are_those_of_the_split(held_out: dict[str, np.ndarray]) -> None:
    pytest.importorskip("sklearn")
    from edgepipe.zoo.train_digits import split

    train_images, train_labels, images, labels = split()
    assert np.array_equal(images, held_out["image"]) and np.array_equal(labels, held_out["labels"])
    assert len(train_images) == len(train_labels) == 1797 - 450


@pytest.mark.needs_torch
def test_written_graph_computes_what_torch_does() -> None:
    import torch

    from edgepipe.zoo import train_digits

    torch.manual_seed(1)
    net = train_digits.Digits()
    images = np.random.default_rng(0).uniform(0, 16, (5, 1, 8, 8)).astype(np.float32)
    net(torch.from_numpy(images))  # moves the BatchNorm statistics off their start
    want = net.eval()(torch.from_numpy(images)).detach().numpy()
    runner = onnxruntime.InferenceSession(train_digits.to_onnx(net))
    assert np.abs(runner.run(None, {"image": images})[0] - want).max() < 1e-5
