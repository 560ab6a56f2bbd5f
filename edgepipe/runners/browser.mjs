// The page that the runner `browser` opens: does the job it fetches, and posts what came of it.

const base = new URL("./", import.meta.url);
const at = (name) => new URL(name, base);

async function post(name, body) {
  const response = await fetch(at(name), { method: "POST", body });
  if (!response.ok) throw new Error(`${name}: HTTP ${response.status}`);
}

async function execute(model, raw, empty, samples, alive) {
  const given = new Uint8Array(await (await fetch(at("inputs.bin"))).arrayBuffer());
  const results = [];
  let from = 0;
  let seen = performance.now();
  for (let sample = 0; sample < samples; sample++) {
    const values = Object.create(null); // a tensor may be called __proto__
    for (const tensor of model.inputs) {
      const bytes = raw((values[tensor.name] = empty(tensor)));
      bytes.set(given.subarray(from, (from += bytes.length)));
    }
    const got = model.run(values);
    for (const { name } of model.outputs) results.push(raw(got[name]));
    if (performance.now() - seen > 1000) {
      await alive();
      seen = performance.now();
    }
  }
  await post("result", new Blob(results));
}

// From bytes in memory to the first result; making up inputs does not count.
async function first(load, sample, names) {
  const files = new Map();
  for (const name of names) {
    const url = at(`bundle/${name}`);
    files.set(url.href, await (await fetch(url)).arrayBuffer());
  }
  globalThis.fetch = async (url) => {
    if (!files.has(`${url}`)) throw new Error(`the page asked for ${url}`);
    return { ok: true, arrayBuffer: async () => files.get(`${url}`) };
  };
  const began = performance.now();
  const model = await load();
  const loaded = performance.now();
  const values = sample(model);
  const given = performance.now();
  model.run(values);
  return performance.now() - given + loaded - began;
}

function brandOf({ userAgentData, userAgent }) {
  const brand = userAgentData?.brands.find(({ brand }) => !/not/i.test(brand));
  if (brand) return `${brand.brand} ${brand.version}`;
  return userAgent.match(/(Firefox|Version)\/\S+/)?.[0] ?? userAgent;
}

async function main() {
  const job = await (await fetch(at("job.json"))).json();
  const alive = () => post("alive", "");
  const { load } = await import(at("bundle/model.mjs"));
  const { empty, features, measure, raw, sample } = await import(at("bundle/measure.mjs"));
  await alive();
  if (job.first !== undefined) {
    const fetched = globalThis.fetch;
    const first_ms = await first(load, sample, job.first)
      .finally(() => (globalThis.fetch = fetched));
    return post("result", JSON.stringify({ first_ms }));
  }
  const model = await load();
  await alive();
  if (job.samples !== undefined) return execute(model, raw, empty, job.samples, alive);
  const engine = brandOf(navigator);
  if (job.profile !== undefined) {
    const { profile } = await import(at("bundle/profile.mjs"));
    const bytes = async (name) => (await fetch(at(`bundle/${name}`))).arrayBuffer();
    return post("result", JSON.stringify({ engine, ...await profile(model, bytes, job.profile) }));
  }
  const values = sample(model);
  const { ms, ...times } = await measure(() => model.run(values), { ...job, alive });
  await post("result", JSON.stringify(
    { ...times, engine, variant: model.variant || "simd", features: features() }));
}

main().catch((error) => post("error", String(error.stack ?? error)));
