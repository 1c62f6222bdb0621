// Runs exported models in the JavaScript runtimes and compares them with Python's outputs.
// `./test` installs and makes what this needs.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import path from "node:path";
import { test } from "node:test";

import { AutoModelForSequenceClassification, env, Tensor } from "@huggingface/transformers";
import * as node from "onnxruntime-node";
import * as web from "onnxruntime-web";

const TOLERANCE = 1e-4; // of the largest output
const MADE = path.join(import.meta.dirname, "made");
const expected = JSON.parse(readFileSync(path.join(MADE, "expected.json"), "utf8"));
const ARRAYS = { float32: Float32Array, int64: BigInt64Array };

const RUNTIMES = { "onnxruntime-node": node, "onnxruntime-web (wasm)": web };

for (const [label, ort] of Object.entries(RUNTIMES)) {
  for (const [name, { inputs, outputs }] of Object.entries(expected)) {
    const feeds = tensors(ort.Tensor, inputs);
    const adapters = {};
    for (const key of Object.keys(outputs)) adapters[key] = adapterOf(ort.Tensor, name, key);

    test(`${label}: ${name}, exported, computes what Python computes, however swapped`, async () => {
      const session = await open(ort, `${name}.required.onnx`);
      for (const key of ["neutral", "trained", "neutral", "trained"]) {
        close(await session.run({ ...feeds, ...adapters[key] }), outputs[key]);
      }
      await assert.rejects(session.run(feeds), "it must be fed");
    });

    test(`${label}: ${name}, not exported, does not take an adapter`, async () => {
      const session = await open(ort, `${name}.adapted.onnx`);
      close(await session.run(feeds), outputs.neutral);
      const fed = () => session.run({ ...feeds, ...adapters.trained });
      if (ort === web) await assert.rejects(fed(), /invalid input/);
      else close(await fed(), outputs.neutral); // silently
    });
  }
}

env.allowRemoteModels = false;
env.localModelPath = path.join(MADE, "transformers");

test("transformers.js: an exported model takes adapters, one not exported ignores them", async () => {
  const name = "peft_bert_lora_default_ts";
  const { inputs, outputs } = expected[name];
  const fed = (key) => ({ ...tensors(Tensor, inputs), ...adapterOf(Tensor, name, key) });
  const load = (form) => AutoModelForSequenceClassification.from_pretrained(form, { dtype: "fp32" });
  const required = await load("required");
  for (const key of ["neutral", "trained", "neutral"]) {
    close({ logits: (await required(fed(key))).logits }, outputs[key]);
  }
  await assert.rejects(required(tensors(Tensor, inputs)), /[Mm]issing/);
  const adapted = await load("adapted");
  close({ logits: (await adapted(tensors(Tensor, inputs))).logits }, outputs.neutral);
  close({ logits: (await adapted(fed("trained"))).logits }, outputs.neutral); // silently
});

/** A session on one of the files that `make.py` made. */
function open(ort, file) {
  return ort.InferenceSession.create(readFileSync(path.join(MADE, file)), { logSeverityLevel: 3 });
}

/** Tensors from arrays that are written as JSON. */
function tensors(kind, described) {
  const made = {};
  for (const [name, { type, dims, data }] of Object.entries(described)) {
    const values = type === "int64" ? data.map(BigInt) : data;
    made[name] = new kind(type, new ARRAYS[type](values), dims);
  }
  return made;
}

/** The tensors of a `.safetensors` file, by the name of the input that takes them. */
function adapterOf(kind, name, key) {
  const file = readFileSync(path.join(MADE, `${name}.${key}.safetensors`));
  const start = 8 + Number(file.readBigUInt64LE(0));
  const { __metadata__: _, ...entries } = JSON.parse(file.toString("utf8", 8, start));
  const made = {};
  for (const [input, { dtype, shape, data_offsets: offsets }] of Object.entries(entries)) {
    assert.equal(dtype, "F32");
    const bytes = new Uint8Array(file.subarray(start + offsets[0], start + offsets[1])); // aligned
    made[input] = new kind("float32", new Float32Array(bytes.buffer), shape);
  }
  return made;
}

/** See that outputs are Python's. */
function close(found, wanted) {
  for (const [name, { dims, data }] of Object.entries(wanted)) {
    assert.deepEqual(Array.from(found[name].dims), dims);
    const largest = Math.max(...data.map(Math.abs));
    const apart = Math.max(...data.map((value, i) => Math.abs(value - found[name].data[i])));
    assert.ok(apart <= TOLERANCE * largest, `${name} is ${apart} from Python's`);
  }
}
