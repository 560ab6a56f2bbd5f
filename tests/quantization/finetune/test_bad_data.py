"""What cannot be trained with is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgepipe.errors import UserError
from edgepipe.quantization import QuantConfig
from edgepipe.quantization.finetune import FinetuneSettings, run
from edgepipe.quantization.finetune.examples import Examples, augment
from quantization.finetune.tasks import SMALL
from quantization.networks import build, context

X = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
LABELS = np.array([0, 1, 2, 3, 0, 1])


def broken(x: np.ndarray, number: float) -> np.ndarray:
    x = x.copy()
    x[2, 0, 0, 0] = number
    return x


@pytest.mark.parametrize(
    ("inputs", "labels", "words"),
    [
        ({"y": X}, LABELS, ["'y' is not an input", "did you mean|known: x"]),
        ({}, LABELS, ["'x'", "missing"]),
        (X[:, :2], LABELS, ["'x'", "[6, 2, 8, 8]", "[N, 3, 8, 8]"]),
        (X[0], LABELS, ["'x'", "[N, 3, 8, 8]"]),
        (X[:0], LABELS[:0], ["'x'", "no examples"]),
        (broken(X, np.nan), LABELS, ["'x'", "NaN"]),
        (broken(X, np.inf), LABELS, ["'x'", "infinite"]),
        (X.astype(complex), LABELS, ["'x'", "complex128"]),
        (X, None, ["no labels", "distillation=1"]),
        (X, LABELS[:5], ["5 labels for 6"]),
        (X, LABELS + 1, ["1 to 4", "4 classes"]),
        (X, LABELS - 1, ["-1 to 2", "4 classes"]),
        (X, LABELS.astype(float), ["float64", "integers"]),
        (X, np.eye(6), ["[6, 6]", "integers"]),
    ],
)
def test_bad_data(inputs: Any, labels: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        Examples.of(build(SMALL).graph, inputs, labels, FinetuneSettings())
    text = str(error.value)
    assert all(any(part in text for part in word.split("|")) for word in words), text


def test_labels_of_squared_errors_have_the_outputs_shape() -> None:
    settings = FinetuneSettings(loss="squared_error")
    with pytest.raises(UserError, match=r"\[6, 3\]"):
        Examples.of(build(SMALL).graph, X, np.zeros((6, 3)), settings)


def test_cross_entropy_needs_logits() -> None:
    model = build("n (float[1, 2, 4] x) => (float[1, 2, 3] y) <float[4,3] w> { y = MatMul(x, w) }")
    x = np.zeros((6, 2, 4), np.float32)
    with pytest.raises(UserError, match="squared_error"):
        Examples.of(model.graph, x, LABELS, FinetuneSettings())
    settings = FinetuneSettings(loss="squared_error", augmentation="flip")
    with pytest.raises(UserError, match="augmentation"):
        Examples.of(model.graph, x, np.zeros((6, 2, 3)), settings)


def test_several_inputs_want_names() -> None:
    model = build(
        "n (float[1,4] x, float[1,4] z) => (float[1,4] y) <float[4] w> {\n"
        " a = Add(x, z)\n y = Mul(a, w) }"
    )
    x = np.zeros((6, 4), np.float32)
    with pytest.raises(UserError, match="name x, z"):
        Examples.of(model.graph, x, LABELS, FinetuneSettings())
    with pytest.raises(UserError, match="differ in number"):
        Examples.of(model.graph, {"x": x, "z": x[:3]}, LABELS, FinetuneSettings())


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"ranges": "minmax"}, "learned"),
        ({"loss": "hinge"}, "cross_entropy"),
        ({"augmentation": "rotate"}, "flip"),
        ({"epochs": -1}, "epochs"),
        ({"batch": 0}, "batch"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"distillation": 1.5}, "distillation"),
        ({"temperature": 0.0}, "temperature"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        FinetuneSettings(**fields)


@pytest.mark.needs_torch
def test_weight_only_recipes_are_refused() -> None:
    with pytest.raises(UserError, match="weight-only"):
        run(build(SMALL), QuantConfig.parse("w4g2"), (X, LABELS), FinetuneSettings(), context())


@pytest.mark.needs_torch
def test_a_teacher_of_another_form_is_refused() -> None:
    teacher = build("n (float[1,4] x) => (float[1,4] y) <float[4] w> { y = Mul(x, w) }")
    settings = FinetuneSettings(distillation=0.5)
    with pytest.raises(UserError, match="teacher: its inputs"):
        run(build(SMALL), None, (X, LABELS), settings, context(), teacher)


def test_every_example_comes_once_an_epoch_and_in_another_order() -> None:
    settings = FinetuneSettings(batch=2)
    examples = Examples.of(build(SMALL).graph, X, LABELS, settings)
    firsts = X[:, 0, 0, 0].tolist()

    def order(epoch: int) -> list[int]:
        batches = [examples.batch(3 * epoch + i, settings) for i in range(3)]
        found = [firsts.index(v) for x, _ in batches for v in x["x"][:, 0, 0, 0].tolist()]
        assert [LABELS[i] for i in found] == [v for _, y in batches for v in y]
        return found

    orders = [order(epoch) for epoch in range(4)]
    assert all(sorted(found) == list(range(6)) for found in orders)
    assert len({tuple(found) for found in orders}) > 1


def test_shifts_and_mirrors() -> None:
    image = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8).repeat(400, 0)
    flipped = augment(image, np.random.default_rng(0), shift=False)
    mirrored = (flipped == image[..., ::-1]).all((1, 2, 3))
    same = (flipped == image).all((1, 2, 3))
    assert (mirrored ^ same).all() and 150 < mirrored.sum() < 250
    moved = augment(image, np.random.default_rng(0), shift=True)
    assert moved.shape == image.shape
    # The pixel in the middle tells where the image went: 3 × 3 places, mirrored or not.
    assert len(np.unique(moved[:, 0, 4, 4])) == 3 * 4
