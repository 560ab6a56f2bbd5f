"""The command line without the compiler: parsing, messages, exit codes, output forms."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import dense
import numpy as np
import pytest

from edgepipe import cli
from edgepipe.cli import main
from edgepipe.cli.guard import INTERRUPTED, explain, guarded
from edgepipe.cli.parser import COMMANDS
from edgepipe.cli.settings import apply_settings, parse_settings, parse_shapes, read_config
from edgepipe.errors import UserError
from edgepipe.target import Target

CLI = [sys.executable, "-m", "edgepipe"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a user's mistake is answered with."""
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    model = dense.save_model(folder / "dense.onnx", *dense.weights())
    dense.build(folder, model, *(1.01 * part for part in dense.weights()), name="wrong")
    return dense.build(folder, model, *dense.weights()).path


def test_help_names_the_commands() -> None:
    done = subprocess.run([*CLI, "--help"], capture_output=True, text=True, check=True)
    assert "compile" in done.stdout and "validate" in done.stdout


def test_importing_edgepipe_loads_nothing_heavy() -> None:
    code = (
        "import sys, edgepipe, edgepipe.cli.parser as p; p.build_parser();"
        "heavy = {'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'torch', 'tvm'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    import edgepipe

    for name in edgepipe.__all__:
        assert getattr(edgepipe, name).__name__ == name
    with pytest.raises(AttributeError, match="'complie'"):
        _ = edgepipe.complie  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compil"], "unknown command 'compil'; did you mean 'compile'?"),
        (["--versio"], "unknown option '--versio'; did you mean '--version'?"),
        (["compile", "digits", "--taget", "host"], "did you mean '--target'?"),
        (["compile", "digits", "--targets=host"], "did you mean '--target'?"),
        (["compile", "digits"], "--target is missing"),
        (["compile", "--target", "host"], "MODEL is missing"),
        (["compile", "digits", "--target"], "--target: expected one argument"),
        (["compile", "digits", "more", "--target", "host"], "unrecognized arguments: more"),
        (["compile", "digits", "--target", "hist"], "did you mean 'host'?"),
        (["compile", "digits", "--target", "host", "--recipe", "fp3"], "did you mean 'fp32'?"),
        (["compile", "digits", "--target", "host", "--recipe", "no.toml"], "no such recipe file"),
        (["compile", "digits", "--target", "host", "--samples", "8"], "no recipe to calibrate"),
        (
            ["compile", "digits", "--target", "host", "--recipe", "w8a8", "--samples", "0"],
            "--samples: must be at least 1",
        ),
        (
            ["compile", "digits", "--target", "host", "--recipe", "fp16", "--samples", "8"],
            "fp16 has no further settings",
        ),
        (
            [
                "compile",
                "digits",
                "--target",
                "host",
                "--quiet",
                "--recipe",
                "w8a8",
                "--calibration",
                "x.npz",
            ],
            "x.npz: no such file",
        ),
        (
            [
                "compile",
                "digits",
                "--target",
                "host",
                "--quiet",
                "--recipe",
                "w8a8",
                "--emit",
                "pb",
            ],
            "unknown format 'pb'",
        ),
        (
            ["compile", "digits", "--target", "host", "--quiet", "--calibration", "digits"],
            "is not calibrated",
        ),
        (["compile", "digits", "--target", "host", "--shape", "image"], "is not NAME=D0,D1"),
        (["compile", "digits", "--target", "host", "--set", "x"], "is not KEY=VALUE"),
        (
            ["compile", "digits", "--target", "host", "--set", "target.llvm.mpu=x"],
            "did you mean 'target.llvm.mcpu'?",
        ),
        (["compile", "digits", "--target", "host", "--config", "no.toml"], "no.toml"),
        (["run", "nowhere"], "the following arguments are required: --input"),
        (["run", "nowhere", "--input", "a.npz", "-o", "b.npz"], "no such bundle folder"),
        (["validate", "nowhere"], "no such bundle folder"),
        (["validate", "nowhere", "--min-snr-db", "loud"], "invalid float value: 'loud'"),
        (["bench", "nowhere", "--runs", "0"], "--runs: must be at least 1"),
        (["targets", "raspberry-pi-44"], "did you mean 'raspberry-pi-4'?"),
        (["models", "digit"], "did you mean 'digits'?"),
    ],
)
def test_a_mistake_is_answered_with_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in fails(capsys, *arguments)


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "targets", "nowhere", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "targets")
    assert code == 0
    assert "raspberry-pi-4" in out
    assert json.loads(run(capsys, "targets", "--json")[1])["wasm-simd"]["kind"] == "wasm"
    assert "cortex-a72" in run(capsys, "targets", "raspberry-pi-4")[1]
    assert json.loads(run(capsys, "targets", "wasm-simd", "--json")[1])["arch"] == "wasm32"
    assert "mobilenet-v1" in run(capsys, "models")[1]
    assert json.loads(run(capsys, "models", "digits", "--json")[1])["accuracy"] > 0.95
    assert "trained" in run(capsys, "models", "digits")[1]
    assert any(check["ok"] for check in json.loads(run(capsys, "doctor", "--json")[1]))
    assert "zig" in run(capsys, "doctor")[1]


