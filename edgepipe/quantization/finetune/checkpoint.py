"""The state of a training on disk: written whole or not at all, read without executing code."""

from __future__ import annotations

import io
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from edgepipe.errors import UserError

FILE = "training.pt"


@dataclass
class Checkpoint:
    """State of one training in ``folder``.

    ``fingerprint`` names model, data and settings: a state that others left is refused.
    """

    folder: Path
    fingerprint: str
    seconds: float
    saved: float = field(default_factory=time.monotonic)

    def load(self) -> dict[str, Any] | None:
        """What ``save`` was given last, or None. Raises UserError for a state of another run."""
        path = self.folder / FILE
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state["fingerprint"]
        except Exception as error:  # zip, pickle and torch errors of many types
            raise UserError(
                f"cannot be read: {type(error).__name__}", where=str(path), fix="delete it"
            ) from None
        if found != self.fingerprint:
            raise UserError(
                "is of a training with another model, other data or other settings",
                where=str(path),
                fix="give another folder, or delete it",
            )
        return dict(state)

    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self.saved >= self.seconds

    def save(self, **state: Any) -> None:
        """Replace what is there, so that a crash leaves the old state or the new one."""
        # In memory first: torch turns a full disk into errors of its own.
        content = io.BytesIO()
        torch.save({"fingerprint": self.fingerprint, **state}, content)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f"{FILE}.new"
            with temporary.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / FILE)
        except OSError as error:
            raise UserError(
                f"cannot be written: {error.strerror}", where=str(self.folder)
            ) from None
        self.saved = time.monotonic()
