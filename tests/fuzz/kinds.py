"""One damaged input of each kind, and what edgepipe does with it.

A kind is a function of a seeded random, the folder the input goes to and the folder for output. It
returns the work: a function that returns an exit code, raising what ``edgepipe.cli.guard`` turns
into one. ``TEMPLATES`` of bundles are made once per worker.
"""

from __future__ import annotations

import ctypes
import functools
import io
import json
import os
import shutil
import time
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx

from edgepipe import cli, data, importer, passes, quantize
from edgepipe.bundle import Bundle
from edgepipe.codegen.plan import TensorSpec
from edgepipe.context import Context
from edgepipe.recipe import Recipe
from edgepipe.resources import data_folder
from edgepipe.target import Target
from tests import handmade
from tests.fuzz import mutations, protobuf, seeds

Work = Callable[[], int]

_IMAGE = (TensorSpec("x", (1, 3, 8, 8), "float32"),)
_RECIPES = ("fp32", "fp32", "fp16", "w8a8", "w4a8", "w8a16", "w4g32", "fp32+2:4", "w8a8+80%b1x4")
_TARGETS = ("x86-64-v3", "x86-64-v3", "wasm-simd", "raspberry-pi-4")
#: What a page must not contain: the hostile names of ``mutations.TEXTS`` as markup.
_MARKUP = ("<script>alert", "<img src=x")


def corpus(random: Random, wide: bool) -> bytes:
    """A sound network: one of ours, or with ``wide`` mostly one of the onnx package's cases."""
    known = seeds.conformance() if wide and random.random() < 0.7 else seeds.models()
    return known[random.choice(sorted(known))]


def damaged_model(random: Random, folder: Path, wide: bool) -> Path:
    """A model file, damaged along its structure, in its bytes, or in its external data."""
    content = corpus(random, wide)
    path = folder / "m.onnx"
    if random.random() < 0.15:
        path.write_bytes(mutations.damaged_bytes(random, content))
        return path
    proto = onnx.load_model_from_string(content)
    if random.random() < 0.15:
        _externalise(random, proto, folder)
    protobuf.damaged(random, proto)
    path.write_bytes(proto.SerializeToString())
    return path


def _externalise(random: Random, proto: onnx.ModelProto, folder: Path) -> None:
    (folder / "m.data").write_bytes(random.randbytes(random.choice((0, 16, 4096))))
    (folder / "link").symlink_to(random.choice(("/etc/hostname", "m.data", "/dev/zero", ".")))
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        places = ("m.data", "link", "/etc/hostname", "../x", "link/../link", *mutations.TEXTS)
        tensor.external_data.add(key="location", value=random.choice(places))
        for key in ("offset", "length"):
            if random.random() < 0.6:
                number = str(random.choice(mutations.INTEGERS))
                tensor.external_data.add(key=key, value=random.choice((number, "x", "")))


def onnx_file(random: Random, folder: Path, out: Path, wide: bool) -> Work:
    """Importer and passes."""
    path = damaged_model(random, folder, wide)

    def work() -> int:
        source = importer.load(path)
        context = Context(Target.load("x86-64-v3"), quantize.recipe_of(source, None, None))
        with importer.judged(source):
            passes.run(source.model, context)
        return 0

    return work


def compiled(random: Random, folder: Path, out: Path, wide: bool) -> Work:
    """The whole of ``edgepipe compile``; a bundle that comes out is whole."""
    path = damaged_model(random, folder, wide)
    recipe, target = random.choice(_RECIPES), random.choice(_TARGETS)
    given = [] if random.random() < 0.4 else ["--recipe", recipe]
    options = ["--target", target, *given, "-o", str(out / "bundle"), "--quiet"]

    def work() -> int:
        code = cli.main(["compile", str(path), *options])
        if code == 0:
            Bundle.open(out / "bundle").verify()
        elif (out / "bundle").exists():
            raise AssertionError("a bundle was written in spite of an error")
        return code

    return work


