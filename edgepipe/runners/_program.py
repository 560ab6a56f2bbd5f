"""A bundle's bench program in a process of its own: on this machine, emulated, or in Node."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.errors import EdgepipeError, UserError
from edgepipe.runners import _io
from edgepipe.runners._base import Timing

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgepipe.bundle import Bundle

_CHUNK_BYTES = 1 << 28


def run_many(
    bundle: Bundle,
    command: Sequence[str],
    samples: Sequence[Mapping[str, npt.NDArray[Any]]],
    program: Path | None = None,
) -> list[dict[str, npt.NDArray[Any]]]:
    """Execute samples with the bench program behind ``command`` (the launcher's words).

    ``program`` is used instead of the bundle's own. One process takes as many samples as fit
    256 MB of temporary files.
    """
    results = []
    for part in chunks(bundle, samples):
        results += _run_chunk(bundle, command, part, program)
    return results


def chunks(
    bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]]
) -> Iterator[Sequence[Mapping[str, npt.NDArray[Any]]]]:
    """``samples`` in parts whose inputs and outputs have 256 MB at most."""
    size = sum(_io.tensor_bytes(t) for t in (*bundle.inputs, *bundle.outputs))
    count = max(1, _CHUNK_BYTES // max(size, 1))
    for start in range(0, len(samples), count):
        yield samples[start : start + count]


def _run_chunk(
    bundle: Bundle,
    command: Sequence[str],
    samples: Sequence[Mapping[str, npt.NDArray[Any]]],
    program: Path | None,
) -> list[dict[str, npt.NDArray[Any]]]:
    with tempfile.TemporaryDirectory(prefix="edgepipe-run-") as name:
        source, result = Path(name) / "in.bin", Path(name) / "out.bin"
        source.write_bytes(_io.to_raw(samples))
        words = ["run", str(source), str(result), str(len(samples))]
        _execute(bundle, command, words, program)
        return _io.from_raw(result.read_bytes(), bundle.outputs, len(samples))


def bench(
    bundle: Bundle, command: Sequence[str], runner: str, engine: str, runs: int, warmup: int,
    *, emulated: bool, program: Path | None = None,
) -> Timing:  # fmt: skip
    """Measure latency with the bench program and return what it printed."""
    options = ["--runs", str(runs), "--warmup", str(warmup), "--json"]
    raw = json.loads(_execute(bundle, command, options, program))
    return timing(raw, runner, engine, emulated=emulated)


def profile(
    bundle: Bundle,
    command: Sequence[str],
    engine: str,
    runs: int,
    *,
    emulated: bool,
    program: Path | None = None,
) -> dict[str, Any]:
    """What the bench program prints of its kernels, with ``engine`` and ``emulated`` added."""
    raw = json.loads(_execute(bundle, command, ["profile", str(runs)], program))
    return {"engine": engine, "emulated": emulated, **raw}


def thread_options(bundle: Bundle) -> list[str]:
    """What tells the program of a bundle with threads how many."""
    return ["--threads", str(bundle.threads)] if bundle.compiled_threads != 1 else []


def timing(raw: Mapping[str, Any], runner: str, engine: str, *, emulated: bool) -> Timing:
    """What a bench program printed as a Timing; keys that it does not know are left out."""
    given = {"runner", "engine", "emulated"}
    known = {key: raw[key] for key in raw if key in Timing.__dataclass_fields__.keys() - given}
    known["round_p50_ms"] = tuple(raw.get("round_p50_ms", ()))
    if emulated:
        known["peak_rss_bytes"] = None  # the emulator's own memory, mostly
        known["board"] = {}
    return Timing(runner=runner, engine=engine, emulated=emulated, **known)


def _execute(
    bundle: Bundle, command: Sequence[str], arguments: Sequence[str], program: Path | None = None
) -> str:
    weights = bundle.file("weights.bin")
    arguments = [*arguments, *thread_options(bundle)]
    native = bundle.target.kind != "wasm"
    if program is not None:
        arguments = [*arguments, "--weights", str(weights)]
    else:
        program = bundle.file("bench" if native else "bench.mjs")
    if not native:
        for name in bundle.manifest["files"]:  # what bench.mjs loads
            bundle.file(name)
    try:
        done = subprocess.run(
            [*command, str(program), *arguments], capture_output=True, text=True, check=False
        )
    except PermissionError:
        raise UserError(
            "is not executable", where=str(program), fix=f"chmod +x '{program}'"
        ) from None
    if done.returncode == 0:
        return done.stdout
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise EdgepipeError(f"{program.name} died of {name} {done.stderr.strip()}".rstrip())
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    if "unable to find CPU model" in last:  # what QEMU says
        target = bundle.target
        raise UserError(f"the emulator has no CPU '{target.run.qemu_cpu}'",
                        where=f"target {target.name}, run.qemu_cpu",
                        fix=f"{target.run.qemu} -cpu help lists them")  # fmt: skip
    raise EdgepipeError(f"{program.name} failed ({done.returncode}): {last}")
