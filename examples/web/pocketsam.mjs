// An exported bundle in a browser or in Node, with ONNX Runtime Web: the same answers as the Python predictor.
//
//   import * as ort from "onnxruntime-web";
//   const sam = await Predictor.open(ort, "lite0.bundle");
//   await sam.setImage(pixels, height, width);             // RGB or RGBA bytes; the slow half, once a photo
//   const { masks, scores } = await sam.predict({ points: [[290, 100]], labels: [1] });

import { bestToken, decoderInputs, frameOf, maskOf, modelImage, singleToken } from "./geometry.mjs";

/** Reads a file of the bundle; in Node pass one that reads from disk. */
async function fetched(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address} cannot be read: ${answer.status} ${answer.statusText}.`);
  return new Uint8Array(await answer.arrayBuffer());
}

export class Predictor {
  constructor(ort, bundle, encoder, decoder) {
    Object.assign(this, { ort, model: bundle.model, slots: bundle.slots, encoder, decoder, image: null });
  }

  /** Open the ONNX graphs of a bundle. `options` are ONNX Runtime's session options, such as { executionProviders }. */
  static async open(ort, place, { precision = "fp32", read = fetched, options = {} } = {}) {
    const bundle = JSON.parse(new TextDecoder().decode(await read(`${place}/bundle.json`)));
    const sessions = ["encoder", "decoder"].map(async (graph) => {
      const found = bundle.artifacts.find((a) => a.format === "onnx" && a.precision === precision && a.graph === graph);
      if (!found) throw new Error(`${place} has no ONNX ${graph} in ${precision}; export it with --to onnx.`);
      return ort.InferenceSession.create(await read(`${place}/${found.path}`), options);
    });
    return new Predictor(ort, bundle, ...await Promise.all(sessions));
  }

  /** Embed a photo: RGB or RGBA bytes of (H, W, 3 or 4), such as the data of a canvas. */
  async setImage(pixels, height, width) {
    const frame = frameOf(height, width, this.model), size = this.model.image_size;
    // Until the encoder is done there is no image to prompt: the old features do not fit the new frame.
    this.image = null;
    const image = new this.ort.Tensor("uint8", modelImage(pixels, frame, this.model), [1, size, size, 3]);
    const features = await this.encoder.run({ image });
    this.image = { features, frame };
  }

  /**
   * Masks of one prompt { points, labels, box, mask } in pixels of the photo.
   * Returns { masks: Uint8Array of (H, W) each, scores: predicted IoU each, logits: Float32Array of (4h, 4w) each };
   * three answers to an ambiguous click when `multimask`, else the one for a box or several points.
   */
  async predict(prompt, { multimask = true } = {}) {
    if (!this.image) throw new Error("no image is set; call setImage first, and wait for it.");
    const { features, frame } = this.image, inputs = { ...features };
    for (const [name, { data, dims }] of Object.entries(decoderInputs(prompt, frame, this.model, this.slots))) {
      inputs[name] = new this.ort.Tensor("float32", data, dims);
    }
    const answer = await this.decoder.run(inputs);
    const all = answer.low_res_masks.data, scores = answer.iou_predictions.data, each = all.length / 4;
    const tokens = !multimask ? [singleToken(all, scores, this.model)]
      : this.model.best_only ? [bestToken(scores)] : [1, 2, 3];
    const logits = tokens.map((t) => all.slice(t * each, (t + 1) * each));
    const limit = this.model.logit_limit;
    return { masks: logits.map((l) => maskOf(l, frame)), scores: tokens.map((t) => scores[t]),
             logits: limit ? logits.map((l) => l.map((v) => Math.min(Math.max(v, -limit), limit))) : logits };
  }
}