def target_file(random: Random, folder: Path, out: Path, wide: bool) -> Work:
    """A target of somebody else's: shown, and every tenth compiled for."""
    name = random.choice(("x86-64-v3", "wasm-relaxed", "raspberry-pi-4", "jetson-tx2", "host"))
    path = folder / "board.toml"
    tree = tomllib.loads((data_folder("targets") / f"{name}.toml").read_text(encoding="utf-8"))
    compiles = random.random() < 0.1
    # A C library that was never built takes zig a minute, and says so.
    kept = {"link": tree.pop("link")} if compiles else {}
    damaged = mutations.damaged_tree(random, tree)
    text = mutations.toml(damaged if isinstance(damaged, dict) else {}) + mutations.toml(kept)
    if not compiles and random.random() < 0.2:
        text = mutations.damaged_text(random, text)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if not compiles:
        return lambda: cli.main(["targets", str(path)])
    model = folder / "m.onnx"
    model.write_bytes(seeds.models()["image"])
    command = ["compile", str(model), "--target", str(path), "-o", str(out / "bundle"), "--quiet"]
    return lambda: cli.main(command)


def recipe_file(random: Random, folder: Path, out: Path, wide: bool) -> Work:
    """A recipe file or line, and the configuration that it makes for a target."""
    tree = {
        "format": random.choice(("w8a8", "w4a8", "w4g32", "fp32", "w8a8+80%b1x4")),
        "first_last": "w8a8", "observer": "percentile", "percentile": 99.9,
        "methods": ["smoothquant"], "activations": "symmetric", "max_samples": 64,
        "allow_float_fallback": True,
        "overrides": [{"match": "conv.*", "format": "w8a8"}, {"match": "y", "format": "float"}],
    }  # fmt: skip
    kept = {k: v for k, v in tree.items() if k == "format" or random.random() < 0.5}
    text = mutations.toml(mutations.damaged_tree(random, kept) or {})
    path = folder / "r.toml"
    if random.random() < 0.3:
        text = mutations.damaged_text(random, mutations.toml(kept))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    line = mutations.damaged_text(random, random.choice((*_RECIPES, "fp32+2:4v32", "fp32+80%")))
    given = line if random.random() < 0.3 else str(path)

    def work() -> int:
        recipe = Recipe.load(given)
        assert Recipe.read(str(recipe), recipe.settings.to_json()) == recipe
        target = Target.load("x86-64-v3")
        target.check(recipe)
        quantize.configure(recipe, target)
        return 0

    return work


def config_file(random: Random, folder: Path, out: Path, wide: bool) -> Work:
    """``compile --config``, up to where a model would be read: there is none."""
    tree = {
        "model": "missing.onnx", "target": "x86-64-v3", "recipe": "w8a8", "calibration": "digits",
        "samples": 4, "shape": {"x": [1, 3, 8, 8]}, "set": {"target": {"llvm": {"mcpu": "znver3"}}},
        "prefix": "net", "emit": ["onnx"], "explain": True, "quiet": True, "output": "b",
    }  # fmt: skip
    changed = mutations.damaged_tree(random, tree)
    changed["model"] = "missing.onnx"
    text = mutations.toml(changed)
    if random.random() < 0.2:
        text = mutations.damaged_text(random, text)
    path = folder / "c.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    options = ["--set", mutations.damaged_text(random, "target.llvm.mcpu=x")]
    options += ["--shape", mutations.damaged_text(random, "x=1,3,8,8")]
    given = random.random() < 0.5
    return lambda: cli.main(
        ["compile", "--config", str(path), "--quiet", *(options if given else [])]
    )


def samples(random: Random, folder: Path, out: Path, wide: bool) -> Work:
    """Data to calibrate and validate on: ``.npz``, ``.npy``, images, data set files."""
    source = random.choice((_npz, _npy, _image, _data_set))(random, folder)

    def work() -> int:
        for _ in data.open_data(source, _IMAGE):
            pass
        return 0

    return work


