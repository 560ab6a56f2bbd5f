"""Bundles of the handmade model, built once per test session."""

from __future__ import annotations

from collections.abc import Callable

import handmade
import pytest

from edgepipe.bundle import Bundle
from edgepipe.target import Target


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """``made(target name)``: the handmade model as a bundle for the target."""
    cache: dict[str, Bundle] = {}

    def make(name: str) -> Bundle:
        if name not in cache:
            target = Target.load(name)
            path = tmp_path_factory.mktemp("bundle") / name
            cache[name] = handmade.write(
                path, handmade.source(), handmade.plan("net"), handmade.objects(target, "net"),
                handmade.context(target), "net",
            )  # fmt: skip
        return cache[name]

    return make
