/**
 * Check, open, compare and time the model of a bundle: what run.py does, in a browser.
 *
 *     index.html?runs=50&threads=4&also=../1/&report=../result
 *
 * `also` (repeatable) names the folder of another bundle of this server; its model is timed in alternating blocks with
 * the first bundle's runtime. With `report` the result is sent to that address of this server. It stays in
 * `window.result` in any case: an object with `results`, or with `error`.
 */

import { BundleError, fetchFiles, neededFiles, openModel, readManifest, testTensors } from "./bundle.js";
import { browserFacts, watchMemory } from "./facts.js";
import { measureTimers, outputDifferences, quantile } from "./measure.js";
import { showError, showResult, showStep } from "./view.js";

const RUNTIME = "lib/ort.wasm.bundle.min.mjs";
const WASM = "lib/ort-wasm-simd-threaded.wasm";
// The smallest model, y = Identity(x). Its session starts the runtime, so that no other model's start includes that.
const IDENTITY = "CAg6NwoQCgF4EgF5IghJZGVudGl0eRIBZ1oPCgF4EgoKCAgBEgQKAggBYg8KAXkSCgoICAESBAoCCAFCBAoAEA0=";
const DEFAULT_RUNS = 50;
const MOST = { runs: 1e6, threads: 1024 };

async function main() {
  let report = null;
  try {
    const options = readOptions(new URL(location.href));
    report = options.report;
    const { result, manifests } = await bench(options);
    window.result = result;
    showResult(result, manifests);
  } catch (error) {
    const known = error instanceof BundleError;
    if (!known) console.error(error);
    const { message, hint = "look into the browser's console", exit_code = 7 } = error;
    window.result = { schema_version: 2, error: { message: message ?? String(error), hint, exit_code } };
    showError(window.result.error);
  }
  if (report) {
    const headers = { "Content-Type": "application/json" };
    await fetch(report, { method: "POST", headers, body: JSON.stringify(window.result) });
  }
}

/** The options of the page's address; other servers are out of reach. */
function readOptions(address) {
  const query = address.searchParams;
  const here = (text) => {
    const url = new URL(text, address);
    if (url.origin !== address.origin)
      throw new BundleError(`${text} is on another server`, "name a folder of this one", 2);
    return url;
  };
  const whole = (name) => {
    const text = query.get(name);
    if (!text) return null;
    if (!/^\d+$/.test(text) || Number(text) < 1 || Number(text) > MOST[name]) {
      throw new BundleError(`${name}=${text} is not a whole number from 1 to ${MOST[name]}`, "correct the address", 2);
    }
    return Number(text);
  };
  return {
    runs: whole("runs") ?? DEFAULT_RUNS,
    threads: whole("threads"),
    bases: [here("./"), ...query.getAll("also").map(here)],
    report: query.has("report") ? here(query.get("report")) : null,
  };
}

async function bench({ runs, threads, bases }) {
  const notes = [];
  const manifests = [];
  for (const base of bases) manifests.push(await readManifest(base));
  const files = await checkFiles(bases, manifests);

  await showStep("Starting the runtime");
  const wanted = threads ?? manifests[0].threads;
  const used = globalThis.crossOriginIsolated ? wanted : 1;
  if (used < wanted) {
    notes.push(
      `one thread instead of ${wanted}: threads need https or localhost, and the server's COOP and COEP headers`,
    );
  }
  const memory = watchMemory();
  const { ort, start_ms } = await startRuntime(bases[0], files[0], manifests[0], used);
  const device = await browserFacts(ort.env.versions.web);

  const models = [];
  for (const [index, manifest] of manifests.entries()) {
    await showStep(`Opening ${manifest.model}`);
    models.push(await openChecked(ort, manifest, files[index], manifests[0].providers));
  }
  const timings = await measureTimers(
    models.map(
      ({ run }) =>
        (count) =>
          timeRuns(run, count),
    ),
    models.map(({ first_ms }) => first_ms),
    runs,
    (done, total) => showStep(`Run ${done} of ${total}`, done / total),
  );
  if (document.visibilityState !== "visible")
    notes.push("the page was in the background: browsers slow such pages down");
  const results = timings.map((timing, index) => row(manifests[index], models[index], timing));
  const fastest = Math.min(...results.map(({ median_ms }) => median_ms));
  if (device.clock_step_ms > fastest / 50) {
    notes.push(`the browser's clock has steps of ${device.clock_step_ms} ms: times of single runs are rounded to that`);
  }
  Object.assign(device, { runtime_start_ms: start_ms, wasm_memory_bytes: memory(), memory_shared: results.length > 1 });
  const after = { frequency_mhz: null, temperature_c: null };
  const result = { schema_version: 2, target: manifests[0].target, threads: used, results, device, after, notes };
  return { result, manifests };
}

/** All files of the first bundle, of the others those that a run needs. */
async function checkFiles(bases, manifests) {
  const paths = manifests.map((manifest, index) => (index ? neededFiles(manifest) : Object.keys(manifest.files)));
  const total = paths.flat().length;
  const files = [];
  let done = 0;
  const progress = () => showStep(`Checking the files, ${++done} of ${total}`, done / total);
  for (const [index, base] of bases.entries()) {
    files.push(await fetchFiles(base, manifests[index], paths[index], progress));
  }
  return files;
}

/** Import the checked runtime and start it; the checked WebAssembly is handed over as it is. */
async function startRuntime(base, files, manifest, threads) {
  const start = performance.now();
  try {
    const ort = await import(new URL(RUNTIME, base));
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = threads;
    ort.env.wasm.wasmBinary = files.get(WASM);
    const tiny = Uint8Array.from(atob(IDENTITY), (letter) => letter.charCodeAt(0));
    await (await ort.InferenceSession.create(tiny, { executionProviders: manifest.providers })).release();
    return { ort, start_ms: performance.now() - start };
  } catch (error) {
    throw new BundleError(`onnxruntime-web does not start: ${error.message ?? error}`, "try another browser", 7);
  }
}

/** Open a model and compare its first outputs with the expected ones. */
async function openChecked(ort, manifest, files, providers) {
  const opened = await openModel(ort, manifest, files, providers);
  const inputs = testTensors(manifest, files, "inputs");
  const feeds = Object.fromEntries(
    inputs.map(({ name, type, data, dims }) => [name, new ort.Tensor(type, data, dims)]),
  );
  const run = () => opened.session.run(feeds);
  const start = performance.now();
  let outputs = null;
  try {
    outputs = await run();
  } catch (error) {
    throw new BundleError(`${manifest.model} does not run: ${error.message ?? error}`, "build the bundle again", 3);
  }
  const first_ms = performance.now() - start;
  const problems = outputDifferences(outputs, testTensors(manifest, files, "outputs"), manifest.tolerance);
  if (problems.length) {
    const hint = "this browser computes differently: do not use the bundle in it";
    throw new BundleError(`wrong outputs: ${problems.join("; ")}`, hint, 5);
  }
  return { ...opened, run, first_ms };
}

async function timeRuns(run, count) {
  const samples = [];
  for (let left = count; left > 0; left--) {
    const start = performance.now();
    await run();
    samples.push(performance.now() - start);
  }
  return samples;
}

function row(manifest, { init_ms, decode_ms }, timing) {
  return {
    model: manifest.model,
    outputs_match: true,
    init_ms,
    decode_ms,
    ...timing,
    median_ms: quantile(timing.values_ms, 0.5),
    p90_ms: quantile(timing.values_ms, 0.9),
    samples: timing.values_ms.length,
    peak_rss_bytes: null,
  };
}

await main();
