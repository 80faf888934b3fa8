// The page: open part-bit, upgrade in the background, answer every photograph at both levels.
import { photoInput } from "./photo.js";
import { Session } from "./session.js";
import { levelCount, readBlob, resolve } from "./version.js";

const BEST = 3;
const byId = (id) => document.getElementById(id);
const photographs = [];
let session;
let labels;

async function start() {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of query) document.querySelector(`form [name="${CSS.escape(name)}"]`)?.setAttribute("value", value);
  if (!query.get("name")) return;
  const store = `${(query.get("store") || "store/").replace(/\/*$/, "")}/`;
  const manifest = await resolve(store, query.get("name"), query.get("ref") || "latest", query.get("digest") || "");
  if (manifest.labels) labels = new TextDecoder().decode(await readBlob(store, manifest.labels)).trimEnd().split("\n");
  byId("levels").hidden = false;
  const top = levelCount(manifest) - 1;
  say(`${manifest.name} version ${manifest.version}: fetching part-bit`);
  session = await measured("Part-bit", (onFetched) => Session.open(store, manifest, 0, onFetched));
  byId("photographs").disabled = false;
  if (top > 0) {
    say(`${manifest.name} version ${manifest.version} answers part-bit; fetching full-bit`);
    await measured("Full-bit", (onFetched) => session.setLevel(top, onFetched));
    await Promise.all(photographs.map(answerFull));
  }
  say(`${manifest.name} version ${manifest.version} answers full-bit`);
}

/** Run `work` with a row of the table of levels: bytes that came over the network, and how long it took. */
async function measured(name, work) {
  const row = byId("levels").tBodies[0].insertRow();
  const [, bytes, time] = [name, "0", ""].map((text) => Object.assign(row.insertCell(), { textContent: text }));
  const began = performance.now();
  let fetched = 0;
  const result = await work((more) => {
    fetched += more;
    bytes.textContent = fetched.toLocaleString("en");
  });
  time.textContent = `${Math.round(performance.now() - began)} ms`;
  return result;
}

byId("photographs").addEventListener("change", ({ target }) =>
  Promise.all(Array.from(target.files, add)).catch(fail),
);

async function add(file) {
  const row = byId("answers").tBodies[0].insertRow();
  byId("answers").hidden = false;
  const cells = Array.from({ length: 4 }, () => row.insertCell());
  cells[0].append(Object.assign(new Image(), { alt: "", src: URL.createObjectURL(file) }), file.name);
  const photograph = { cells, answers: {}, ...(await photoInput(file, session.manifest.preprocessing)) };
  photographs.push(photograph);
  await answer(photograph);
  // The level may have changed while this request was under way, and after the page went through its photographs.
  await answerFull(photograph);
}

async function answerFull(photograph) {
  if (session.level > 0 && photograph.answers[1] === undefined) await answer(photograph);
}

async function answer(photograph) {
  const { logits, level, milliseconds } = await session.run(photograph.input, photograph.shape);
  const best = ranked(logits);
  const column = level === 0 ? 0 : 1;
  photograph.answers[column] = best;
  const list = document.createElement("ol");
  for (const [name, probability] of best.slice(0, BEST)) {
    list.append(Object.assign(document.createElement("li"), { textContent: `${name} ${percent(probability)}` }));
  }
  photograph.cells[1 + column].replaceChildren(list, `${milliseconds.toFixed(1)} ms`);
  const { 0: part, 1: full } = photograph.answers;
  if (part !== undefined && full !== undefined) photograph.cells[3].textContent = difference(part, full);
}

function difference(part, full) {
  const [before, after] = [part[0][0], full[0][0]];
  const earlier = part.find(([name]) => name === after)[1];
  const moved = `${after} ${percent(earlier)} → ${percent(full[0][1])}`;
  return before === after ? `same class; ${moved}` : `${before} → ${after}; ${moved}`;
}

/** Return classes by their softmax, the likeliest first. */
function ranked(logits) {
  const highest = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - highest));
  const sum = powers.reduce((left, right) => left + right, 0);
  const named = powers.map((power, index) => [labels?.[index] ?? `class ${index}`, power / sum]);
  return named.sort(([, one], [, other]) => other - one);
}

const percent = (value) => `${(100 * value).toFixed(1)}%`;
const say = (text) => (byId("status").textContent = text);

function fail(error) {
  byId("failure").textContent = error.message;
  byId("failure").hidden = false;
}

start().catch(fail);
