// A photograph to an input, as nestquant/engines/images.py does it: resampled by the filters and the rounding of Pillow.

const PRECISION = 22; // Pillow's Resample.c: 8 bits of pixel, 2 of overshoot
const cubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0);
const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
const FILTERS = {
  bilinear: { support: 1, at: (x) => Math.max(0, 1 - x) },
  bicubic: { support: 2, at: cubic },
  lanczos: { support: 3, at: (x) => (x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

/** Return `{input, shape}` of an image file, float32 [1, C, H, W]. */
export async function photoInput(file, preprocessing) {
  const bitmap = await createImageBitmap(file, { premultiplyAlpha: "none", colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  canvas.drawImage(bitmap, 0, 0);
  bitmap.close();
  return pixelsInput(canvas.getImageData(0, 0, width, height), preprocessing);
}

/** The same from RGBA pixels. */
export function pixelsInput({ data, width, height }, { size, resize, mean, std, interpolation = "bilinear" }) {
  const channels = mean.length;
  const [rows, columns] = sides(size);
  let planes = channels === 1 ? [grey(data)] : [0, 1, 2].map((channel) => data.filter((_, at) => at % 4 === channel));
  const cover = resize === null || resize === undefined ? null : sides(resize);
  const least = Math.max(rows / height, columns / width);
  const factor = Math.max(least, cover === null ? 1 : Math.min(1, Math.max(cover[0] / height, cover[1] / width)));
  let [tall, wide] = [height, width];
  if (factor !== 1) {
    tall = Math.max(rows, halfToEven(height * factor));
    wide = Math.max(columns, halfToEven(width * factor));
    planes = planes.map((plane) => resample(plane, width, height, wide, tall, interpolation));
  }
  const [left, top] = [halfToEven((wide - columns) / 2), halfToEven((tall - rows) / 2)];
  const input = new Float32Array(channels * rows * columns);
  planes.forEach((plane, channel) => {
    const [centre, spread] = [Math.fround(mean[channel]), Math.fround(std[channel])];
    for (let row = 0; row < rows; row += 1) {
      for (let column = 0; column < columns; column += 1) {
        const pixel = Math.fround(plane[(top + row) * wide + left + column] / 255);
        input[(channel * rows + row) * columns + column] = Math.fround(pixel - centre) / spread;
      }
    }
  });
  return { input, shape: [1, channels, rows, columns] };
}

const sides = (size) => (Array.isArray(size) ? size : [size, size]);

function halfToEven(value) {
  const low = Math.floor(value);
  if (value - low !== 0.5) return Math.round(value);
  return low % 2 === 0 ? low : low + 1;
}

function grey(data) {
  const plane = new Uint8ClampedArray(data.length / 4);
  for (let at = 0; at < plane.length; at += 1) {
    plane[at] = (data[4 * at] * 19595 + data[4 * at + 1] * 38470 + data[4 * at + 2] * 7471 + 0x8000) >> 16;
  }
  return plane;
}

/** Resample one plane: first along rows, then along columns, each rounded to 8 bits. Pillow 13 takes some sizes in the
 * other order; what is rounded in between then differs. */
export function resample(plane, width, height, wide, tall, interpolation) {
  if (interpolation === "nearest") return nearest(plane, width, height, wide, tall);
  const filter = FILTERS[interpolation];
  if (filter === undefined) throw new Error(`interpolation ${interpolation}: expected nearest, ${Object.keys(FILTERS).join(", ")}`);
  const along = (from, lines) =>
    width === wide ? from : pass(from, coefficients(width, wide, filter), lines, { line: width, item: 1 }, { line: wide, item: 1 });
  const down = (from, columns) =>
    height === tall ? from : pass(from, coefficients(height, tall, filter), columns, { line: 1, item: columns }, { line: 1, item: columns });
  return down(along(plane, height), wide);
}

/** Filter `lines` lines of a plane; `from` and `to` say how far apart lines and their items are. */
function pass(plane, windows, lines, from, to) {
  const count = windows.length;
  const out = new Uint8ClampedArray(lines * count);
  for (let line = 0; line < lines; line += 1) {
    for (let at = 0; at < count; at += 1) {
      const { first, weights } = windows[at];
      let sum = 1 << (PRECISION - 1);
      for (let k = 0; k < weights.length; k += 1) sum += plane[line * from.line + (first + k) * from.item] * weights[k];
      out[line * to.line + at * to.item] = sum >> PRECISION; // clamped to 0..255
    }
  }
  return out;
}

function coefficients(from, to, { support, at }) {
  const scale = from / to;
  const spread = Math.max(1, scale);
  const reach = support * spread;
  return Array.from({ length: to }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const stop = Math.min(from, Math.trunc(centre + reach + 0.5));
    const inverse = 1 / spread;
    const weights = Array.from({ length: stop - first }, (__, k) => at(Math.abs((k + first - centre + 0.5) * inverse)));
    const sum = weights.reduce((left, right) => left + right, 0);
    const fixed = weights.map((weight) => (sum === 0 ? weight : weight / sum) * (1 << PRECISION));
    return { first, weights: fixed.map((weight) => Math.trunc(weight < 0 ? weight - 0.5 : weight + 0.5)) };
  });
}

function nearest(plane, width, height, wide, tall) {
  const [rows, columns] = [positions(height, tall), positions(width, wide)];
  const out = new Uint8ClampedArray(wide * tall);
  rows.forEach((row, line) => columns.forEach((column, at) => (out[line * wide + at] = plane[row * width + column])));
  return out;
}

/** Where each of `to` places reads, by a sum as in Pillow's Geometry.c: a product would fall differently on a tie. */
function positions(from, to) {
  const step = from / to;
  let place = step / 2;
  return Array.from({ length: to }, () => {
    const at = Math.min(from - 1, Math.trunc(place));
    place += step;
    return at;
  });
}
