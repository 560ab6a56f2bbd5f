"""A page on the loopback, served to one browser that this process starts and ends.

The page fetches what it needs and posts back what came of it, so nothing but the browser itself is
needed to drive it. Any browser that can be started with an address will do.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from edgepipe.errors import EdgepipeError, UserError

#: Programs to look for, the preferred one first, and the family of their options.
BROWSERS = {
    "chromium": "chromium", "chromium-browser": "chromium", "google-chrome": "chromium",
    "google-chrome-stable": "chromium", "chrome": "chromium", "microsoft-edge": "chromium",
    "brave-browser": "chromium", "firefox": "firefox", "firefox-esr": "firefox",
}  # fmt: skip
INSTALL = "apt-get install chromium"

_TYPES = {
    ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm",
    ".html": "text/html; charset=utf-8", ".json": "application/json",
}  # fmt: skip
_CHROMIUM = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--disable-background-timer-throttling", "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)  # fmt: skip


def find(name: str = "") -> str | None:
    """Path of the browser ``name`` (a program or its path), or of the first there is."""
    return next(filter(None, map(shutil.which, (name,) if name else BROWSERS)), None)


def command(program: str, profile: Path, url: str) -> list[str]:
    """How to start ``program`` without a window at ``url``."""
    if "firefox" in Path(program).name:
        return [program, "--headless", "--no-remote", "--profile", str(profile), url]
    # Chromium's sandbox refuses root, as in most containers; the page is our own.
    root = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
    return [program, *_CHROMIUM, *root, f"--user-data-dir={profile}", url]


def exchange(
    program: str, files: Mapping[str, bytes], folders: Mapping[str, Path], timeout_s: float
) -> bytes:
    """Serve ``files`` and ``folders`` by name, open ``index.html`` and return what it posts.

    Raises EdgepipeError where the page posts an error, the browser ends, or nothing was asked for
    and posted for ``timeout_s``; UserError where the browser cannot be started. The browser and its
    profile are gone afterwards.
    """
    with _serve(files, folders) as (url, events), _browser(program, url) as process:
        while True:
            event, data = _next(events, process, timeout_s)
            if event == "result":
                return data
            if event == "error":
                text = data.decode("utf-8", "replace").strip()
                raise EdgepipeError(f"the page failed in {Path(program).name}: {text}")


def _next(
    events: queue.Queue[tuple[str, bytes]], process: subprocess.Popen[bytes], timeout_s: float
) -> tuple[str, bytes]:
    waited = 0.0
    while waited < timeout_s:
        step = min(0.5, timeout_s - waited)
        with contextlib.suppress(queue.Empty):
            return events.get(timeout=step)
        waited += step
        if process.poll() is not None:
            with contextlib.suppress(queue.Empty):
                return events.get_nowait()
            raise UserError(
                f"the browser ended ({process.returncode}) before the page was done",
                fix="try another runner, such as node",
            )
    raise EdgepipeError(f"no sign of life from the browser within {timeout_s:g} s")


@contextlib.contextmanager
def _browser(program: str, url: str) -> Iterator[subprocess.Popen[bytes]]:
    with tempfile.TemporaryDirectory(
        prefix="edgepipe-browser-", ignore_cleanup_errors=True
    ) as folder:
        try:
            process = subprocess.Popen(
                command(program, Path(folder), url),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(
                f"cannot be started: {error.strerror}", where=program, fix=INSTALL
            ) from None
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, number)  # helpers too
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that the browser cut as it ended is no error."""


@contextlib.contextmanager
def _serve(
    files: Mapping[str, bytes], folders: Mapping[str, Path]
) -> Iterator[tuple[str, queue.Queue[tuple[str, bytes]]]]:
    events: queue.Queue[tuple[str, bytes]] = queue.Queue()
    prefix = f"/{secrets.token_urlsafe(12)}/"  # other users of this machine do not know it

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            data = self._find()
            events.put(("asked", b""))
            self._answer(200 if data is not None else 404, data or b"")

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not self.path.startswith(prefix):
                return self._answer(404, b"")
            self._answer(204, b"")
            events.put((self.path.removeprefix(prefix), data))

        def _find(self) -> bytes | None:
            name = self.path.partition("?")[0].removeprefix(prefix)
            if not self.path.startswith(prefix) or ".." in name:
                return None
            if name in files:
                return files[name]
            folder, _, rest = name.partition("/")
            path = folders[folder] / rest if folder in folders else None
            return path.read_bytes() if path and path.is_file() else None

        def _answer(self, status: int, data: bytes) -> None:
            self.send_response(status)
            # With these a page may use threads, and has a clock fine enough to measure with.
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.send_header("Cache-Control", "no-store")
            suffix = Path(self.path.partition("?")[0]).suffix
            self.send_header("Content-Type", _TYPES.get(suffix, "application/octet-stream"))
            if status != 204:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}{prefix}index.html", events
        finally:
            server.shutdown()
