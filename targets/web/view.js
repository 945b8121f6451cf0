/** What the page shows. Texts are set as texts, never as markup. */

import { quantile } from "./measure.js";

const SVG = "http://www.w3.org/2000/svg";
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const HEIGHT = 200;
const WIDE_SPREAD = 0.1;
const MOST_POINTS = 1000;
const MARGIN = { left: 44, right: 8, top: 12, bottom: 26 };

const find = (id) => document.getElementById(id);

function element(name, content = [], attributes = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...[content].flat());
  return made;
}

/**
 * Say what is going on, and let the browser draw it.
 * @param {string} text
 * @param {number} [share] how much of it is done, 0 to 1
 */
export async function showStep(text, share) {
  find("step").textContent = text;
  if (share === undefined) find("bar").removeAttribute("value");
  else find("bar").value = share;
  await new Promise((resolve) => setTimeout(resolve));
}

/** @param {{message: string, hint: string}} error */
export function showError({ message, hint }) {
  document.body.dataset.state = "failed";
  find("error").replaceChildren(element("p", sentence(message)), element("p", sentence(hint), { class: "soft" }));
}

/**
 * @param {object} result what `window.result` holds
 * @param {object[]} manifests of the bundles measured, the one with the runtime first
 */
export function showResult(result, manifests) {
  document.body.dataset.state = "done";
  const [first] = result.results;
  const { total, model } = manifests[0].sizes;
  const names = result.results.map(({ model: name }, index) =>
    manifests.length > 1 ? `${LETTERS[index]} ${name}` : name,
  );
  const figures = [
    [
      names.length > 1 ? `Median of a run of ${LETTERS[0]}` : "Median of a run",
      milliseconds(first.median_ms),
      `p90 ${milliseconds(first.p90_ms).join(" ")}`,
    ],
    ["Start of the model", milliseconds(first.init_ms), `first run ${milliseconds(first.first_ms).join(" ")}`],
    ["Download", bytes(total.download_bytes), `the model is ${bytes(model.download_bytes).join(" ")} of it`],
  ];
  find("headline").replaceChildren(
    ...figures.map(([name, [figure, unit], note]) =>
      element("div", [
        element("dt", name),
        element("dd", [figure, " ", element("span", unit)], { class: "figure" }),
        element("dd", note, { class: "note" }),
      ]),
    ),
  );
  find("lead").textContent = leadOf(result, manifests[0]);
  showNotes([...result.notes, ...doubts(result.results)]);
  const draw = () => find("chart").replaceChildren(...chartOf(result.results, names, find("chart").clientWidth));
  draw();
  addEventListener("resize", draw);
  find("times").replaceChildren(timesTable(result.results, names));
  find("sizes").replaceChildren(sizesTable(manifests, names));
  find("device").replaceChildren(...facts(result));
  const form = find("again").elements;
  form.runs.value = first.samples;
  form.threads.value = result.threads;
  for (const also of new URLSearchParams(location.search).getAll("also")) {
    find("again").append(element("input", [], { type: "hidden", name: "also", value: also }));
  }
  const blob = new Blob([JSON.stringify(result, null, 1)], { type: "application/json" });
  find("save").href = URL.createObjectURL(blob);
}

function leadOf({ results, threads }, { tolerance }) {
  const many = results.length > 1;
  const which = many ? " of each model, in turns," : "";
  const where = threads === 1 ? "one thread" : `${threads} threads`;
  const checked = `Every file had its SHA-256; the outputs are right within ${tolerance} of the largest value.`;
  return `${results[0].samples} runs${which} on ${where}. ${checked}`;
}

function showNotes(notes) {
  find("notes").hidden = notes.length === 0;
  find("notes").replaceChildren(
    element("h2", notes.length > 1 ? "Notes" : "Note"),
    element(
      "ul",
      notes.map((note) => element("li", sentence(note))),
    ),
  );
}

function sentence(text) {
  return `${text.slice(0, 1).toUpperCase()}${text.slice(1)}.`;
}

/** The rule of edgecompress/latency.py: the middle half of the runs should lie within a tenth of the median. */
function doubts(results) {
  const spreads = results.map(
    ({ values_ms: values, median_ms: median }) => (quantile(values, 0.75) - quantile(values, 0.25)) / median,
  );
  const widest = Math.max(...spreads);
  return widest > WIDE_SPREAD
    ? [`half of the runs spread over ${Math.round(widest * 100)} % of the median: the machine is noisy`]
    : [];
}

/** Figure and unit, three significant digits. */
function milliseconds(value) {
  return value >= 10_000 ? [digits(value / 1000), "s"] : [digits(value), "ms"];
}

function bytes(value) {
  if (value >= 1e6) return [digits(value / 1e6), "MB"];
  return value >= 1000 ? [digits(value / 1000), "kB"] : [String(value), "B"];
}

function digits(value) {
  const places = Math.max(0, 2 - Math.floor(Math.log10(Math.max(value, 1e-3))));
  return value.toFixed(Math.min(places, 3));
}

function table(caption, head, rows) {
  const cells = (tag, row) => row.map((text, index) => element(index ? tag : "th", text, index ? { class: "n" } : {}));
  const labelled = rows.map((row) => {
    const made = element("tr", cells("td", row));
    [...made.children].forEach((cell, index) => cell.setAttribute("data-label", head[index]));
    return made;
  });
  return element("table", [
    element("caption", caption, { class: "sr" }),
    element("thead", element("tr", cells("th", head))),
    element("tbody", labelled),
  ]);
}

