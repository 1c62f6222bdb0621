// Training in onnxruntime-web: a model that `onnx-adapt train-graph` wrote, and what it carries.

import * as ort from "onnxruntime-web";

/**
 * Opens a training step and runs the model of its first values.
 * @param {ArrayBuffer} step the step's file
 * @param {ArrayBuffer} start the file beside it, `.start.onnx`
 * @param {(sentence: string) => number[]} tokenize from a sentence to ids
 */
export async function openLearner(step, start, tokenize, options) {
  const first = await ort.InferenceSession.create(start, options);
  const carried = await first.run({});
  await first.release();
  return new Learner(await ort.InferenceSession.create(step, options), carried, tokenize);
}

class Learner {
  constructor(session, carried, tokenize) {
    Object.assign(this, { session, carried, tokenize });
  }

  /** Takes one step on sentences and their classes; gives the loss before it. */
  async learn(sentences, classes, rate) {
    const found = await this.#run(sentences, classes, rate);
    for (const name of Object.keys(this.carried)) this.carried[name] = found[`next:${name}`];
    return found.loss.data[0];
  }

  /** The probability of each class, for each sentence. A step is run and not kept. */
  async classify(sentences) {
    const { head } = await this.#run(sentences, sentences.map(() => 0), 0);
    const classes = head.dims[1];
    return sentences.map((_, row) => {
      return softmax([...head.data.slice(row * classes, (row + 1) * classes)]);
    });
  }

  #run(sentences, classes, rate) {
    const ids = sentences.map(this.tokenize);
    const longest = Math.max(...ids.map((row) => row.length));
    const padded = (value) => ids.flatMap((row) => pad(row.map(value), longest));
    return this.session.run({
      ...this.carried,
      input_ids: integers(padded((id) => id), [ids.length, longest]),
      attention_mask: integers(padded(() => 1), [ids.length, longest]),
      labels: integers(classes, [ids.length]),
      rate: new ort.Tensor("float32", [rate], []),
    });
  }
}

const pad = (row, length) => [...row, ...Array(length - row.length).fill(0)];
const integers = (values, dims) => new ort.Tensor("int64", values.map(BigInt), dims);

function softmax(values) {
  const largest = Math.max(...values);
  const powers = values.map((value) => Math.exp(value - largest));
  const total = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / total);
}
