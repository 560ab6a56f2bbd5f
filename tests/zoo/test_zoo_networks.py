"""Every network of the zoo: what its TOML says is what it is, and it computes sensibly."""

from __future__ import annotations

import hashlib
import importlib
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from edgepipe import importer, zoo
from edgepipe.errors import UserError
from edgepipe.importer.source import Source

#: The networks users can count on by name.
PROMISED = {
    "digits", "efficientnet-b0", "espcn", "fastdepth", "lstm", "mobilenet-v1", "mobilenet-v2",
    "resnet18", "resnet50", "squeezenet-v1-1", "text-transformer", "unet-small", "vit-tiny",
}  # fmt: skip
BUILT = [name for name in zoo.names() if zoo.describe(name).builder]

#: Multiply-accumulates and parameters as published (papers; torchvision's and timm's tables).
PUBLISHED = {
    "mobilenet-v1": (568.7e6, 4_231_976),
    "mobilenet-v2": (300.8e6, 3_504_872),
    "resnet18": (1814.1e6, 11_689_512),
    "resnet50": (4089.2e6, 25_557_032),
    "squeezenet-v1-1": (349.2e6, 1_235_496),
    "efficientnet-b0": (385.8e6, 5_288_548),
    "vit-tiny": (1253.7e6, 5_717_416),
}


def multiply_accumulates(model: ir.Model) -> int:
    return sum(_node_macs(node) for node in model.graph)


def _node_macs(node: ir.Node) -> int:
    shapes = [() if v is None or v.shape is None else v.shape.numpy() for v in node.inputs]
    output = math.prod(node.outputs[0].shape.numpy()) if node.outputs[0].shape else 0
    match node.op_type:
        case "Conv":
            return output * math.prod(shapes[1][1:])
        case "ConvTranspose":
            return math.prod(shapes[0]) * math.prod(shapes[1][1:])
        case "Gemm":
            return output * shapes[0][0 if node.attributes.get_int("transA", 0) else 1]
        case "MatMul":
            return output * shapes[0][-1]
        case "LSTM":
            steps, batch, _ = shapes[0]
            return steps * batch * (math.prod(shapes[1]) + math.prod(shapes[2]))
    return 0


