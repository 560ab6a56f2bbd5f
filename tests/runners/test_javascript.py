"""model.mjs as a user's program sees it: in Node, from a folder and from a web server."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import handmade
import naming
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper as oh

from edgepipe import pipeline
from edgepipe.bundle import Bundle
from edgepipe.runners import node
from edgepipe.target import Target

pytestmark = pytest.mark.needs_node
Made = Callable[[str], Bundle]
X, N, Y, TWICE = handmade.NAMES


def script(text: str, *flags: str) -> Any:
    """Run an ES module in Node; what it passes to ``show`` comes back."""
    text = "const show = (value) => console.log(JSON.stringify(value));\n" + text
    done = subprocess.run(
        ["node", *flags, "--input-type=module", "-e", text],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def module(made: Bundle) -> str:
    return json.dumps(made.file("model.mjs").as_uri())


def test_run_and_descriptions(made: Made) -> None:
    result = script(f"""
        import {{ load }} from {module(made("wasm-simd"))};
        const model = await load();
        const [x, n] = model.inputs.map((tensor) => tensor.name);
        const first = model.run({{ [x]: new Float32Array(1000).fill(1),
          [n]: BigInt64Array.of(21n) }});
        const kept = first.y[5];
        const second = model.run({{ [x]: new Float32Array(1000).fill(-2),
          [n]: BigInt64Array.of(-1n) }});
        show({{ inputs: model.inputs, outputs: model.outputs, variant: model.variant,
          y: [...first.y], same: kept === first.y[5], twice: [`${{first.twice[0]}}`,
          `${{second.twice[0]}}`], types: [first.y.constructor.name, first.twice.constructor.name],
          promise: first instanceof Promise }});
    """)
    assert result["inputs"] == [
        {"name": X, "shape": [1, 1000], "dtype": "float32"},
        {"name": N, "shape": [], "dtype": "int64"},
    ]
    assert [t["name"] for t in result["outputs"]] == [Y, TWICE]
    exact = handmade.expected({X: np.ones((1, 1000), np.float32), N: np.array(21)})
    assert np.allclose(result["y"], exact[Y][0], atol=1e-6)
    assert result["same"] and result["twice"] == ["42", "-2"] and not result["promise"]
    assert result["types"] == ["Float32Array", "BigInt64Array"]
    assert result["variant"] == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{[x]: good}", "input 'count' is missing"),
        ("{[x]: good, [n]: one, z: one}", "unknown input 'z'"),
        ("{[x]: [1, 2], [n]: one}", "must be a Float32Array, got Array"),
        ("{[x]: new Float64Array(1000), [n]: one}", "must be a Float32Array, got Float64Array"),
        ("{[x]: undefined, [n]: one}", "must be a Float32Array, got undefined"),
        ("{[x]: new Float32Array(999), [n]: one}", "must have 1000 elements [1,1000], got 999"),
    ],
)
def test_wrong_inputs_say_what_is_wrong(made: Made, values: str, message: str) -> None:
    result = script(f"""
        import {{ load }} from {module(made("wasm-simd"))};
        const model = await load();
        const [x, n] = model.inputs.map((tensor) => tensor.name);
        const [good, one] = [new Float32Array(1000), BigInt64Array.of(1n)];
        try {{ model.run({values}); show("no error"); }}
        catch (error) {{ show([error.message, error instanceof TypeError ||
          error instanceof RangeError]); }}
    """)
    assert message in result[0] and result[1]


def test_relaxed_build_is_taken_where_the_engine_has_it(made: Made) -> None:
    text = f"""
        import {{ load }} from {module(made("wasm-relaxed"))};
        const model = await load();
        const [x, n] = model.inputs.map((tensor) => tensor.name);
        const {{ y }} = model.run({{ [x]: new Float32Array(1000).fill(1),
          [n]: BigInt64Array.of(1n) }});
        show([model.variant, [...y]]);
    """
    flags = node.command(Target.load("wasm-relaxed"))[1:]
    exact = handmade.expected({X: np.ones((1, 1000), np.float32), N: np.array(21)})[Y][0]
    variant, values = script(text, *flags)
    assert variant == "relaxed" and np.allclose(values, exact, atol=1e-6)
    if flags:  # this Node has it behind a flag
        variant, values = script(text)
        assert variant == "" and np.allclose(values, exact, atol=1e-6)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - one server at a time

    def log_message(self, *arguments: object) -> None:
        self.asked.append(self.path)


@pytest.fixture
def served(made: Made) -> Iterator[tuple[str, list[str]]]:
    _Quiet.asked = []
    handler = functools.partial(_Quiet, directory=str(made("wasm-relaxed").path.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", _Quiet.asked
        server.shutdown()


@pytest.mark.slow
def test_load_from_elsewhere(made: Made, served: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = served
    folder = made("wasm-relaxed").path
    for base in (f"{address}/{folder.name}", f"{address}/{folder.name}/", str(folder),
                 folder.as_uri()):  # fmt: skip
        result = script(f"""
            import {{ load }} from {module(made("wasm-relaxed"))};
            show([(await load({json.dumps(base)})).outputs.length,
                  (await load(new URL({json.dumps(folder.as_uri())}))).outputs.length]);
        """)
        assert result == [2, 2]
    # Only what is used is downloaded: here the plain build.
    assert sorted(set(asked)) == [f"/{folder.name}/model.wasm", f"/{folder.name}/weights.bin"]
    result = script(f"""
        import {{ load }} from {module(made("wasm-relaxed"))};
        try {{ await load("{address}/nothing"); }} catch (error) {{ show(error.message); }}
    """)
    assert "HTTP 404" in result


def test_other_weights_are_refused(made: Made, tmp_path: Path) -> None:
    for name in ("model.mjs", "model.wasm", "weights.bin"):
        data = bytearray(made("wasm-simd").file(name).read_bytes())
        if name == "weights.bin":
            data[9] ^= 1
        (tmp_path / name).write_bytes(data)
    result = script(f"""
        import {{ load }} from {json.dumps((tmp_path / "model.mjs").as_uri())};
        try {{ await load(); }} catch (error) {{ show(error.message); }}
    """)
    assert "does not belong" in result


def test_two_models_side_by_side(made: Made) -> None:
    result = script(f"""
        import * as a from {module(made("wasm-simd"))};
        import * as b from {module(made("wasm-relaxed"))};
        const models = await Promise.all([a.load(), a.load(), b.load()]);
        const [x, n] = models[0].inputs.map((tensor) => tensor.name);
        show(models.map((model, i) => Number(model.run({{ [x]: new Float32Array(1000),
          [n]: BigInt64Array.of(BigInt(i)) }}).twice[0])));
    """)
    assert result == [0, 2, 4]


def test_module_is_small_and_imports_nothing_at_load(made: Made) -> None:
    text = made("wasm-simd").file("model.mjs").read_text()
    assert not re.search(r"^\s*import\b(?!\()", text, re.MULTILINE)
    assert made("wasm-simd").manifest["files"]["model.wasm"]["bytes"] < 2000


def test_a_page_downloads_no_more_than_it_uses(made: Made) -> None:
    text = made("wasm-relaxed").file("model.mjs").read_bytes()
    assert len(gzip.compress(text, 9)) < 2400
    code = text.partition(b"\n\n")[2]
    assert b"class Model" in code and b"\n//" not in code
    assert b"warm_up" not in code  # its kernels are light
    assert b"PROBES = {}" in made("wasm-simd").file("model.mjs").read_bytes()
    exports = script(f"""
        import {{ readFileSync }} from "node:fs";
        const code = readFileSync({json.dumps(str(made("wasm-relaxed").file("model.wasm")))});
        show(WebAssembly.Module.exports(new WebAssembly.Module(code)).map(({{ name }}) => name));
    """)
    api = ("arena_bytes", "init", "run", "step_count", "step")
    assert sorted(exports) == sorted([*(f"net_{n}" for n in api), "memory", "__heap_base"])


def optimised(made: Bundle) -> int:
    """How many functions V8 optimises when the model is loaded and nothing run."""
    text = f"""
        import {{ load }} from {module(made)};
        await load();
        setTimeout(() => {{}}, 1500);
    """
    flags = ["--trace-wasm-compilation-times", "--input-type=module", "-e", text]
    done = subprocess.run(["node", *flags], capture_output=True, text=True, check=True)
    return len(re.findall(r"#\d+ using TurboFan", done.stdout))


def test_heavy_kernels_are_warm_before_the_first_run(tmp_path: Path) -> None:
    """The one of two convolutions that is worth it; results are as ever, whenever that is done."""
    rng = np.random.default_rng(1)
    wide, narrow = (
        rng.standard_normal(s).astype(np.float32) for s in ((64, 16, 3, 3), (1, 64, 1, 1))
    )
    nodes = [oh.make_node("Conv", ["x", "wide"], ["h"], pads=[1, 1, 1, 1], name="heavy"),
             oh.make_node("Conv", ["h", "narrow"], ["y"], name="light")]  # fmt: skip
    graph = oh.make_graph(
        nodes, "g", [oh.make_tensor_value_info("x", 1, [1, 16, 28, 28])],
        [oh.make_tensor_value_info("y", 1, [1, 1, 28, 28])],
        [onnx.numpy_helper.from_array(*w) for w in ((wide, "wide"), (narrow, "narrow"))],
    )  # fmt: skip
    onnx.save(oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)]), tmp_path / "m.onnx")
    made = pipeline.compile(tmp_path / "m.onnx", target="wasm-simd", output=tmp_path / "b",
                            prefix="net")  # fmt: skip
    exports, first, again = script(f"""
        import {{ load }} from {module(made)};
        import {{ readFileSync }} from "node:fs";
        const code = readFileSync({json.dumps(str(made.file("model.wasm")))});
        const exports = WebAssembly.Module.exports(new WebAssembly.Module(code));
        const model = await load();
        const x = Float32Array.from({{length: 16 * 28 * 28}}, (_, i) => Math.sin(i));
        const run = () => [...model.run({{ x }}).y];
        show([exports.map(({{ name }}) => name), run(), run()]);
    """)
    assert "net_warm_up" in exports and first == again
    x = np.sin(np.arange(16 * 28 * 28)).astype(np.float32).reshape(1, 16, 28, 28)
    np.testing.assert_array_equal(np.float32(first), made.run({"x": x}, "wasmtime")["y"].ravel())
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(first, session.run(None, {"x": x})[0].ravel(), atol=1e-3)
    driver = made.file("model.mjs").read_text()
    assert driver.count("exports.net_warm_up();") == 1
    assert optimised(made) == 1


@pytest.mark.parametrize("name", ["wasm-simd", "wasm-relaxed"])
def test_no_module_has_imports(made: Made, name: str) -> None:
    built = made(name)
    modules = [str(built.file(file)) for file in built.manifest["files"] if ".wasm" in file]
    flags = node.command(built.target)[1:]
    result = script(f"""
        import {{ readFileSync }} from "node:fs";
        const modules = {json.dumps(modules)}.map((f) => new WebAssembly.Module(readFileSync(f)));
        show(modules.map((m) => WebAssembly.Module.imports(m).length));
    """, *flags)  # fmt: skip
    assert result == [0] * len(modules) and len(modules) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("x", "y"), naming.STRANGE)
def test_names_are_only_names(tmp_path: Path, x: str, y: str) -> None:
    made = naming.named(tmp_path / "b", x, y)
    values = {x: np.ones((1, handmade.COUNT), np.float32), N: np.array(21)}
    exact = handmade.expected({X: values[x], N: values[N]})[Y]
    got = made.run(values, runner="node")  # through bench.mjs
    assert np.allclose(got[y], exact, atol=1e-6) and got[TWICE] == 42
    assert not np.allclose(got[y], exact[:, ::-1], atol=1e-6)
    assert made.bench(runner="node", runs=3, against=["none"]).timing.runs >= 3
    measure = made.file("measure.mjs").as_uri()
    result = script(f"""
        import {{ load }} from {module(made)};
        import {{ checkGolden, readNpz, sample }} from {json.dumps(measure)};
        import {{ readFileSync }} from "node:fs";
        const model = await load();
        const names = model.inputs.map((tensor) => tensor.name);
        const results = model.run(sample(model));
        const file = readFileSync({json.dumps(str(made.file("golden.npz")))});
        const golden = readNpz(new Uint8Array(file));
        show([names, Object.keys(results), checkGolden(model, golden).max_abs]);
    """)
    assert result[:2] == [[x, N], [y, TWICE]]
    assert result[2] is not None and result[2] < 1e-5


def test_types_name_every_tensor(made: Made) -> None:
    text = made("wasm-simd").file("model.d.mts").read_text()
    assert f"{json.dumps(X)}: Float32Array;" in text
    assert '"twice": BigInt64Array;' in text
    assert "@" not in text
