"""What every test may use, and the rule that CI skips nothing it must have."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_folder() -> Path | None:
    """The folder of trained networks outside the repository; None where there is none."""
    named = os.environ.get("EDGEPIPE_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    return folder if (folder / "models").is_dir() else None


def _has_module(name: str) -> Callable[[], str | None]:
    return lambda: None if importlib.util.find_spec(name) else f"{name} is not installed"


def _has_program(*names: str) -> Callable[[], str | None]:
    return lambda: None if any(map(shutil.which, names)) else f"{names[0]} is not installed"


def _has_shared() -> str | None:
    return None if shared_folder() else "no trained networks: set EDGEPIPE_SHARED to their folder"


def _has_browser() -> str | None:
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{missing[0]} is not installed" if missing else None


def _has_sshd() -> str | None:
    there = shutil.which("sshd") or Path("/usr/sbin/sshd").exists()
    return None if there and shutil.which("ssh-keygen") else "openssh-server is not installed"


def _has_buildah() -> str | None:
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    return None if os.geteuid() == 0 else "images without a daemon are built by root"


def _has_cuda_toolkit() -> str | None:
    found = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cuda_nvrtc")
    return None if found else "NVIDIA's wheels are not installed: pip install 'edgepipe[cuda]'"


def _has_ncnn() -> str | None:
    missing = [name for name in ("ncnn", "pnnx") if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else None


def _has_aarch64_libc() -> str | None:
    there = Path("/usr/aarch64-linux-gnu/lib/ld-linux-aarch64.so.1").exists()
    emulated = shutil.which("qemu-aarch64-static") is not None
    return None if there and emulated else "libc6-arm64-cross or qemu-user-static is not installed"


def _has_qemu_plugins() -> str | None:
    program = shutil.which("qemu-aarch64")
    words = [program or "false", "-help"]
    said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    return None if "-plugin" in said else "qemu-user, which takes plugins, is not installed"


#: Marker → probe that returns why the capability is missing, or None. Probes never raise.
PROBES: dict[str, Callable[[], str | None]] = {
    "needs_qemu": _has_program("qemu-aarch64-static", "qemu-aarch64"),
    "needs_qemu_plugins": _has_qemu_plugins,
    "needs_node": _has_program("node"),
    "needs_wasmtime": _has_module("wasmtime"),
    "needs_browser": _has_browser,
    "needs_sshd": _has_sshd,
    "needs_buildah": _has_buildah,
    "needs_torch": _has_module("torch"),
    "needs_atheris": _has_module("atheris"),
    "needs_litert": _has_module("ai_edge_litert"),
    "needs_openvino": _has_module("openvino"),
    "needs_ncnn": _has_ncnn,
    "needs_cuda_toolkit": _has_cuda_toolkit,
    "needs_aarch64_libc": _has_aarch64_libc,
    "needs_shared": _has_shared,
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, saying why, where a marked capability is missing."""
    for marker, probe in PROBES.items():
        if item.get_closest_marker(marker) and (reason := probe()):
            pytest.skip(reason)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """EDGEPIPE_SHARED=none says that the trained networks are knowingly absent."""
    if os.environ.get("EDGEPIPE_SHARED") == "none":
        absent = [item for item in items if item.get_closest_marker("needs_shared")]
        config.hook.pytest_deselected(items=absent)
        items[:] = [item for item in items if item not in absent]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, None, None]:
    """In CI a skip is a failure, unless the test is marked ``may_skip``."""
    outcome = yield
    report = outcome.get_result()
    if not hasattr(report, "wasxfail") and not item.get_closest_marker("may_skip"):
        _fail_if_skipped(report)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, None, None]:
    """The same for a module that skips itself as a whole."""
    outcome = yield
    _fail_if_skipped(outcome.get_result())


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = str(report.longrepr)
    if os.environ.get("CI") == "true" and report.skipped and not _knowingly_absent(reason):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where it must run: {reason}"


def _knowingly_absent(reason: str) -> bool:
    return os.environ.get("EDGEPIPE_SHARED") == "none" and "EDGEPIPE_SHARED" in reason


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of the trained networks; for tests marked ``needs_shared``."""
    folder = shared_folder()
    assert folder is not None
    return folder / "models"


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return ROOT
