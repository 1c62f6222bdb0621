// The page: choose a sound and an adapter, see what the base and the adapted model say.

import * as ort from "onnxruntime-web";

import { openModel } from "./adapted-model.js";
import { AdaptError, readAdapter } from "./adapter-file.js";

const SHAPE = [1, 900, 120]; // rows, frames, mel bands
const element = (id) => document.getElementById(id);
const dropped = new Map(); // {file, option} from the reader's disk, by name
const opened = open();
let shown = ""; // the adapter whose results are on the page
let last = Promise.resolve(); // runs follow each other, however fast the choices come

async function open() {
  const version = ort.env.versions.web;
  element("about").textContent = `By onnxruntime-web ${version} in this page, on WebAssembly.`;
  return openModel(await fetchFile("rating.onnx"), { logSeverityLevel: 3 });
}

async function update() {
  element("results").ariaBusy = "true";
  const mine = (last = last.then(show));
  await mine;
  if (mine === last) element("results").ariaBusy = "false";
}

/** Runs base and adapter on the chosen sound. */
async function show() {
  const file = element("adapter").value;
  tell(null);
  try {
    const model = await opened;
    const feeds = { input_1: await sound(element("sound").value) };
    const swap = file ? await swapTo(model, file) : { adapter: null };
    const base = await timed(() => model.run(feeds));
    const adapted = await timed(() => model.run(feeds, swap.adapter));
    showRating("base", base);
    showRating("adapted", adapted);
    element("adapted-name").textContent = file || "No adapter";
    element("swap-time").textContent = inMilliseconds(swap.time);
    shown = file;
  } catch (error) {
    tell(error);
    dropped.get(file)?.option?.remove();
    dropped.delete(file);
    element("adapter").value = shown;
  }
}

/** All that a swap takes: read a file, check it. The session stays as it is. */
async function swapTo(model, file) {
  const buffer = await (dropped.get(file)?.file.arrayBuffer() ?? fetchFile(file));
  const begin = performance.now();
  const adapter = readAdapter(buffer, file);
  model.check(adapter);
  return { adapter, time: performance.now() - begin };
}

async function sound(name) {
  return new ort.Tensor("float32", new Float32Array(await fetchFile(`${name}.f32`)), SHAPE);
}

async function fetchFile(name) {
  const response = await fetch(`made/${name}`);
  if (!response.ok) throw new AdaptError(`made/${name} is not there: run make.py first.`);
  return response.arrayBuffer();
}

/** The rating, and the fastest of three runs: the first ones of a page are slow. */
async function timed(run) {
  let [rating, time] = [NaN, Infinity];
  for (let i = 0; i < 3; i += 1) {
    const begin = performance.now();
    const [output] = Object.values(await run());
    time = Math.min(time, performance.now() - begin);
    rating = output.data[0];
  }
  return { rating, time };
}

function showRating(id, { rating, time }) {
  element(id).value = String(rating);
  element(id).textContent = rating.toFixed(2);
  element(`${id}-meter`).value = rating;
  element(`${id}-time`).textContent = inMilliseconds(time);
}

function inMilliseconds(time) {
  if (time === undefined) return "–";
  return time < 0.1 ? "under 0.1 ms" : `${time.toFixed(1)} ms`;
}

function tell(error) {
  if (error && !(error instanceof AdaptError)) console.error(error);
  element("message").textContent = error?.message ?? "";
  element("message").hidden = !error;
}

function add(file) {
  if (!file) return;
  const list = element("adapter");
  const known = [...list.options].some((option) => option.value === file.name);
  const option = known ? dropped.get(file.name)?.option : new Option(file.name);
  if (!known) list.add(option);
  dropped.set(file.name, { file, option });
  list.value = file.name;
  void update();
}

for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault(); // or the browser opens the file
    element("drop").classList.toggle("over", type === "dragover");
    if (type === "drop") add(event.dataTransfer.files[0]);
  });
}
element("file").addEventListener("change", ({ target }) => {
  add(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
});
element("sound").addEventListener("change", update);
element("adapter").addEventListener("change", update);
element("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  void update();
});
await update();
