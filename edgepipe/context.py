"""What every stage of one compilation reads: the target, the recipe, and where to leave notes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edgepipe.recipe import Recipe
from edgepipe.records import NO_RECORDS, Records
from edgepipe.target import Target


@dataclass(frozen=True)
class Note:
    """Why something was or was not done; ``edgepipe compile --explain`` prints them.

    A ``warning`` is printed always: the result is less than the user may expect.
    """

    stage: str
    subject: str
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Context:
    """Read by every stage, changed by none; only ``notes`` grows.

    ``dump_dir`` receives the intermediate form after each stage when it is not None.
    ``progress`` is called with a short line when a stage starts. With ``allow_float_fallback``
    a quantized operator that no integer kernel executes is noted instead of refused. ``threads``
    share an inference of the bundle; 0: as many as the device has. ``records`` are preferred to
    what the default rules of kernel templates choose.
    """

    target: Target
    recipe: Recipe
    dump_dir: Path | None = None
    progress: Callable[[str], None] = lambda line: None
    notes: list[Note] = field(default_factory=list)
    allow_float_fallback: bool = False
    threads: int = 1
    records: Records = NO_RECORDS

    def note(self, stage: str, subject: str | None, text: str) -> None:
        """Record the reason for a decision about ``subject`` (a node or tensor name)."""
        self.notes.append(Note(stage, subject or "?", text))

    def warn(self, stage: str, subject: str | None, text: str) -> None:
        """Record what the user should hear of unasked."""
        self.notes.append(Note(stage, subject or "?", text, warning=True))

    def dump(self, name: str, text: str | Callable[[], str]) -> None:
        """Keep ``text`` as ``dump_dir/name`` when dumping was asked for.

        A function is called only then: printing a module takes longer than most stages.
        """
        if self.dump_dir is not None:
            self.dump_dir.mkdir(parents=True, exist_ok=True)
            content = text if isinstance(text, str) else text()
            (self.dump_dir / name).write_text(content, encoding="utf-8")
