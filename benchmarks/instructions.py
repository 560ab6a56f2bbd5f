"""Guest instructions per inference of a bundle for ARM, 64 or 32 bits, counted by QEMU: no latency.

The counting plugin and the QEMU that takes it come from ``tools/count_insns.py`` beside the
checkout (EDGEPIPE_SHARED), which builds them once; other engines' AArch64 builds from
``tools/peers_arm.py``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from harness import SHARED

from edgepipe.bundle import Bundle
from edgepipe.errors import UserError
from edgepipe.target import Target

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgepipe/count-insns"


@cache
def tool(name: str) -> ModuleType:
    """The program ``tools/name.py`` as a module. Raises UserError."""
    file = SHARED / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UserError("no counter of instructions", where=str(file), fix="set EDGEPIPE_SHARED")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _lab(qemu: str) -> Any:
    """The counter, around the program ``qemu`` of the package that it unpacks."""
    lab = tool("count_insns").Lab(CACHE)
    lab.build_qemu()
    lab.qemu = lab.qemu.with_name(qemu)
    return lab


def count(bundle: Bundle) -> float:
    """Instructions per inference, from the difference of two repetition counts."""
    if bundle.target.arch not in ("aarch64", "arm"):
        raise UserError("the counter reads ARM programs only", where=bundle.target.name)
    program = str(bundle.file("bench"))
    return between(bundle.target, lambda times: [program, "repeat", str(times)])


def between(target: Target, words: Callable[[int], list[str]]) -> float:
    """Instructions per repetition of a program that is started by ``words(repetitions)``."""
    lab = _lab(target.run.qemu)
    few, many = (lab.run(words(n), target.run.qemu_cpu)[0] for n in (1, 3))
    return float(many - few) / 2
