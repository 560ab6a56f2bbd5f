// Times a model in another engine, in Node or in a page: job.json beside this file says which.
// The result, {median_ms, min_ms, first_ms, outputs}, is printed or posted. With `job.code`, files
// of the engine that are fetched beforehand, first_ms is the time from bytes in memory to a result.

const node = typeof process !== "undefined" && Boolean(process.versions?.node);
const base = new URL("./", import.meta.url);

async function bytes(name) {
  const url = new URL(name, base);
  if (node) return new Uint8Array(await (await import("node:fs/promises")).readFile(url));
  return new Uint8Array(await (await fetch(url)).arrayBuffer());
}

const ENGINES = {
  async "ort-web"(model, inputs, modules) {
    const folder = `${modules}/onnxruntime-web/dist/`;
    const found = await import(`${folder}ort.${node ? "node" : "wasm"}.min.mjs`);
    const ort = found.InferenceSession ? found : found.default;
    Object.assign(ort.env.wasm, node ? { numThreads: 1 } : { numThreads: 1, wasmPaths: folder });
    ort.env.logLevel = "error";
    const options = { executionProviders: ["wasm"], graphOptimizationLevel: "all" };
    const session = await ort.InferenceSession.create(model, options);
    const feeds = Object.fromEntries(
      inputs.map(({ name, shape, data }) => [name, new ort.Tensor("float32", data, shape)]));
    return async () => {
      const results = await session.run(feeds);
      return Object.fromEntries(Object.entries(results).map(([name, { data }]) => [name, data]));
    };
  },

  async "litert-js"(model, inputs, modules, build) {
    const litert = await import(`${modules}/@litertjs/core/dist/index.js`);
    await litert.loadLiteRt(`${modules}/@litertjs/core/wasm/${build}`, { threads: false });
    const url = URL.createObjectURL(new Blob([model]));
    const loaded = await litert.loadAndCompile(url, { accelerator: "wasm" });
    const given = inputs.map(({ shape, data }) => new litert.Tensor(data, shape));
    return async () => {
      const results = await loaded.run(given.length === 1 ? given[0] : given);
      return results.map((result) => {
        const values = result.toTypedArray().slice();
        result.delete();
        return values;
      });
    };
  },

  async tfjs(model, inputs, modules) {
    const { open } = await import("./tfjs.mjs");
    return open(model, inputs, modules, node);
  },
};

// The engine's scripts are loaded, its code and data in memory: what `fetch` then gives.
async function prepare({ scripts, code }, modules) {
  for (const name of scripts) await import(`${modules}/${name}`);
  const files = new Map();
  for (const name of code) files.set(`${modules}/${name}`, await bytes(`modules/${name}`));
  const fetched = globalThis.fetch;
  const headers = { "Content-Type": "application/wasm" };
  globalThis.fetch = async (what, ...rest) => {
    const data = files.get(new URL(what.url ?? what, base).href);
    return data ? new Response(data, { headers }) : fetched(what, ...rest);
  };
}

async function main() {
  const job = JSON.parse(new TextDecoder().decode(await bytes("job.json")));
  const modules = node ? job.modules : new URL("modules", base).href;
  const inputs = await Promise.all(job.inputs.map(async ({ name, shape, file }) =>
    ({ name, shape, data: new Float32Array((await bytes(file)).slice().buffer) })));
  const model = await bytes("model.bin");
  if (job.code) await prepare(job, modules);
  const began = performance.now();
  const infer = await ENGINES[job.engine](model, inputs, modules, job.build);
  let outputs = await infer();
  const first_ms = performance.now() - began;
  for (let i = 1; i < job.warmup; i++) await infer();
  const ms = [];
  for (let i = 0; i < job.runs; i++) {
    const start = performance.now();
    outputs = await infer();
    ms.push(performance.now() - start);
  }
  ms.sort((a, b) => a - b);
  const plain = Array.isArray(outputs) ? outputs.map((data) => Array.from(data, Number))
    : Object.fromEntries(Object.entries(outputs).map(([k, data]) => [k, Array.from(data, Number)]));
  return JSON.stringify(
    { median_ms: ms[ms.length >> 1], min_ms: ms[0], first_ms, outputs: plain });
}

const post = (name, body) => fetch(new URL(name, base), { method: "POST", body });
try {
  const result = await main();
  if (node) await new Promise((written) => process.stdout.write(`${result}\n`, written));
  else await post("result", result);
} catch (error) {
  if (node) console.error(String(error));
  else await post("error", String(error.stack ?? error));
  if (node) process.exitCode = 2;
}
if (node) process.exit(); // engines may keep workers
