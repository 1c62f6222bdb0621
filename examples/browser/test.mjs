// Drives the page in headless Chromium and compares what it computes with Python's results.
// `./test` installs and makes what this needs.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync, readFileSync } from "node:fs";
import path from "node:path";
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";

import { chromium } from "playwright-core";

const TOLERANCE = 1e-5; // of the largest output
const HERE = path.dirname(import.meta.filename);
const read = (name) => readFileSync(path.join(HERE, "made", name));
const expected = JSON.parse(read("expected.json"));
const learned = JSON.parse(read("learned.json"));
const STRICT = "strict.safetensors";
const GENEROUS = "generous.onnx_adapter";
const SLOT = "adapter.mos_estimator_small_1/dense_5/MatMul_add";

/** Everything that is tested: what it is, and how. Each begins with a fresh page. */
const tests = {
  async "the page computes what Python computes, however adapters are swapped"(page) {
    for (const adapter of [STRICT, GENEROUS, "", STRICT, "", GENEROUS]) {
      for (const sound of ["noisy", "clean"]) {
        await choose(page, sound, adapter);
        const wanted = expected.rating[sound];
        close([await rating(page, "adapted")], wanted[adapter || "base"]);
        close([await rating(page, "base")], wanted.base);
        if (!adapter) assert.equal(await rating(page, "adapted"), await rating(page, "base"));
      }
    }
  },

  async "a file from the disk is an adapter: chosen, dropped, run by the keyboard"(page) {
    await page.getByLabel("choose one").setInputFiles(file("mine.bin", read(GENEROUS)));
    await settled(page);
    close([await rating(page, "adapted")], expected.rating.clean[GENEROUS]);
    await dropFile(page, "other.bin", read(STRICT));
    close([await rating(page, "adapted")], expected.rating.clean[STRICT]);
    await choose(page, "noisy", "mine.bin");
    close([await rating(page, "adapted")], expected.rating.noisy[GENEROUS]);
    await page.getByLabel("Adapter", { exact: true }).focus();
    for (const key of ["Home", "Tab", "Enter"]) await page.keyboard.press(key);
    await settled(page);
    close([await rating(page, "adapted")], expected.rating.noisy.base);
  },

  async "a wrong file gets an answer a person understands, and changes nothing"(page) {
    const bottleneck = (down, bias, up) =>
      safetensors({ down: [1, down], down_bias: [bias], up: [up, 1], up_bias: [1] });
    const wrong = [
      ["notes.txt", Buffer.from("not an adapter at all"), /^notes\.txt cannot be read as/],
      ["empty.safetensors", Buffer.alloc(0), /^empty\.safetensors cannot be read/],
      ["half.safetensors", read(STRICT).subarray(0, 350), /half.* damaged/],
      ["half.onnx_adapter", read(GENEROUS).subarray(0, 350), /half.* damaged/],
      ["bert.safetensors", read("bert.safetensors"), /bert.* made for another base model/],
      ["bert.onnx_adapter", read("bert.onnx_adapter"), /bert.* made for another base model/],
      ["less.safetensors", safetensors({ down: [1, 2] }), /it has no adapter\.mos.*\.up\b/],
      ["more.safetensors", safetensors({ gate: [1] }), /no weight adapter\.mos.*\.gate/],
      ["odd.safetensors", bottleneck(2, 2, 3), /\.up is of shape \[3, 1\], not \[2, 1\]/],
    ];
    for (const [name, bytes, answer] of wrong) {
      await dropFile(page, name, bytes);
      assert.match(await page.getByRole("alert").textContent(), answer);
      close([await rating(page, "adapted")], expected.rating.clean[STRICT]);
      assert.equal(await page.locator("#adapter").inputValue(), STRICT);
    }
    await dropFile(page, "good.safetensors", bottleneck(2, 2, 2));
    assert(await page.getByRole("alert").isHidden());
  },

  async "a page without its files says how to make them"(page, complaints) {
    await page.route("**/rating.onnx", (route) => route.fulfill({ status: 404 }));
    await page.reload();
    await settled(page);
    assert.match(await page.getByRole("alert").textContent(), /run make\.py first/);
    assert.match(complaints.pop(), /404/); // the browser's own
  },

  async "a page without its packages says how to install them"(page, complaints) {
    await page.route("**/node_modules/**", (route) => route.fulfill({ status: 404 }));
    await page.reload();
    assert.match(await page.getByRole("alert").textContent(), /run npm ci/);
    assert.match(complaints.pop(), /404/);
  },

  async "a LoRA and a classifier that PEFT trained move a transformer as in Python"(page) {
    const found = await transformer(page, "wasm");
    for (const [name, output] of found) close(output, expected.trained[name]);
    assert.deepEqual(found.at(-1), found[0]);
  },

  async "the same on WebGPU, emulated by the browser on the CPU"(page) {
    await page.route(page.url(), async (route) => {
      const body = (await (await route.fetch()).text()).replace("ort.wasm.", "ort.webgpu.");
      await route.fulfill({ body, contentType: "text/html" });
    });
    await page.reload();
    await settled(page);
    for (const [name, output] of await transformer(page, "webgpu")) {
      close(output, expected.trained[name]);
    }
  },

  async "the page that learns takes the steps that Python takes"(page, complaints) {
    const { texts, rate, ids, losses } = learned;
    await page.goto(new URL("learn.html", page.url()).href);
    await page.locator("body[aria-busy=false]").waitFor();
    const found = await page.evaluate(
      async ([texts, rate, steps]) => {
        const learner = await globalThis.learner;
        const classes = texts.flatMap((kind, number) => kind.map(() => number));
        const ids = texts.flat().map(learner.tokenize);
        const losses = [];
        for (let i = 0; i < steps; i += 1) {
          losses.push(await learner.learn(texts.flat(), classes, rate));
        }
        return { ids, losses };
      },
      [texts, rate, losses.length],
    );
    const padded = found.ids.map((row) => ids[0].map((_, i) => row[i] ?? 0));
    assert.deepEqual(padded, ids);
    for (const [i, loss] of losses.entries()) {
      assert(Math.abs(found.losses[i] - loss) < 1e-3 * losses[0], `${found.losses} ${losses}`);
    }
    assert(losses.at(-1) < 0.5 * losses[0]);
    assert.deepEqual(complaints, []);
  },

  async "the page that learns tells two kinds of sentences apart, and says what it needs"(page) {
    await page.goto(new URL("learn.html", page.url()).href);
    await page.locator("body[aria-busy=false]").waitFor();
    await page.getByRole("button", { name: "Learn" }).click();
    await page.locator("progress[value='1']").waitFor();
    await page.locator("body[aria-busy=false]").waitFor();
    const answer = async () => (await page.locator("#answer").textContent()).match(/\d+/g);
    assert(Number((await answer())[1]) > 80, await answer());
    await page.getByLabel("Another sentence").fill("This pasta is delicious.");
    await page.getByRole("button", { name: "Ask" }).click();
    await page.locator("#answer", { hasText: /^first kind ([89]\d|100) %/ }).waitFor();
    await page.getByLabel("Second kind").fill(" ");
    await page.getByRole("button", { name: "Learn" }).click();
    await page.getByRole("alert").waitFor();
    assert.match(await page.getByRole("alert").textContent(), /at least one sentence/);
  },

  // When this fails, take-defaults.js may have had its day.
  async "onnxruntime-web itself still cannot feed slot weights"(page) {
    const found = await page.evaluate(async (down) => {
      const ort = await import("onnxruntime-web");
      const options = { logSeverityLevel: 3 };
      const session = await ort.InferenceSession.create("made/rating.onnx", options);
      const input_1 = new ort.Tensor("float32", new Float32Array(108000), [1, 900, 120]);
      const weight = new ort.Tensor("float32", [1], [1, 1]);
      const error = await session.run({ input_1, [down]: weight }).catch((e) => e.message);
      return { lora: typeof ort.LoraAdapter, inputs: session.inputNames, error };
    }, `${SLOT}.down`);
    const error = `invalid input '${SLOT}.down'`;
    assert.deepEqual(found, { lora: "undefined", inputs: ["input_1"], error });
  },
};

