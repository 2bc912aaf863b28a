// Between a photo and the model: placing, resizing, prompts and mask upscaling, as src/pocketsam/geometry.py has them.
// `model` is the object of that name in bundle.json. Coordinates are x, y in pixels of the photo, from the top left.

const EMPTY_SLOT = -2, PADDING_POINT = -1, TOP_LEFT = 2, BOTTOM_RIGHT = 3;

/** How a photo lies in the model's square: the part it covers, for the encoder (`content`) and for prompts (`prompt`). */
export function frameOf(height, width, model) {
  const covered = (size) => {
    if (model.resize === "squash") return [size, size];
    const scale = size / Math.max(height, width);
    return [height, width].map((side) => Math.max(1, Math.floor(side * scale + 0.5)));
  };
  const promptSize = model.prompt_size || model.image_size;
  return { height, width, size: model.image_size, promptSize, upscale: model.upscale,
           content: covered(model.image_size), prompt: covered(promptSize) };
}

/** RGBA or RGB bytes (H, W, 3 or 4) -> the encoder's `image`: Uint8Array of (1, S, S, 3). */
export function modelImage(pixels, frame, model) {
  const [h, w] = frame.content;
  const channels = pixels.length / (frame.height * frame.width);
  if (channels === 4) pixels = overWhite(pixels);
  const resize = model.resampling === "bilinear" ? plainResize : pillowResize;
  const content = resize(pixels, frame.height, frame.width, channels, h, w);
  const pad = model.mean.map((m) => Math.floor(m + 0.5));
  const out = new Uint8Array(frame.size * frame.size * 3);
  for (let y = 0; y < frame.size; y++) {
    for (let x = 0; x < frame.size; x++) {
      for (let c = 0; c < 3; c++) {
        out[(y * frame.size + x) * 3 + c] = y < h && x < w ? content[(y * w + x) * 3 + c] : pad[c];
      }
    }
  }
  return out;
}

/** Lays transparent pixels over white, as the Python package does. */
function overWhite(pixels) {
  const out = new Uint8Array(pixels.length);
  for (let i = 0; i < pixels.length; i += 4) {
    const alpha = pixels[i + 3];
    for (let c = 0; c < 3; c++) out[i + c] = Math.round((pixels[i + c] * alpha + 255 * (255 - alpha)) / 255);
  }
  return out;
}

/** Pillow's bilinear filter, antialiased when it makes smaller, in its fixed-point arithmetic: the same bytes. */
function pillowResize(pixels, height, width, channels, newHeight, newWidth) {
  const narrow = new Uint8Array(height * newWidth * 3);
  taps(width, newWidth).forEach(({ first, weights }, x) => {
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < 3; c++) {
        narrow[(y * newWidth + x) * 3 + c] = weighted(pixels, (y * width + first) * channels + c, channels, weights);
      }
    }
  });
  const out = new Uint8Array(newHeight * newWidth * 3);
  taps(height, newHeight).forEach(({ first, weights }, y) => {
    for (let i = 0; i < newWidth * 3; i++) {
      out[y * newWidth * 3 + i] = weighted(narrow, first * newWidth * 3 + i, newWidth * 3, weights);
    }
  });
  return out;
}

const ONE = 2 ** 22;

function weighted(source, start, step, weights) {
  let sum = ONE / 2;
  for (let k = 0; k < weights.length; k++) sum += source[start + k * step] * weights[k];
  return Math.min(255, Math.floor(sum / ONE));
}

/** For each new position the first source position and whole weights that add up to about 2^22. */
function taps(before, after) {
  const scale = before / after, support = Math.max(scale, 1);
  if (before === after) return Array.from({ length: after }, (_, i) => ({ first: i, weights: [ONE] }));
  return Array.from({ length: after }, (_, i) => {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(before, Math.trunc(centre + support + 0.5));
    const raw = Array.from({ length: last - first }, (_, k) =>
      Math.max(0, 1 - Math.abs((k + first - centre + 0.5) / support)));
    const sum = raw.reduce((a, b) => a + b, 0);
    return { first, weights: raw.map((v) => Math.trunc(v / sum * ONE + 0.5)) };
  });
}

/** Bilinear without antialiasing, rounded to even: EfficientSAM's way. */
function plainResize(pixels, height, width, channels, newHeight, newWidth) {
  const out = new Uint8Array(newHeight * newWidth * 3);
  for (let c = 0; c < 3; c++) {
    const plane = Float32Array.from({ length: height * width }, (_, i) => pixels[i * channels + c]);
    const resized = linear(plane, height, width, newHeight, newWidth, newHeight, newWidth);
    for (let i = 0; i < resized.length; i++) out[i * 3 + c] = roundToEven(resized[i]);
  }
  return out;
}

function roundToEven(value) {
  const below = Math.floor(value);
  return value - below === 0.5 ? below + below % 2 : Math.round(value);
}

/**
 * The decoder's inputs for one prompt, without the image features: { name: { data, dims } }.
 * prompt: { points: [[x, y], ...], labels: [1 or 0, ...], box: [x0, y0, x1, y1], mask: Float32Array of (4h, 4w) logits }.
 */
