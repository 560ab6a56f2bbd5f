"""A bundle's bench program on a board: copied there, run, removed, through any remote shell.

Only a POSIX shell is asked of the board. Samples and outputs stream through the program's standard
input and output, so the board's disk holds the program and the weights alone. Every command may be
given twice, so one whose connection broke is tried again.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from edgepipe.errors import EdgepipeError, UserError
from edgepipe.runners import _io, _program
from edgepipe.runners._base import Availability, Timing
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgepipe.bundle import Bundle

_MACHINES = {"armv7l": "arm", "armv8l": "arm", "amd64": "x86_64", "arm64": "aarch64"}
_SETUP_TIMEOUT_S = 60.0
#: How OpenSSH and adb put it that the other side went away or is not there for the moment. A key
#: that is refused or a name that does not exist stays so.
_BROKEN = re.compile(
    "closed|reset by|refused|timed out|no route|unreachable|not responding|broken pipe"
    "|temporary failure|offline|protocol fault",
    re.IGNORECASE,
)
#: Ends what an earlier try of ours left running: the group, launcher included.
_KILL = "p=$(cat pid 2>/dev/null) && { kill -9 -$p || kill -9 $p; } 2>/dev/null"


@dataclass(frozen=True)
class Board:
    """The runner ``NAME``: ``words`` start a shell command there, given as one more word.

    ``package`` brings the first of the words. ``folder`` is where files go on the board,
    ``launcher`` what is put before the program (an emulator, ``taskset``, ``nice``). Where
    ``missing`` says what must be named first, nothing can be run.
    """

    NAME: str
    words: tuple[str, ...]
    package: str
    folder: str
    launcher: str
    timeout_s: float
    retries: int
    missing: str = ""

    def available(self, target: Target) -> Availability:
        """Whether the way there is installed and named; whether it answers shows at the run."""
        if target.kind not in ("cpu", "cuda"):
            return Availability(False, f"it runs native bundles, not {target.kind}")
        if shutil.which(self.words[0]) is None:
            fix = f"apt-get install {self.package}"
            return Availability(False, f"{self.words[0]} is not installed", fix)
        if self.missing:
            return Availability(False, "no board was named", self.missing)
        return Availability(True, self.NAME)

    def run_many(
        self, bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]]
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Execute samples in one process on the board. Raises UserError and EdgepipeError."""
        results = []
        with self._copied(bundle) as (folder, _):
            for part in _program.chunks(bundle, samples):
                command = self._bench(bundle, folder, "run", "-", "-", str(len(part)))
                data = self._call(command, _io.to_raw(part), self.timeout_s)
                results += _io.from_raw(data, bundle.outputs, len(part))
        return results

    def bench(self, bundle: Bundle, runs: int, warmup: int) -> Timing:
        """Time inferences on the board; emulated where its machine is not the target's."""
        with self._copied(bundle) as (folder, machine):
            options = ["--runs", str(runs), "--warmup", str(warmup), "--json"]
            data = self._call(self._bench(bundle, folder, *options), b"", self.timeout_s)
        return _program.timing(json.loads(data), self.NAME, f"{self.NAME} ({machine})",
                               emulated=_emulated(bundle, machine))  # fmt: skip

    def profile(self, bundle: Bundle, runs: int) -> dict[str, Any]:
        """Time each kernel on the board."""
        with self._copied(bundle) as (folder, machine):
            data = self._call(
                self._bench(bundle, folder, "profile", str(runs)), b"", self.timeout_s
            )
        engine, emulated = f"{self.NAME} ({machine})", _emulated(bundle, machine)
        return {"engine": engine, "emulated": emulated, **json.loads(data)}

    def _bench(self, bundle: Bundle, folder: str, *arguments: str) -> str:
        limit = str(max(1, math.ceil(self.timeout_s)))  # a program that hangs must end itself
        words = shlex.join(
            ["./bench", *arguments, *_program.thread_options(bundle), "--limit", limit]
        )
        # No exec: a shell tells the signal that ended the program, ssh does not.
        run = f"{self.launcher} {words}; s=$?; rm -f pid; exit $s"
        return f"cd {shlex.quote(folder)} || exit; {_KILL}; echo $$ > pid && {run}"

    @contextlib.contextmanager
    def _copied(self, bundle: Bundle) -> Iterator[tuple[str, str]]:
        """The folder on the board with program and weights, and the board's machine."""
        files = [bundle.file(name) for name in ("weights.bin", "bench")]
        # A name that nobody guesses, known here before the board answers: where the answer is lost,
        # the folder is found again, or removed.
        folder = f"{self.folder}/edgepipe-{secrets.token_hex(8)}"
        try:
            machine = self._make(folder)
            for path in files:
                target = shlex.quote(f"{folder}/{path.name}")
                command = f"cat > {target} && chmod 700 {target}"
                self._call(command, path.read_bytes(), self.timeout_s)
            yield folder, _MACHINES.get(machine, machine)
        finally:
            self._remove(folder)

    def _make(self, folder: str) -> str:
        """Make the folder; returns the board's machine."""
        d = shlex.quote(folder)
        command = f"uname -m; umask 077; test -d {d} || mkdir {d}"
        try:
            made = self._call(command, b"", min(self.timeout_s, _SETUP_TIMEOUT_S))
        except UserError:
            raise
        except EdgepipeError as error:
            raise UserError(str(error), where=self.folder, fix=self._check()) from None
        return made.decode("utf-8", "replace").strip()

    def _remove(self, folder: str) -> None:
        # A board that is gone cannot be cleaned; the error that told so is worth more.
        with contextlib.suppress(UserError, EdgepipeError):
            d = shlex.quote(folder)
            command = f"test -d {d} || exit 0; (cd {d} && {_KILL}); rm -rf {d}"
            self._call(command, b"", min(self.timeout_s, 20.0))

    def _call(self, command: str, data: bytes, timeout_s: float) -> bytes:
        """What ``command`` printed, given ``data``; tried again where the connection broke."""
        for attempt in range(1, self.retries + 2):
            code, output, text = self._once(command, data, timeout_s)
            if not _broke(code, text) or attempt > self.retries:
                break
            time.sleep(attempt)
        if code:
            self._fail(code, text, attempt)
        return output

    def _once(self, command: str, data: bytes, timeout_s: float) -> tuple[int, bytes, str]:
        try:
            process = subprocess.Popen(
                [*self.words, command],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"cannot be run: {error.strerror}", where=self.words[0]) from None
        try:
            output, text = _talk(process, data, timeout_s)
        except TimeoutError:
            raise EdgepipeError(f"{self.NAME}: no sign of life within {timeout_s:g} s") from None
        finally:
            process.kill()
            process.wait()
        return process.returncode, output, text.decode("utf-8", "replace")

    def _fail(self, code: int, text: str, attempts: int) -> None:
        last = _last_line(text) or "no message"
        if "No space left" in text:
            fix = f"another folder there: --runner {self.NAME},dir=/path"
            raise UserError(f"the disk of {self.NAME} is full", where=self.folder, fix=fix)
        if code == 128 + signal.SIGALRM:
            raise EdgepipeError(f"{self.NAME}: the program hung and was ended")
        if code == 255 or _broke(code, text):
            tried = f" ({attempts} attempts)" if attempts > 1 else ""
            what = f"cannot be reached, or the connection broke{tried}: {last}"
            raise UserError(what, where=self.NAME, fix=self._check())
        raise EdgepipeError(f"{self.NAME}: failed ({code}): {last}")

    def _check(self) -> str:
        return f"try '{shlex.join(self.words)} true'"


