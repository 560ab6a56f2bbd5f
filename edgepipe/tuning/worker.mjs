// Measures pairs of WebAssembly kernels in V8. A line with a file's path comes in, one with the
// times of both kernels per round, in ns, goes out.
import fs from "node:fs";
import readline from "node:readline";

const WARM_MS = 60; // V8's baseline code is replaced meanwhile
const ROUND_MS = 0.8; // short rounds meet the same neighbours on the core
const ROUNDS = 60;

function measure(path) {
  const module = new WebAssembly.Module(fs.readFileSync(path));
  const { candidate_fill: fill, candidate_run: run } = new WebAssembly.Instance(module).exports;
  fill();
  const timed = (which, times) => {
    const start = performance.now();
    run(which, times);
    return (performance.now() - start) / times;
  };
  let once = Infinity;
  for (let which = 0; which < 2; which++) {
    for (const start = performance.now(); performance.now() - start < WARM_MS;) {
      const taken = timed(which, 1);
      if (which === 0) once = Math.min(once, taken);
    }
  }
  const times = Math.max(1, Math.floor(ROUND_MS / Math.max(once, 1e-6)));
  const rounds = [];
  for (let round = 0; round < ROUNDS; round++) {
    rounds.push([timed(0, times) * 1e6, timed(1, times) * 1e6]);
  }
  return { rounds };
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  let answer;
  try {
    answer = measure(line);
  } catch (error) {
    answer = { error: String(error) };
  }
  console.log(JSON.stringify(answer));
}
