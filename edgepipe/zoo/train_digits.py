"""Train the zoo network ``digits``: ``python -m edgepipe.zoo.train_digits [FOLDER]``.

Data: scikit-learn's handwritten digits (1797 images of 8×8, ``load_digits``; UCI Optical
Recognition of Handwritten Digits). A fixed, stratified quarter is held out. Writes
``digits.onnx`` (BatchNorms kept), ``digits_test.npz`` (the held-out images and labels) and
``digits_train.npz`` (images to calibrate with) into FOLDER (``models/``), and prints the accuracy
to put into ``digits.toml``.
"""

# mypy: allow-subclassing-any
from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from edgepipe.resources import data_folder
from edgepipe.zoo.mobilenet import conv_bn

_SEED, _EPOCHS, _BATCH, _HELD_OUT, _CALIBRATION = 0, 60, 64, 450, 256

Array = np.ndarray[Any, Any]
Shapes = Mapping[str, list[int | str]]


class Digits(nn.Module):
    """Input image [n,1,8,8] float32 in 0…16, output logits [n,10]; 12.7 k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(1, 16, 3)
        self.first = conv_bn(16, 16, 3)
        self.second = conv_bn(16, 16, 3, activation=None)
        self.widen = conv_bn(16, 32, 3)
        self.depthwise = conv_bn(32, 32, 3, groups=32)
        self.pointwise = conv_bn(32, 64)
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image / 16)
        x = torch.relu(x + self.second(self.first(x)))
        x = self.pool(self.widen(x))
        x = self.pointwise(self.depthwise(x))
        return self.classifier(x.mean((2, 3)))


def split() -> tuple[Array, Array, Array, Array]:
    """Train images, train labels, held-out images, held-out labels; images [n,1,8,8] float32."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = data.images.astype(np.float32)[:, None]
    labels = data.target.astype(np.int64)
    parts = train_test_split(
        images, labels, test_size=_HELD_OUT, random_state=_SEED, stratify=labels
    )
    return parts[0], parts[2], parts[1], parts[3]


def train(images: Array, labels: Array) -> nn.Module:
    """Train with AdamW, a one-cycle learning rate and shifts by up to one pixel."""
    torch.manual_seed(_SEED)
    torch.set_num_threads(1)
    model = Digits()
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    steps = _EPOCHS * (len(x) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(x))[: len(x) // _BATCH * _BATCH].split(_BATCH):
            dy, dx = torch.randint(-1, 2, (2,)).tolist()
            shifted = nn.functional.pad(x[batch], (1, 1, 1, 1))[
                ..., 1 + dy : 9 + dy, 1 + dx : 9 + dx
            ]
            optimizer.zero_grad()
            loss_of(model(shifted), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def to_onnx(model: nn.Module) -> bytes:
    """The trained network as ONNX (opset 17), with a free batch and its BatchNorms kept.

    Written node by node: torch's exporter would fold the BatchNorms into the convolutions, and
    this network is there to exercise the compiler on what networks look like.
    """
    graph = _GraphWriter(model.state_dict())
    x = graph.node("Div", "image", graph.constant("range", np.array(16, np.float32)))
    x = skip = graph.conv_bn_relu(x, "stem")
    x = graph.conv_bn(graph.conv_bn_relu(x, "first"), "second")
    x = graph.node("Relu", graph.node("Add", skip, x))
    x = graph.conv_bn_relu(x, "widen")
    x = graph.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = graph.conv_bn_relu(x, "depthwise", group=32)
    x = graph.conv_bn_relu(x, "pointwise")
    x = graph.node("Flatten", graph.node("GlobalAveragePool", x))
    weight, bias = (graph.parameter(f"classifier.{p}") for p in ("weight", "bias"))
    graph.node("Gemm", x, weight, bias, output="logits", transB=1)
    return graph.serialize("digits", {"image": ["batch", 1, 8, 8]}, {"logits": ["batch", 10]})


class _GraphWriter:
    """Collects nodes and initializers; every method returns the name of what it made."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.state = state
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, name: str, array: Array) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def parameter(self, name: str) -> str:
        return self.constant(name, self.state[name].numpy())

    def node(self, op_type: str, *inputs: str, output: str = "", **attributes: object) -> str:
        name = f"{op_type.lower()}_{len(self.nodes)}"
        made = helper.make_node(op_type, inputs, [output or f"{name}_out"], name, **attributes)
        self.nodes.append(made)
        return output or f"{name}_out"

    def conv_bn(self, x: str, layer: str, group: int = 1) -> str:
        weight = self.parameter(f"{layer}.0.weight")
        size = list(self.state[weight].shape[2:])
        pads = [k // 2 for k in size * 2]
        x = self.node("Conv", x, weight, kernel_shape=size, pads=pads, group=group)
        norm = [f"{layer}.1.{p}" for p in ("weight", "bias", "running_mean", "running_var")]
        return self.node("BatchNormalization", x, *map(self.parameter, norm), epsilon=1e-5)

    def conv_bn_relu(self, x: str, layer: str, group: int = 1) -> str:
        return self.node("Relu", self.conv_bn(x, layer, group))

    def serialize(self, name: str, inputs: Shapes, outputs: Shapes) -> bytes:
        values = [
            [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in side.items()]
            for side in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, name, *values, initializer=self.initializers)
        imports = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        content: bytes = model.SerializeToString(deterministic=True)
        return content


def write_calibration(folder: Path, train_images: Array) -> None:
    """The first images that the network was trained on; bytes hold 0…16."""
    chosen = train_images[:_CALIBRATION].astype(np.uint8)
    np.savez_compressed(folder / "digits_train.npz", image=chosen)


def main(folder: Path) -> None:
    """Train, export, and write the files into ``folder``."""
    train_images, train_labels, test_images, test_labels = split()
    model = train(train_images, train_labels)
    with torch.no_grad():
        predicted = model(torch.from_numpy(test_images)).argmax(1).numpy()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "digits.onnx").write_bytes(to_onnx(model))
    np.savez_compressed(
        folder / "digits_test.npz", image=test_images, labels=test_labels.astype(np.int64)
    )
    write_calibration(folder, train_images)
    print(f"accuracy = {(predicted == test_labels).mean():.4f} on {len(test_labels)} images")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else data_folder("models"))
