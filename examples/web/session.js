// A version that answers at one level and goes to another. A request ends at the level at which it began.

/** A worker with one level, until its last answer. */
class LevelWorker {
  #worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  #waiting = new Map();
  #requests = 0;
  #retired = false;

  constructor(store, manifest, level, onFetched) {
    this.level = level;
    this.opened = new Promise((resolve, reject) => this.#waiting.set("open", { resolve, reject }));
    this.#worker.onerror = (event) => this.#fail(new Error(event.message ?? "the worker does not load"));
    this.#worker.onmessage = ({ data }) => {
      if (data.kind === "fetched") return onFetched(data.bytes);
      const { resolve, reject } = this.#waiting.get(data.id);
      this.#waiting.delete(data.id);
      if (data.kind === "failed") reject(new Error(data.message));
      else resolve({ ...data, level });
      return this.#endIfIdle();
    };
    this.#worker.postMessage({ kind: "open", id: "open", store, manifest, level });
  }

  run(input, shape) {
    this.#requests += 1;
    const id = this.#requests;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ kind: "run", id, input, shape });
    });
  }

  /** End with the last request: a worker's end is all that gives WebAssembly's memory back. */
  retire() {
    this.#retired = true;
    this.#endIfIdle();
  }

  #endIfIdle() {
    if (this.#retired && this.#waiting.size === 0) this.#worker.terminate();
  }

  #fail(error) {
    for (const { reject } of this.#waiting.values()) reject(error);
    this.#waiting.clear();
  }
}

export class Session {
  #store;
  #serving;

  constructor(store, manifest, serving) {
    this.#store = store;
    this.manifest = manifest;
    this.#serving = serving;
  }

  /** Fetch, verify and load a level; 0 is part-bit. `onFetched` is told of the bytes that came over the network. */
  static async open(store, manifest, level = 0, onFetched = () => {}) {
    return new Session(store, manifest, await load(store, manifest, level, onFetched));
  }

  get level() {
    return this.#serving.level;
  }

  /** Answer float32 inputs of `shape` [batch, channels, height, width]: `{logits, level, milliseconds}`. */
  run(input, shape) {
    return this.#serving.run(input, shape);
  }

  /** Answer what comes after this at `level`; whatever fails leaves the level as it was. */
  async setLevel(level, onFetched = () => {}) {
    if (level === this.level) return;
    const next = await load(this.#store, this.manifest, level, onFetched);
    const before = this.#serving;
    this.#serving = next;
    before.retire();
  }

  close() {
    this.#serving.retire();
  }
}

async function load(store, manifest, level, onFetched) {
  const worker = new LevelWorker(store, manifest, level, onFetched);
  try {
    await worker.opened;
  } catch (error) {
    worker.retire();
    throw error;
  }
  return worker;
}
