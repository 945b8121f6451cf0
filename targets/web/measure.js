/** The measuring loop, the comparison of outputs and the figures of edgecompress/runtime/measure.py, in JavaScript. */

const WARMUP_BATCH_MS = 50;
const WARMUP_LIMIT_MS = 1000;
const WARMUP_LIMIT_RUNS = 200;
const STABLE = 0.05;
const BLOCKS = 10;
// The distance from 1 to the next number, by type.
const EPSILON = { float16: 2 ** -10, float32: 2 ** -23, float64: 2 ** -52 };

/**
 * Time models after a warm-up, in blocks that alternate between them (A B A B ...). With several of them the first run
 * after each change is not counted: the other one has just emptied the caches.
 * @param {((count: number) => Promise<number[]>)[]} timers each runs its model and returns one time in ms per run
 * @param {number[]} firsts what the first run of each took, in ms
 * @param {number} runs
 * @param {(done: number, total: number) => Promise<void>} progress
 * @returns {Promise<{first_ms: number, warmup_ms: number[], values_ms: number[]}[]>}
 */
export async function measureTimers(timers, firsts, runs, progress) {
  const found = [];
  for (const [index, timer] of timers.entries()) {
    found.push({ first_ms: firsts[index], warmup_ms: await warmUp(timer, firsts[index]), values_ms: [] });
  }
  const settle = timers.length > 1 ? 1 : 0;
  let done = 0;
  for (const size of blockSizes(runs)) {
    for (const [index, timer] of timers.entries()) {
      const block = (await timer(size + settle)).slice(settle);
      for (const value of block) found[index].values_ms.push(value);
      done += block.length;
      await progress(done, runs * timers.length);
    }
  }
  return found;
}

/** Split `runs` into at most ten blocks of nearly the same size. */
export function blockSizes(runs) {
  const blocks = Math.min(runs, BLOCKS);
  return Array.from({ length: blocks }, (_, index) => Math.floor(runs / blocks) + (index < runs % blocks ? 1 : 0));
}

/** Run in batches until two in a row have medians within 5 %, or for a second, or 200 times. */
export async function warmUp(timer, first) {
  const size = Math.min(Math.max(Math.ceil(WARMUP_BATCH_MS / Math.max(first, 1e-3)), 1), 20);
  const samples = await timer(size);
  let before = quantile(samples, 0.5);
  while (samples.reduce((sum, value) => sum + value, 0) < WARMUP_LIMIT_MS && samples.length < WARMUP_LIMIT_RUNS) {
    const batch = await timer(size);
    samples.push(...batch);
    const median = quantile(batch, 0.5);
    if (Math.abs(median - before) <= STABLE * before) break;
    before = median;
  }
  return samples;
}

/** A quantile by linear interpolation. */
export function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  const place = (sorted.length - 1) * share;
  const below = Math.floor(place);
  return sorted[below] + (place - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
}

/**
 * Say how outputs differ from the expected ones; an empty list where they agree. Numbers with a point may differ by
 * `relative` of the largest magnitude of their output, at least by sixteen steps of their type; all else must be equal.
 * @param {Record<string, {type: string, dims: ArrayLike<number>, data: ArrayLike}>} actual
 * @param {{name: string, type: string, dims: number[], data: ArrayLike}[]} expected
 * @param {number} relative
 * @returns {string[]}
 */
export function outputDifferences(actual, expected, relative) {
  const problems = [];
  for (const wanted of expected) {
    const found = actual[wanted.name];
    const problem = found ? difference(found, wanted, relative) : "missing";
    if (problem) problems.push(`'${wanted.name}' ${problem}`);
  }
  return problems;
}

function difference(found, wanted, relative) {
  if ([...found.dims].join() !== wanted.dims.join()) return `shape (${[...found.dims]}) instead of (${wanted.dims})`;
  if (found.type !== wanted.type) return `type ${found.type} instead of ${wanted.type}`;
  if (!(wanted.type in EPSILON)) {
    let differing = 0;
    for (let index = 0; index < wanted.data.length; index++) differing += found.data[index] !== wanted.data[index];
    return differing ? `${differing} of ${wanted.data.length} values differ` : "";
  }
  const [actual, exact] = [numbers(found), numbers(wanted)];
  let largest = 0;
  let worst = 0;
  for (let index = 0; index < exact.length; index++) {
    if (Number.isFinite(exact[index]) && Number.isFinite(actual[index])) {
      largest = Math.max(largest, Math.abs(exact[index]));
      worst = Math.max(worst, Math.abs(actual[index] - exact[index]));
    } else if (!Object.is(actual[index], exact[index])) {
      return "NaN or Inf at other places";
    }
  }
  const allowed = Math.max(relative, 16 * EPSILON[wanted.type]) * largest;
  return worst > allowed ? `off by ${worst.toPrecision(3)}, allowed ${allowed.toPrecision(3)}` : "";
}

/** The values as numbers; half precision may come as its bits. */
function numbers({ type, data }) {
  if (type !== "float16" || !(data instanceof Uint16Array)) return data;
  return Float64Array.from(data, (bits) => {
    const [exponent, rest] = [(bits >> 10) & 31, bits & 1023];
    const size =
      exponent === 31 ? (rest ? NaN : Infinity) : exponent ? (1 + rest / 1024) * 2 ** (exponent - 15) : rest / 2 ** 24;
    return bits & 0x8000 ? -size : size;
  });
}
