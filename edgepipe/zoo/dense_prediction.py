"""Image to image: ESPCN super-resolution (Shi et al. 2016), a small U-Net (Ronneberger 2015)."""

# mypy: allow-subclassing-any
from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from edgepipe.zoo.mobilenet import conv_bn


class Espcn(nn.Module):
    """Input luma [n,1,h,w] float32 in 0…1, output [n,1,h·scale,w·scale]."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 64, 5, padding=2),
            nn.Tanh(),
            nn.Conv2d(64, 32, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(32, scale * scale, 3, padding=1),
            nn.PixelShuffle(scale),
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.layers(input)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv_bn(inputs, outputs, 3), conv_bn(outputs, outputs, 3))


class UNet(nn.Module):
    """Input [n,3,h,w] float32 (h, w multiples of 16), output class logits [n,classes,h,w].

    ``width`` channels at full resolution, doubled at each of four halvings; padded
    convolutions, transposed 2×2 convolutions on the way up, concatenated skips.
    """

    def __init__(self, width: int = 16, depth: int = 4, classes: int = 2) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        pairs = list(pairwise(widths))
        self.stem = _double(3, width)
        self.down = nn.ModuleList(_double(i, o) for i, o in pairs)
        self.pool = nn.MaxPool2d(2)
        self.enlarge = nn.ModuleList(nn.ConvTranspose2d(o, i, 2, 2) for i, o in pairs[::-1])
        self.up = nn.ModuleList(_double(2 * i, i) for i, _ in pairs[::-1])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kept = [self.stem(input)]
        for down in self.down:
            kept.append(down(self.pool(kept[-1])))
        x = kept.pop()
        for enlarge, up in zip(self.enlarge, self.up, strict=True):
            x = up(torch.cat([kept.pop(), enlarge(x)], 1))
        return self.head(x)


def espcn() -> nn.Module:
    """ESPCN, enlargement by 3."""
    return Espcn(3)


def unet_small() -> nn.Module:
    """U-Net with 16 to 256 channels, 2 classes."""
    return UNet()
