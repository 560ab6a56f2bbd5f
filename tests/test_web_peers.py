"""Engines from npm beside wasm bundles, with stand-ins for the packages: what they are given, what
comes back, and what is said where they fail."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import helper, save

from edgepipe import peers, pipeline
from edgepipe.benchmark import bench
from edgepipe.bundle import Bundle
from edgepipe.errors import EdgepipeError, UserError
from edgepipe.peers._web import Web

ORT = """
export const env = { wasm: {} };
export class Tensor {
  constructor(type, data, shape) { Object.assign(this, { type, data, shape }); }
}
export const InferenceSession = { async create(model, options) {
  if (model.length < 20 || options.executionProviders[0] !== "wasm" || env.wasm.numThreads !== 1)
    throw new Error("not what was asked for");
  return { async run({ x }) {
    if (x.shape.join() !== "1,2,3,4") throw new Error(`shape ${x.shape}`);
    return { y: { data: x.data.map((v) => Math.max(v, 0)) } };
  } };
} };
"""
LITERT = """
let sign = 1;
export async function loadLiteRt(path, { threads }) {
  // Another build, another result.
  if (path.endsWith("/wasm/litert_wasm_compat_internal.js")) sign = -1;
  else if (!path.endsWith("/wasm/") || threads) throw new Error("not what was asked for");
}
export class Tensor { constructor(data, shape) { Object.assign(this, { data, shape }); } }
export const loadAndCompile = async (url) => {
  const text = await (await fetch(url)).text();
  if (text !== "a tflite file") throw new Error(`a model of '${text}'`);
  return { async run(x) {
    if (x.shape.join() !== "1,3,4,2") throw new Error(`shape ${x.shape}`);
    const values = x.data.map((v) => sign * Math.max(v, 0));
    return [{ toTypedArray: () => values, delete() {} }];
  } };
};
"""
TFJS = """
const tensor = (data, shape) => ({ shape, values: data, data: async () => data, dispose() {} });
const tf = {
  tensor,
  env: () => ({ set(flag, on) { tf.oneThread = flag.includes("MULTITHREAD") && !on; } }),
  setBackend: async (name) => name === "wasm" && tf.oneThread,
  tidy: (compute) => compute(),
  relu(x) {
    if (x.shape.join() !== "1,3,4,2") throw new Error(`shape ${x.shape}`);
    return tensor(x.values.map((v) => Math.max(v, 0)), x.shape);
  },
  wasm: { setWasmPaths(path) { tf.oneThread &&= path.endsWith("/tfjs-backend-wasm/dist/"); } },
};
if (typeof module === "undefined") globalThis.tf = tf;
else module.exports = tf;
"""


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("relu")
    ends = [helper.make_tensor_value_info(n, 1, [1, 2, 3, 4]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "net.onnx")
    return pipeline.compile(folder / "net.onnx", target="wasm-simd", output=folder / "b")


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder, the current one, with all packages."""
    for name, files in {
        "onnxruntime-web": {"dist/ort.node.min.mjs": ORT, "dist/ort.wasm.min.mjs": ORT},
        "@litertjs/core": {"dist/index.js": LITERT},
        "@tensorflow/tfjs-core": {
            "dist/tf-core.min.js": TFJS, "package.json": '{"main": "dist/tf-core.min.js"}',
        },
        "@tensorflow/tfjs-backend-wasm": {
            "dist/tf-backend-wasm.min.js": "",
            "package.json": '{"version": "9.8", "main": "dist/tf-backend-wasm.min.js"}',
        },
    }.items():  # fmt: skip
        package = tmp_path / "node_modules" / name
        for file, text in {"package.json": '{"version": "9.8", "type": "module"}', **files}.items():
            (package / file).parent.mkdir(parents=True, exist_ok=True)
            (package / file).write_text(text)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "node_modules"


@pytest.mark.slow
@pytest.mark.needs_node
def test_ort_web_in_node(relu: Bundle, npm: Path) -> None:
    (peer,) = bench(relu, runner="node", runs=5, against=("ort-web",)).peers
    assert peer.engine == "onnxruntime-web 9.8" and peer.median_ms > 0
    assert peer.snr_db == np.inf
    engine = npm / "onnxruntime-web/dist/ort.node.min.mjs"
    engine.write_text(ORT.replace("Math.max(v, 0)", "Math.max(v, 0.5)"))
    (peer,) = bench(relu, runner="node", runs=5, against=("ort-web",)).peers
    assert peer.snr_db is not None and peer.snr_db < 20
    engine.write_text(ORT.replace("1,2,3,4", "9"))
    with pytest.raises(EdgepipeError, match="failed in Node: Error: shape 1,2,3,4"):
        bench(relu, runner="node", runs=5, against=("ort-web",))


