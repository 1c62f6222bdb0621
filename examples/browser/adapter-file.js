// Reads adapter files: `.safetensors`, and ONNX Runtime's `.onnx_adapter`.

import * as ort from "onnxruntime-web";

/** Something a person can do something about: `message` is for the page. */
export class AdaptError extends Error {}

const ARRAYS = { float32: Float32Array, float16: Uint16Array, float64: Float64Array };
const SAFETENSORS = { F32: "float32", F16: "float16", F64: "float64" };
export const ONNX_TYPES = { 1: "float32", 10: "float16", 11: "float64" };

/** A tensor of a copy of `bytes`, which may lie anywhere in a file. */
export function tensorOf(type, bytes, dims) {
  if (!ARRAYS[type]) throw new AdaptError("it has tensors other than float16, 32 and 64");
  return new ort.Tensor(type, new ARRAYS[type](bytes.slice().buffer), dims);
}

/** A tensor of zeros. */
export function zeros(type, dims) {
  const count = dims.reduce((product, dim) => product * dim, 1);
  return new ort.Tensor(type, new ARRAYS[type](count), dims);
}

/**
 * Reads an adapter.
 * @param {ArrayBuffer} buffer the file
 * @param {string} name what to call it in messages
 * @returns {{name: string, fingerprint: string, activations: object, tensors: object}}
 *   tensors by the name of the input that takes them
 */
export function readAdapter(buffer, name) {
  const bytes = new Uint8Array(buffer);
  try {
    const isFlatbuffer = text(bytes.subarray(4, 8)) === "TORT";
    return { name, ...(isFlatbuffer ? readOnnxAdapter(bytes) : readSafetensors(bytes)) };
  } catch (error) {
    const why = error instanceof AdaptError ? error.message : "it is damaged, or another kind of file";
    throw new AdaptError(`${name} cannot be read as .safetensors or .onnx_adapter: ${why}.`);
  }
}

function readSafetensors(bytes) {
  const start = 8 + Number(viewOf(bytes).getBigUint64(0, true));
  const { __metadata__: metadata, ...entries } = JSON.parse(text(bytes.subarray(8, start)));
  const data = bytes.subarray(start);
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: offsets }] of Object.entries(entries)) {
    tensors[name] = tensorOf(SAFETENSORS[dtype], data.subarray(...offsets), shape);
  }
  const { fingerprint = "", slots = {} } = JSON.parse(metadata?.onnx_adapt ?? "{}");
  const activations = {};
  for (const [slot, record] of Object.entries(slots)) activations[slot] = record.activation;
  return { fingerprint, activations, tensors };
}

// FlatBuffers: Adapter{format_version, adapter_version, model_version, parameters} of
// Parameter{name, dims, data_type, raw_data}. The model's version is a short fingerprint.
function readOnnxAdapter(bytes) {
  const view = viewOf(bytes);
  const follow = (at) => at + view.getUint32(at, true);
  const field = (table, index) => {
    const layout = table - view.getInt32(table, true);
    const known = 4 + 2 * index < view.getUint16(layout, true);
    const offset = known ? view.getUint16(layout + 4 + 2 * index, true) : 0;
    return offset && table + offset;
  };
  const vector = (table, index) => {
    const at = follow(field(table, index));
    return { start: at + 4, count: view.getUint32(at, true) };
  };
  const blob = (table, index) => {
    const { start, count } = vector(table, index);
    return bytes.subarray(start, start + count);
  };
  const root = follow(0);
  const list = vector(root, 3);
  const tensors = {};
  for (let i = 0; i < list.count; i += 1) {
    const parameter = follow(list.start + 4 * i);
    const { start, count } = vector(parameter, 1);
    const dim = (_, axis) => Number(view.getBigInt64(start + 8 * axis, true));
    const type = ONNX_TYPES[view.getInt32(field(parameter, 2), true)];
    const dims = Array.from({ length: count }, dim);
    tensors[text(blob(parameter, 0))] = tensorOf(type, blob(parameter, 3), dims);
  }
  const version = field(root, 2) && view.getInt32(field(root, 2), true);
  return { fingerprint: version ? `short:${version}` : "", activations: {}, tensors };
}

const viewOf = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
const text = (bytes) => new TextDecoder("utf-8", { fatal: true }).decode(bytes);
