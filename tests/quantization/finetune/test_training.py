"""The loop learns, is the same twice, and goes on after an interruption as if there was none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgepipe.errors import UserError
from edgepipe.quantization import QuantConfig
from edgepipe.quantization.finetune import FinetuneSettings, run
from quantization.finetune.tasks import SMALL, content, learnable, losses, outputs, tune
from quantization.networks import build, context

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.needs_torch, pytest.mark.slow]


class Interrupted(Exception):
    """Instead of a power cut."""


def accuracy(model: object, x: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(outputs(model, x)[0].argmax(1) == labels))


@pytest.mark.parametrize(
    ("recipe", "ranges"),
    [
        (None, "learned"),
        ("w8a8", "average"),
        ("w4a8", "learned"),
        ("w4a4", "learned"),
        ("w4a4", "average"),
    ],
)
def test_it_learns(recipe: str | None, ranges: str) -> None:
    model = build(SMALL)
    x, labels = learnable(model)
    tuned, lines = tune(model, recipe, (x, labels), epochs=12, ranges=ranges)
    assert accuracy(tuned, x, labels) > accuracy(model, x, labels) + 0.2
    found = losses(lines)
    assert len(found) == 12 and found[-1] < found[0]


def test_without_epochs_it_is_what_calibration_gives() -> None:
    from edgepipe import quantization

    model = build(SMALL)
    x, labels = learnable(model)
    plain = quantization.apply(
        model, QuantConfig.parse("w4a8"), [{"x": x[i : i + 1]} for i in range(len(x))], context()
    )
    tuned, _ = tune(model, "w4a8", (x, labels), epochs=0)
    assert plain.graph.initializers.keys() == tuned.graph.initializers.keys()
    for name, value in plain.graph.initializers.items():
        other = tuned.graph.initializers[name].const_value.numpy()
        np.testing.assert_array_equal(value.const_value.numpy(), other, err_msg=name)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_the_teacher_alone_can_teach(loss: str) -> None:
    model, teacher = build(SMALL), build(SMALL, seed=3)
    x, _ = learnable(model)
    settings = FinetuneSettings(
        epochs=15, batch=16, learning_rate=0.02, distillation=1.0, loss=loss
    )
    tuned = run(model, QuantConfig(), (x, None), settings, context(), teacher)
    wanted = outputs(teacher, x)[0].argmax(1)
    assert accuracy(tuned, x, wanted) > accuracy(model, x, wanted) + 0.2


def test_wanted_outputs_can_be_trained_towards() -> None:
    model = build(SMALL)
    x, _ = learnable(model)
    wanted = np.stack([x[:, i % 3].mean((1, 2)) for i in range(4)], 1)
    _, lines = tune(model, None, (x, wanted), loss="squared_error", epochs=15)
    assert losses(lines)[-1] < 0.5 * losses(lines)[0]


def test_the_model_stays_and_the_seed_decides() -> None:
    model = build(SMALL)
    before, data = content(model), learnable(model)
    first, second, third = (
        content(tune(model, "w4a8", data, seed=seed, augmentation="shift_flip")[0])
        for seed in (5, 5, 6)
    )
    assert content(model) == before
    assert first == second
    assert first != third


@pytest.mark.parametrize(
    ("recipe", "chosen"),
    [
        (None, {"ranges": "learned"}),
        (None, {"ranges": "average"}),
        (None, {"normalization": "batch", "sparsity": "2:4"}),
        ("w4a8", {"ranges": "learned"}),
        ("w4a8", {"ranges": "average"}),
    ],
)
def test_an_interrupted_training_ends_with_the_same_bits(
    tmp_path: Path, recipe: str | None, chosen: dict[str, str]
) -> None:
    model = build(SMALL)
    data = learnable(model)
    settings = {"distillation": 0.3, "augmentation": "shift_flip", **chosen}
    whole, _ = tune(model, recipe, data, **settings)

    used = context()

    def stop(line: str) -> None:
        if "epoch 2" in line:
            raise Interrupted

    object.__setattr__(used, "progress", stop)
    config = None if recipe is None else QuantConfig.parse(recipe)
    kept = {"checkpoint": tmp_path, "checkpoint_seconds": 0.0}
    stopped = FinetuneSettings(epochs=4, batch=16, learning_rate=0.02, **settings, **kept)
    with pytest.raises(Interrupted):
        run(model, config, data, stopped, used)
    resumed, lines = tune(model, recipe, data, **settings, **kept)
    # The step that ends epoch 2 was interrupted before its state was saved.
    assert "fine-tuning goes on at step 15" in lines
    assert content(resumed) == content(whole)
    again, lines = tune(model, recipe, data, **settings, **kept)
    assert "fine-tuning goes on at step 32" in lines and not losses(lines)
    assert content(again) == content(whole)


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from quantization.finetune.tasks import SMALL, learnable, tune
from quantization.networks import build
model = build(SMALL)
tune(model, "w4a8", learnable(model), epochs=50, checkpoint=Path(sys.argv[2]),
     checkpoint_seconds=0.0)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_state_to_go_on_from(tmp_path: Path, repository: Path) -> None:
    """SIGKILL while it writes all the time: what is on disk loads, and the end is the same."""
    model = build(SMALL)
    data = learnable(model)
    tests, folder = str(repository / "tests"), tmp_path / "state"
    state = folder / "training.pt"
    program = [sys.executable, "-c", PROGRAM, tests, str(folder)]
    steps = []
    for kill in range(3):
        process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = state.stat().st_mtime_ns if state.exists() else 0
        deadline = time.monotonic() + 240
        while not (state.exists() and state.stat().st_mtime_ns > before):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.13 * (kill + 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps.append(torch.load(state, weights_only=True)["step"])
    assert steps == sorted(set(steps)) and steps[-1] < 50 * 8
    same = {"epochs": 50, "checkpoint_seconds": 0.0}
    resumed, lines = tune(model, "w4a8", data, checkpoint=folder, **same)
    assert any("goes on at step" in line for line in lines)
    whole, _ = tune(model, "w4a8", data, **same)
    assert content(resumed) == content(whole)


def test_a_state_of_another_training_is_refused(tmp_path: Path) -> None:
    model = build(SMALL)
    x, labels = learnable(model)
    tune(model, None, (x, labels), epochs=1, checkpoint=tmp_path)
    with pytest.raises(UserError, match="another model, other data or other settings"):
        tune(model, None, (x, labels), epochs=2, checkpoint=tmp_path)
    with pytest.raises(UserError, match="another model"):
        tune(model, None, (x * 2, labels), epochs=1, checkpoint=tmp_path)
    with pytest.raises(UserError, match="another model"):
        tune(build(SMALL, seed=1), None, (x, labels), epochs=1, checkpoint=tmp_path)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "training.pt").write_bytes(os.urandom(2000))
    model = build(SMALL)
    with pytest.raises(UserError, match="cannot be read"):
        tune(model, None, learnable(model), checkpoint=tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    model = build(SMALL)
    with pytest.raises(UserError, match="cannot be written"):
        tune(model, None, learnable(model), epochs=1, checkpoint=tmp_path / "file")


def test_code_in_a_state_is_not_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"fingerprint": Trap()}, tmp_path / "training.pt")
    model = build(SMALL)
    with pytest.raises(UserError, match="cannot be read"):
        tune(model, None, learnable(model), checkpoint=tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_loss_that_overflows_is_an_error() -> None:
    model = build(SMALL)
    x, _ = learnable(model)
    wanted = np.zeros((len(x), 4), np.float32)
    with pytest.raises(UserError, match="lower learning_rate"):
        tune(model, None, (x * np.float32(1e19), wanted), loss="squared_error")
