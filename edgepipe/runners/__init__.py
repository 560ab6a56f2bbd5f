"""Runners execute bundles. Each is one module of this package, found by its file.

A runner module has

- ``NAME``
- ``available(target) -> Availability``: whether it can run the target's bundles here; never raises
- ``run_many(bundle, samples) -> list of outputs``: one process or instance for all samples
- ``bench(bundle, runs, warmup) -> Timing``
- ``profile(bundle, runs) -> dict``: what each kernel takes (see ``edgepipe.op_profile``)

A runner that reaches somewhere else, a board or a browser, is named ``NAME:WHERE,KEY=VALUE``. Its
module has ``at(address) -> Runner`` instead, which returns an object with the above. Where no sign
of life comes for ``timeout=SECONDS`` it gives up with an error, and it leaves nothing behind.

Samples and outputs are ``{tensor name: array}`` with exactly the model's shapes and dtypes.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgepipe.errors import UserError, did_you_mean
from edgepipe.runners._base import Address, Availability, Timing
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgepipe.bundle import Bundle

__all__ = [
    "Address",
    "Availability",
    "Runner",
    "Timing",
    "names",
    "pick",
    "run",
    "run_many",
    "run_samples",
]


class Runner(Protocol):
    """What every module of this package that does not start with an underscore offers, or what
    its ``at`` returns. ``NAME`` is what the user named it by."""

    @property
    def NAME(self) -> str: ...

    def available(self, target: Target) -> Availability: ...

    def run_many(
        self, bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]]
    ) -> list[dict[str, npt.NDArray[Any]]]: ...

    def bench(self, bundle: Bundle, runs: int, warmup: int) -> Timing: ...

    def profile(self, bundle: Bundle, runs: int) -> dict[str, Any]: ...


def names() -> list[str]:
    """Names of all runners, sorted."""
    found = (m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in found)


def get(name: str) -> Runner:
    """The runner called ``name``, ``NAME`` or ``NAME:WHERE,KEY=VALUE…``. Raises UserError."""
    stem, address = Address.parse(name)
    if stem not in names():
        raise UserError(
            f"unknown runner '{stem}'", where="--runner", fix=did_you_mean(stem, names())
        )
    module = importlib.import_module(f"edgepipe.runners.{stem.replace('-', '_')}")
    if hasattr(module, "at"):
        return cast(Runner, module.at(address))
    if address != Address():
        raise UserError(f"runner '{stem}' takes no address and no options", where="--runner",
                        fix=f"--runner {stem}")  # fmt: skip
    return cast(Runner, module)


def candidates(target: Target) -> list[str]:
    """Runners worth trying for ``target``, preferred first.

    A machine of the target's own architecture runs native bundles without an emulator, so
    ``local`` comes first for every native target; it is unavailable elsewhere.
    """
    local = ("local",) if target.kind == "cpu" else ()
    return list(dict.fromkeys((*local, *target.run.runners)))


def pick(target: Target, name: str | None = None) -> Runner:
    """The runner ``name``, or the first available one of the target's.

    Raises UserError that lists, per runner, why not and what would add it.
    """
    if name is not None:
        runner = get(name)
        state = runner.available(target)
        if not state.ok:
            raise UserError(
                f"runner '{name}' cannot run {target.name} here: {state.reason}",
                where="--runner",
                fix=state.fix,
            )
        return runner
    reasons, fixes = [], []
    for candidate in candidates(target):
        runner = get(candidate)
        state = runner.available(target)
        if state.ok:
            return runner
        reasons.append(f"{candidate}: {state.reason}")
        if state.fix:
            fixes.append(state.fix)
    raise UserError(
        f"nothing here can run bundles for {target.name} ({'; '.join(reasons)})",
        fix=" or ".join(dict.fromkeys(fixes)) or None,
    )


def run(
    bundle: Bundle, inputs: Mapping[str, npt.NDArray[Any]], runner: str | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Execute one sample of exactly the model's shapes. Raises UserError."""
    return run_many(bundle, [inputs], runner)[0]


def run_many(
    bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]], runner: str | None = None
) -> list[dict[str, npt.NDArray[Any]]]:
    """Execute ``samples``, each of exactly the model's shapes and dtypes. Raises UserError."""
    from edgepipe.runners import _io

    chosen = pick(bundle.target, runner)
    checked = [_io.check_sample(bundle.inputs, sample) for sample in samples]
    return chosen.run_many(bundle, checked)


def run_samples(
    bundle: Bundle, inputs: Mapping[str, npt.NDArray[Any]], runner: str | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Execute inputs whose leading dimension may be longer than the model's.

    The batch is cut into samples of the model's own leading dimension, one result per output is
    put together along it. Inputs of exactly the model's shape are given to every sample. Raises
    UserError.
    """
    from edgepipe.runners import _io

    samples = _io.split(bundle.inputs, inputs)
    results = run_many(bundle, samples, runner)
    return results[0] if len(results) == 1 else _io.join(bundle.outputs, results)