export function decoderInputs(prompt, frame, model, slots) {
  const [height, width] = frame.prompt;
  const scaled = ([x, y]) => [x * width / frame.width, y * height / frame.height];
  const points = (prompt.points ?? []).map((p, i) => [...scaled(p), prompt.labels?.[i] ?? 1]);
  const box = prompt.box ?? [];
  const corners = box.length ? [[...scaled(box.slice(0, 2)), TOP_LEFT], [...scaled(box.slice(2)), BOTTOM_RIGHT]] : [];
  const tokens = model.box_first ? [...corners, ...points] : [...points, ...corners];
  if (!tokens.length && !prompt.mask) throw new Error("no prompt was given; pass at least one point, a box or a mask.");
  const used = tokens.length;
  const padding = model.padding === "fill" ? model.max_points - used
    : used && (model.padding === "always" || !corners.length) ? 1 : 0;
  if (padding < 0 || used + padding > slots) throw new Error(`${used} points are too many for ${model.name}.`);
  for (let i = 0; i < padding; i++) tokens.push([-1, -1, PADDING_POINT]);
  const coords = new Float32Array(slots * 2), labels = new Float32Array(slots).fill(EMPTY_SLOT);
  tokens.forEach(([x, y, label], i) => { coords.set([x, y], i * 2); labels[i] = label; });
  const inputs = { point_coords: { data: coords, dims: [1, slots, 2] },
                   point_labels: { data: labels, dims: [1, slots] } };
  if (model.mask_prompt) {
    const side = 4 * model.embed_size;
    inputs.mask_input = { data: prompt.mask ?? new Float32Array(side * side), dims: [1, 1, side, side] };
    inputs.has_mask_input = { data: Float32Array.of(prompt.mask ? 1 : 0), dims: [1] };
  }
  return inputs;
}

/** The single answer to a box or to several points: token 0, or SAM 2's choice when token 0 is not stable. */
export function singleToken(logits, scores, model) {
  if (!model.stability.length) return 0;
  const [delta, threshold] = model.stability;
  const first = logits.subarray(0, logits.length / 4);
  let wide = 0, narrow = 0;
  for (const v of first) { wide += v > -delta; narrow += v > delta; }
  return wide === 0 || narrow / wide >= threshold ? 0 : bestToken(scores);
}

/** The best of the three answers to a single click. */
export function bestToken(scores) {
  return [1, 2, 3].reduce((best, i) => scores[i] > scores[best] ? i : best, 1);
}

/** (4h, 4w) logits -> Uint8Array of (H, W), 1 where the object is. */
export function maskOf(logits, frame) {
  const side = Math.sqrt(logits.length);
  let source = logits, rows = side, columns = side;
  if (frame.upscale === "frame") {
    [rows, columns] = frame.prompt;
    source = linear(logits, side, side, frame.promptSize, frame.promptSize, rows, columns);
  }
  const resized = frame.upscale === "cubic" ? cubic(source, rows, columns, frame.height, frame.width)
    : linear(source, rows, columns, frame.height, frame.width, frame.height, frame.width);
  return Uint8Array.from(resized, (v) => v > 0);
}

/** Bilinear with half-pixel centres from (h, w) to (height, width), of which the top left part is made. */
function linear(source, h, w, height, width, keepHeight, keepWidth) {
  return apply(source, h, w, linearTaps(h, height, keepHeight), linearTaps(w, width, keepWidth));
}

function linearTaps(before, full, keep) {
  return Array.from({ length: keep }, (_, i) => {
    const at = Math.max((i + 0.5) * before / full - 0.5, 0);
    const low = Math.min(Math.floor(at), before - 1);
    const t = Math.fround(at - low);
    return full === before ? [[i, 1]] : [[low, Math.fround(1 - t)], [Math.min(low + 1, before - 1), t]];
  });
}

/** Bicubic with half-pixel centres and a = -0.75, edges repeated. */
function cubic(source, h, w, height, width) {
  return apply(source, h, w, cubicTaps(h, height), cubicTaps(w, width));
}

function cubicTaps(before, after) {
  const a = -0.75;
  const near = (x) => ((a + 2) * x - (a + 3)) * x * x + 1;
  const far = (x) => ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
  return Array.from({ length: after }, (_, i) => {
    const at = (i + 0.5) * before / after - 0.5, base = Math.floor(at), t = at - base;
    return [far(t + 1), near(t), near(1 - t), far(2 - t)].map((weight, k) =>
      [Math.min(Math.max(base + k - 1, 0), before - 1), weight]);
  });
}

/** Columns first, then rows, each new position a weighted sum of old ones. */
function apply(source, h, w, rowTaps, columnTaps) {
  const width = columnTaps.length;
  const wide = new Float32Array(h * width);
  columnTaps.forEach((pairs, x) => {
    for (let y = 0; y < h; y++) {
      let sum = 0;
      for (const [index, weight] of pairs) sum += source[y * w + index] * weight;
      wide[y * width + x] = sum;
    }
  });
  const out = new Float32Array(rowTaps.length * width);
  rowTaps.forEach((pairs, y) => {
    for (const [index, weight] of pairs) {
      for (let x = 0; x < width; x++) out[y * width + x] += wide[index * width + x] * weight;
    }
  });
  return out;
}
