// The page that learns: two kinds of sentences from its reader, and then a sentence of either.

import * as ort from "onnxruntime-web";

import { openLearner } from "./learner.js";
import { openVocabulary } from "./word-pieces.js";

const STEPS = 20;
const RATE = 3e-3;
const element = (id) => document.getElementById(id);
const lines = (id) => element(id).value.split("\n").map((line) => line.trim()).filter(Boolean);
let last = Promise.resolve(); // the model runs once at a time

async function open() {
  const [step, start, words] = await Promise.all([
    fetchFile("step.onnx"),
    fetchFile("step.start.onnx"),
    fetchFile("vocab.txt"),
  ]);
  const vocabulary = openVocabulary(new TextDecoder().decode(words));
  return openLearner(step, start, vocabulary, { logSeverityLevel: 3 });
}

async function fetchFile(name) {
  const response = await fetch(`made/${name}`);
  if (!response.ok) throw new Error(`made/${name} is not there: run make_learn.py first.`);
  return response.arrayBuffer();
}

async function learn(learner) {
  const kinds = [lines("first"), lines("second")];
  if (kinds.some((sentences) => !sentences.length)) {
    throw new Error("Write at least one sentence of each kind.");
  }
  const classes = kinds.flatMap((sentences, kind) => sentences.map(() => kind));
  for (let step = 1; step <= STEPS; step += 1) {
    const begin = performance.now();
    const loss = await learner.learn(kinds.flat(), classes, RATE);
    const time = (performance.now() - begin).toFixed(0);
    element("progress").value = step / STEPS;
    element("loss").textContent = `loss ${loss.toFixed(3)}, ${time} ms a step`;
  }
  await classify(learner);
}

async function classify(learner) {
  const sentence = element("sentence").value.trim();
  if (!sentence) return;
  const [[first, second]] = await learner.classify([sentence]);
  const share = (value) => `${(100 * value).toFixed(0)} %`;
  element("answer").textContent = `first kind ${share(first)}, second kind ${share(second)}`;
}

/** Runs an action when the one before has ended, and shows what goes wrong. */
function run(action) {
  last = last.then(async () => {
    document.body.ariaBusy = "true";
    element("message").hidden = true;
    try {
      await action(await opened);
    } catch (error) {
      element("message").textContent = error.message;
      element("message").hidden = false;
    }
    document.body.ariaBusy = "false";
  });
}

const opened = open();
run(async () => {
  const version = ort.env.versions.web;
  element("about").textContent = `By onnxruntime-web ${version} in this page, on WebAssembly.`;
});
element("teach").addEventListener("submit", (event) => {
  event.preventDefault();
  run(learn);
});
element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run(classify);
});
globalThis.learner = opened; // for the test