let worst = 0;

function close(actual, wanted) {
  const largest = Math.max(...wanted.map(Math.abs));
  const far = Math.max(...wanted.map((value, i) => Math.abs(value - actual[i]))) / largest;
  assert.equal(actual.length, wanted.length);
  assert(far <= TOLERANCE, `${actual} is ${far} away from ${wanted}`);
  worst = Math.max(worst, far);
}

async function choose(page, sound, adapter) {
  await page.getByLabel("Sound").selectOption(sound);
  await page.getByLabel("Adapter", { exact: true }).selectOption(adapter);
  await settled(page);
}

/** The outputs of the base, both adapter files, and the base again. */
function transformer(page, provider) {
  return page.evaluate(
    async ([inputs, executionProviders]) => {
      const ort = await import("onnxruntime-web");
      const { openModel } = await import("./adapted-model.js");
      const { readAdapter } = await import("./adapter-file.js");
      const read = async (name) => (await fetch(`made/${name}`)).arrayBuffer();
      const options = { executionProviders, logSeverityLevel: 3 };
      const model = await openModel(await read("bert.onnx"), options);
      const feeds = {};
      for (const [name, { type, data, dims }] of Object.entries(inputs)) {
        feeds[name] = new ort.Tensor(type, data, dims);
      }
      const found = [];
      for (const name of ["base", "bert.safetensors", "bert.onnx_adapter", "base"]) {
        const adapter = name === "base" ? null : readAdapter(await read(name), name);
        if (adapter) model.check(adapter);
        const [output] = Object.values(await model.run(feeds, adapter));
        found.push([name, [...output.data]]);
      }
      return found;
    },
    [expected.trained.inputs, [provider]],
  );
}

