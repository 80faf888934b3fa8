// One level of a version in a worker of its own: it fetches, verifies and decodes, then answers.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { levelCount, readBlob } from "./version.js";
import { engineWeights } from "./weights.js";

const WEIGHTS_FILE = "weights.bin"; // what the graph calls its external data
let session;
let layout;

async function open({ store, manifest, level }) {
  if (!(level >= 0 && level < levelCount(manifest))) throw new Error(`level ${level}: ${manifest.name} has ${levelCount(manifest)}`);
  const engine = manifest.engines.find((one) => one.engine === "onnx");
  const read = (blob) => readBlob(store, blob, (bytes) => postMessage({ kind: "fetched", bytes }));
  const graph = await read(engine.graph);
  const level0 = await engineWeights(manifest, await read(engine.layout), read, level);
  layout = level0.layout;
  session = await ort.InferenceSession.create(graph, {
    executionProviders: ["wasm"],
    logSeverityLevel: 4,
    externalData: [{ path: WEIGHTS_FILE, data: level0.weights }],
    extra: engine.activations ? {} : { session: { disable_quant_qdq: "1" } },
  });
}

async function run({ input, shape }) {
  const began = performance.now();
  const { [layout.answer]: answer } = await session.run({ [layout.image]: new ort.Tensor("float32", input, shape) });
  return { logits: answer.data, milliseconds: performance.now() - began };
}

self.onmessage = async ({ data }) => {
  try {
    if (data.kind === "open") {
      await open(data);
      postMessage({ kind: "ready", id: data.id });
    } else {
      postMessage({ kind: "answer", id: data.id, ...(await run(data)) });
    }
  } catch (error) {
    postMessage({ kind: "failed", id: data.id, message: error.message ?? String(error) });
  }
};
