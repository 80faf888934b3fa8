// A shard's integers: storage/shard.py says what the file holds. Sizes are checked before a payload is touched.
import { decompress } from "./node_modules/fzstd/esm/index.mjs";

const MAX_HEADER_BYTES = 16 << 20;
const ITEM_BYTES = { U8: 1, I8: 1, BOOL: 1, U16: 2, I16: 2, F16: 2, U32: 4, I32: 4, F32: 4, U64: 8, I64: 8, F64: 8 };
const product = (sizes) => sizes.reduce((left, right) => left * right, 1);

/** Return `{tensors: Map(name -> {dtype, shape, bytes}), metadata}` of a safetensors file. */
export function readTensors(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const headerBytes = bytes.length < 8 ? -1 : Number(view.getBigUint64(0, true));
  if (headerBytes < 0 || headerBytes > Math.min(MAX_HEADER_BYTES, bytes.length - 8)) {
    throw new Error(`shard: header of ${headerBytes} bytes in a file of ${bytes.length}`);
  }
  const { __metadata__: metadata = {}, ...header } = JSON.parse(text(bytes.subarray(8, 8 + headerBytes)));
  const payload = bytes.subarray(8 + headerBytes);
  const tensors = new Map();
  let offset = 0;
  // By offset: an object puts keys that are numbers first, whatever their order in the file.
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(header).sort(
    ([, one], [, other]) => one.data_offsets[0] - other.data_offsets[0],
  )) {
    const stop = offset + product(shape) * ITEM_BYTES[dtype];
    if (offsets[0] !== offset || offsets[1] !== stop || !(stop <= payload.length)) {
      throw new Error(`shard: tensor "${name}": data_offsets ${offsets}, expected ${offset},${stop}`);
    }
    tensors.set(name, { dtype, shape, bytes: payload.subarray(offset, stop) });
    offset = stop;
  }
  if (offset !== payload.length) throw new Error(`shard: ${payload.length} bytes of payload, its header has ${offset}`);
  return { tensors, metadata };
}

/** Return a shard: `integers(key, count, bits)` decodes a piece to an Int8Array. */
export function readShard(bytes) {
  const { tensors, metadata } = readTensors(bytes);
  if (metadata.format !== "nestquant.shard.v1") throw new Error(`shard: format ${metadata.format}, expected nestquant.shard.v1`);
  if (!["packed", "zstd"].includes(metadata.codec)) throw new Error(`shard: codec ${metadata.codec}, expected packed or zstd`);
  if ([...tensors.keys()].sort().join() !== "index,integers,tensors") throw new Error(`shard: tensors ${[...tensors.keys()]}`);
  const frame = tensors.get("index").bytes;
  const index = JSON.parse(text(decodeFrame(frame, frameSize(frame), "index")));
  const section = tensors.get("integers").bytes;
  const pieces = new Map();
  let offset = 0;
  for (const [key, size, bits, ...shape] of index.integers) {
    if (pieces.has(key) || !(size >= 0) || offset + size > section.length) throw new Error(`shard: integers "${key}": ${size} bytes`);
    pieces.set(key, { bits, count: product(shape), payload: section.subarray(offset, offset + size) });
    offset += size;
  }
  if (offset !== section.length) throw new Error(`shard: ${section.length} bytes of integers, the index has ${offset}`);
  return {
    codec: metadata.codec,
    integers(key, count, bits) {
      const piece = pieces.get(key);
      if (piece === undefined || piece.count !== count || piece.bits !== bits) {
        const actual = piece === undefined ? "none" : `${piece.count} of ${piece.bits} bits`;
        throw new Error(`shard: ${count} integers of ${bits} bits expected under "${key}", seen ${actual}`);
      }
      return metadata.codec === "packed" ? unpack(piece.payload, bits, count, key) : inRange(piece, key);
    },
  };
}

function inRange({ payload, count, bits }, key) {
  const octets = decodeFrame(payload, count, key);
  const values = new Int8Array(octets.buffer, octets.byteOffset, count);
  const bound = 1 << (bits - 1);
  if (values.some((value) => value < -bound || value >= bound)) throw new Error(`shard: "${key}" holds integers beyond ${bits} bits`);
  return values;
}

/** Undo nestquant/packing.py: the values are one stream of k-bit two's complements, the lowest bit first. */
export function unpack(packed, bits, count, key = "") {
  const expected = Math.ceil((count * bits) / 8);
  if (packed.length !== expected) throw new Error(`shard: integers "${key}": ${packed.length} bytes packed, expected ${expected}`);
  const used = (count * bits) % 8;
  if (used && packed[expected - 1] >> used) throw new Error(`shard: integers "${key}": padding bits are not zero`);
  const values = new Int8Array(count);
  const shift = 32 - bits;
  let word = 0;
  let ready = 0;
  let next = 0;
  for (let at = 0; at < count; at += 1) {
    if (ready < bits) {
      word |= packed[next] << ready; // at most 7 + 8 bits
      next += 1;
      ready += 8;
    }
    values[at] = (word << shift) >> shift;
    word >>>= bits;
    ready -= bits;
  }
  return values;
}

/** Return the content size that a zstd frame's header claims (RFC 8878, 3.1.1.1), which ours always have. */
export function frameSize(frame) {
  const view = new DataView(frame.buffer, frame.byteOffset, frame.byteLength);
  if (frame.length < 6 || view.getUint32(0, true) !== 0xfd2fb528) throw new Error("shard: not a zstd frame");
  const descriptor = frame[4];
  const single = (descriptor >> 5) & 1;
  const at = 5 + (single ? 0 : 1) + [0, 1, 2, 4][descriptor & 3];
  const bytes = [single, 2, 4, 8][descriptor >> 6];
  if (bytes === 0 || frame.length < at + bytes) throw new Error("shard: a zstd frame that does not say its size");
  if (bytes === 1) return view.getUint8(at);
  if (bytes === 2) return view.getUint16(at, true) + 256;
  return bytes === 4 ? view.getUint32(at, true) : Number(view.getBigUint64(at, true));
}

function decodeFrame(frame, size, key) {
  const claimed = frameSize(frame);
  if (claimed !== size || (key === "index" && size > MAX_HEADER_BYTES)) {
    throw new Error(`shard: "${key}": a zstd frame of ${claimed} bytes, expected ${size}`);
  }
  let data;
  try {
    data = decompress(frame);
  } catch (error) {
    throw new Error(`shard: "${key}": the zstd frame does not decode (${error.message})`);
  }
  if (data.length !== size) throw new Error(`shard: "${key}": ${data.length} bytes decoded, expected ${size}`);
  return data;
}

const text = (bytes) => new TextDecoder("utf-8", { fatal: true }).decode(bytes);