const settled = (page) => page.locator("#results[aria-busy=false]").waitFor();
const rating = async (page, id) => Number(await page.locator(`#${id}`).getAttribute("value"));
const file = (name, buffer) => ({ name, buffer, mimeType: "" });

async function dropFile(page, name, buffer) {
  const dataTransfer = await page.evaluateHandle(
    ([name, bytes]) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(bytes)], name));
      return transfer;
    },
    [name, [...buffer]],
  );
  await page.dispatchEvent("#drop", "drop", { dataTransfer });
  await settled(page);
}

/** An adapter file of zeros for the page's slot, with these shapes. */
function safetensors(shapes) {
  let end = 0;
  const header = {};
  for (const [part, shape] of Object.entries(shapes)) {
    const from = end;
    end += 4 * shape.reduce((a, b) => a * b);
    header[`${SLOT}.${part}`] = { dtype: "F32", shape, data_offsets: [from, end] };
  }
  const text = Buffer.from(JSON.stringify(header));
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([size, text, Buffer.alloc(end)]);
}

async function screenshots(browser, address, folder) {
  mkdirSync(folder, { recursive: true });
  const phone = { viewport: { width: 360, height: 740 } };
  const looks = { light: {}, dark: { colorScheme: "dark" }, phone };
  for (const [name, look] of Object.entries(looks)) {
    const page = await browser.newPage(look);
    await page.goto(address);
    await settled(page);
    await page.screenshot({ path: path.join(folder, `${name}.png`), fullPage: true });
    await dropFile(page, "bert.safetensors", read("bert.safetensors"));
    await page.screenshot({ path: path.join(folder, `${name}-error.png`), fullPage: true });
    await page.close();
  }
}

/** Serves this folder as long as this program runs; gives its address. */
async function serve() {
  const command = ["-u", "-m", "http.server", "0", "--bind", "127.0.0.1"];
  const stdio = ["ignore", "pipe", "ignore"];
  const server = spawn(process.env.PYTHON, command, { cwd: HERE, stdio });
  process.on("exit", () => server.kill());
  for await (const line of createInterface(server.stdout)) {
    const port = /port (\d+)/.exec(line)?.[1];
    if (port) return `http://127.0.0.1:${port}/`;
  }
  throw new Error("the server did not start");
}

async function main() {
  const { values } = parseArgs({ options: { screenshots: { type: "string" } } });
  const address = await serve();
  // Containers have no sandbox and no GPU; SwiftShader is the browser's own emulation of one.
  const args = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args });
  let failed = 0;
  try {
    for (const [name, test] of Object.entries(tests)) {
      const page = await browser.newPage();
      const complaints = [];
      page.on("console", (said) => complaints.push(said.text()));
      page.on("pageerror", (error) => complaints.push(error.message));
      page.on("request", (request) => {
        if (!request.url().startsWith(address)) complaints.push(request.url());
      });
      try {
        await page.goto(address);
        await settled(page);
        await test(page, complaints);
        assert.deepEqual(complaints, []);
        console.log(`ok      ${name}`);
      } catch (error) {
        failed += 1;
        console.log(["FAILED  " + name, error.message, ...complaints].join("\n        "));
      }
      await page.close();
    }
    console.log(`outputs differ from Python's by ${worst.toExponential(1)} at most`);
    if (values.screenshots) await screenshots(browser, address, values.screenshots);
  } finally {
    await browser.close();
  }
  process.exit(failed ? 1 : 0);
}

await main();
