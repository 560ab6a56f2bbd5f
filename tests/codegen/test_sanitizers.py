"""No kernel, driver or program of a bundle reads or writes what is not its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepipe.codegen.plan import ALIGNMENT

from . import sanitizers


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sanitizers.RECIPES)
def test_sanitizers_find_nothing_but_what_is_injected(recipe: str, tmp_path: Path) -> None:
    built = sanitizers.build("digits", recipe, tmp_path)
    assert built.run() == ""
    assert built.bench() == ""
    assert "AddressSanitizer" in built.run(short_output=4)
    assert "AddressSanitizer" in built.run(short_arena=ALIGNMENT + 4)
