// Times a wasm bundle and onnxruntime-web in turn, in one process. Used by latency_node.py.
//
//   node latency_node.mjs JOB.json
//
// JOB: {bundle, model, ort, runs, rounds, inputs: {name: {shape, file}}}; float32 inputs only.
// Prints {ours: {medians, minima, variant}, ort: {medians, minima, threads}, snr_db}.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const job = JSON.parse(readFileSync(process.argv[2], "utf8"));
const require = createRequire(pathToFileURL(`${job.ort}/package.json`));
const ort = await import(pathToFileURL(require.resolve("onnxruntime-web")));
const web = ort.default?.InferenceSession ? ort.default : ort;
web.env.wasm.numThreads = 1;
web.env.logLevel = "error";

const { load } = await import(pathToFileURL(`${job.bundle}/model.mjs`));
const model = await load(`${job.bundle}/`);
const session = await web.InferenceSession.create(readFileSync(job.model), {
  executionProviders: ["wasm"],
  graphOptimizationLevel: "all",
});

const values = {};
const feeds = {};
for (const [name, { shape, file }] of Object.entries(job.inputs)) {
  const raw = readFileSync(file);
  values[name] = new Float32Array(raw.buffer.slice(raw.byteOffset, raw.byteOffset + raw.byteLength));
  feeds[name] = new web.Tensor("float32", values[name], shape);
}

const ours = () => model.run(values);
const theirs = () => session.run(feeds);

async function time(inference, runs) {
  const ms = [];
  for (let i = 0; i < runs; i++) {
    const start = performance.now();
    await inference();
    ms.push(performance.now() - start);
  }
  ms.sort((a, b) => a - b);
  return { median: ms[ms.length >> 1], min: ms[0] };
}

// Both must compute the same, or the times mean nothing.
const [mine, reference] = [ours(), await theirs()];
let [signal, noise] = [0, 0];
for (const [name, tensor] of Object.entries(reference))
  tensor.data.forEach((value, i) => {
    signal += Number(value) ** 2;
    noise += Number(value - mine[name][i]) ** 2;
  });

const result = {
  ours: { medians: [], minima: [], variant: model.variant || "simd" },
  ort: { medians: [], minima: [], threads: web.env.wasm.numThreads },
  snr_db: noise > 0 ? 10 * Math.log10(signal / noise) : 999,
};
// The first calls run V8's baseline code.
await time(ours, 20);
await time(theirs, 20);
for (let round = 0; round < job.rounds; round++)
  for (const [key, inference] of [["ours", ours], ["ort", theirs]]) {
    const { median, min } = await time(inference, Math.max(1, Math.floor(job.runs / job.rounds)));
    result[key].medians.push(median);
    result[key].minima.push(min);
  }
console.log(JSON.stringify(result));
process.exit(0);
