"""Bundles: whole or not there, refused when touched, the same bytes every time."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import handmade
import numpy as np
import pytest

from edgepipe import bundle, bundle_folder, golden, temporary
from edgepipe.bundle import Bundle
from edgepipe.codegen.plan import TensorSpec
from edgepipe.errors import UserError
from edgepipe.recipe import Recipe
from edgepipe.target import Target

TARGET = Target.load("wasm-simd")


@pytest.fixture(scope="module")
def objects() -> dict[str, bytes]:
    return handmade.objects(TARGET)


def write(path: Path, objects: dict[str, bytes], seed: int = 7) -> Bundle:
    plan, source = handmade.plan(seed=seed), handmade.source(seed)
    return handmade.write(path, source, plan, objects, handmade.context(TARGET), "model")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_manifest_tells_what_the_bundle_is(tmp_path: Path, objects: dict[str, bytes]) -> None:
    made = write(tmp_path / "b", objects)
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest == made.manifest
    assert manifest["source"] == {
        "name": "handmade", "origin": "handmade.onnx", "sha256": "0" * 64,
    }  # fmt: skip
    assert manifest["memory"] == {
        "arena_bytes": 4096, "peak_live_bytes": 4000, "weights_bytes": 8000, "arena": [],
    }  # fmt: skip
    assert manifest["recipe"] == "fp32"
    assert manifest["target"]["llvm"]["mtriple"] == "wasm32-unknown-unknown"
    assert manifest["kernels"][0]["kernel"] == "scale_bias"
    assert manifest["golden"]["reference"].startswith("onnxruntime ")
    assert set(contents(tmp_path / "b")) == {*manifest["files"], "manifest.json"}
    for name, facts in manifest["files"].items():
        data = (tmp_path / "b" / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_open_gives_the_same_bundle(tmp_path: Path, objects: dict[str, bytes]) -> None:
    made = write(tmp_path / "b", objects)
    opened = Bundle.open(tmp_path / "b")
    opened.verify()
    assert opened == made
    assert opened.target == TARGET
    assert opened.recipe == Recipe()
    assert opened.inputs == handmade.plan().inputs
    assert opened.outputs == handmade.plan().outputs


def test_golden_outputs_are_the_original_models(tmp_path: Path, objects: dict[str, bytes]) -> None:
    inputs, outputs = write(tmp_path / "b", objects).golden()
    for name, exact in handmade.expected(inputs).items():
        assert outputs[name].dtype == exact.dtype
        assert np.allclose(outputs[name], exact, atol=1e-6)


def test_same_inputs_same_bytes(tmp_path: Path, objects: dict[str, bytes]) -> None:
    write(tmp_path / "one", objects)
    write(tmp_path / "deeper" / "two", objects)
    assert contents(tmp_path / "one") == contents(tmp_path / "deeper" / "two")


def test_a_bundle_is_replaced(tmp_path: Path, objects: dict[str, bytes]) -> None:
    write(tmp_path / "b", objects)
    before = contents(tmp_path / "b")
    write(tmp_path / "b", objects, seed=8)
    after = contents(tmp_path / "b")
    assert before["weights.bin"] != after["weights.bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def foreign(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "link":
        path.symlink_to(path.parent / "nowhere")
    else:
        path.mkdir()
        if kind == "folder":
            (path / "thesis.tex").write_text("precious")
        if kind == "other manifest":
            (path / "manifest.json").write_text('{"format": "android"}')
        if kind == "broken manifest":
            (path / "manifest.json").write_bytes(b"\xff{")


@pytest.mark.parametrize(
    "kind", ["file", "folder", "empty folder", "other manifest", "broken manifest", "link"]
)
def test_anything_else_is_not_replaced(
    tmp_path: Path, objects: dict[str, bytes], kind: str
) -> None:
    foreign(tmp_path / "b", kind)
    for attempt in (
        lambda: bundle.destination(tmp_path / "b", handmade.source(), TARGET, Recipe()),
        lambda: write(tmp_path / "b", objects),
    ):
        with pytest.raises(UserError, match="is not a bundle"):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_link_to_a_bundle_is_not_replaced(tmp_path: Path, objects: dict[str, bytes]) -> None:
    write(tmp_path / "b", objects)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    with pytest.raises(UserError):
        write(tmp_path / "link", objects)


def test_default_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = dataclasses.replace(handmade.source(), name="a/b c")
    path = bundle.destination(None, source, TARGET, Recipe())
    assert path == tmp_path / "a-b-c-wasm-simd-fp32"


def test_destination_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        bundle.destination(tmp_path / "file" / "b", handmade.source(), TARGET, Recipe())


FAILURES = {
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "Ctrl-C": KeyboardInterrupt(),
}


@pytest.mark.parametrize("cause", FAILURES)
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("step", ["fsync", "rename", "two renames"])
def test_failures_leave_nothing_behind(
    tmp_path: Path, objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    cause: str, existing: bool, step: str,
) -> None:  # fmt: skip
    folder = tmp_path / "new" / "b"
    if existing:
        write(folder, objects)
    before = contents(folder) if existing else None
    calls = 0
    real = os.fsync if step == "fsync" else Path.rename

    def fail(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        # the second rename is the one that moves the new bundle in, when there is an old one
        if calls == (3 if step == "fsync" else 1 + existing):
            raise FAILURES[cause]
        return real(*arguments)

    def fail_now() -> None:
        raise FAILURES[cause]

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif step == "rename" and existing:
        monkeypatch.setattr(bundle_folder, "_exchange", lambda *_: fail_now())
    else:
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: None)  # no renameat2
        monkeypatch.setattr(Path, "rename", fail)
    error = KeyboardInterrupt if cause == "Ctrl-C" else UserError
    with pytest.raises(error):
        write(folder, objects, seed=8)
    monkeypatch.undo()
    if before is None:
        assert list(tmp_path.iterdir()) == []
    else:
        assert contents(folder) == before
        assert [path.name for path in folder.parent.iterdir()] == ["b"]


def change(folder: Path, **entries: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_damaged_bundles_are_refused(tmp_path: Path, objects: dict[str, bytes]) -> None:
    made = write(tmp_path / "b", objects)
    weights = tmp_path / "b" / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    opened = Bundle.open(made.path)
    with pytest.raises(UserError, match="changed"):
        opened.verify()
    weights.write_bytes(data[:-1])
    with pytest.raises(UserError, match="bytes"):
        Bundle.open(made.path)
    weights.unlink()
    with pytest.raises(UserError, match="missing"):
        Bundle.open(made.path)


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", ""])
def test_file_names_outside_the_bundle_are_refused(
    tmp_path: Path, objects: dict[str, bytes], name: str
) -> None:
    write(tmp_path / "b", objects)
    (tmp_path / "escape").write_text("x")
    change(tmp_path / "b", files={name: {"bytes": 1, "sha256": ""}})
    with pytest.raises(UserError, match="outside the bundle"):
        Bundle.open(tmp_path / "b")


def test_links_out_of_the_bundle_are_refused(tmp_path: Path, objects: dict[str, bytes]) -> None:
    write(tmp_path / "b", objects)
    target = tmp_path / "b" / "weights.bin"
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="missing"):
        Bundle.open(tmp_path / "b")


@pytest.mark.parametrize(
    "entries",
    [
        {"schema": 99}, {"format": "x"}, {"files": []}, {"files": {"model.wasm": 3}},
        {"inputs": [{}]}, {"target": {"name": "x"}}, {"recipe": 5}, {"kernels": [{"op": "x"}]},
        {"kernels": {}}, {"macs": "many"}, {"source": {"name": "x", "origin": 5, "sha256": ""}},
        {"memory": {"arena_bytes": -1.5}},
        {"inputs": [{"name": "x", "shape": [1.5], "dtype": "int8"}]},
        {"inputs": [{"name": "x", "shape": [-1], "dtype": "int8"}]},
        {"inputs": [{"name": "x", "shape": [2**40], "dtype": "int8"}]}, {"recipe_settings": []},
        {"quantization": {"integer": True}}, {"golden": "none"}, {"files": {}},
        {"files": {"model.wasm": {"bytes": 1, "sha256": ""}}},
        {"files": {"weights.bin": {"bytes": 1, "sha256": ""}}},
        {"kernels": [{"op": "x", "op_type": "Conv", "kernel": "k", "arithmetic": "float32",
                      "accumulator": "float32", "macs": 1, "sparsity": {"zeros": 0.5}}]},
    ],
)  # fmt: skip
def test_foreign_manifests_are_refused(
    tmp_path: Path, objects: dict[str, bytes], entries: dict[str, object]
) -> None:
    write(tmp_path / "b", objects)
    change(tmp_path / "b", **entries)
    with pytest.raises(UserError):
        Bundle.open(tmp_path / "b")


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_fifo, _endless, Path.mkdir])
@pytest.mark.parametrize("name", ["weights.bin", "manifest.json", "golden.npz"])
def test_what_never_ends_is_not_read(
    tmp_path: Path, objects: dict[str, bytes], name: str, make: Callable[[Path], None]
) -> None:
    write(tmp_path / "b", objects)
    (tmp_path / "b" / name).unlink()
    make(tmp_path / "b" / name)
    with pytest.raises(UserError, match=r"missing|not a regular file"):
        Bundle.open(tmp_path / "b")
    assert bundle_folder.is_bundle(tmp_path / "b") is (name != "manifest.json")


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b'{"format": ' * 100_000, b'{"format": "edgepipe-bundle", "macs": 1e999}',
     b"\xff\xfe{", b"", b'{"format": "edgepipe-bundle"} x'],
)  # fmt: skip
def test_manifests_that_are_hardly_json(
    tmp_path: Path, objects: dict[str, bytes], content: bytes
) -> None:
    write(tmp_path / "b", objects)
    (tmp_path / "b" / "manifest.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        Bundle.open(tmp_path / "b")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("size", [2**63, -1, 10**400, 1.5, "8", True, None])
def test_sizes_that_are_none(tmp_path: Path, objects: dict[str, bytes], size: object) -> None:
    made = write(tmp_path / "b", objects)
    change(tmp_path / "b", files={**made.manifest["files"],
                                  "weights.bin": {"bytes": size, "sha256": "0" * 64}})  # fmt: skip
    with pytest.raises(UserError):
        Bundle.open(tmp_path / "b")


def test_code_of_another_machine_is_not_run(tmp_path: Path, objects: dict[str, bytes]) -> None:
    """Whatever the manifest calls it: the content is checked, then the machine it is for."""
    made = write(tmp_path / "b", objects)
    inputs = {t.name: np.zeros(t.shape, t.dtype) for t in made.inputs}
    with pytest.raises(UserError, match="native bundles, not wasm"):
        made.run(inputs, runner="local")
    code = made.path / "model.wasm"
    code.write_bytes(bytes(reversed(code.read_bytes())))
    with pytest.raises(UserError, match="changed after"):
        Bundle.open(made.path).run(inputs, runner="node")


def test_not_a_bundle(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError):
            Bundle.open(path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        Bundle.open(tmp_path)


def test_golden_tries_smaller_integers() -> None:
    """Token ids: indices outside the table make the reference fail."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    table = numpy_helper.from_array(np.eye(2, dtype=np.float32), "table")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"])], "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [50])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [50, 2])], [table],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    inputs, outputs, name = golden.golden(
        model.SerializeToString(),
        [TensorSpec("ids", (50,), "int64")],
        ["y"],
    )
    assert inputs["ids"].max() == 1
    assert outputs["y"].shape == (50, 2)
    assert name.startswith("onnxruntime")