def session(content: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def feed(entry: zoo.ZooEntry, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    values: dict[str, np.ndarray] = {}
    for spec in entry.inputs:
        if spec.dtype == "int64":
            limit = 2 if "mask" in spec.name else 8192
            values[spec.name] = random.integers(0, limit, spec.shape)
        else:
            values[spec.name] = random.standard_normal(spec.shape).astype(spec.dtype)
    return values


@pytest.fixture(scope="module")
def sources() -> dict[str, Source]:
    return {}


def load(name: str, sources: dict[str, Source]) -> Source:
    if name not in sources:
        sources[name] = importer.load(name)
    return sources[name]


def test_every_promised_network_is_there() -> None:
    assert set(zoo.names()) == PROMISED


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_entry(name: str) -> None:
    entry = zoo.describe(name)
    assert entry.name == name and entry.summary and entry.macs > 0 and entry.parameters > 0
    assert entry.trained == (entry.accuracy is not None)
    for spec in entry.inputs:
        assert spec.shape[0] == 1 and np.dtype(spec.dtype)


def _builder(name: str) -> Any:
    module, _, function = zoo.describe(name).builder.partition(":")
    return getattr(importlib.import_module(module), function)


@pytest.mark.needs_torch
@pytest.mark.parametrize("name", BUILT)
def test_parameters(name: str) -> None:
    counted = sum(p.numel() for p in _builder(name)().parameters())
    assert counted == zoo.describe(name).parameters
    assert counted == PUBLISHED.get(name, (0, counted))[1]


@pytest.mark.needs_torch
@pytest.mark.parametrize("name", sorted(PROMISED))
def test_inputs_outputs_and_multiply_accumulates(name: str, sources: dict[str, Source]) -> None:
    entry, graph = zoo.describe(name), load(name, sources).model.graph
    inputs = [
        zoo.ZooInput(str(v.name), tuple(v.shape.numpy()), v.dtype.numpy().name)
        for v in graph.inputs
    ]
    assert tuple(inputs) == entry.inputs
    assert tuple(v.name for v in graph.outputs) == entry.outputs
    assert all(v.shape.is_static() for node in graph for v in node.outputs)
    counted = multiply_accumulates(sources[name].model)
    assert counted == entry.macs
    assert abs(counted / PUBLISHED.get(name, (counted, 0))[0] - 1) < 1e-3


@pytest.mark.slow
@pytest.mark.needs_torch
@pytest.mark.parametrize("name", sorted(PROMISED))
def test_original_and_loaded_model_agree(name: str, sources: dict[str, Source]) -> None:
    source = load(name, sources)
    original, loaded = (
        session(content).run(None, feed(zoo.describe(name), 0))
        for content in (source.proto_bytes(), ir.to_proto(source.model).SerializeToString())
    )
    for left, right in zip(original, loaded, strict=True):
        assert np.array_equal(left, right)


@pytest.mark.slow
@pytest.mark.needs_torch
@pytest.mark.parametrize("name", BUILT)
def test_activations_stay_in_range_and_depend_on_the_input(
    name: str, sources: dict[str, Source]
) -> None:
    """Random weights must not blow up, die out, or reach denormals (slow on WebAssembly)."""
    proto = load(name, sources).proto
    runner = session(_with_all_outputs(proto))
    names = [o.name for o in runner.get_outputs()]
    values = dict(zip(names, runner.run(None, feed(zoo.describe(name), 1)), strict=True))
    for key, value in values.items():
        if value.dtype != np.float32:
            continue
        assert np.isfinite(value).all(), key
        assert np.abs(value).max() <= 2e4, key  # masked scores of the text transformer: -1e4
        tiny = (value != 0) & (np.abs(value) < np.finfo(np.float32).tiny)
        assert not tiny.any(), key
    for output in zoo.describe(name).outputs:
        other = session(proto.SerializeToString()).run([output], feed(zoo.describe(name), 2))[0]
        change = np.abs(other - values[output]).mean() / np.abs(values[output]).mean()
        assert change > 0.005, output


def _with_all_outputs(proto: onnx.ModelProto) -> bytes:
    kept = {o.name for o in proto.graph.output}
    produced = [n for node in proto.graph.node for n in node.output if n and n not in kept]
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in produced)
    return proto.SerializeToString()


#: sha256 of all weights and statistics, in order. They must not depend on the machine.
DIGESTS = {"lstm": "aff935ca91fd4bf5", "mobilenet-v1": "d470fd0ff518a0df"}


@pytest.mark.slow
@pytest.mark.needs_torch
@pytest.mark.parametrize("name", DIGESTS)
def test_weights_are_reproducible(name: str) -> None:
    from edgepipe.zoo import weights

    module = _builder(name)()
    weights.initialise(module, zoo.describe(name).inputs, name)
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[name]


@pytest.mark.slow
@pytest.mark.needs_torch
@pytest.mark.parametrize("name", ["fastdepth", "mobilenet-v1", "resnet50"])
def test_rounding_is_not_amplified(name: str) -> None:
    """What no compiler can beat must leave room: float32 above 100 dB, halves above 45."""
    import torch

    from edgepipe.zoo import weights

    module = _builder(name)()
    weights.initialise(module, zoo.describe(name).inputs, name)
    values = {key: torch.from_numpy(value) for key, value in feed(zoo.describe(name), 3).items()}
    with torch.no_grad():
        single = module(**values).double()
        exact = module.double()(**{key: value.double() for key, value in values.items()})
        halves = module.half()(**{key: value.half() for key, value in values.items()})
    for got, least in ((single, 106), (halves, 50)):
        noise = (got - exact).square().sum()
        assert 10 * float(torch.log10(exact.square().sum() / noise)) > least


@pytest.mark.needs_torch
def test_networks_with_norms_keep_them(sources: dict[str, Source]) -> None:
    kinds = [node.op_type for node in load("mobilenet-v1", sources).model.graph]
    assert kinds.count("BatchNormalization") == kinds.count("Conv") == 27


@pytest.mark.slow
@pytest.mark.needs_torch
def test_other_shapes_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = importer.load("espcn", {"input": (2, 1, 32, 48)})
    assert list(source.model.graph.outputs[0].shape.numpy()) == [2, 1, 96, 144]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"inputs": (1, 3, 224, 224)}, "did you mean 'input'"),
        ({"input": (3, 224, 224)}, "the shape is like 1,3,224,224"),
        ({"input": (1, 3, 0, 224)}, "does not fit"),
    ],
)
def test_bad_shapes(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        importer.load("mobilenet-v1", shapes)


def test_unknown_name() -> None:
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        zoo.describe("resnet-18")


@pytest.fixture
def models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(zoo, "data_folder", lambda name: tmp_path)
    yield tmp_path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = ", "not a readable TOML"),
        ('name = "net"\n', "bad or missing key"),
        ('name = "net"\nmac = 3\n', "unknown key 'mac'; did you mean 'macs'"),
        ('name = "other"\nsummary = ""\n', "bad or missing key"),
    ],
)
def test_malformed_entry(models_folder: Path, text: str, words: str) -> None:
    (models_folder / "net.toml").write_text(text)
    with pytest.raises(UserError, match=words):
        zoo.describe("net")


def test_reading_the_zoo_imports_nothing_heavy() -> None:
    script = (
        "import sys; from edgepipe import zoo; [zoo.describe(n) for n in zoo.names()]\n"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'torch', 'tvm', 'onnxruntime'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
