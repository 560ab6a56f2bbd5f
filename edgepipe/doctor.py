"""What this machine can build and run, and the command that adds what is missing."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from edgepipe import runners
from edgepipe.errors import UserError
from edgepipe.target import Target, target_names


@dataclass(frozen=True)
class Check:
    """One capability. ``fix`` is the exact command that would add it, "" where none is needed."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def checks() -> list[Check]:
    """Check zig, the packages that compile, torch for models, NVRTC for GPUs, every runner."""
    return [
        _zig(),
        _package("apache-tvm", "tvm", "the compiler", "pip install apache-tvm==0.27.0.post1"),
        _package("onnxruntime", "onnxruntime", "the float reference", "pip install onnxruntime"),
        _package("torch", "torch", "torch models as input", "pip install 'edgepipe[torch]'"),
        _cuda(),
        *_runners(),
    ]


def _zig() -> Check:
    from edgepipe.codegen import link

    try:
        program = link.zig_program()
    except UserError as error:
        return Check("zig", False, error.what, error.fix or "")
    return Check("zig", True, f"{version('ziglang')} ({program})")


def _cuda() -> Check:
    from edgepipe.codegen.cuda import toolkit

    try:
        known = toolkit.architectures()
    except UserError as error:
        return Check("nvrtc", False, f"{error.what} (GPU targets)", error.fix or "")
    return Check("nvrtc", True, f"sm_{known[0]} to sm_{known[-1]} (GPU targets)")


def _package(distribution: str, module: str, purpose: str, fix: str) -> Check:
    if importlib.util.find_spec(module) is None:
        return Check(module, False, f"not installed ({purpose})", fix)
    try:
        return Check(module, True, f"{version(distribution)} ({purpose})")
    except PackageNotFoundError:
        return Check(module, True, f"installed ({purpose})")


def _runners() -> list[Check]:
    """One check per runner and what it needs: qemu is one program per architecture."""
    found: dict[tuple[str, str], tuple[Check, list[str]]] = {}
    for target in _targets():
        for name in runners.candidates(target):
            if name == "local" and "local" not in target.run.runners:
                continue  # only worth a line on the device itself
            key = (name, target.run.qemu if name == "qemu" else "")
            state = runners.get(name).available(target)
            label = f"runner {name}" + (f" ({target.run.qemu})" if key[1] else "")
            check, names = found.setdefault(
                key, (Check(label, state.ok, state.reason, state.fix), [])
            )
            names.append(target.name)
            if state.ok and not check.ok:
                found[key] = (Check(label, True, state.reason), names)
    return [
        Check(check.name, check.ok, f"{check.detail}; for {', '.join(names)}", check.fix)
        for check, names in found.values()
    ]


def _targets() -> list[Target]:
    targets = []
    for name in target_names():
        try:
            targets.append(Target.load(name))
        except UserError:
            continue  # 'host' on a machine it does not know
    return targets
