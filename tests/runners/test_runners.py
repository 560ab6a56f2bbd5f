"""Every runner gives the right answer, times it, and says when it cannot."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import handmade
import numpy as np
import pytest

from edgepipe import doctor, runners
from edgepipe.bundle import Bundle
from edgepipe.codegen.plan import Call, Place, TensorSpec
from edgepipe.errors import EdgepipeError, UserError
from edgepipe.runners import _io, local, node, qemu
from edgepipe.target import Target

Made = Callable[[str], Bundle]
X, N, Y, TWICE = handmade.NAMES

CASES = [
    pytest.param("host", "local"),
    pytest.param("x86-64-v3", "local"),
    pytest.param("raspberry-pi-4", "qemu", marks=pytest.mark.needs_qemu),
    pytest.param("raspberry-pi-5", "qemu", marks=pytest.mark.needs_qemu),
    pytest.param("raspberry-pi-3-32", "qemu", marks=pytest.mark.needs_qemu),
    pytest.param("jetson-tx2-cpu", "qemu", marks=pytest.mark.needs_qemu),
    pytest.param("android-arm64", "qemu", marks=pytest.mark.needs_qemu),
    pytest.param("wasm-simd", "wasmtime", marks=pytest.mark.needs_wasmtime),
    pytest.param("wasm-relaxed", "wasmtime", marks=pytest.mark.needs_wasmtime),
    pytest.param("wasm-simd", "node", marks=pytest.mark.needs_node),
    pytest.param("wasm-relaxed", "node", marks=pytest.mark.needs_node),
    pytest.param("wasm-relaxed", "browser", marks=pytest.mark.needs_browser),
]


@pytest.mark.parametrize(("target", "runner"), CASES)
def test_samples_run_one_by_one(made: Made, target: str, runner: str) -> None:
    random = np.random.default_rng(3)
    inputs = {
        X: random.standard_normal((4, handmade.COUNT)).astype(np.float32),
        N: np.array(2**40 - 1),
    }
    got = made(target).run(inputs, runner)
    assert got[Y].shape == (4, handmade.COUNT) and got[Y].dtype == np.float32
    assert got[TWICE].tolist() == [2**41 - 2] * 4
    exact = handmade.expected(inputs)[Y]
    assert np.allclose(got[Y], exact, rtol=1e-6, atol=1e-6)
    # Positive control: the samples are not mixed up.
    assert not np.allclose(got[Y][::-1], exact, rtol=1e-2, atol=1e-2)


def test_buffers_without_elements_are_aligned_too() -> None:
    arrays = [_io.aligned(shape, "float32") for shape in ((20, 0, 5), (3,), (0,)) * 20]
    assert not any(a.ctypes.data % 64 for a in arrays)


@pytest.mark.parametrize(("target", "runner"), CASES)
def test_timing(made: Made, target: str, runner: str) -> None:
    timing = runners.get(runner).bench(made(target), runs=7, warmup=2)
    assert (timing.runner, timing.warmup) == (runner, 2)
    # A coarse clock reads several inferences at a time.
    assert timing.runs == 7 or (timing.inferences_per_timing > 1 and timing.runs > 7)
    assert 0 < timing.min_ms <= timing.p50_ms <= timing.p90_ms <= timing.p99_ms < 1000
    assert timing.min_ms <= timing.mean_ms <= timing.p99_ms
    assert timing.emulated == (runner == "qemu")
    assert timing.engine
    if runner in ("node", "wasmtime", "browser"):
        assert timing.variant == ("relaxed" if target == "wasm-relaxed" else "simd")
    if runner in ("local", "node"):
        assert timing.peak_rss_bytes and timing.peak_rss_bytes > 50_000


@pytest.mark.parametrize(("target", "runner"), CASES)
def test_golden_outputs(made: Made, target: str, runner: str) -> None:
    inputs, outputs = made(target).golden()
    got = made(target).run(inputs, runner)
    assert np.allclose(got[Y], outputs[Y], rtol=1e-6, atol=1e-6)
    assert got[TWICE] == outputs[TWICE]


def test_the_first_available_runner_is_picked(made: Made) -> None:
    assert runners.pick(Target.load("host")).NAME == "local"
    picked = runners.pick(Target.load("wasm-simd")).NAME
    assert picked == ("node" if node.available(Target.load("wasm-simd")).ok else "wasmtime")


def test_native_bundles_run_natively_where_the_machine_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(local, "_cpu_flags", lambda: {"fp", "asimd"})
    assert runners.pick(Target.load("raspberry-pi-4")).NAME == "local"
    assert not local.available(Target.load("raspberry-pi-5")).ok  # no dot product
    monkeypatch.setattr(local, "_cpu_flags", lambda: {"fp", "asimd", "asimddp", "atomics"})
    assert local.available(Target.load("raspberry-pi-5")).ok


def test_an_old_cpu_is_not_given_new_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(local, "_cpu_flags", lambda: {"sse2", "avx"})
    state = local.available(Target.load("x86-64-v3"))
    assert not state.ok and "avx2" in state.reason


def test_a_missing_emulator_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu.shutil, "which", lambda name: None)
    target = Target.load("raspberry-pi-4")
    with pytest.raises(UserError, match="apt-get install qemu-user-static"):
        runners.pick(target, "qemu")
    if platform.machine() == "x86_64":
        with pytest.raises(UserError, match="local: this machine is x86_64"):
            runners.pick(target)


def test_unknown_and_unfit_runners(made: Made) -> None:
    with pytest.raises(UserError, match="did you mean 'wasmtime'"):
        runners.pick(Target.load("wasm-simd"), "wasmtim")
    with pytest.raises(UserError, match="it runs native bundles"):
        made("wasm-simd").run(handmade.inputs(), "local")
    assert not any(name.startswith("_") for name in runners.names())


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("output", lambda tensors: tensors.clear()),
        ("output", lambda tensors: tensors.pop()),
        ("output", lambda tensors: tensors[0].update(shape=[1])),
        ("output", lambda tensors: tensors[0].update(dtype="int8")),
        ("input", lambda tensors: tensors[0].update(shape=[2, 2])),
    ],
)
def test_a_manifest_of_other_tensors_is_refused(
    made: Made, kind: str, change: Callable[[list[dict[str, object]]], None], tmp_path: Path
) -> None:
    """The code would read or write behind the buffers."""
    shutil.copytree(made("host").path, tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text(encoding="utf-8"))
    change(manifest[f"{kind}s"])
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    bundle = Bundle.open(tmp_path / "b")
    inputs = {t.name: np.zeros(t.shape, t.dtype) for t in bundle.inputs}
    with pytest.raises(UserError, match=f"its manifest names other {kind}s than its code has"):
        bundle.run(inputs, "local")


@pytest.mark.needs_qemu
def test_a_cpu_that_the_emulator_does_not_have(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, command = made("raspberry-pi-4"), qemu.command
    inputs, _ = bundle.golden()
    monkeypatch.setattr(qemu, "command", lambda target: [*command(target), "-cpu", "w8a16"])
    with pytest.raises(UserError, match="the emulator has no CPU"):
        bundle.run(inputs, "qemu")


@pytest.mark.slow
@pytest.mark.needs_qemu
def test_the_emulated_cpu_refuses_what_it_lacks(tmp_path: Path) -> None:
    """A dot product instruction is SIGILL on the Cortex-A72 and runs on the A76."""
    text = (
        "#include <arm_neon.h>\n"
        "void model_k(void *x, void *y) { vst1q_s32(y, vdotq_s32(vdupq_n_s32(0),"
        " vld1q_s8(x), vld1q_s8(x))); }"
    )
    plan = dataclasses.replace(
        handmade.plan(),
        inputs=(TensorSpec("x", (16,), "int8"),),
        outputs=(TensorSpec("y", (4,), "int32"),),
        calls=(Call("model_k", (Place("input"), Place("output")), "k"),),
    )
    kernels = {"": handmade.compile_c(Target.load("raspberry-pi-5"), text)}
    inputs = {"x": np.arange(16, dtype=np.int8)}
    exact = (np.arange(16) ** 2).reshape(4, 4).sum(1)
    for name in ("raspberry-pi-5", "raspberry-pi-4"):
        target = Target.load(name)
        context = handmade.context(target)
        made = handmade.write(tmp_path / name, handmade.source(), plan, kernels, context, "model")
        if name == "raspberry-pi-5":
            assert np.array_equal(made.run(inputs)["y"], exact)
        else:
            with pytest.raises(EdgepipeError, match="SIGILL"):
                made.run(inputs, "qemu")


@pytest.mark.slow
def test_a_bundle_compiled_anew_runs_the_new_code(tmp_path: Path) -> None:
    """The old library must not stay loaded under the same path."""
    host = Target.load("host")
    context = handmade.context(host)
    x = {X: np.ones((1, handmade.COUNT), np.float32), N: np.array(1)}
    kernels = handmade.objects(host)
    for seed in (7, 8):
        made = handmade.write(
            tmp_path / "b", handmade.source(seed), handmade.plan(seed=seed), kernels, context,
            "model",
        )  # fmt: skip
        assert np.allclose(made.run(x)[Y], handmade.expected(x, seed)[Y])


def test_a_changed_bundle_is_not_run(made: Made, tmp_path: Path) -> None:
    host = Target.load("host")
    changed = handmade.write(
        tmp_path / "b", handmade.source(), handmade.plan(), handmade.objects(host),
        handmade.context(host), "model",
    )  # fmt: skip
    path = tmp_path / "b" / "weights.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="changed"):
        Bundle.open(changed.path).run(handmade.inputs())


def test_bench_program_refuses_wrong_weights_and_use(made: Made, tmp_path: Path) -> None:
    program = str(made("host").file("bench"))
    wrong = tmp_path / "weights.bin"
    data = bytearray(made("host").file("weights.bin").read_bytes())
    data[9] ^= 1  # the hash
    wrong.write_bytes(data)
    cases = {
        ("--weights", str(wrong)): "does not belong",
        ("--weights", str(tmp_path / "no")): "cannot open",
        ("run", "a", "b"): "use:",
        ("--runs", "x"): "whole number",
        ("--runs",): "whole number",
        ("--what",): "unknown option",
        ("run", str(tmp_path / "no"), str(tmp_path / "out"), "1"): "cannot open",
    }
    for arguments, message in cases.items():
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2, arguments
        assert message in done.stderr
    assert subprocess.run([program, "repeat", "3"], check=True, capture_output=True).stdout == b""
    done = subprocess.run([program], check=True, capture_output=True, text=True)
    assert "median" in done.stdout


@pytest.mark.needs_node
def test_node_bench_refuses_wrong_use(made: Made, tmp_path: Path) -> None:
    program = str(made("wasm-simd").file("bench.mjs"))
    for arguments, message in {
        ("run", "a", "b"): "use:",
        ("--runs", "x"): "whole number",
        ("--what",): "unknown option",
        ("run", str(tmp_path / "no"), str(tmp_path / "out"), "1"): "no such file",
    }.items():
        done = subprocess.run(
            ["node", program, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, arguments
        assert message in done.stderr
    subprocess.run(["node", program, "repeat", "3"], check=True, capture_output=True)
    done = subprocess.run(["node", program, "--json"], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["runs"] >= 50


BAD_INPUTS = {
    "missing": ({X: np.zeros((1, 1000), np.float32)}, "'count' is missing"),
    "unknown": (handmade.inputs() | {"cuont": np.zeros(1)}, "did you mean 'count'"),
    "shape": (handmade.inputs() | {X: np.zeros((1, 999), np.float32)}, "shape"),
    "dtype": (handmade.inputs() | {N: np.float32(3)}, "dtype float32"),
    "text": (handmade.inputs() | {N: np.array("x")}, "dtype"),
    "lengths": (handmade.inputs() | {X: np.zeros((0, 1000), np.float32)}, "leading dimension 0"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_do_not_fit(made: Made, case: str) -> None:
    inputs, message = BAD_INPUTS[case]
    with pytest.raises(UserError, match=message):
        made("host").run(inputs)


def test_harmless_dtypes_are_converted(made: Made) -> None:
    got = made("host").run({X: np.ones((1, 1000)), N: np.int8(-3)})
    assert got[TWICE] == -6
    spec = [TensorSpec("x", (2,), "int8")]
    with pytest.raises(UserError, match="do not fit int8"):
        _io.check_sample(spec, {"x": np.array([1, 300])})


def test_split_and_join() -> None:
    specs = (TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (1,), "int64"))
    inputs = {"a": np.arange(18.0).reshape(6, 3), "b": np.arange(3)}
    samples = _io.split(specs, inputs)
    assert [s["b"].tolist() for s in samples] == [[0], [1], [2]]
    assert np.array_equal(_io.join(specs, samples)["a"], inputs["a"])
    with pytest.raises(UserError, match="no multiple"):
        _io.split(specs, {"a": np.zeros((5, 3)), "b": np.arange(1)})
    with pytest.raises(UserError, match="different numbers"):
        _io.split(specs, {"a": np.zeros((4, 3)), "b": np.arange(3)})


def test_many_samples_take_several_processes(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepipe.runners import _program

    monkeypatch.setattr(_program, "_CHUNK_BYTES", 20_000)  # two samples
    samples = [{X: np.full((1, 1000), i, np.float32), N: np.array(i)} for i in range(5)]
    results = _program.run_many(made("host"), [], samples)
    assert [int(r[TWICE]) for r in results] == [0, 2, 4, 6, 8]


def test_doctor_names_every_runner_and_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    names = " ".join(check.name for check in doctor.checks())
    for name in ("zig", "tvm", "onnxruntime", "torch", *runners.names()):
        assert name in names
    monkeypatch.setattr(qemu.shutil, "which", lambda name: None)
    missing = [check for check in doctor.checks() if "qemu" in check.name]
    assert missing
    for check in missing:
        assert not check.ok
        assert check.fix == "apt-get install qemu-user-static"
