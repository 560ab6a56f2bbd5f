"""TVM's RPC: a real server on the loopback, and a tracker that hands it out."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rpc_servers import free_port, server

from edgepipe import pipeline, runners
from edgepipe.bundle import Bundle
from edgepipe.errors import EdgepipeError, UserError
from edgepipe.runners import rpc
from edgepipe.target import Target


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pipeline.compile("digits", target="host", output=tmp_path_factory.mktemp("rpc") / "b")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with server("rpc_server", log, "--no-fork") as port:
        yield f"rpc:127.0.0.1:{port}"


@pytest.mark.slow
def test_samples_and_times(bundle: Bundle, address: str) -> None:
    rng = np.random.default_rng(1)
    samples = [{"image": rng.random((1, 1, 8, 8), np.float32)} for _ in range(3)]
    found = runners.run_many(bundle, samples, address)
    expected = runners.run_many(bundle, samples, "local")
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours["logits"], theirs["logits"])
    assert not np.array_equal(found[0]["logits"], found[1]["logits"])
    timing = runners.get(address).bench(bundle, runs=7, warmup=1)
    assert timing.runs == 7
    assert 0 < timing.min_ms <= timing.p50_ms <= timing.p99_ms
    assert len(timing.round_p50_ms) == 5
    with pytest.raises(UserError, match="longer than most kernels"):
        runners.get(address).profile(bundle, 1)


@pytest.mark.slow
def test_a_program_for_another_machine_is_told(tmp_path: Path, address: str) -> None:
    other = pipeline.compile("digits", target="raspberry-pi-4", output=tmp_path / "b")
    sample = {"image": np.zeros((1, 1, 8, 8), np.float32)}
    with pytest.raises(EdgepipeError, match=r"rpc:127\.0\.0\.1.*\.so"):
        runners.run_many(other, [sample], address)


@pytest.mark.slow
def test_a_tracker_hands_out_a_board(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []  # a session that somebody still refers to is given back all the same
    loaded = rpc._Model

    def model(*arguments: Any) -> Any:
        kept.append(loaded(*arguments))
        return kept[-1]

    monkeypatch.setattr(rpc, "_Model", model)
    sample = {"image": np.ones((1, 1, 8, 8), np.float32)}
    with (
        server("rpc_tracker", tmp_path / "tracker") as tracker,
        server("rpc_server", tmp_path / "server", "--no-fork",
               f"--tracker=127.0.0.1:{tracker}", "--key=desk"),
    ):  # fmt: skip
        name = f"rpc:127.0.0.1:{tracker},key=desk,timeout=120"
        for _ in range(2):  # the first one gave it back
            found = runners.run_many(bundle, [sample], name)[0]
            assert np.array_equal(
                found["logits"], runners.run_many(bundle, [sample], "local")[0]["logits"]
            )


@pytest.mark.slow
def test_nobody_answers(bundle: Bundle) -> None:
    sample = {"image": np.zeros((1, 1, 8, 8), np.float32)}
    name = f"rpc:127.0.0.1:{free_port()},retries=0"
    with pytest.raises(UserError, match="cannot be reached"):
        runners.run_many(bundle, [sample], name)


@pytest.mark.slow
def test_a_server_that_says_nothing_is_given_up(bundle: Bundle) -> None:
    sample = {"image": np.zeros((1, 1, 8, 8), np.float32)}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        name = f"rpc:127.0.0.1:{silent.getsockname()[1]},timeout=2"
        with pytest.raises(EdgepipeError, match="no answer within 2 s"):
            runners.run_many(bundle, [sample], name)


@pytest.mark.parametrize("where", ["nowhere", "host:", "host:99999", ":9090", "host:-1"])
def test_an_address_needs_host_and_port(where: str) -> None:
    with pytest.raises(UserError, match="no HOST:PORT"):
        runners.get(f"rpc:{where}")


def test_what_it_cannot_run_is_said() -> None:
    assert not runners.get("rpc").available(Target.load("host")).ok
    assert not runners.get("rpc:h:1").available(Target.load("wasm-simd")).ok
