"""A page on which digits are drawn and classified in the browser: in float32, in 8-bit integers and
with most weights zero, side by side."""

from __future__ import annotations

import functools
import http.server
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from edgepipe import bundle_folder, pipeline
from edgepipe.bundle import Bundle
from edgepipe.errors import UserError

TARGET = "wasm-relaxed"
#: Folder, recipe, what it is called, and the data it is calibrated with.
NETWORKS = (
    ("fp32", "fp32", "float32", None),
    ("w8a8", "w8a8", "8-bit integers", "digits-train"),
    ("sparse", "fp32+60%", "float32, sparse", "digits-train"),
)
_PAGE, _LIST = "index.html", "demo.json"


def build(folder: Path, progress: Callable[[str], None] = lambda line: None) -> None:
    """Compile the networks into ``folder`` and write the page beside them.

    The folder is then a site for any static server. Raises UserError where it holds anything that
    is not the demo's.
    """
    _check(folder)
    listed = []
    for name, recipe, title, calibration in NETWORKS:
        progress(f"compiling digits, {title}")
        made = pipeline.compile(
            "digits", target=TARGET, recipe=recipe, calibration=calibration, output=folder / name
        )
        progress(f"validating {title}")
        size = _download_bytes(made)
        accuracy = made.validate(data="digits").accuracy
        listed.append({"folder": name, "recipe": recipe, "title": title, "kib": size / 1024,
                       "accuracy": accuracy, "zeros": _zeros(made)})  # fmt: skip
    page = resources.files("edgepipe.demo").joinpath(_PAGE).read_bytes()
    try:
        (folder / _PAGE).write_bytes(page)
        (folder / _LIST).write_text(json.dumps({"networks": listed}) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(folder)) from None


def server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A static server of ``folder`` on the loopback; port 0 is any. Raises UserError."""
    handler = functools.partial(_Quiet, directory=str(folder))
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} cannot be served: {error}", where="--port",
                        fix="choose another, or 0 for any") from None  # fmt: skip


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Requests are nobody's business."""


def _download_bytes(bundle: Bundle) -> int:
    files = bundle.manifest["files"]
    return sum(files[n]["bytes"] for n in ("model.mjs", "model.relaxed.wasm", "weights.bin"))


def _zeros(bundle: Bundle) -> float:
    """Share of the pruned layers' weights that are zero, in 0…1."""
    layers = (bundle.manifest.get("sparsity") or {}).get("zeros", {})
    return sum(layers.values()) / len(layers) if layers else 0.0


def _check(folder: Path) -> None:
    bundle_folder.check_writable(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError("is not a folder", where=str(folder), fix="choose another with -o")
    own = {_PAGE, _LIST, *(name for name, *_ in NETWORKS)}
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in own)
    if foreign or (any(folder.iterdir()) and not (folder / _LIST).exists()):
        what = f"holds other files ({', '.join(foreign[:3]) or 'no demo'}), so it is not replaced"
        raise UserError(what, where=str(folder), fix="choose another folder with -o")