@pytest.mark.needs_node
def test_large_outputs_come_whole_from_node(npm: Path) -> None:
    """A pipe holds 64 KB, and Node ends without waiting for its reader."""
    text = ORT.replace("x.data.map((v) => Math.max(v, 0))", "new Float32Array(40000).fill(0.25)")
    (npm / "onnxruntime-web/dist/ort.node.min.mjs").write_text(text)
    outputs = [SimpleNamespace(name="y", shape=(40000,))]
    case: Any = SimpleNamespace(runner="node", bundle=SimpleNamespace(outputs=outputs))
    x = np.zeros((1, 2, 3, 4), np.float32)
    web = Web(case, "ort-web", npm / "onnxruntime-web", bytes(20), {"x": x})
    assert np.array_equal(web.engine("it", "").outputs()["y"], np.full(40000, 0.25))


@pytest.mark.slow
@pytest.mark.needs_node
def test_tfjs_in_node(relu: Bundle, npm: Path) -> None:
    (peer,) = bench(relu, runner="node", runs=5, against=("tfjs",)).peers
    assert peer.engine == "TensorFlow.js 9.8, wasm" and peer.median_ms > 0
    assert peer.snr_db == np.inf
    engine = npm / "@tensorflow/tfjs-core/dist/tf-core.min.js"
    engine.write_text(TFJS.replace("Math.max(v, 0)", "Math.max(v, 0.5)"))
    (peer,) = bench(relu, runner="node", runs=5, against=("tfjs",)).peers
    assert peer.snr_db is not None and peer.snr_db < 20
    engine.write_text(TFJS.replace('name === "wasm"', "false"))
    with pytest.raises(EdgepipeError, match="the wasm backend of tfjs does not start"):
        bench(relu, runner="node", runs=5, against=("tfjs",))


@pytest.mark.slow
@pytest.mark.needs_browser
def test_all_in_a_browser(relu: Bundle, npm: Path) -> None:
    file = npm.parent / "net.tflite"
    file.write_text("a tflite file")
    against = ("ort-web", "tfjs", f"litert-js={file}")
    result = bench(relu, runner="browser", runs=5, against=against)
    assert [p.engine for p in result.peers] == [
        "onnxruntime-web 9.8", "TensorFlow.js 9.8, wasm", "LiteRT.js 9.8, net.tflite",
    ]  # fmt: skip
    assert [p.snr_db for p in result.peers] == [np.inf] * 3
    plain = npm / "@litertjs/core/wasm/litert_wasm_compat_internal.js"
    plain.parent.mkdir()
    plain.write_text("")
    own, other = bench(relu, runner="browser", runs=5, against=against[2:]).peers
    assert (own.engine, own.snr_db) == ("LiteRT.js 9.8, net.tflite", np.inf)
    assert other.engine == "LiteRT.js 9.8, plain SIMD, net.tflite"
    assert other.snr_db is not None and other.snr_db < 0
    file.write_text("something else")
    with pytest.raises(EdgepipeError, match="a model of 'something else'"):
        bench(relu, runner="browser", runs=5, against=against[2:])


@pytest.mark.slow
@pytest.mark.needs_browser
def test_first_results_from_memory(relu: Bundle, npm: Path) -> None:
    """The engine's code is fetched before the clock starts: its address is asked for once."""
    fetched = """
      const [first, second] = [await fetch(`${env.wasm.wasmPaths}ort-wasm-simd-threaded.wasm`),
        await fetch(`${env.wasm.wasmPaths}other.wasm`)];
      if (await first.text() !== "code" || second.ok) throw new Error("not from memory");
      return { async run"""
    engine = npm / "onnxruntime-web/dist/ort.wasm.min.mjs"
    engine.write_text(ORT.replace("return { async run", fetched, 1))
    (npm / "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm").write_text("code")
    case = peers.Case(relu, runner="browser")
    (made,) = peers.engines(case, "ort-web", "browser")
    assert made.first_ms is not None and 0 < made.first_ms() < 60_000
    (npm / "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm").write_text("other code")
    with pytest.raises(EdgepipeError, match="not from memory"):
        made.first_ms()


@pytest.mark.needs_node
def test_what_is_missing_is_named(
    relu: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="npm install onnxruntime-web"):
        bench(relu, runner="node", runs=5, against=("ort-web",))
    with pytest.raises(UserError, match="runs as 'browser' does"):
        bench(relu, runner="node", runs=5, against=("litert-js",))
    with pytest.raises(UserError, match="npm install @tensorflow/tfjs-core @tensorflow/tfjs-back"):
        bench(relu, runner="node", runs=5, against=("tfjs",))
