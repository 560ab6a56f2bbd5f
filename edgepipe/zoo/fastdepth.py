"""FastDepth (Wofk et al. 2019): MobileNet encoder, NNConv5 decoder, additive skips."""

# mypy: allow-subclassing-any
from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from edgepipe.zoo.mobilenet import MobileNetV1, conv_bn


def nnconv5(inputs: int, outputs: int) -> nn.Sequential:
    """Depthwise 5×5 and pointwise convolution, then nearest-neighbour enlargement by 2."""
    return nn.Sequential(
        conv_bn(inputs, inputs, 5, groups=inputs),
        conv_bn(inputs, outputs),
        nn.Upsample(scale_factor=2, mode="nearest"),
    )


class FastDepth(nn.Module):
    """Input [n,3,h,w] float32 (h, w multiples of 32), output depth in metres [n,1,h,w]."""

    #: Encoder blocks whose outputs are added in the decoder, after which decoder layer.
    SKIPS = ((5, 1), (3, 2), (1, 3))

    def __init__(self) -> None:
        super().__init__()
        self.encoder = MobileNetV1().blocks
        widths = (1024, 512, 256, 128, 64, 32)
        self.decoder = nn.ModuleList(nnconv5(i, o) for i, o in pairwise(widths))
        self.head = conv_bn(32, 1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x, kept = input, {}
        for i, block in enumerate(self.encoder):
            x = kept[i] = block(x)
        skips = {layer: kept[i] for i, layer in self.SKIPS}
        for i, layer in enumerate(self.decoder):
            x = layer(x)
            if i in skips:
                x = x + skips[i]
        return self.head(x)


def fastdepth() -> nn.Module:
    """FastDepth with additive skips."""
    return FastDepth()
