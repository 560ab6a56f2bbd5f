"""TVM's RPC servers and trackers on the loopback."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

#: A server that is forgotten ends itself.
LONGEST_S = 900


def free_port() -> int:
    """A port that nobody has, from below the range that outgoing connections take theirs from."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextlib.contextmanager
def server(module: str, log: Path, *options: str) -> Iterator[int]:
    """The port of a server of TVM's; its whole group is ended afterwards."""
    for _ in range(3):  # another process may have taken the port meanwhile
        port = free_port()
        words = ["timeout", str(LONGEST_S), sys.executable, "-m", f"tvm.exec.{module}"]
        words += ["--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1)]
        with log.open("w") as stream:
            started = subprocess.Popen(
                [*words, *options], stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            if answers(port, started):
                yield port
                return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    pytest.fail(f"{module} does not listen: {log.read_text()}")


def answers(port: int, started: subprocess.Popen[bytes]) -> bool:
    """Whether somebody listens on ``port`` before ``started`` ends or a minute has passed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and started.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.1)
    return False
