// From a model's name to verified bytes. A digest guards against damage; who published a manifest is known only
// where its digest came to the page some other way (`digest`): the page does not verify signatures.

const MAX_MANIFEST_BYTES = 64 << 20;
const MAX_TAG_BYTES = 4096;
const SCHEMAS = [1, 2, 3, 4]; // 4 adds deltas, which this page does without: shards stand whole beside them
const CACHE = "nestquant-blobs";

/** Return the manifest of a tag or number. `digest`: what its SHA-256 must be; "" takes the store's word. */
export async function resolve(store, name, ref, digest = "") {
  if (!/^[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?$/.test(name)) throw new Error(`model name "${name}": expected a-z 0-9 . _ -`);
  let version = Number(ref);
  let expected = digest;
  if (!/^[0-9]+$/.test(ref)) {
    const raw = await fetchBytes(`${store}models/${name}/tags/${encodeURIComponent(ref)}.json`, MAX_TAG_BYTES);
    const tag = JSON.parse(new TextDecoder().decode(raw));
    if (digest && tag.digest !== digest) {
      throw new Error(`tag "${ref}" of ${name} names ${tag.digest}, expected ${digest}; open it by its number`);
    }
    version = tag.version;
    expected = tag.digest;
  }
  if (!Number.isInteger(version) || version < 1) throw new Error(`version ${version} of ${name}: expected 1 or more`);
  const key = `models/${name}/versions/${String(version).padStart(8, "0")}.json`;
  const raw = await fetchBytes(store + key, MAX_MANIFEST_BYTES);
  if (expected) await checkDigest(raw, expected, `manifest of ${name} version ${version}`);
  const manifest = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(raw));
  if (manifest.name !== name || manifest.version !== version) {
    throw new Error(`manifest of ${name} version ${version}: it says ${manifest.name} version ${manifest.version}`);
  }
  if (!SCHEMAS.includes(manifest.schema_version)) {
    throw new Error(`manifest of ${name}: schema ${manifest.schema_version}, expected ${SCHEMAS.join(", ")}`);
  }
  if (!(manifest.engines ?? []).some((one) => one.engine === "onnx")) {
    throw new Error(`${name} version ${version} has no graph; 'nestquant export ${name}@${version} --engine onnx' makes one`);
  }
  return manifest;
}

/** Return how many levels a version has: the further ones refine level 0. */
export const levelCount = (manifest) => Math.max(...manifest.groups.map((group) => group.levels.length));

/** Return a blob's bytes, verified, from the browser's cache or the store. `onFetched` is told of bytes as they come. */
export async function readBlob(store, blob, onFetched = () => {}) {
  const hex = blob.digest.replace(/^sha256:/, "");
  const url = new URL(`${store}blobs/sha256/${hex.slice(0, 2)}/${hex}`, self.location.href).href;
  const cache = await caches.open(CACHE);
  const stored = await cache.match(url);
  if (stored) {
    const bytes = new Uint8Array(await stored.arrayBuffer());
    if (await isBlob(bytes, blob)) return bytes;
    await cache.delete(url);
  }
  const bytes = await fetchBytes(url, blob.size_bytes, onFetched);
  if (bytes.length !== blob.size_bytes) throw new Error(`${blob.digest}: ${bytes.length} bytes, expected ${blob.size_bytes}`);
  await checkDigest(bytes, blob.digest, "blob");
  // What cannot be kept (a full disk) is fetched again next time.
  await cache.put(url, new Response(bytes)).catch(() => {});
  return bytes;
}

async function fetchBytes(url, maxBytes, onFetched = () => {}) {
  const response = await fetch(url, { cache: "no-store" }).catch((error) => {
    throw new Error(`${url} cannot be fetched (${error.message}); does the store allow this page's origin?`);
  });
  if (!response.ok) throw new Error(`${url}: the store answers ${response.status}`);
  const chunks = [];
  let size = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    size += value.length;
    if (size > maxBytes) {
      await reader.cancel();
      throw new Error(`${url}: more than the ${maxBytes} bytes expected`);
    }
    chunks.push(value);
    onFetched(value.length);
  }
  const bytes = new Uint8Array(size);
  let offset = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, offset);
    offset += chunk.length;
  }
  return bytes;
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return `sha256:${Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

const isBlob = async (bytes, blob) => bytes.length === blob.size_bytes && (await sha256(bytes)) === blob.digest;

async function checkDigest(bytes, expected, what) {
  const digest = await sha256(bytes);
  if (digest !== expected) throw new Error(`${what} is damaged: its digest is ${digest}, expected ${expected}`);
}
