"""Runs native bundles through a TVM RPC server: ``rpc:HOST:PORT``, or a board of a farm by its key.

For boards that run ``python -m tvm.exec.rpc_server`` or TVM's RPC app already: they need TVM there,
which the other runners do not. With ``key=NAME`` the address is that of a tracker, which hands out
a board that registered under this name; it is given back afterwards. Options: ``key``,
``timeout``, ``retries``. TVM's protocol has neither a login nor encryption: for networks one
trusts.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgepipe.errors import EdgepipeError, UserError
from edgepipe.runners._base import Address, Availability, Timing
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgepipe.bundle import Bundle

_CONNECT_S = 60.0
T = TypeVar("T")


def at(address: Address) -> Server:
    """The server or tracker that ``address`` names. Raises UserError."""
    address.check("rpc", ("key", "retries"))
    host, _, port = address.where.rpartition(":")
    if address.where and not (host and port.isascii() and port.isdigit() and int(port) < 65536):
        raise UserError(f"'{address.where}' is no HOST:PORT", where="--runner",
                        fix="--runner rpc:192.168.0.7:9090")  # fmt: skip
    return Server(f"rpc:{address.where}", host, int(port or 0), address.options.get("key", ""),
                  address.timeout_s, address.retries)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """The runner ``NAME``."""

    NAME: str
    host: str
    port: int
    key: str
    timeout_s: float
    retries: int

    def available(self, target: Target) -> Availability:
        """Whether there is a way to go; whether someone answers shows at the run."""
        if target.kind != "cpu":
            return Availability(False, f"it runs native bundles, not {target.kind}")
        if not self.host:
            return Availability(False, "no server was named", "--runner rpc:HOST:PORT")
        return Availability(True, self.NAME)

    def run_many(
        self, bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]]
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Execute samples on the board. Raises UserError and EdgepipeError."""

        def execute() -> list[dict[str, npt.NDArray[Any]]]:
            with self._loaded(bundle) as model:
                return [model.run(sample) for sample in samples]

        return self.within(execute)

    def bench(self, bundle: Bundle, runs: int, warmup: int) -> Timing:
        """Time inferences on the board, by the server's own clock."""
        import numpy as np

        from edgepipe import golden

        def measure() -> list[float]:
            with self._loaded(bundle) as model:
                model.write(golden.synthetic_inputs(bundle.inputs))
                for _ in range(warmup):
                    model.call()
                return model.times(runs)

        times = np.array(self.within(measure)) * 1e3
        p50, p90, p99 = np.percentile(times, [50, 90, 99], method="inverted_cdf")
        rounds = np.array_split(times, 5) if runs >= 5 else []
        return Timing(
            runner=self.NAME, engine=f"TVM RPC server {self.host}:{self.port} {self.key}".strip(),
            emulated=False, runs=runs, warmup=warmup, min_ms=float(times.min()),
            p50_ms=float(p50), p90_ms=float(p90), p99_ms=float(p99), mean_ms=float(times.mean()),
            round_p50_ms=tuple(
                float(np.percentile(part, 50, method="inverted_cdf")) for part in rounds
            ),
        )  # fmt: skip

    def profile(self, bundle: Bundle, runs: int) -> dict[str, Any]:
        """Refused: a call to the server takes longer than most kernels. Raises UserError."""
        raise UserError("a call through RPC takes longer than most kernels", where="--runner rpc",
                        fix="profile with --runner ssh:HOST or adb")  # fmt: skip

    def within(self, work: Callable[[], T]) -> T:
        """What ``work`` returns; TVM's calls have no time limit of their own."""
        found: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                found.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if errors:
            raise errors[0]
        if not found:
            raise EdgepipeError(f"{self.NAME}: no answer within {self.timeout_s:g} s")
        return found[0]

    def _session(self) -> Any:
        """A connection to the board, tried again where nobody answers."""
        from tvm import rpc

        limit = max(1, round(self.timeout_s))
        for attempt in range(1, self.retries + 2):
            try:
                if self.key:
                    tracker = rpc.connect_tracker(self.host, self.port)
                    return tracker.request(self.key, session_timeout=limit, max_retry=1)
                return rpc.connect(self.host, self.port, session_timeout=limit)
            except (OSError, RuntimeError) as error:
                last = _last_line(error)
            if attempt <= self.retries:
                time.sleep(attempt)
        what = f"cannot be reached ({attempt} attempts): {last}"
        start = "python -m tvm.exec.rpc_server --host 0.0.0.0 --port 9090"
        raise UserError(what, where=self.NAME, fix=f"on the board: {start}")

    def count(self) -> int:
        """How many boards the tracker has for the key; 1 without a tracker. Raises UserError."""
        if not self.key:
            return 1
        from tvm import rpc

        try:
            servers = rpc.connect_tracker(self.host, self.port).summary()["server_info"]
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot be reached: {_last_line(error)}", where=self.NAME) from None
        found = len([s for s in servers if s["key"] == f"server:{self.key}"])
        if not found:
            raise UserError(f"the tracker has no board '{self.key}'", where=self.NAME,
                            fix="python -m tvm.exec.query_rpc_tracker lists them")  # fmt: skip
        return found

    @contextlib.contextmanager
    def library(self, path: Path) -> Iterator[tuple[Any, Any]]:
        """The shared library ``path``, loaded on the board, and the board's CPU."""
        session = self._session()
        close = session.get_function("CloseRPCConnection")
        try:
            session.upload(str(path))
            module = session.load_module(path.name)
            session.remove(path.name)  # it is loaded: nothing needs to stay
            yield module, session.cpu(0)
        except (UserError, EdgepipeError):
            raise
        except Exception as error:  # whatever TVM raises across the connection
            raise EdgepipeError(f"{self.NAME}: {_last_line(error)}") from None
        finally:  # a board serves one client: it must not wait for our garbage collector
            with contextlib.suppress(Exception):
                close()

    @contextlib.contextmanager
    def _loaded(self, bundle: Bundle) -> Iterator[_Model]:
        """The bundle's model on the board."""
        name = f"edgepipe-{secrets.token_hex(8)}.so"
        with (
            tempfile.TemporaryDirectory(prefix="edgepipe-rpc-") as folder,
            self.library(_library(bundle, Path(folder) / name)) as (module, device),
        ):
            yield _Model(bundle, device, module, self.NAME)