def _emulated(bundle: Bundle, machine: str) -> bool:
    arch = bundle.target.arch
    return machine != arch and (arch, machine) != ("arm", "aarch64")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _broke(code: int, text: str) -> bool:
    """Whether a command ended because the connection did: ssh says 255, adb 1 and who it is."""
    last = _last_line(text)
    own = code == 255 or (code == 1 and last.startswith(("error: ", "adb: ")))
    return own and (not last or _BROKEN.search(last) is not None)


def _talk(process: subprocess.Popen[bytes], data: bytes, timeout_s: float) -> tuple[bytes, bytes]:
    """Write ``data``, read both streams; TimeoutError where nothing moves for ``timeout_s``."""
    assert process.stdin and process.stdout and process.stderr
    moved = [time.monotonic()]
    output, errors = bytearray(), bytearray()

    def write(stream: IO[bytes]) -> None:
        with contextlib.suppress(OSError):  # the program ended: its exit code says why
            for start in range(0, len(data), 65536):
                stream.write(data[start : start + 65536])
                stream.flush()
                moved[0] = time.monotonic()
        with contextlib.suppress(OSError):
            stream.close()

    def read(stream: IO[bytes], into: bytearray) -> None:
        while part := stream.read1(65536):  # type: ignore[attr-defined]
            into += part
            moved[0] = time.monotonic()

    threads = [
        threading.Thread(target=write, args=(process.stdin,), daemon=True),
        threading.Thread(target=read, args=(process.stdout, output), daemon=True),
        threading.Thread(target=read, args=(process.stderr, errors), daemon=True),
    ]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads[1:]) or process.poll() is None:
        if time.monotonic() - moved[0] > timeout_s:
            raise TimeoutError
        time.sleep(0.01)
    return bytes(output), bytes(errors)
