"""From a recipe, or from zeros that are there, to a bundle that runs over them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import edgepipe
from edgepipe import importer, passes, prune
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.quantization.layers import prunable
from edgepipe.recipe import Recipe
from edgepipe.sparsity import pruning
from edgepipe.sparsity.pattern import Pattern
from edgepipe.target import Target


def network(path: Path, zeros: float = 0.0, *, pointwise: bool = True, classes: int = 0) -> Path:
    """Convolution, then depthwise and pointwise ones with a residual, as MobileNets have them, and
    a classifier where there are ``classes``; weights of He's deviation, ``zeros`` of the pointwise
    ones zero."""
    rng = np.random.default_rng(0)
    nodes, tensors, size = [], [], [0]

    def conv(x: str, co: int, ci: int, k: int, stride: int, group: int, dense: bool) -> str:
        size[0] += 1
        shape = (co, ci // group, k, k)
        weight = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        if not dense:
            weight *= (rng.random(shape) >= zeros) / np.sqrt(1 - zeros)
        bias = rng.standard_normal(co) * 0.1
        for array, kind in ((weight, "w"), (bias, "b")):
            name = f"{kind}{size[0]}"
            tensors.append(numpy_helper.from_array(array.astype(np.float32), name))
        out = f"c{size[0]}"
        p = k // 2
        nodes.append(
            helper.make_node(
                "Conv", [x, f"w{size[0]}", f"b{size[0]}"], [out], name=out,
                strides=[stride] * 2, pads=[p] * 4, group=group,
            )
        )  # fmt: skip
        nodes.append(helper.make_node("Relu", [out], [f"{out}r"]))
        return f"{out}r"

    y = conv("x", 32, 3, 3, 2, 1, True)
    if pointwise:
        for co, ci, stride in ((64, 32, 1), (64, 64, 2), (64, 64, 1)):
            y = conv(y, ci, ci, 3, stride, ci, True)
            y = conv(y, co, ci, 1, 1, 1, False)
        z = conv(y, 64, 64, 1, 1, 1, False)
        nodes.append(helper.make_node("Add", [y, z], ["sum"]))
        y = conv("sum", 512 if classes else 64, 64, 1, 1, 1, False)
    value = helper.make_tensor_value_info
    width = 512 if classes else 64 if pointwise else 32
    result = value("y", 1, [1, width, 1, 1])
    nodes.append(helper.make_node("GlobalAveragePool", [y], ["pooled" if classes else "y"]))
    if classes:
        weight = rng.standard_normal((classes, width)) * np.sqrt(2 / width)
        tensors.append(numpy_helper.from_array(weight.astype(np.float32), "wc"))
        nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
        nodes.append(helper.make_node("Gemm", ["flat", "wc"], ["y"], name="classifier", transB=1))
        result = value("y", 1, [1, classes])
    graph = helper.make_graph(nodes, "g", [value("x", 1, [1, 3, 28, 28])], [result], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def kinds(bundle: edgepipe.Bundle) -> Counter[str]:
    return Counter(k["kernel"].rsplit("_", 1)[0] for k in bundle.manifest["kernels"])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["host", "wasm-simd", "raspberry-pi-4", "raspberry-pi-3-32"])
def test_a_network_that_is_sparse_runs_over_planes(target: str, tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx", 0.9)
    bundle = edgepipe.compile(path, target=target, output=tmp_path / "b")
    found = kinds(bundle)
    assert found["sparse_rows"] == 5 and found["depthwise_planes"] == 2, found
    report = bundle.validate()
    assert not report.failures and report.outputs[0].snr_db > 110
    audit = [k["sparsity"] for k in bundle.manifest["kernels"] if k["sparsity"]]
    for facts in audit:
        estimates = facts["estimated_instructions"]
        assert estimates[facts["form"]] == min(estimates.values())
        assert 0.85 < facts["zeros"] < 0.95
    dense = edgepipe.compile(network(tmp_path / "dense.onnx"), target=target, output=tmp_path / "d")
    assert not any(k["sparsity"] for k in dense.manifest["kernels"])
    ours, theirs = (b.manifest["memory"]["weights_bytes"] for b in (bundle, dense))
    assert ours < 0.5 * theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "recipe"),
    [("host", "fp32+1:4v32"), ("wasm-simd", "fp32+2:4v8"), ("raspberry-pi-4", "fp32+1:4v16")],
)
def test_a_recipe_prunes_to_what_the_kernels_share(
    target: str, recipe: str, tmp_path: Path
) -> None:
    path = network(tmp_path / "net.onnx")
    bundle = edgepipe.compile(path, target=target, recipe=recipe, output=tmp_path / "b")
    assert str(bundle.recipe) == recipe
    assert kinds(bundle)["sparse_shared"] == 5
    facts = bundle.manifest["sparsity"]
    wanted = 0.5 if "2:4" in recipe else 0.75
    assert facts["refitted"] is False and set(facts["zeros"].values()) == {wanted}
    assert not bundle.validate().failures
    # Positive control: the dense network's answers are others.
    _, outputs = bundle.golden()
    floats = bundle.golden_floats()
    assert np.abs(outputs["y"] - floats["y"]).max() > 0.05 * np.abs(floats["y"]).max()


@pytest.mark.slow
def test_calibration_refits_what_stays(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx")
    rng = np.random.default_rng(1)
    data = {"x": rng.standard_normal((16, 3, 28, 28), dtype=np.float32)}
    errors = {}
    for name, calibration in (("plain", None), ("refitted", data)):
        bundle = edgepipe.compile(
            path, target="host", recipe="fp32+2:4", calibration=calibration,
            output=tmp_path / name,
        )  # fmt: skip
        _, outputs = bundle.golden()
        errors[name] = float(np.square(outputs["y"] - bundle.golden_floats()["y"]).sum())
        assert set(bundle.manifest["sparsity"]["zeros"].values()) == {0.5}
    assert errors["refitted"] < 0.2 * errors["plain"]


@pytest.mark.parametrize("pattern", ["1:4", "80%", "60%b1x4"])
def test_places_are_chosen_for_what_a_layer_puts_out(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = importer.load(str(network(tmp_path / "net.onnx")), None)
    context = Context(Target.load("host"), Recipe.parse(f"fp32+{pattern}"))
    graph = passes.run(source.model, context)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((48, 3, 28, 28), dtype=np.float32)
    errors = []
    for settled in (pruning.settled, lambda kept, *_: kept):
        monkeypatch.setattr(pruning, "settled", settled)
        pruned, _ = prune.run(graph, source, {"x": x[:32]}, context)
        found, wanted = (outputs(model, x[32:]) for model in (pruned, graph))
        errors.append(float(np.square(found - wanted).sum()))
    assert errors[0] < 0.9 * errors[1]


def outputs(model: onnx_ir.Model, x: np.ndarray) -> np.ndarray:
    """Of every sample, by ONNX Runtime."""
    session = onnxruntime.InferenceSession(
        onnx_ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return np.concatenate([session.run(None, {"x": x[i : i + 1]})[0] for i in range(len(x))])


@pytest.mark.slow
def test_wide_vectors_do_not_take_a_pattern_that_costs_more(tmp_path: Path) -> None:
    """2:4 of every channel for itself leaves hardly a place that 32 channels do not need."""
    path = network(tmp_path / "net.onnx")
    target = Target.load("x86-64-v3")
    bundle = edgepipe.compile(path, target=target, recipe="fp32+2:4", output=tmp_path / "b")
    for kernel in bundle.manifest["kernels"]:
        facts = kernel["sparsity"]
        if facts is not None:
            estimates = facts["estimated_instructions"]
            assert facts["form"] == min(estimates, key=estimates.__getitem__)
            assert estimates["shared"] > estimates["dense"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "runner"),
    [
        ("x86-64-v3", "local"),
        pytest.param("wasm-simd", "node", marks=pytest.mark.needs_node),
        pytest.param("wasm-relaxed", "wasmtime", marks=pytest.mark.needs_wasmtime),
        pytest.param("wasm-relaxed", "browser", marks=pytest.mark.needs_browser),
        pytest.param("raspberry-pi-5", "qemu", marks=pytest.mark.needs_qemu),
    ],
)
def test_integers_run_over_blocks(target: str, runner: str, tmp_path: Path) -> None:
    path, rng = network(tmp_path / "net.onnx"), np.random.default_rng(1)
    data = {"x": rng.standard_normal((8, 3, 28, 28), dtype=np.float32)}
    bundle = edgepipe.compile(
        path, target=target, recipe="w8a8+80%b1x4", calibration=data, output=tmp_path / "b"
    )
    assert kinds(bundle)["q_sparse"] >= 4
    assert not bundle.validate(runner=runner).failures
    facts = bundle.manifest["sparsity"]
    assert facts["pattern"] == "80%b1x4" and facts["refitted"]
    assert all(0.79 < zeros < 0.81 for zeros in facts["zeros"].values())
    for kernel in bundle.manifest["kernels"]:
        found = kernel["sparsity"]
        if found is not None:  # a fit that forgot the mask would leave no zeros
            estimates = found["estimated_instructions"]
            assert 0.79 < found["zeros"] < 0.85
            assert estimates[found["form"]] == min(estimates.values())
    dense = edgepipe.compile(
        path, target=target, recipe="w8a8", calibration=data, output=tmp_path / "d"
    )
    ours, theirs = (b.manifest["memory"]["weights_bytes"] for b in (bundle, dense))
    assert ours < 0.8 * theirs


QEMU, NODE = pytest.mark.needs_qemu, pytest.mark.needs_node


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "recipe", "runner"),
    [
        ("host", "fp32+80%", "local"),
        pytest.param("wasm-simd", "fp32+80%", "node", marks=NODE),
        pytest.param("raspberry-pi-4", "fp32+80%", "qemu", marks=QEMU),
        pytest.param("raspberry-pi-3-32", "fp32+80%", "qemu", marks=QEMU),
        ("host", "w8a8+80%b1x4", "local"),
        ("x86-64-v3", "w8a8+80%b1x4", "local"),
        pytest.param("wasm-simd", "w8a8+80%b1x4", "node", marks=NODE),
        pytest.param("wasm-relaxed", "w8a8+80%b1x4", "node", marks=NODE),
        pytest.param("raspberry-pi-5", "w8a8+80%b1x4", "qemu", marks=QEMU),
    ],
)
def test_a_large_classifier_runs_over_its_nonzero_weights(
    target: str, recipe: str, runner: str, tmp_path: Path
) -> None:
    path = network(tmp_path / "net.onnx", classes=500 if recipe == "fp32+80%" else 2000)
    bundle = edgepipe.compile(path, target=target, recipe=recipe, output=tmp_path / "b")
    form, kernel = ("gathered", "sparse_gemv") if "fp32" in recipe else ("blocks", "q_sparse_gemv")
    assert kinds(bundle)[kernel] == 1
    assert not bundle.validate(runner=runner).failures
    found = next(k for k in bundle.manifest["kernels"] if k["kernel"].startswith(kernel))
    assert found["sparsity"]["form"] == form and 0.79 < found["sparsity"]["zeros"] < 0.85


@pytest.mark.parametrize(
    ("pattern", "classes", "pruned"),
    [
        ("80%", 500, True), ("1:4", 500, True), ("80%b1x4", 2000, True), ("auto", 500, True),
        ("80%", 400, False), ("2:4", 500, False), ("1:4v8", 500, False), ("50%", 500, False),
        ("80%b1x4", 500, False),
    ],
)  # fmt: skip
def test_classifiers_are_pruned_where_it_pays(
    pattern: str, classes: int, pruned: bool, tmp_path: Path
) -> None:
    model = onnx_ir.load(network(tmp_path / "net.onnx", classes=classes))
    names = [node.name for node in prunable(model.graph, Pattern.parse(pattern, "test"))]
    assert ("classifier" in names) == pruned and len(names) == 5 + pruned
    assert ("classifier" in [n.name for n in prunable(model.graph, None)]) == (classes >= 500)


@pytest.mark.slow
def test_a_network_of_dense_layers_alone_is_pruned(tmp_path: Path) -> None:
    """The first layer too, which reads the model's input; the last is too small."""
    rng = np.random.default_rng(2)
    shapes = ((512, 500), (500, 512), (512, 10))
    tensors = [
        numpy_helper.from_array((rng.standard_normal(s) * (2 / s[0]) ** 0.5).astype("f"), f"w{i}")
        for i, s in enumerate(shapes)
    ]
    nodes = [
        node
        for i in range(3)
        for node in (
            helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"m{i}"], name=f"m{i}"),
            helper.make_node("Relu", [f"m{i}"], [f"x{i + 1}"]),
        )
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x0", 1, [1, 512])], [value("x3", 1, [1, 10])], tensors
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    bundle = edgepipe.compile(
        tmp_path / "net.onnx", target="host", recipe="fp32+80%", output=tmp_path / "b"
    )
    assert kinds(bundle)["sparse_gemv"] == 2
    assert set(bundle.manifest["sparsity"]["zeros"]) == {"m0", "m1"}
    assert not bundle.validate().failures


