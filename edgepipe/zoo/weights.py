"""Reproducible random weights: He initialisation and re-estimated BatchNorm statistics.

The numbers must not depend on the machine: random ones come from NumPy's frozen MT19937
stream, and statistics are computed in float64 and rounded to 10 bits of mantissa, so that the
order of summation cannot show.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import RandomState
from torch import nn

from edgepipe.zoo import ZooEntry, ZooInput

_SAMPLES = 2

# BatchNorm takes the mean from what a ReLU leaves, not from its rounding errors: at random noise
# grows by up to pi / (pi - 1) a layer ("A mean field theory of batch normalization", Yang et al.
# 2019), where that of trained networks of this kind stays level. Larger shifts leave more of the
# signal: FastDepth in float32 keeps 89 dB with shifts around 0, 109 from 0 to 1, 121 with these;
# with halves in memory, 41 dB from 0 to 1 and 54 with these.
_NORM_RANGES = {
    (nn.BatchNorm2d, "weight"): (0.8, 1.2),
    (nn.BatchNorm2d, "bias"): (0.5, 1.5),
    (nn.LayerNorm, "weight"): (0.8, 1.2),
    (nn.LayerNorm, "bias"): (-0.1, 0.2),
}


def built(entry: ZooEntry) -> nn.Module:
    """The network of a zoo entry that has a builder, with its fixed random weights."""
    name, _, function = entry.builder.partition(":")
    module: nn.Module = getattr(importlib.import_module(name), function)()
    initialise(module, entry.inputs, entry.name)
    return module


def initialise(module: nn.Module, inputs: Sequence[ZooInput], seed_text: str) -> None:
    """Give ``module`` He-normal weights (He et al. 2015, fan in) and settled BatchNorms.

    Biases are small and random; scales and shifts of norms as in ``_NORM_RANGES``. Running
    statistics are those of two seeded samples of the shapes in ``inputs``. In place; leaves
    eval mode.
    """
    random = RandomState(int.from_bytes(hashlib.sha256(seed_text.encode()).digest()[:4], "big"))
    with torch.no_grad():
        for layer in module.modules():
            _initialise_layer(layer, random)
        _settle_batch_norms(module, inputs, random)
    module.eval()


def _initialise_layer(layer: nn.Module, random: RandomState) -> None:
    for name, parameter in layer.named_parameters(recurse=False):
        shape = tuple(parameter.shape)
        if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
            values = random.uniform(*_NORM_RANGES[type(layer), name], shape)
        elif "bias" in name or len(shape) < 2:
            values = random.uniform(-0.05, 0.05, shape)
        else:
            values = random.standard_normal(shape) * _deviation(layer, shape)
        parameter.copy_(torch.from_numpy(np.asarray(values, dtype=np.float32)))


def _deviation(layer: nn.Module, shape: tuple[int, ...]) -> float:
    fan_in = int(np.prod(shape[1:]))
    if isinstance(layer, nn.Conv2d):
        return float((2.0 / fan_in) ** 0.5)
    if isinstance(layer, nn.ConvTranspose2d):  # kernel = stride: one input pixel per output
        return float((1.0 / shape[0]) ** 0.5)
    if isinstance(layer, nn.Linear):
        return float((1.0 / fan_in) ** 0.5)  # no ReLU follows: unit gain
    if isinstance(layer, nn.LSTM):
        return float((2.0 / fan_in) ** 0.5)  # gates squash: a smaller gain forgets the input
    return 0.02  # embeddings, position and class tokens: as ViT and BERT start


def _settle_batch_norms(module: nn.Module, inputs: Sequence[ZooInput], random: RandomState) -> None:
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    arguments = {i.name: torch.from_numpy(sample(i, random)).double() for i in inputs}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # one forward pass: exactly its statistics
    module.double().train()
    module(**arguments)
    for norm in norms:
        for statistic in (norm.running_mean, norm.running_var):
            statistic.copy_(torch.from_numpy(_round_mantissa(statistic.numpy())))
    module.float()


def sample(spec: ZooInput, random: RandomState) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Two samples of the input's shape: white noise, and noise that is smooth as images are."""
    shape = (_SAMPLES, *spec.shape[1:])
    noise = random.standard_normal(shape)
    if len(shape) == 4 and min(shape[2:]) >= 8:
        coarse = random.standard_normal((shape[1], shape[2] // 8 + 1, shape[3] // 8 + 1))
        smooth = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, : shape[2], : shape[3]]
        noise[1] = 0.9 * smooth + 0.3 * noise[1]
    return noise


def _round_mantissa(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    mantissa, exponent = np.frexp(values)
    rounded: np.ndarray[Any, Any] = np.ldexp(np.round(mantissa * 1024) / 1024, exponent)
    return rounded
