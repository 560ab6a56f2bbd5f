"""EfficientNet-B0 (Tan & Le 2019): MBConv blocks with squeeze-and-excitation and SiLU."""

# mypy: allow-subclassing-any
from __future__ import annotations

import torch
from torch import nn

from edgepipe.zoo.mobilenet import conv_bn


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channel means (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.silu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(gate))


class MBConv(nn.Module):
    """Expansion, depthwise, squeeze-and-excitation, linear projection; added where it fits."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.body = nn.Sequential(
            *([conv_bn(inputs, width, activation=nn.SiLU)] if expansion > 1 else []),
            conv_bn(width, width, kernel, stride, groups=width, activation=nn.SiLU),
            SqueezeExcite(width, inputs // 4),
            conv_bn(width, outputs, activation=None),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class EfficientNet(nn.Module):
    """B0: input [n,3,h,w] float32, output logits [n,classes]."""

    #: Expansion, kernel, output channels, repetitions, stride of the first (Table 1).
    STAGES = (
        (1, 3, 16, 1, 1),
        (6, 3, 24, 2, 2),
        (6, 5, 40, 2, 2),
        (6, 3, 80, 3, 2),
        (6, 5, 112, 3, 1),
        (6, 5, 192, 4, 2),
        (6, 3, 320, 1, 1),
    )

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(3, 32, 3, 2, activation=nn.SiLU)]
        width = 32
        for expansion, kernel, outputs, count, stride in self.STAGES:
            for i in range(count):
                layers.append(MBConv(width, outputs, kernel, stride if i == 0 else 1, expansion))
                width = outputs
        layers.append(conv_bn(width, 1280, activation=nn.SiLU))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(input).mean((2, 3)))


def efficientnet_b0() -> nn.Module:
    """EfficientNet-B0, 1000 classes."""
    return EfficientNet()