@pytest.mark.slow
def test_without_an_instruction_for_it_integers_stay_dense(tmp_path: Path) -> None:
    path, notes = network(tmp_path / "net.onnx"), []
    bundle = edgepipe.compile(
        path, target="raspberry-pi-4", recipe="w8a8+80%b1x4", output=tmp_path / "b", notes=notes
    )
    assert not kinds(bundle)["q_sparse"]
    told = [str(note) for note in notes if "no blocks" in str(note)]
    assert len(told) == 5 and all("gain nothing over the dense kernel" in text for text in told)


def test_a_network_without_convolutions_to_prune_is_refused(tmp_path: Path) -> None:
    path = network(tmp_path / "net.onnx", pointwise=False)
    with pytest.raises(UserError, match="no layer of the network can be pruned"):
        edgepipe.compile(path, target="host", recipe="fp32+2:4", output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(wrong: float, tmp_path: Path) -> None:
    model = onnx.load(network(tmp_path / "net.onnx"))
    tensor = next(t for t in model.graph.initializer if t.name == "w3")
    array = numpy_helper.to_array(tensor).copy()
    array[0, 0] = wrong
    tensor.CopyFrom(numpy_helper.from_array(array, "w3"))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(UserError, match="not finite"):
        edgepipe.compile(
            tmp_path / "net.onnx", target="host", recipe="fp32+2:4", output=tmp_path / "b"
        )