function timesTable(results, names) {
  const head = ["Model", "Start", "First run", "Median", "p90", "Runs", "Outputs"];
  return table(
    "Times",
    head,
    results.map((row, index) => [
      names[index],
      ...[row.init_ms, row.first_ms, row.median_ms, row.p90_ms].map((value) => milliseconds(value).join(" ")),
      String(row.samples),
      "as expected",
    ]),
  );
}

function sizesTable(manifests, names) {
  const parts = [
    ["model", "Model"],
    ["runtime", "Runtime and program"],
    ["other", "Test data, licences"],
    ["total", "Total"],
  ];
  const rows = [];
  manifests.forEach(({ sizes }, index) => {
    for (const [part, label] of index ? parts.slice(0, 1) : parts) {
      const several = { model: names[index], total: `Total with ${LETTERS[0]}` };
      const name = manifests.length > 1 ? (several[part] ?? label) : label;
      const { installed_bytes: installed, download_bytes: packed } = sizes[part];
      rows.push([name, ...[installed, packed].map((value) => value.toLocaleString("en"))]);
    }
  });
  return table("Sizes in bytes", ["Part", "Bytes", "Compressed"], rows);
}

function facts({ device, results, threads }) {
  const memory = device.wasm_memory_bytes;
  const decoded = results.map(({ decode_ms: value }) => value).filter((value) => value !== null);
  const known = [
    ["Browser", device.browser],
    ["System", [device.os, device.machine, device.phone].filter(Boolean).join(", ")],
    ["Processor cores", device.cores && `${device.cores}, ${threads} used`],
    ["Runtime", `onnxruntime-web ${device.onnxruntime}, started in ${milliseconds(device.runtime_start_ms).join(" ")}`],
    ["Decoding the model", decoded.map((value) => milliseconds(value).join(" ")).join(", ")],
    [
      "WebAssembly memory",
      memory && `${bytes(memory).join(" ")} at most${results.length > 1 ? ", all models together" : ""}`,
    ],
    ["Device memory", device.memory_gb && `${device.memory_gb} GB or more`],
    ["Clock", `steps of ${device.clock_step_ms} ms`],
  ];
  return known
    .filter(([, value]) => value)
    .flatMap(([name, value]) => [element("dt", name), element("dd", String(value))]);
}

// --- the chart: every run, in order ---

function shape(name, attributes, content = []) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...[content].flat());
  return made;
}

function chartOf(results, names, width) {
  const shown = results.map(({ values_ms: values }) => thinned(values));
  const all = shown.flat();
  const ticks = ticksOf(Math.min(...all), Math.max(...all));
  const [low, high] = [ticks[0], ticks[ticks.length - 1]];
  const y = (value) => HEIGHT - MARGIN.bottom - ((value - low) / (high - low)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  const most = Math.max(...shown.map(({ length }) => length));
  const x = (index) => MARGIN.left + ((index + 0.5) / most) * (width - MARGIN.left - MARGIN.right);
  const drawn = ticks.flatMap((tick) => [
    shape("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(tick), y2: y(tick), class: "grid" }),
    shape("text", { x: MARGIN.left - 8, y: y(tick) + 4, class: "tick", "text-anchor": "end" }, String(tick)),
  ]);
  results.forEach(({ median_ms: median }, index) => {
    const values = shown[index];
    drawn.push(
      shape("line", {
        x1: MARGIN.left,
        x2: width - MARGIN.right,
        y1: y(median),
        y2: y(median),
        class: `median s${index % 3}`,
      }),
    );
    drawn.push(
      ...values.map((value, run) =>
        shape("circle", { cx: x(run), cy: y(value), r: values.length > 200 ? 1.6 : 2.6, class: `s${index % 3}` }),
      ),
    );
  });
  const axis = { y: HEIGHT - 8, class: "tick" };
  drawn.push(shape("text", { ...axis, x: x(0), "text-anchor": "start" }, "run 1"));
  drawn.push(shape("text", { ...axis, x: x(most - 1), "text-anchor": "end" }, String(results[0].samples)));
  const range = [Math.min(...all), Math.max(...all)].map((value) => value.toPrecision(3)).join(" to ");
  const label = `Milliseconds of each run, in order, from ${range}`;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label }, drawn);
  const keys =
    results.length > 1 ? names.map((name, index) => element("span", name, { class: `key s${index % 3}` })) : [];
  return [element("figcaption", ["Milliseconds of each run, in order; the line is the median ", ...keys]), svg];
}

/** At most a thousand of the runs, evenly taken: more are not to be told apart. */
function thinned(values) {
  const step = Math.ceil(values.length / MOST_POINTS);
  return values.filter((_, index) => index % step === 0);
}

/** Round numbers that enclose a range. */
function ticksOf(low, high) {
  const range = Math.max(high - low, high * 0.02, 1e-3);
  const raw = range / 3;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= raw);
  const ticks = [];
  for (let tick = Math.floor(low / step); tick <= Math.ceil(high / step + 1e-9); tick++)
    ticks.push(Number((tick * step).toPrecision(6)));
  return ticks.length > 1 ? ticks : [...ticks, ticks[0] + step];
}
