// Runs prompts of a JSON on standard input through a bundle in ONNX Runtime Web, in Node: masks as base64 on standard
// output. { bundle, pixels: file of RGB bytes, height, width, prompts: [{ points, labels, box }] }
import { readFileSync } from "node:fs";
import { readFile } from "node:fs/promises";
import * as ort from "onnxruntime-web";
import { Predictor } from "./pocketsam.mjs";

const job = JSON.parse(readFileSync(0, "utf8"));
const sam = await Predictor.open(ort, job.bundle, { read: readFile });
await sam.setImage(readFileSync(job.pixels), job.height, job.width);
const answers = [];
for (const prompt of job.prompts) {
  const { masks, scores } = await sam.predict(prompt, { multimask: !prompt.box });
  answers.push({ masks: masks.map((m) => Buffer.from(m).toString("base64")), scores });
}
process.stdout.write(JSON.stringify(answers));