def test_run_writes_what_the_model_says(
    capsys: pytest.CaptureFixture[str], built: Path, tmp_path: Path
) -> None:
    x, (w, b) = dense.data(), dense.weights()
    np.savez(tmp_path / "in.npz", x=x)
    source, result = str(tmp_path / "in.npz"), str(tmp_path / "out.npz")
    code, out, _ = run(capsys, "run", str(built), "--input", source, "-o", result)
    assert code == 0
    assert "scores" in out
    np.testing.assert_allclose(np.load(result)["scores"], x @ w.T + b, rtol=1e-4, atol=1e-4)
    code, out, _ = run(capsys, "run", str(built), "--input", source, "-o", result, "--json")
    assert json.loads(out)["arrays"]["scores"]["shape"] == [40, 10]
    assert run(capsys, "run", str(built), "--input", source, "-o", result, "--quiet")[1:] == (
        "",
        "",
    )


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"y": np.zeros((1, 64), np.float32)}, "'y' is not an input"),
        ({"x": np.zeros((1, 63), np.float32)}, "has shape [1, 63]; the model takes [1, 64]"),
        ({"x": np.zeros((1, 64), complex)}, "complex128"),
    ],
)
def test_run_names_bad_input(
    capsys: pytest.CaptureFixture[str], built: Path, tmp_path: Path, arrays: dict, said: str
) -> None:
    np.savez(tmp_path / "in.npz", **arrays)
    line = fails(
        capsys,
        "run",
        str(built),
        "--input",
        str(tmp_path / "in.npz"),
        "-o",
        str(tmp_path / "o.npz"),
    )
    assert said in line
    assert not (tmp_path / "o.npz").exists()


def test_validate_passes_and_fails_by_its_exit_code(
    capsys: pytest.CaptureFixture[str], built: Path
) -> None:
    code, out, _ = run(capsys, "validate", str(built))
    assert code == 0
    assert out.rstrip().endswith("ok")
    code, out, _ = run(capsys, "validate", str(built.parent / "wrong"))
    assert code == 1
    assert "FAILED  scores: SNR 40.0 dB is below 100" in out
    code, out, _ = run(capsys, "validate", str(built.parent / "wrong"), "--min-snr-db", "30")
    assert code == 0
    code, out, _ = run(capsys, "validate", str(built.parent / "wrong"), "--json")
    assert code == 1
    assert json.loads(out)["ok"] is False
    assert run(capsys, "validate", str(built), "--quiet")[1:] == ("", "")


def test_bench_prints_the_ratio_first(capsys: pytest.CaptureFixture[str], built: Path) -> None:
    code, out, _ = run(capsys, "bench", str(built), "--runs", "10")
    assert code == 0
    assert "× ONNX Runtime" in out.splitlines()[0]
    result = json.loads(run(capsys, "bench", str(built), "--runs", "10", "--json")[1])
    assert result["rounds"] == 5


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{' '.join(CLI)} targets | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_is_one_line_and_exit_code_2(number: signal.Signals) -> None:
    code = (
        "import sys, time; from edgepipe.cli.guard import guarded;"
        "work = lambda: (print('at work', flush=True), time.sleep(60), 0)[2];"
        "sys.exit(guarded(work, debug=False))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err == f"error: {INTERRUPTED}\n"


def test_an_interrupt_is_known_also_where_a_library_hides_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RuntimeError("the compiler failed") from None
        return 0

    assert guarded(work, debug=False) == 2
    assert INTERRUPTED in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "no space left on the device"),
        (OSError(errno.EACCES, "Permission denied", "/x"), 2, "/x: permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 2, "read-only file system"),
        (ModuleNotFoundError("", name="tvm"), 2, "pip install 'apache-tvm==0.27.0.post1'"),
        (ModuleNotFoundError("", name="edgepipe.x"), 3, "a bug in edgepipe"),
        (MemoryError(), 2, "out of memory"),
        (UserError("no such op", where="conv1", fix="use another"), 2, "conv1: no such op; use"),
        (KeyError("what"), 3, "a bug in edgepipe (KeyError: 'what'); please rerun with --debug"),
        (OSError(errno.EBADF, "Bad file descriptor"), 3, "a bug in edgepipe"),
        (ValueError("many\nlines\n" * 100), 3, "..."),
    ],
)
def test_what_is_said_of_an_error(error: BaseException, code: int, said: str) -> None:
    got, line = explain(error)
    assert got == code
    assert said in line
    assert "\n" not in line