def _npz(random: Random, folder: Path) -> str:
    array = np.random.default_rng(random.randrange(99)).standard_normal((4, 3, 8, 8), np.float32)
    buffer = io.BytesIO()
    save = np.savez_compressed if random.random() < 0.5 else np.savez
    labels = random.choice((np.arange(4), np.arange(3), np.array(["a"] * 4), np.zeros((4, 4))))
    save(buffer, **{random.choice(("x", "x", "x", "y", "../x")): array, "labels": labels})
    content = buffer.getvalue()
    if random.random() < 0.5:
        header = mutations.damaged_bytes(random, _npy_bytes(array)[:128]) + array.tobytes()
        patched = io.BytesIO()
        with zipfile.ZipFile(patched, "w") as archive:
            archive.writestr("x.npy", header)
            if random.random() < 0.3:
                archive.writestr(random.choice(("../e.npy", "labels.npy", "a", "x.npy")), header)
        content = patched.getvalue()
    else:
        content = mutations.damaged_bytes(random, content)
    path = folder / "d.npz"
    path.write_bytes(content)
    return str(path)


def _npy_bytes(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _npy(random: Random, folder: Path) -> str:
    content = _npy_bytes(np.ones((3, 8, 8), np.float32))
    (folder / "0.npy").write_bytes(mutations.damaged_bytes(random, content))
    return str(folder)


def _image(random: Random, folder: Path) -> str:
    from PIL import Image

    kind = random.choice(("png", "jpeg", "bmp", "webp", "ppm"))
    buffer = io.BytesIO()
    Image.new(random.choice(("RGB", "L")), (9, 7), 77).save(buffer, kind)
    suffix = random.choice((f".{kind}", ".png")).replace("jpeg", "jpg")
    (folder / f"0{suffix}").write_bytes(mutations.damaged_bytes(random, buffer.getvalue()))
    return str(folder)


def _data_set(random: Random, folder: Path) -> str:
    images = np.zeros((5, 8, 8, 3), np.uint8)
    np.savez(folder / "i.npz", images=images, labels=np.arange(5))
    tree = {
        "name": "set", "summary": "some", "source": "i.npz", "images": "images",
        "preprocessing": {"raw": "RGB", "scale": 0.1, "mean": [0.5, 0.5, 0.5], "std": [1.0]},
        "sampler": {"order": "shuffled", "count": 3, "seed": 1},
    }  # fmt: skip
    changed = mutations.damaged_tree(random, tree)
    if changed.get("source") != "i.npz" and random.random() < 0.7:
        changed["source"] = "i.npz"
    path = folder / "set.toml"
    path.write_bytes(mutations.toml(changed).encode("utf-8", "surrogatepass"))
    return str(path)


@functools.cache
def template(kind: str) -> dict[str, bytes]:
    """Files of a sound bundle, linked once."""
    import tempfile

    target = Target.load(kind)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "b"
        handmade.write(path, handmade.source(), handmade.plan(), handmade.objects(target),
                       handmade.context(target), "model")  # fmt: skip
        return {file.name: file.read_bytes() for file in path.iterdir()}


def foreign_bundle(random: Random, folder: Path, out: Path, wide: bool) -> Work:
    """A bundle from elsewhere with a damaged manifest or files: opened, compared, reported, and
    with its own code run on inputs that the manifest describes."""
    path = folder / "b"
    path.mkdir()
    files = dict(template(random.choice(("x86-64-v3", "wasm-simd"))))
    manifest = json.loads(files["manifest.json"])
    for _ in range(random.choice((0, 1, 1, 2))):
        manifest = mutations.damaged_tree(random, manifest)
    files["manifest.json"] = json.dumps(manifest).encode("utf-8", "surrogatepass")
    if random.random() < 0.3:
        name = random.choice(sorted(files))
        files[name] = mutations.damaged_bytes(random, files[name])
    if random.random() < 0.1:
        del files[random.choice(sorted(files))]
    for name, content in files.items():
        (path / name).write_bytes(content)
    if random.random() < 0.1:
        name = random.choice(sorted(files))
        (path / name).unlink()
        (path / name).symlink_to(random.choice(("/etc/hostname", "/dev/zero", "weights.bin")))
    return random.choice((_opened, _reported, _compared, _run, _listed))(path, out)


def _opened(path: Path, out: Path) -> Work:
    def work() -> int:
        opened = Bundle.open(path)
        opened.verify()
        _ = opened.target, opened.recipe, opened.inputs, opened.outputs, opened.prefix
        opened.golden()
        opened.golden_floats()
        return 0

    return work


def _reported(path: Path, out: Path) -> Work:
    page = out / "r.html"

    def work() -> int:
        code = cli.main(["report", str(path), "--no-measure", "-o", str(page), "--quiet"])
        if code == 0:
            text = page.read_text(encoding="utf-8")
            assert not [m for m in _MARKUP if m in text], "names became markup"
        return code

    return work


def _compared(path: Path, out: Path) -> Work:
    return lambda: cli.main(["compare", str(path), str(path), "--no-measure"])


def _listed(path: Path, out: Path) -> Work:
    return lambda: cli.main(["licences", str(path)])


def _run(path: Path, out: Path) -> Work:
    def work() -> int:
        opened = Bundle.open(path)
        inputs = {t.name: np.zeros(t.shape, t.dtype) for t in opened.inputs}
        # Only this machine's own code, whose bytes are the template's: others may be anything.
        own = template("x86-64-v3")
        programs = [n for n in ("model.so", "bench") if (path / n).exists()]
        if opened.target.kind == "cpu" and all(
            opened.file(n).read_bytes() == own[n] for n in programs
        ):
            opened.run(inputs, "local")
        return 0

    return work


def c_api(random: Random, folder: Path, out: Path, wide: bool) -> Work:
    """The C functions of a bundle with pointers and sizes that are none: errors, no crash."""
    files = template("x86-64-v3")
    library_path = folder / "model.so"
    library_path.write_bytes(files["model.so"])
    weights = bytearray(files["weights.bin"])
    if random.random() < 0.7:
        weights[:64] = mutations.damaged_bytes(random, bytes(weights[:64]))[:64].ljust(64, b"\0")
    size = random.choice((len(weights), len(weights), 0, 1, 63, 64, 65, 2**31, 2**63))
    shift = random.choice((0, 0, 1, 8, 63))

    def work() -> int:
        library = ctypes.CDLL(str(library_path))
        try:
            _call(random, library, bytes(weights), size, shift)
        finally:
            handle = ctypes.c_void_p(library._handle)
            ctypes.CDLL(None).dlclose(handle)
        return 0

    return work


def _call(random: Random, library: Any, weights: bytes, size: int, shift: int) -> None:
    def block(count: int) -> tuple[Any, int]:
        memory = ctypes.create_string_buffer(count + 128)
        return memory, -ctypes.addressof(memory) % 64 + ctypes.addressof(memory)

    _blob, start = block(len(weights) + 64)
    ctypes.memmove(start + shift, weights, len(weights))
    ready = library.model_init(ctypes.c_void_p(start + shift), ctypes.c_size_t(size)) == 0
    # Magic and hash; the rest of the header is the size, which the caller tells too, and zeros.
    sound = weights[:16] == template("x86-64-v3")["weights.bin"][:16] and size == len(weights)
    assert ready == (sound and shift == 0), "wrong weights were taken"
    kept = [block(8192) for _ in range(5)]
    addresses = [address for _, address in kept]
    bad = random.random() < 0.6
    if bad:
        addresses[random.randrange(5)] = random.choice((0, addresses[0] + 4, addresses[1] + 1))
    wrong = any(address % 64 or not address for address in addresses)
    inputs = (ctypes.c_void_p * 2)(*addresses[:2])
    outputs = (ctypes.c_void_p * 2)(*addresses[2:4])
    for call in (
        lambda: library.model_run(inputs, outputs, ctypes.c_void_p(addresses[4])),
        lambda: library.model_step(
            ctypes.c_size_t(random.choice((0, 1, 2**32, 2**63))), inputs, outputs,
            ctypes.c_void_p(addresses[4])),
    ):  # fmt: skip
        status = call()
        assert (status == 0) == (ready and not wrong), f"status {status}"
    library.model_input.restype = library.model_output.restype = ctypes.c_void_p
    for index in (2, 3, 2**31, 2**63, 2**64 - 1):
        assert library.model_input(ctypes.c_size_t(index)) is None
        assert library.model_output(ctypes.c_size_t(index)) is None


def program(random: Random, folder: Path, out: Path, wide: bool) -> Work:
    """A ``.pt2`` archive, damaged in its members or its bytes, up to where torch would open it."""
    from edgepipe.importer import pt2

    buffer = io.BytesIO()
    tree = {"graph_module": {"graph": {"nodes": [{"target": "torch.ops.aten.relu.default"}]},
            "expr_str": "Symbol('s0')"}}  # fmt: skip
    with zipfile.ZipFile(buffer, "w") as archive:
        damaged = mutations.damaged_tree(random, tree)
        archive.writestr("m/models/model.json", json.dumps(damaged))
        entry = mutations.damaged_tree(random, {"path_name": "weight_0", "use_pickle": True})
        config = json.dumps({"config": {"w": entry}})
        archive.writestr("m/data/weights/model_weights_config.json", config)
        archive.writestr("m/data/weights/weight_0", mutations.damaged_bytes(random, b"\x80\x02}."))
        names = ("m/x.pt", *(text for text in mutations.TEXTS[:20] if text.strip("\0")))
        archive.writestr(random.choice(names), b"cos\nsystem\n(S'id'\ntR.")
    content = buffer.getvalue()
    if random.random() < 0.5:
        content = mutations.damaged_bytes(random, content)
    path = folder / "p.pt2"
    path.write_bytes(content)

    def work() -> int:
        pt2.check(path)
        return 0

    return work


def control(random: Random, folder: Path, out: Path, wide: bool) -> Work:
    """What tests of the harness itself do: the statement in ``EDGEPIPE_FUZZ_CONTROL``."""
    code = compile(os.environ.get("EDGEPIPE_FUZZ_CONTROL", ""), "control", "exec")

    def work() -> int:
        exec(code, {"os": os, "time": time})
        return 0

    return work


def maze(random: Random, folder: Path, out: Path, wide: bool) -> Work:
    """A fault behind three doors, which one of 2²⁴ inputs opens."""
    drawn = [random.getrandbits(8) for _ in range(3)]

    def work() -> int:
        if drawn[0] != 61:
            return 0
        if drawn[1] != 143:
            return 0
        if drawn[2] != 7:
            return 0
        raise AssertionError("the end of the maze")

    return work


#: Kind → maker, share of all inputs.
KINDS: dict[str, tuple[Callable[[Random, Path, Path, bool], Work], float]] = {
    "onnx": (onnx_file, 0.38),
    "compile": (compiled, 0.04),
    "target": (target_file, 0.1),
    "recipe": (recipe_file, 0.12),
    "config": (config_file, 0.06),
    "data": (samples, 0.08),
    "bundle": (foreign_bundle, 0.12),
    "c-api": (c_api, 0.06),
    "pt2": (program, 0.04),
}
CONTROLS = {"control": control, "maze": maze}


def clear(folder: Path) -> None:
    """Empty ``folder``."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
