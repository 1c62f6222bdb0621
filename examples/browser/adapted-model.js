// An adapted model in one onnxruntime-web session, with another adapter for every run.

import * as ort from "onnxruntime-web";

import { AdaptError } from "./adapter-file.js";
import { takeDefaults } from "./take-defaults.js";

/**
 * Opens a model that onnx-adapt made.
 * @param {ArrayBuffer} buffer the model's file; it is changed, so read it for this alone
 * @param {ort.InferenceSession.SessionOptions} options for ONNX Runtime
 */
export async function openModel(buffer, options) {
  const bytes = new Uint8Array(buffer);
  const { manifest, defaults } = takeDefaults(bytes);
  const session = await ort.InferenceSession.create(bytes, options);
  return new AdaptedModel(session, manifest, defaults);
}

class AdaptedModel {
  constructor(session, manifest, defaults) {
    Object.assign(this, { session, manifest, defaults });
  }

  /** Runs with an adapter that `check` let pass; without one, the model as its file is. */
  run(feeds, adapter = null) {
    return this.session.run({ ...this.defaults, ...adapter?.tensors, ...feeds });
  }

  /** Throws unless an adapter fits this model. `onnx-adapt check` looks at more. */
  check(adapter) {
    const why = [...this.misfits(adapter)][0];
    if (why) throw new AdaptError(`${adapter.name} does not fit this model: ${why}.`);
  }

  *misfits({ fingerprint, activations, tensors }) {
    if (!sameBase(fingerprint, this.manifest.base.fingerprint)) {
      yield "it was made for another base model";
    }
    const { slots, weights } = this.manifest;
    const names = new Set(weights.map((weight) => weight.name));
    for (const { name, parts, activation } of slots) {
      for (const part of parts) names.add(`adapter.${name}.${part}`);
      const trained = activations[name] || activation;
      if (trained !== activation) yield `slot ${name} has ${activation}, it needs ${trained}`;
    }
    for (const name of Object.keys(tensors)) {
      if (!names.has(name) || !this.defaults[name]) yield `the model has no weight ${name}`;
    }
    const bottlenecks = {}; // by symbolic dimension: the same in all weights of a slot
    for (const { name, type, shape } of this.session.inputMetadata) {
      if (!names.has(name)) continue;
      if (!tensors[name]) {
        yield `it has no ${name}`;
        continue;
      }
      const { type: its, dims } = tensors[name];
      if (its !== type) yield `${name} is ${its}, not ${type}`;
      const size = (dim, i) => (Number.isInteger(dim) ? dim : (bottlenecks[dim] ??= dims[i]));
      const right = shape.map(size).join(", ");
      const actual = dims.join(", ");
      if (actual !== right) yield `${name} is of shape [${actual}], not [${right}]`;
    }
  }
}

/** Whether two fingerprints can be of one base; a file may have 31 bits of it, or none. */
function sameBase(adapters, models) {
  if (!adapters.startsWith("short:")) return adapters === "" || adapters === models;
  const digits = models.slice("sha256:".length, "sha256:".length + 8);
  return Number(adapters.slice("short:".length)) === parseInt(digits, 16) >>> 1;
}