def test_a_full_disk_below_another_error_is_found() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/x")
        except OSError as cause:
            raise RuntimeError("linking failed") from cause
    except RuntimeError as error:
        assert explain(error) == (
            2,
            "/x: no space left on the device; free some space or choose another folder",
        )


def test_shapes() -> None:
    assert parse_shapes(["x=1,3,224,224", "a=b=7", "s="]) == {
        "x": (1, 3, 224, 224),
        "a=b": (7,),
        "s": (),
    }
    for bad in ("x", "=1", "x=0", "x=-1", "x=1,,2", "x=1.5"):
        with pytest.raises(UserError, match="--shape"):
            parse_shapes([bad])
    with pytest.raises(UserError, match="twice"):
        parse_shapes(["x=1", "x=2"])


def test_settings_change_the_target() -> None:
    target = Target.load("raspberry-pi-4")
    texts = [
        "target.llvm.mcpu=cortex-a53",
        'target.llvm.mattr=["+neon", "+crc"]',
        "target.simd.registers=16",
        "target.run.qemu_cpu=cortex-a53",
        "target.link.zig_target=aarch64-linux-gnu.2.17",
    ]
    changed = apply_settings(target, parse_settings(texts))
    assert changed.llvm["mcpu"] == "cortex-a53"
    assert changed.llvm["mattr"] == ["+neon", "+crc"]
    assert changed.simd.registers == 16
    assert changed.run.qemu_cpu == "cortex-a53"
    assert changed.link.zig_target == "aarch64-linux-gnu.2.17"
    assert target.llvm["mcpu"] == "cortex-a72"
    with pytest.raises(UserError, match="is a whole number, not a string; it is 32 now"):
        apply_settings(target, {"target.simd.registers": "many"})
    with pytest.raises(UserError, match=r"unknown key 'target\.name'"):
        apply_settings(target, {"target.name": "other"})


def test_a_config_file_holds_the_same_keys(tmp_path: Path) -> None:
    path = tmp_path / "build.toml"
    path.write_text(
        """
model = "net.onnx"
target = "raspberry-pi-4"
output = "out/net"
explain = true
[shape]
x = [1, 3, 224, 224]
[set]
target.llvm.mcpu = "cortex-a53"
target.llvm.mattr = ["+crc"]
""",
        encoding="utf-8",
    )
    values = read_config(path)
    assert values["model"] == str(tmp_path / "net.onnx")
    assert values["target"] == "raspberry-pi-4"
    assert values["output"] == str(tmp_path / "out/net")
    assert parse_shapes(values["shape"]) == {"x": (1, 3, 224, 224)}
    assert parse_settings(values["set"]) == {
        "target.llvm.mcpu": "cortex-a53",
        "target.llvm.mattr": ["+crc"],
    }
    for text, said in [
        ("taget = 'host'", "did you mean 'target'"),
        ("target = 3", "'target' cannot be a whole number"),
        ("target = ", "not a readable TOML"),
        ("[shape]\nx = 'wide'", "must be a list of whole numbers"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            read_config(path)


def test_every_command_is_offered() -> None:
    modules = {m.name: import_module(f"edgepipe.cli.{m.name}") for m in iter_modules(cli.__path__)}
    commands = {name for name, module in modules.items() if hasattr(module, "execute")}
    assert commands == set(COMMANDS)


@pytest.mark.parametrize("debug", [False, True])
def test_what_libraries_tell_developers_is_shown_to_them(
    debug: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> int:
        logging.getLogger("library").warning("logged")
        warnings.warn("warned", stacklevel=1)
        return 0

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert guarded(work, debug=debug) == 0
    assert bool(caplog.records) is bool(seen) is debug
