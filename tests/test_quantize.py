"""The quantization stage: recipes, data and imported models on their way to a bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgepipe
from edgepipe import quantize, validation
from edgepipe.cli import main
from edgepipe.context import Note
from edgepipe.errors import UserError
from edgepipe.quantization import QuantConfig
from edgepipe.recipe import Override, Recipe, Settings
from edgepipe.resources import data_folder
from edgepipe.target import Target


def images(count: int = 40) -> np.ndarray:
    """Digits that calibration may see."""
    with np.load(data_folder("models") / "digits_test.npz") as held:
        return held["image"][:count]


def compiled(folder: Path, recipe: str | Recipe | None = "w8a8", **options: object):
    """Digits for this machine, and the notes."""
    notes: list[Note] = []
    model = options.pop("model", "digits")
    bundle = edgepipe.compile(
        model, target="host", recipe=recipe, output=folder / "bundle", notes=notes, **options
    )
    return bundle, notes


# -- from a recipe to a configuration ----------------------------------------------------------


def test_a_recipe_file_reaches_the_configuration() -> None:
    settings = Settings(
        (Override("stem", "w8a8"), Override("Gemm", "float")), "float", "same", "percentile", 99.9,
        ("equalization",), "symmetric", 77,
    )  # fmt: skip
    config = quantize.configure(Recipe("w4a8", settings), Target.load("x86-64-v3"))
    assert config == QuantConfig.parse(
        "w4a8",
        overrides=(("stem", "w8a8"), ("Gemm", "float")),
        first_last="float",
        depthwise="same",
        observer="percentile",
        percentile=99.9,
        methods=("equalization",),
        symmetric_activations=True,
        max_samples=77,
        weight_limit=63,
    )


def test_the_recipe_file_in_the_documents_is_one(repository: Path, tmp_path: Path) -> None:
    text = (repository / "docs" / "quantization.md").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text.split("```toml")[1].split("```")[0], encoding="utf-8")
    recipe = Recipe.load(str(tmp_path / "mine.toml"))
    assert quantize.configure(recipe, Target.load("wasm-simd")) is not None
    assert len(recipe.settings.overrides) == 2


@pytest.mark.parametrize(
    ("target", "signed", "limit"),
    [("x86-64-v3", False, 63), ("raspberry-pi-4", True, 63), ("wasm-simd", True, 127)],
)
def test_the_target_decides_codes_and_weights(target: str, signed: bool, limit: int) -> None:
    config = quantize.configure(Recipe("w8a8"), Target.load(target))
    assert config is not None
    assert (config.signed_activations, config.weight_limit) == (signed, limit)
    four = quantize.configure(Recipe("w4a8"), Target.load(target))
    assert four is not None
    assert (four.signed_activations, four.weight_limit) == (signed, limit)
    weight_only = quantize.configure(Recipe("w4g32"), Target.load(target))
    assert weight_only is not None
    assert (weight_only.group_size, weight_only.weight_limit) == (32, 127)


def test_float_recipes_are_not_configured() -> None:
    assert quantize.configure(Recipe("fp32"), Target.load("wasm-simd")) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(observer="msee"), "did you mean 'mse'"),
        (Settings(methods=("magic",)), "unknown methods 'magic'"),
        (Settings(first_last="w9"), "unknown first_last 'w9'"),
        (Settings(depthwise="float"), "unknown depthwise 'float'"),
        (Settings(percentile=5.0), "outside 50…100"),
        (Settings(max_samples=0), "at least 1"),
    ],
)
def test_what_cannot_be_configured_is_refused_before_any_work(
    tmp_path: Path, settings: Settings, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        compiled(tmp_path, Recipe("w8a8", settings), model="no such model, and never read")


def test_a_target_that_lacks_a_recipe_says_what_it_offers(tmp_path: Path) -> None:
    target = replace(Target.load("x86-64-v3"), recipes=("fp32", "w8gN"))
    with pytest.raises(UserError, match=r"does not offer recipe 'w4g32'; it offers fp32, w8gN"):
        edgepipe.compile("digits", target=target, recipe="w4g32", output=tmp_path / "b")


# -- calibration -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory):
    """One w8a8 bundle with everything that can come along, and the notes."""
    settings = Settings((Override("Gemm", "float"), Override("conv_zzz", "float")), max_samples=32)
    return compiled(
        tmp_path_factory.mktemp("digits"), Recipe("w8a8", settings),
        calibration={"image": images()}, emit=("onnx",),
    )  # fmt: skip


def test_the_bundle_says_how_it_was_made(calibrated) -> None:
    bundle, _ = calibrated
    facts = bundle.manifest["quantization"]
    assert facts["imported"] is False
    assert facts["calibration"] == {"data": "arrays (40 runs)", "samples": 32, "synthetic": False}
    assert bundle.recipe == Recipe(
        "w8a8",
        Settings((Override("Gemm", "float"), Override("conv_zzz", "float")), max_samples=32),
    )
    assert edgepipe.Bundle.open(bundle.path).recipe == bundle.recipe
    assert bundle.manifest["golden"].keys() == {"reference", "float_reference"}


def test_an_override_that_fits_nothing_is_a_warning(calibrated) -> None:
    _, notes = calibrated
    warned = [note for note in notes if note.warning]
    assert [note.subject for note in warned] == ["override 'conv_zzz'"]
    assert "it fits no node's name or operator" in warned[0].text


def test_the_emitted_model_is_what_the_bundle_computes(calibrated) -> None:
    bundle, _ = calibrated
    proto = onnx.load(bundle.file("model.qdq.onnx"))
    onnx.checker.check_model(proto, full_check=True)
    assert {n.op_type for n in proto.graph.node} >= {"QuantizeLinear", "DequantizeLinear", "Conv"}
    inputs, outputs = bundle.golden()
    result = bundle.run(inputs)["logits"]
    spread = np.ptp(outputs["logits"])
    assert np.abs(result - outputs["logits"]).max() <= spread / 255
    # The golden reference is the Q/DQ model, not the float one.
    assert np.abs(bundle.golden_floats()["logits"] - outputs["logits"]).max() > spread / 1000


def test_validation_asks_both_questions(calibrated) -> None:
    bundle, _ = calibrated
    report = bundle.validate(data="digits")
    assert report.ok, report
    (steps,) = report.steps
    assert steps.within_one >= 0.999
    assert report.steps_data == report.data
    assert report.outputs[0].snr_db > 25
    assert report.accuracy == pytest.approx(report.reference_accuracy, abs=0.01)
    text = str(report)
    assert "against the Q/DQ model:" in text
    assert "against the original model:" in text
    assert json.loads(json.dumps(report.to_json()))["steps"][0]["name"] == "logits"


def test_where_the_engine_is_far_the_definition_decides(
    calibrated, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, _ = calibrated
    data = {"image": images(6)}

    def off(share: float):
        """What a model answers that is off by a share of its range."""
        right = bundle.golden_integers()["logits"]
        shift = np.float32(share * np.ptp(right))
        return lambda inputs: {"logits": bundle.run(inputs)["logits"] + shift}

    monkeypatch.setattr(validation, "quantized_runs", lambda model: (off(0.1),))
    report = bundle.validate(data=data)
    assert report.ok, report
    assert report.steps[0].within_one == 0.0
    assert report.integer_steps[0].max_steps < 1e-3
    assert "its integers by definition" in str(report)
    monkeypatch.setattr(validation, "integer_run", lambda model: off(0.1))  # positive control
    report = bundle.validate(data=data)
    assert not report.ok
    assert "within one step of the Q/DQ model" in report.failures[0]


def test_golden_integers_are_what_the_bundle_computes(calibrated) -> None:
    bundle, _ = calibrated
    inputs, outputs = bundle.golden()
    defined = bundle.golden_integers()["logits"]
    assert defined.dtype == outputs["logits"].dtype
    np.testing.assert_allclose(bundle.run(inputs)["logits"], defined, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_golden_data_need_no_floor_against_the_original(calibrated) -> None:
    report = calibrated[0].validate()
    assert report.ok
    assert report.min_snr_db is None
    assert not calibrated[0].validate(min_snr_db=300).ok  # but the user's own counts


@pytest.mark.slow
def test_without_data_the_inputs_are_synthetic_and_everyone_hears_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "bundle")
    assert main(["compile", "digits", "--target", "host", "--recipe", "w8a8", "-o", out]) == 0
    streams = capsys.readouterr()
    assert "warning: calibration: no data given" in streams.err
    assert "64 samples of synthetic inputs" in streams.out
    facts = edgepipe.Bundle.open(out).manifest["quantization"]["calibration"]
    assert facts["synthetic"]
    assert facts["samples"] == 64


BAD_DATA = {
    "wrong name": ({"img": images(20)}, "'img' is not an input of the model"),
    "wrong shape": ({"image": images(20)[:, :, :4]}, r"has shape \[20, 1, 4, 8\]"),
    "wrong type": ({"image": images(20).astype(np.complex64)}, "is complex64"),
    "NaN": ({"image": np.where(np.arange(8) == 3, np.nan, images(20))}, "contains NaN"),
    "infinity": ({"image": np.where(np.arange(8) == 3, np.inf, images(20))}, "NaN or infinite"),
    "none": ({"image": images(20)[:0]}, r"has shape \[0, 1, 8, 8\]"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_are_named(tmp_path: Path, case: str) -> None:
    arrays, said = BAD_DATA[case]
    with pytest.raises(UserError, match=said) as caught:
        compiled(tmp_path, calibration={k: np.asarray(v) for k, v in arrays.items()})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nowhere", None, "no such file, folder or data set"),
        ("nowhere.npz", None, "no such file"),
        ("empty", {}, "no .npy files and no images"),
        ("broken", {"a.png": b"not an image"}, r"a\.png: not a readable image"),
        ("odd", {"a.npy": b"no array"}, r"a\.npy: not a readable .npy"),
        ("text.npz", b"no archive", "not a readable .npz"),
    ],
)
def test_bad_folders_are_named(tmp_path: Path, name: str, content: object, said: str) -> None:
    path = tmp_path / name
    if isinstance(content, dict):
        path.mkdir()
        for file, data in content.items():
            (path / file).write_bytes(data)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        compiled(tmp_path, calibration=str(path))


def test_data_for_a_float_recipe_are_refused(tmp_path: Path) -> None:
    for recipe in ("fp32", "fp16", None):
        with pytest.raises(UserError, match=r"--calibration: recipe 'fp.*' is not calibrated"):
            compiled(tmp_path, recipe, calibration={"image": images()})


def test_emit_belongs_to_quantized_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--emit: recipe 'fp32' makes no quantized model"):
        compiled(tmp_path, "fp32", emit=("onnx",))
    with pytest.raises(UserError, match="--emit: unknown format 'onx'; did you mean 'onnx'"):
        compiled(tmp_path, "w8a8", emit=("onx",))


def test_tflite_is_refused_for_float_activations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--emit tflite: recipe 'w8a16' computes in float"):
        compiled(tmp_path, "w8a16", emit=("tflite",))


@pytest.mark.slow
def test_a_tflite_file_comes_along(tmp_path: Path) -> None:
    options = {"calibration": {"image": images()}}
    bundle, _ = compiled(tmp_path, "w8a8", emit=("tflite", "onnx"), **options)
    data = bundle.file("model.tflite").read_bytes()
    assert data[4:8] == b"TFL3"
    plain, _ = compiled(tmp_path / "plain", "w8a8", emit=("onnx",), **options)
    # The other format's wishes do not reach the bundle.
    for name in ("weights.bin", "model.qdq.onnx", "golden.npz"):
        assert bundle.file(name).read_bytes() == plain.file(name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        pytest.param("raspberry-pi-4", marks=pytest.mark.needs_qemu),
        pytest.param("raspberry-pi-5", marks=pytest.mark.needs_qemu),
        pytest.param("raspberry-pi-3-32", marks=pytest.mark.needs_qemu),
        pytest.param("wasm-simd", marks=pytest.mark.needs_node),
        pytest.param("wasm-relaxed", marks=pytest.mark.needs_wasmtime),
    ],
)
def test_every_kind_of_target_computes_its_model(tmp_path: Path, target: str) -> None:
    bundle = edgepipe.compile(
        "digits", target=target, recipe="w8a8", calibration={"image": images(300)},
        output=tmp_path / "bundle", emit=("onnx",),
    )  # fmt: skip
    report = bundle.validate(data="digits", max_top1_drop=0.5)
    assert report.ok, report
    assert report.outputs[0].snr_db > 30


@pytest.mark.slow
@pytest.mark.needs_shared
def test_a_trained_network_by_its_own_data(shared_models: Path, tmp_path: Path) -> None:
    data = shared_models.parent / "data"

    def cifar(name: str, count: int) -> dict[str, np.ndarray]:
        with np.load(data / f"{name}.npz") as held:
            x = held["images"][:count].transpose(0, 3, 1, 2).astype(np.float32)
            return {"x": x, "labels": held["labels"][:count].ravel().astype(np.int64)}

    path = shared_models / "ic_resnet8.onnx"
    bundle, notes = compiled(
        tmp_path, "w8a8", model=path, calibration=cifar("cifar10_train5000", 256), emit=("onnx",)
    )
    assert not [note for note in notes if note.warning]
    report = bundle.validate(
        data=cifar("cifar10_val2000", 300), model=path, min_snr_db=30, max_top1_drop=2
    )
    assert report.ok, report
    assert report.steps[0].within_one >= 0.999


# -- models that come quantized ----------------------------------------------------------------


def dense(path: Path, weights: str = "int8", *, rounds: bool = True, block: int = 0) -> Path:
    """x [1,8] → y [1,4]: dequantised weights, and activations between Q/DQ pairs or not."""
    generator = np.random.default_rng(0)
    limit = 7 if weights == "int4" else 127
    codes = generator.integers(-limit, limit + 1, (8, 4)).astype(np.int8)
    scales = np.full((8 // block, 4) if block else (4,), 0.3 / limit, np.float32)
    kind = TensorProto.INT4 if weights == "int4" else TensorProto.INT8
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], **attributes),
        helper.make_node("MatMul", ["xr" if rounds else "x", "w"], ["y"]),
    ]
    if rounds:
        nodes[:0] = [
            helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xr"]),
        ]
    tensors = [
        helper.make_tensor("codes", kind, codes.shape, codes.ravel().tolist()),
        numpy_helper.from_array(scales, "scales"),
        numpy_helper.from_array(np.float32(0.02), "sx"),
        numpy_helper.from_array(np.uint8(128), "zx"),
    ]
    graph = helper.make_graph(
        nodes, "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        tensors if rounds else tensors[:2],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ({}, "w8a8"),
        ({"weights": "int4"}, "w4a8"),
        ({"rounds": False}, "w8a16"),
        ({"rounds": False, "weights": "int4"}, "w4a16"),
        ({"rounds": False, "weights": "int4", "block": 4}, "w4g4"),
    ],
)
def test_an_imported_model_keeps_its_scales(
    tmp_path: Path, options: dict[str, object], recipe: str
) -> None:
    path = dense(tmp_path / "dense.onnx", **options)  # type: ignore[arg-type]
    bundle, notes = compiled(tmp_path, None, model=path, allow_float_fallback=True)
    assert str(bundle.recipe) == recipe
    assert bundle.manifest["quantization"]["imported"] is True
    assert not [note for note in notes if note.warning]
    x = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    report = bundle.validate(data={"x": x}, model=path)
    assert report.ok, report
    assert report.steps[0].max_steps < 0.01
    assert bundle.validate().ok


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        ("fp32", {}, "recipe 'fp32' contradicts that; leave --recipe out"),
        ("w4a8", {}, "recipe 'w4a8' contradicts that"),
        (None, {"calibration": {"x": np.zeros((4, 8), np.float32)}}, "nothing to calibrate"),
        (Recipe("w8a8", Settings(observer="mse")), {}, "settings change nothing"),
    ],
)
def test_contradictions_to_an_imported_model_are_refused(
    tmp_path: Path, recipe: str | Recipe | None, options: dict[str, object], said: str
) -> None:
    path = dense(tmp_path / "dense.onnx")
    with pytest.raises(UserError, match="is quantized already: w8a8") as caught:
        compiled(tmp_path, recipe, model=path, **options)
    assert said in str(caught.value)


def test_an_imported_model_may_be_named_by_its_recipe(tmp_path: Path) -> None:
    path = dense(tmp_path / "dense.onnx")
    recipe = Recipe("w8a8", Settings(allow_float_fallback=True))
    bundle, _ = compiled(tmp_path, recipe, model=path)
    assert bundle.recipe == recipe
