"""A small LSTM sequence classifier, of the kind used on motion sensors (UCI HAR: 128×9)."""

# mypy: allow-subclassing-any
from __future__ import annotations

import torch
from torch import nn


class LstmClassifier(nn.Module):
    """Input [n,steps,channels] float32, output logits [n,classes]; the last step decides."""

    def __init__(self, channels: int = 9, hidden: int = 64, classes: int = 6) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, hidden, num_layers=2, batch_first=True)
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(input)
        return self.classifier(states[:, -1])


def lstm() -> nn.Module:
    """Two LSTM layers of 64, 9 channels, 6 classes."""
    return LstmClassifier()
