"""Layer-by-layer comparison: right layers pass, a damaged one is named with what to try."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_quantize import compiled, dense, images

from edgepipe import layer_validation
from edgepipe.cli import main
from edgepipe.errors import UserError
from edgepipe.layer_report import LayerReport, LayersReport
from edgepipe.layer_validation import validate_layers
from edgepipe.recipe import Recipe, Settings


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory):
    settings = Settings(methods=("reconstruction",))
    return compiled(
        tmp_path_factory.mktemp("digits"), Recipe("w8a8", settings),
        calibration={"image": images()}, emit=("onnx",),
    )[0]  # fmt: skip


def test_every_layer_is_there_in_order(bundle) -> None:
    report = validate_layers(bundle, {"image": images()})
    proto = onnx.load(bundle.file("model.qdq.onnx"))
    linear = [n.name for n in proto.graph.node if n.op_type in ("Conv", "Gemm")]
    with_weights = [layer.layer for layer in report.layers if layer.weight_bits]
    assert list(dict.fromkeys(with_weights)) == linear
    assert {layer.weight_bits for layer in report.layers} == {8, None}
    assert report.layers[-1].tensor == "logits"
    assert report.runs == 40
    assert all(layer.snr_db > 25 for layer in report.layers)
    for layer in report.layers[:-1]:
        assert layer.saturation is not None
        assert layer.codes_used is not None
        assert 0 <= layer.saturation < 0.02
        assert 0 < layer.codes_used <= 1


def test_a_damaged_layer_is_named(bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: two output channels of the third convolution swapped."""
    right = validate_layers(bundle, {"image": images()})
    proto = onnx.load(bundle.file("model.qdq.onnx"))
    third = [n for n in proto.graph.node if n.op_type == "Conv"][2]
    restore = next(n for n in proto.graph.node if third.input[1] in n.output)
    codes = next(t for t in proto.graph.initializer if t.name == restore.input[0])
    array = numpy_helper.to_array(codes).copy()
    array[[0, 1]] = array[[1, 0]]
    codes.CopyFrom(numpy_helper.from_array(array, codes.name))
    import onnx_ir as ir

    damaged = ir.serde.deserialize_model(proto)
    monkeypatch.setattr(layer_validation, "_emitted", lambda _: damaged)
    report = validate_layers(bundle, {"image": images()})
    assert report.worst[0].layer == third.name
    assert (report.worst[0].loss_db or 0) > 20
    before = [layer.snr_db for layer in right.layers]
    after = [layer.snr_db for layer in report.layers]
    first = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
    assert report.layers[first].layer == third.name


def test_values_beyond_the_codes_are_counted(bundle) -> None:
    inside = validate_layers(bundle, {"image": images()}).layers[0]
    beyond = validate_layers(bundle, {"image": 4 * images()}).layers[0]
    assert inside.saturation == 0
    assert beyond.saturation is not None
    bright = float(np.mean(4 * images() > images().max() * (1 + 1 / 255)))
    assert beyond.saturation == pytest.approx(bright, abs=0.02)
    assert "are cut off" in beyond.advice[0]


@pytest.mark.slow
def test_rescaled_channels_are_compared_after_their_factor(tmp_path: Path) -> None:
    settings = Settings(methods=("equalization", "reconstruction"))
    made, _ = compiled(
        tmp_path, Recipe("w8a8", settings), calibration={"image": images()}, emit=("onnx",)
    )
    report = validate_layers(made, {"image": images()})
    assert all(layer.snr_db > 25 for layer in report.layers)
    assert {layer.saturation for layer in report.layers[1:-1]} == {None}


def test_an_imported_model_is_compared_with_itself_unrounded(tmp_path: Path) -> None:
    path = dense(tmp_path / "dense.onnx")
    made, _ = compiled(tmp_path, None, model=path)
    x = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    report = validate_layers(made, {"x": x}, model=path)
    assert [layer.tensor for layer in report.layers] == ["xr", "y"]
    assert [layer.op_type for layer in report.layers] == ["input", "MatMul"]
    assert 40 < report.layers[0].snr_db < 60
    assert 30 < report.layers[1].snr_db < 60


@pytest.mark.slow
def test_what_cannot_be_compared_says_what_would_work(tmp_path: Path) -> None:
    floats, _ = compiled(tmp_path / "a", "fp32")
    with pytest.raises(UserError, match="recipe 'fp32' rounds no tensors"):
        validate_layers(floats)
    plain, _ = compiled(tmp_path / "b", "w8a8", calibration={"image": images()})
    with pytest.raises(UserError, match="compile it again with --emit onnx"):
        validate_layers(plain)


@pytest.mark.slow
def test_the_command_line_prints_both(bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["validate", str(bundle.path), "--data", "digits", "--layers"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.index("against the original model") < text.index("layers, float against quantized")
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["layers"]["runs"] == 450
    assert found["layers"]["layers"][-1]["tensor"] == "logits"


def layer(**changes: object) -> LayerReport:
    values = {
        "tensor": "t", "layer": "block/conv.1", "op_type": "Conv", "weight_bits": 4,
        "snr_db": 20.0, "loss_db": 5.0, "saturation": 0.0, "codes_used": 0.9,
    }  # fmt: skip
    return LayerReport(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [r"overrides = [{match = 'block/conv\.1', format = 'w8a8'}]"]),
        ({"weight_bits": 8}, [r"overrides = [{match = 'block/conv\.1', format = 'float'}]"]),
        ({"weight_bits": None, "saturation": 0.05}, ["5.00 % of its values are cut off"]),
        ({"weight_bits": None, "codes_used": 0.1}, ["it uses 10.00 % of its codes"]),
        ({"weight_bits": None}, []),
    ],
)
def test_advice_follows_from_what_is_wrong(changes: dict[str, object], expected: list[str]) -> None:
    advice = layer(**changes).advice
    assert len(advice) == len(expected)
    assert all(text.startswith(wanted) for text, wanted in zip(advice, expected, strict=True))


def test_advice_can_be_pasted_into_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("format = 'w4a8'\n" + layer().advice[0] + "\n", encoding="utf-8")
    (override,) = Recipe.load(str(path)).settings.overrides
    assert (override.match, override.format) == (r"block/conv\.1", "w8a8")


def test_the_worst_come_first_and_small_losses_not_at_all() -> None:
    layers = tuple(layer(layer=str(i), loss_db=db) for i, db in enumerate((2.0, 0.5, 9.0, None)))
    report = LayersReport("data", False, 1, layers)
    assert [x.layer for x in report.worst] == ["2", "0"]
