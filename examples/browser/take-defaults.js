// Makes the slot weights of an adapted model plain required inputs, and keeps their defaults.
//
// Slot weights are initializers that are inputs as well: ONNX Runtime lets a run feed them, or
// leaves them at what the file holds. onnxruntime-web 1.30 takes required inputs only, so the
// initializers are hidden from it.

import { AdaptError, ONNX_TYPES, tensorOf, zeros } from "./adapter-file.js";

// Field numbers in ONNX's protobuf messages.
const MODEL = { graph: 7, metadata: 14 };
const GRAPH = { initializer: 5, input: 11, reserved: 9 };
const TENSOR = { dims: 1, type: 2, floats: 4, name: 8, raw: 9, external: 13 };
const [VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES] = [0, 1, 2, 5];

/**
 * Hides the initializers that runs may feed. One byte of each is changed in `bytes`.
 * @param {Uint8Array} bytes an adapted model
 * @returns {{manifest: object, defaults: object}} the model's record of its slots, and a
 *   tensor for each hidden initializer that does what it did
 */
export function takeDefaults(bytes) {
  const model = [...fields(bytes)];
  const graph = model.find((field) => field.number === MODEL.graph)?.body;
  const manifest = manifestOf(model);
  if (!graph || !manifest) throw new AdaptError("The model has no adapter slots.");

  const all = [...fields(graph)];
  const nameOf = ({ body }) => text([...fields(body)][0].body);
  const inputs = new Set(all.filter((field) => field.number === GRAPH.input).map(nameOf));
  const replaceable = new Set(manifest.weights.map((weight) => weight.name));
  const defaults = {};
  for (const { number, tag, body } of all) {
    if (number !== GRAPH.initializer) continue;
    const parts = [...fields(body)];
    const name = text(last(parts, TENSOR.name).body);
    // Old models list every initializer as an input; only the adapters' own are taken.
    if (!inputs.has(name) || !(name.startsWith("adapter.") || replaceable.has(name))) continue;
    defaults[name] = tensorFrom(parts, name);
    // Readers skip a field that ONNX does not have. No byte moves, so all lengths stay right.
    graph[tag] = (GRAPH.reserved << 3) | LENGTH;
  }
  return { manifest, defaults };
}

function manifestOf(model) {
  for (const { number, body } of model) {
    if (number !== MODEL.metadata) continue;
    const [key, value] = [...fields(body)].map((field) => text(field.body));
    // A key that has its default is not in the record.
    if (key === "onnx_adapt") return { weights: [], ...JSON.parse(value) };
  }
  return null;
}

function tensorFrom(parts, name) {
  if (last(parts, TENSOR.external)) {
    throw new AdaptError(`${name} is in another file: make the model whole, onnx-adapt pack.`);
  }
  const dims = parts
    .filter((field) => field.number === TENSOR.dims)
    .flatMap((field) => (field.body ? packed(field.body) : [field.value]));
  const type = ONNX_TYPES[last(parts, TENSOR.type).value];
  // A slot without weights has a bottleneck of 0. One unit of zeros adds as much, and runs on
  // WebGPU too, which takes no empty tensor.
  if (dims.includes(0)) return zeros(type, dims.map((dim) => dim || 1));
  const data = last(parts, TENSOR.raw) ?? last(parts, TENSOR.floats);
  return tensorOf(type, data.body, dims);
}

/** The fields of a protobuf message; `tag` is where one starts, `body` views its bytes. */
function* fields(bytes) {
  for (let at = 0; at < bytes.length; ) {
    const tag = at;
    let value, size;
    [value, at] = varint(bytes, at);
    const [number, wire] = [value >>> 3, value & 7];
    if (wire === VARINT) {
      [value, at] = varint(bytes, at);
      yield { number, tag, value };
      continue;
    }
    if (wire === LENGTH) [size, at] = varint(bytes, at);
    else size = { [EIGHT_BYTES]: 8, [FOUR_BYTES]: 4 }[wire];
    if (!(at + size <= bytes.length)) throw new AdaptError("This is not a whole ONNX model.");
    yield { number, tag, body: bytes.subarray(at, at + size) };
    at += size;
  }
}

function varint(bytes, at) {
  for (let value = 0, scale = 1; ; scale *= 128) {
    const byte = bytes[at++];
    value += (byte & 127) * scale;
    if (!(byte & 128)) return [value, at];
  }
}

function packed(bytes) {
  const values = [];
  for (let value, at = 0; at < bytes.length; values.push(value)) {
    [value, at] = varint(bytes, at);
  }
  return values;
}

const last = (parts, number) => parts.findLast((field) => field.number === number);
const text = (bytes) => new TextDecoder().decode(bytes);