def _last_line(error: Exception) -> str:
    """TVM's errors name their place first and the cause last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _library(bundle: Bundle, path: Path) -> Path:
    """The bundle's code as a library that a TVM server can load."""
    from edgepipe.codegen import link

    files = {name: bundle.file(name).read_bytes() for name in ("model.a", "model.h")}
    counts = len(bundle.inputs), len(bundle.outputs)
    path.write_bytes(link.rpc(bundle.target, files, bundle.prefix, counts))
    return path


class _Model:
    """Buffers on the board, and the two functions that take them."""

    def __init__(self, bundle: Bundle, device: Any, module: Any, name: str) -> None:
        import numpy as np
        from tvm import runtime

        self.bundle, self.module, self.name = bundle, module, name
        self.device = device
        weights = np.fromfile(bundle.file("weights.bin"), np.uint8)
        self.weights = runtime.tensor(weights, self.device)
        arena = bundle.manifest["memory"]["arena_bytes"]
        self.arena = runtime.empty((arena,), "uint8", self.device)
        self.inputs = [runtime.empty(t.shape, t.dtype, self.device) for t in bundle.inputs]
        self.outputs = [runtime.empty(t.shape, t.dtype, self.device) for t in bundle.outputs]
        self.function = module["edgepipe_run"]
        self._check("init", module["edgepipe_init"](self.weights, weights.size))

    def run(self, sample: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        self.write(sample)
        self.call()
        pairs = zip(self.bundle.outputs, self.outputs, strict=True)
        return {spec.name: tensor.numpy() for spec, tensor in pairs}

    def write(self, sample: Mapping[str, npt.NDArray[Any]]) -> None:
        import numpy as np

        for spec, tensor in zip(self.bundle.inputs, self.inputs, strict=True):
            tensor.copyfrom(np.ascontiguousarray(sample[spec.name]))

    def call(self) -> None:
        self._check("run", self.function(self.arena, *self.inputs, *self.outputs))

    def times(self, runs: int) -> list[float]:
        """Seconds of ``runs`` inferences."""
        timer = self.module.time_evaluator("edgepipe_run", self.device, number=1, repeat=runs)
        return list(timer(self.arena, *self.inputs, *self.outputs).results)

    def _check(self, function: str, status: int) -> None:
        if status != 0:
            raise EdgepipeError(f"{self.name}: {function} failed with error {status}")
