"""A bundle computes its golden inputs before it is handed over, where something here can run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.errors import UserError, ValidationFailed

if TYPE_CHECKING:
    from edgepipe.context import Context
    from edgepipe.importer.source import Source


def check(folder: Path, source: Source, context: Context) -> None:
    """Validate the bundle in ``folder``, made from ``source``, through its target's first runner
    here, by the floors of ``edgepipe validate``. Notes why where nothing can run it or nothing
    says what is right. Raises ValidationFailed."""
    from edgepipe import runners
    from edgepipe.bundle import Bundle
    from edgepipe.validation import validate

    bundle = Bundle.open(folder)
    try:
        runner = runners.pick(bundle.target)
    except UserError as error:
        context.note("check", "bundle", f"not run: {error}")
        return
    if not bundle.golden()[1]:
        context.warn("check", "bundle", "not checked: no reference could run the original model")
        return
    context.progress(f"checking through {runner.NAME}")
    report = validate(bundle, runner=runner.NAME, source=source)
    if not report.ok:
        raise ValidationFailed(
            f"the bundle does not compute what the model does, so it is not written "
            f"({'; '.join(report.failures[:2])}); --no-check writes it all the same"
        )
    context.note("check", "bundle", f"computes its golden inputs right, through {runner.NAME}")


def skip(folder: Path, source: Source, context: Context) -> None:
    """Take the bundle in ``folder`` as it is."""
