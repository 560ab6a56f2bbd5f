"""MobileNetV1 (Howard et al. 2017) and MobileNetV2 (Sandler et al. 2018), width 1.0."""

# mypy: allow-subclassing-any
from __future__ import annotations

import torch
from torch import nn


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Convolution with symmetric padding, BatchNorm and an activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if activation is not None:
        layers.append(activation())
    return nn.Sequential(*layers)


class MobileNetV1(nn.Module):
    """1.0-224: input [n,3,h,w] float32, output logits [n,classes]."""

    #: Output channels and stride of each depthwise-separable block.
    BLOCKS = (
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *((512, 1),) * 5,
        (1024, 2),
        (1024, 1),
    )

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        blocks, width = [conv_bn(3, 32, 3, 2)], 32
        for outputs, stride in self.BLOCKS:
            depthwise = conv_bn(width, width, 3, stride, groups=width)
            blocks.append(nn.Sequential(depthwise, conv_bn(width, outputs)))
            width = outputs
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Linear(width, classes)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            input = block(input)
        return self.classifier(input.mean((2, 3)))


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, 1×1 linear projection; added to the input where it fits."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.body = nn.Sequential(
            *([conv_bn(inputs, width, activation=nn.ReLU6)] if expansion > 1 else []),
            conv_bn(width, width, 3, stride, groups=width, activation=nn.ReLU6),
            conv_bn(width, outputs, activation=None),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """1.0-224: input [n,3,h,w] float32, output logits [n,classes]."""

    #: Expansion, output channels, repetitions, stride of the first (Table 2 of the paper).
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(3, 32, 3, 2, activation=nn.ReLU6)]
        width = 32
        for expansion, outputs, count, stride in self.STAGES:
            for i in range(count):
                layers.append(InvertedResidual(width, outputs, stride if i == 0 else 1, expansion))
                width = outputs
        layers.append(conv_bn(width, 1280, activation=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(input).mean((2, 3)))


def mobilenet_v1() -> nn.Module:
    """MobileNetV1 1.0, 1000 classes."""
    return MobileNetV1()


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 1.0, 1000 classes."""
    return MobileNetV2()