def test_npz_has_no_time_and_numpy_reads_it(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6).reshape(2, 3).T, "b": np.array(3.5, np.float16)}
    data = golden.npz_bytes(arrays)
    assert data == golden.npz_bytes(arrays)
    (tmp_path / "x.npz").write_bytes(data)
    with np.load(tmp_path / "x.npz") as archive:
        for name, array in arrays.items():
            assert archive[name].shape == array.shape
            assert np.array_equal(archive[name], array)


def test_bench_is_executable_in_a_native_bundle(tmp_path: Path) -> None:
    host = Target.load("host")
    made = handmade.write(
        tmp_path / "b", handmade.source(), handmade.plan(), handmade.objects(host),
        handmade.context(host), "model",
    )  # fmt: skip
    assert os.access(made.file("bench"), os.X_OK)
    assert not os.access(made.file("weights.bin"), os.X_OK)
    assert bundle_folder.is_bundle(made.path)


def test_full_temporary_folder(
    tmp_path: Path, objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepipe.codegen import link

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(link, "wasm", full)
    with pytest.raises(UserError, match="TMPDIR"):
        write(tmp_path / "b", objects)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_with_a_users_file_in_it_is_not_replaced(
    tmp_path: Path, objects: dict[str, bytes]
) -> None:
    write(tmp_path / "b", objects)
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt.*not replaced"):
        write(tmp_path / "b", objects, seed=8)
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"
    (tmp_path / "b" / "notes.txt").unlink()
    write(tmp_path / "b", objects, seed=8)


def test_what_killed_processes_left_is_removed(tmp_path: Path, objects: dict[str, bytes]) -> None:
    left = tmp_path / ".b.edgepipe-killed"
    left.mkdir()
    (left / "weights.bin").write_bytes(b"x" * 10)
    other = tmp_path / ".c.edgepipe-other"  # of another destination
    other.mkdir()
    write(tmp_path / "b", objects)
    assert not left.exists()
    assert other.exists()


def test_what_a_living_process_writes_is_left_alone(
    tmp_path: Path, objects: dict[str, bytes]
) -> None:
    with temporary.folder(tmp_path / "b") as work:
        (work / "weights.bin").write_bytes(b"x" * 10)
        write(tmp_path / "b", objects)
        assert (work / "weights.bin").exists()
    assert not work.exists()


@pytest.mark.slow
def test_two_compilations_into_one_folder(tmp_path: Path, objects: dict[str, bytes]) -> None:
    made = contents(write(tmp_path / "one", objects).path)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                bundle_folder.install(tmp_path / "b", dict(made))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "b").exists():
            Bundle.open(tmp_path / "b").verify()
    assert not errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "one"]


def test_a_bundle_that_fails_its_check_is_not_there(
    tmp_path: Path, objects: dict[str, bytes]
) -> None:
    made = contents(write(tmp_path / "b", objects).path)

    def check(folder: Path) -> None:
        assert contents(folder).keys() == {*made, "extra"}
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        bundle_folder.install(tmp_path / "b", {**made, "extra": b""}, check)
    assert contents(tmp_path / "b") == made
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
