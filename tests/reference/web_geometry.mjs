// Answers jobs of tests/test_web.py with the example's geometry: JSON in, JSON out, bytes as base64.
import { readFileSync } from "node:fs";
import { decoderInputs, frameOf, maskOf, modelImage, singleToken } from "../../examples/web/geometry.mjs";

const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));
const floats = (text) => new Float32Array(bytes(text).buffer);
const text = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");

const jobs = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(jobs.map(({ model, height, width, pixels, prompts, slots, logits, scores }) => {
  const frame = frameOf(height, width, model);
  const low = floats(logits);
  return {
    image: text(modelImage(bytes(pixels), frame, model)),
    inputs: prompts.map((p) => {
      const mask = p.mask ? floats(p.mask) : undefined;
      const named = Object.entries(decoderInputs({ ...p, mask }, frame, model, slots));
      return Object.fromEntries(named.map(([name, { data, dims }]) => [name, { data: text(data), dims }]));
    }),
    mask: text(maskOf(low.subarray(0, low.length / 4), frame)),
    token: singleToken(low, scores, model),
  };
})));
