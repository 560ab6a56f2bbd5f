// Runs the calls that _tfjs_graph.py lists in TensorFlow.js, as its GraphModel would: constants are
// on the backend once, and a tensor is freed after its last reader.

const OPS = {
  conv: (tf, { pad, strides, dilations, activation }) => (x, filter, bias) =>
    tf.fused.conv2d({ x, filter, bias, strides, dilations, pad, activation }),
  depthwise: (tf, { pad, strides, dilations, activation }) => (x, filter, bias) =>
    tf.fused.depthwiseConv2d({ x, filter, bias, strides, dilations, pad, activation }),
  dense: (tf, { activation, shape }) => (x, b, bias) => {
    const a = x.rank === 2 ? x : tf.reshape(x, [-1, x.shape[x.rank - 1]]);
    const y = tf.fused.matMul({ a, b, bias, activation });
    return x.rank === 2 ? y : tf.reshape(y, shape);
  },
  clip: (tf, { low, high }) => (x) => tf.clipByValue(x, low, high),
  hardSigmoid: (tf, { alpha, beta }) => (x) =>
    tf.clipByValue(tf.add(tf.mul(x, alpha), beta), 0, 1),
  hardSwish: (tf) => (x) => tf.mul(tf.mul(x, tf.relu6(tf.add(x, 3))), 1 / 6),
  gelu: (tf) => (x) => tf.mul(tf.mul(x, 0.5), tf.add(tf.erf(tf.mul(x, Math.SQRT1_2)), 1)),
  leakyRelu: (tf, { alpha }) => (x) => tf.leakyRelu(x, alpha),
  identity: (tf) => (x) => tf.clone(x),
  avgPool: (tf, { window, strides, pad }) => (x) => tf.avgPool(x, window, strides, pad),
  maxPool: (tf, { window, strides, pad }) => (x) => tf.maxPool(x, window, strides, pad),
  pad: (tf, { pads, value }) => (x) => tf.pad(x, pads, value),
  mean: (tf, { axes, keep }) => (x) => tf.mean(x, axes, keep),
  max: (tf, { axes, keep }) => (x) => tf.max(x, axes, keep),
  reshape: (tf, { shape }) => (x) => tf.reshape(x, shape),
  transpose: (tf, { axes }) => (x) => tf.transpose(x, axes),
  slice: (tf, { begin, size }) => (x) => tf.slice(x, begin, size),
  concat: (tf, { axis }) => (...xs) => tf.concat(xs, axis),
  layerNorm: (tf, { epsilon }) => (x, scale, shift) => {
    const { mean, variance } = tf.moments(x, -1, true);
    const y = tf.mul(tf.mul(tf.sub(x, mean), tf.rsqrt(tf.add(variance, epsilon))), scale);
    return shift ? tf.add(y, shift) : y;
  },
  nearest: (tf, { size, corners, half }) => (x) =>
    tf.image.resizeNearestNeighbor(x, size, corners, half),
  bilinear: (tf, { size, corners, half }) => (x) =>
    tf.image.resizeBilinear(x, size, corners, half),
};

async function load(modules, node) {
  const folder = `${modules}/@tensorflow`;
  if (node) {
    const require = (await import("node:module")).createRequire(`${folder}/tfjs-core/package.json`);
    const tf = require("@tensorflow/tfjs-core");
    require("@tensorflow/tfjs-backend-wasm");
    return tf;
  }
  await import(`${folder}/tfjs-core/dist/tf-core.min.js`);
  await import(`${folder}/tfjs-backend-wasm/dist/tf-backend-wasm.min.js`);
  globalThis.tf.wasm.setWasmPaths(`${folder}/tfjs-backend-wasm/dist/`);
  return globalThis.tf;
}

export async function open(model, inputs, modules, node) {
  const tf = await load(modules, node);
  tf.env().set("WASM_HAS_MULTITHREAD_SUPPORT", false); // one thread
  if (!await tf.setBackend("wasm")) throw new Error("the wasm backend of tfjs does not start");
  const length = new DataView(model.buffer, model.byteOffset).getUint32(0, true);
  const graph = JSON.parse(new TextDecoder().decode(model.subarray(4, 4 + length)));
  const numbers = new Float32Array(model.slice(4 + length).buffer);
  const held = Object.fromEntries(Object.entries(graph.constants).map(([name, c]) => {
    const size = c.shape.reduce((a, b) => a * b, 1);
    return [name, tf.tensor(numbers.slice(c.offset / 4, c.offset / 4 + size), c.shape)];
  }));
  for (const { name, shape, data } of inputs) held[name] = tf.tensor(data, shape);
  const steps = graph.steps.map((step) =>
    ({ ...step, run: OPS[step.op] ? OPS[step.op](tf, step) : (...xs) => tf[step.op](...xs) }));
  return async () => {
    const results = tf.tidy(() => {
      const found = { ...held };
      for (const step of steps) {
        const given = step.inputs.map((name) => found[name]);
        found[step.output] = tf.tidy(() => step.run(...given));
        for (const name of step.free) found[name].dispose();
      }
      return graph.outputs.map((name) => found[name]);
    });
    const values = await Promise.all(results.map((result) => result.data()));
    results.forEach((result) => result.dispose());
    return values;
  };
}
