"""torch modules and ``.pt2`` programs."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edgepipe import importer
from edgepipe.errors import UserError

pytestmark = pytest.mark.needs_torch

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
    def forward(self, image):
        return self.drop(torch.relu(self.norm(self.conv(image)))).mean((2, 3))

class Two(nn.Module):
    def forward(self, a, b, scale=2.0):
        return {"sum": a + b * scale, "difference": a - b}

def with_example():
    return Net(), torch.zeros(1, 3, 8, 8)

def with_dict():
    return Two(), {"b": torch.zeros(2, 3), "a": torch.zeros(2, 3)}

def integer():
    return nn.Embedding(10, 4), (torch.zeros(1, 5, dtype=torch.int64),)

class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def untraceable():
    return Branch(), torch.zeros(3)

instance = Net()
number = 3
def fails(): raise RuntimeError("weights\\nare missing")
def returns_text(): return "net"
def needs_argument(width): return Net()
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, under a name no other test uses."""
    name = f"nets_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return name


def run(source: Any, **feed: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(source.proto_bytes()).run(None, feed)


@pytest.mark.slow
def test_factory_with_example_matches_torch_in_eval_mode(nets: str) -> None:
    import torch

    source = importer.load(f"{nets}:with_example")
    assert (source.name, source.origin) == ("with_example", f"{nets}:with_example")
    image = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    net = sys.modules[nets].Net().eval()
    want = net(torch.from_numpy(image)).detach().numpy()
    got = run(source, image=image)[0]
    assert np.abs(got - want).max() < 1e-6
    assert np.abs(got - run(source, image=image[:, ::-1])[0]).max() > 1e-3  # positive control


@pytest.mark.slow
def test_class_and_instance_are_factories_too(nets: str) -> None:
    shapes = {"image": (2, 3, 6, 6)}
    for name in ("Net", "instance"):
        source = importer.load(f"{nets}:{name}", shapes)
        assert list(source.model.graph.inputs[0].shape.numpy()) == [2, 3, 6, 6]


@pytest.mark.slow
def test_examples_by_name(nets: str) -> None:
    source = importer.load(f"{nets}:with_dict")
    a, b = np.full((2, 3), 5, np.float32), np.full((2, 3), 1, np.float32)
    total, difference = run(source, a=a, b=b)
    assert (total == 7).all() and (difference == 4).all()


@pytest.mark.slow
def test_shape_replaces_the_example_and_keeps_its_dtype(nets: str) -> None:
    source = importer.load(f"{nets}:integer", {"input": (1, 7)})
    value = source.model.graph.inputs[0]
    assert (list(value.shape.numpy()), value.dtype.name) == ([1, 7], "INT64")


@pytest.mark.slow
def test_export_is_reproducible_and_names_no_folder(nets: str, tmp_path: Path) -> None:
    first, second = (importer.load(f"{nets}:with_example") for _ in range(2))
    assert first.sha256 == second.sha256
    assert str(tmp_path).encode() not in first.proto_bytes()
    assert b"pkg.torch" not in first.proto_bytes()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Net", ("input 'image'", "--shape image=1,3,224,224")),
        ("with_exampel", ("did you mean 'with_example'",)),
        ("number", ("not callable",)),
        ("fails", ("RuntimeError: weights", "without arguments")),
        ("returns_text", ("returned str",)),
        ("needs_argument", ("TypeError", "width")),
        ("untraceable", ("torch.onnx cannot export it", "traceable")),
    ],
)
def test_bad_factory(nets: str, name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        importer.load(f"{nets}:{name}")
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert "\n" not in message


def test_bad_shape_name(nets: str) -> None:
    with pytest.raises(UserError, match="did you mean 'image'"):
        importer.load(f"{nets}:Net", {"imge": (1, 3, 8, 8)})


@pytest.mark.slow
def test_terminal_stays_silent(nets: str) -> None:
    script = f"from edgepipe import importer; importer.load('{nets}:with_example')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""


def test_missing_torch_says_what_to_install(nets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r'pip install "edgepipe\[torch\]"'):
        importer.load(f"{nets}:with_example")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with a free batch, a buffer and a lifted constant."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("gain", torch.full((4, 1, 1), 2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.conv(x)) * self.gain + torch.tensor([1.5])

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    shapes = ({0: torch.export.Dim("batch")},)
    example = (torch.zeros(2, 3, 8, 8),)
    torch.export.save(torch.export.export(Net().eval(), example, dynamic_shapes=shapes), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("shapes", "batch"), [(None, 1), ({"x": (4, 3, 8, 8)}, 4)])
def test_program(program: Path, shapes: dict[str, tuple[int, ...]] | None, batch: int) -> None:
    import torch

    source = importer.load(program, shapes)
    assert (source.name, source.origin) == ("net", "net.pt2")
    x = np.random.default_rng(0).standard_normal((batch, 3, 8, 8)).astype(np.float32)
    want = torch.export.load(program).module()(torch.from_numpy(x.repeat(2, 0))).detach()
    assert np.abs(run(source, x=x)[0] - want.numpy()[::2]).max() < 1e-5


def _replace(old: bytes, new: bytes) -> Callable[[str, bytes], bytes | None]:
    def change(name: str, content: bytes) -> bytes | None:
        assert not name.endswith("model.json") or old in content
        return content.replace(old, new) if name.endswith("model.json") else content

    return change


class _Code:
    """Unpickling this calls ``exit``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exit, (7,))


def _pickled_code(name: str, content: bytes) -> bytes | None:
    import torch

    buffer = io.BytesIO()
    torch.save((_Code(),), buffer)
    return buffer.getvalue() if name.endswith("sample_inputs/model.pt") else content


_SYMBOL = b"Symbol('s77', positive=True, integer=True)"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_pickled_code, "holds pickled code"),
        (_replace(_SYMBOL, b"exit(7)"), "malformed dimension"),
        (_replace(_SYMBOL, b"Symbol('s77').__class__"), "malformed dimension"),
        (_replace(b"torch.ops.aten.relu.default", b"torch.os.abort"), "not an operator"),
        (_replace(b"torch.ops.aten.relu.default", b"_operator.methodcaller"), "not an operator"),
        (lambda n, c: None if n.endswith("model.json") else c, "holds no program"),
        (lambda n, c: c[:100] if n.endswith("model.json") else c, "is damaged"),
    ],
)
def test_program_that_would_run_code_is_refused(
    program: Path, tmp_path: Path, change: Callable[[str, bytes], bytes | None], words: str
) -> None:
    path = tmp_path / "changed.pt2"
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    with pytest.raises(UserError, match=words):
        importer.load(path)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04" + bytes(50)])
def test_program_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt2").write_bytes(content)
    with pytest.raises(UserError, match=r"m\.pt2: is not a \.pt2 program"):
        importer.load(tmp_path / "m.pt2")


def test_hostile_dimension_costs_linear_time() -> None:
    from edgepipe.importer.pt2 import _EXPRESSION

    assert _EXPRESSION.fullmatch("A" * 100_000 + "!") is None
    assert _EXPRESSION.fullmatch("FloorDiv(Symbol('s7', integer=True), Integer(2)) + 1")
