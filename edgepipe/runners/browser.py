"""Runs wasm bundles in a browser without a window: ``browser``, ``browser:firefox``.

A page on the loopback imports the bundle's own modules, as a user's page does. What is measured
is therefore what visitors get. Chromium, Chrome, Edge and Firefox are found by their names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.errors import EdgepipeError
from edgepipe.runners import _io, _page, _program
from edgepipe.runners._base import Address, Availability, Timing
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgepipe.bundle import Bundle

_PAGE = (
    b'<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">'
    b'<script type="module" src="browser.mjs"></script>'
)


@dataclass(frozen=True)
class Browser:
    """One browser. ``program`` is its name or path, "" the first one found."""

    NAME: str
    program: str
    timeout_s: float

    def available(self, target: Target) -> Availability:
        """Whether the browser is installed."""
        if target.kind != "wasm":
            return Availability(False, f"it runs wasm bundles, not {target.kind}")
        if found := _page.find(self.program):
            return Availability(True, found)
        missing = self.program or "no browser"
        return Availability(False, f"{missing} is not installed", _page.INSTALL)

    def run_many(
        self, bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]]
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Execute samples in one page per 256 MB of tensors."""
        results = []
        for part in _program.chunks(bundle, samples):
            files = {"inputs.bin": _io.to_raw(part)}
            data = self._exchange(bundle, {"samples": len(part)}, files)
            results += _io.from_raw(data, bundle.outputs, len(part))
        return results

    def bench(self, bundle: Bundle, runs: int, warmup: int) -> Timing:
        """Time inferences in the page. The first calls run baseline code: warm up well."""
        raw = json.loads(self._exchange(bundle, {"runs": runs, "warmup": warmup}, {}))
        return _program.timing(raw, self.NAME, str(raw["engine"]), emulated=False)

    def profile(self, bundle: Bundle, runs: int) -> dict[str, Any]:
        """Time each kernel in the page."""
        raw = json.loads(self._exchange(bundle, {"profile": runs}, {}))
        return {"emulated": False, **raw}

    def first_ms(self, bundle: Bundle) -> float:
        """From a bundle's bytes in memory to its first result, in a page of its own: what a visitor
        waits for behind the download."""
        names = [n for n in bundle.manifest["files"] if n.endswith((".wasm", "weights.bin"))]
        return float(json.loads(self._exchange(bundle, {"first": names}, {}))["first_ms"])

    def _exchange(self, bundle: Bundle, job: dict[str, Any], files: dict[str, bytes]) -> bytes:
        bundle.verify()
        bundle.file("measure.mjs")
        files["index.html"] = _PAGE
        files["browser.mjs"] = Path(__file__).with_suffix(".mjs").read_bytes()
        files["job.json"] = json.dumps(job).encode()
        program = _page.find(self.program)
        if program is None:
            raise EdgepipeError(f"{self.program or 'the browser'} is gone")
        return _page.exchange(program, files, {"bundle": bundle.path}, self.timeout_s)


def at(address: Address) -> Browser:
    """The browser that ``address`` names, by default the first one found. Raises UserError."""
    address.check("browser", ())
    name = f"browser:{address.where}" if address.where else "browser"
    return Browser(name, address.where, address.timeout_s)
