// What the graph takes at a level: integers on the full-bit grid, and the level's biases (nestquant/engines/weights.py).
import { readShard, readTensors } from "./shard.js";

const product = (sizes) => sizes.reduce((left, right) => left * right, 1);

/** Return the bytes of the graph's external data at a level, and the layout. `read`: blob -> its bytes, verified. */
export async function engineWeights(manifest, layoutBytes, read, level) {
  const { tensors: values, metadata } = readTensors(layoutBytes);
  if (metadata.format !== "nestquant.engine-layout.v1") throw new Error(`engine layout: format ${metadata.format}`);
  const layout = JSON.parse(metadata.layout);
  const layers = new Map(manifest.layers.map((layer) => [layer.name, layer]));
  const shards = new Map();
  const shardAt = async (group, step) => {
    const blob = manifest.groups[group].levels[step];
    if (!shards.has(blob.digest)) shards.set(blob.digest, readShard(await read(blob)));
    return shards.get(blob.digest);
  };
  const size = Math.max(0, ...layout.tensors.map((tensor) => tensor.offset + sizeOf(tensor)));
  const weights = new Uint8Array(size);
  for (const tensor of layout.tensors) {
    const place = weights.subarray(tensor.offset, tensor.offset + sizeOf(tensor));
    if (tensor.role === "bias") {
      const value = values.get(`${tensor.name}/level${Math.min(level, tensor.levels - 1)}`);
      if (value?.bytes.length !== place.length) throw new Error(`engine layout: the bias of "${tensor.name}" is not there whole`);
      place.set(value.bytes);
      continue;
    }
    const layer = layers.get(tensor.layer);
    if (layer === undefined) throw new Error(`engine layout: "${tensor.name}" is of layer "${tensor.layer}", which is not there`);
    const whole = await fullGridIntegers(layer, shardAt, level);
    if (whole.length !== place.length) throw new Error(`engine layout: "${tensor.name}" has ${place.length} bytes, its layer ${whole.length}`);
    const octets = new Uint8Array(whole.buffer, whole.byteOffset, whole.length);
    if (tensor.order === "in_out") exchange(octets, tensor.shape, place);
    else place.set(octets);
  }
  return { weights, layout };
}

const sizeOf = (tensor) => product(tensor.shape) * { int8: 1, int32: 4, float32: 4 }[tensor.dtype];

async function fullGridIntegers(layer, shardAt, level) {
  const channels = layer.kind === "conv_transpose2d" ? layer.shape[1] * layer.groups : layer.shape[0];
  const row = product(layer.shape) / channels;
  const full = layer.bits[0];
  const value = new Int8Array(channels * row);
  for (let step = 0; step <= Math.min(level, layer.bits.length - 1); step += 1) {
    const grid = layer.bits.at(-1 - step);
    const bits = step === 0 ? grid : grid - layer.bits.at(-step) + 1; // each low part has one bit more than its shift
    for (const { group, start, stop } of layer.pieces) {
      const shard = await shardAt(group, step);
      const part = shard.integers(`${layer.name}[${start}:${stop}]/level${step}`, (stop - start) * row, bits);
      add(value.subarray(start * row, stop * row), part, full - grid, layer.name);
    }
  }
  return value;
}

function add(value, part, shift, name) {
  for (let at = 0; at < part.length; at += 1) {
    const sum = value[at] + (part[at] << shift);
    value[at] = sum;
    if (value[at] !== sum) throw new Error(`layer "${name}": its levels add up beyond 8 bits; they are not of one version`);
  }
}

/** Write [b, a, ...] of `source` as [a, b, ...], the shape given. */
function exchange(source, shape, place) {
  const [first, second] = shape;
  const inner = product(shape.slice(2));
  for (let a = 0; a < first; a += 1) {
    for (let b = 0; b < second; b += 1) {
      const from = (b * first + a) * inner;
      place.set(source.subarray(from, from + inner), (a * second + b) * inner);
    }
  }
}
