"""ResNet-18 and ResNet-50 (He et al. 2016; stride in the 3×3, as torchvision's "v1.5")."""

# mypy: allow-subclassing-any
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgepipe.zoo.mobilenet import conv_bn


class Residual(nn.Module):
    """``relu(body(x) + shortcut(x))``; the shortcut is a 1×1 convolution where shapes differ."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    """Two 3×3 convolutions; ``width`` output channels."""
    body = nn.Sequential(
        conv_bn(inputs, width, 3, stride), conv_bn(width, width, 3, activation=None)
    )
    return Residual(body, _shortcut(inputs, width, stride))


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """1×1, 3×3, 1×1 convolutions; 4 · ``width`` output channels."""
    body = nn.Sequential(
        conv_bn(inputs, width),
        conv_bn(width, width, 3, stride),
        conv_bn(width, 4 * width, activation=None),
    )
    return Residual(body, _shortcut(inputs, 4 * width, stride))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return conv_bn(inputs, outputs, 1, stride, activation=None)


class ResNet(nn.Module):
    """Input [n,3,h,w] float32, output logits [n,classes]. ``counts``: blocks per stage."""

    def __init__(self, counts: Sequence[int], deep: bool, classes: int = 1000) -> None:
        super().__init__()
        self.stem = conv_bn(3, 64, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        block, factor = (bottleneck, 4) if deep else (basic_block, 1)
        blocks: list[nn.Module] = []
        channels = 64
        for stage, count in enumerate(counts):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(block(channels, 64 << stage, stride))
                channels = (64 << stage) * factor
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.pool(self.stem(input)))
        return self.classifier(x.mean((2, 3)))


def resnet18() -> nn.Module:
    """ResNet-18, 1000 classes."""
    return ResNet((2, 2, 2, 2), deep=False)


def resnet50() -> nn.Module:
    """ResNet-50, 1000 classes."""
    return ResNet((3, 4, 6, 3), deep=True)
