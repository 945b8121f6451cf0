/** What a page can know of the machine that it runs on. Unknown is null. */

/**
 * Note every memory that WebAssembly allocates from now on. It never shrinks, so its size is the most that was in use.
 * @returns {() => number | null} the bytes so far
 */
export function watchMemory() {
  const memories = [];
  const Memory = WebAssembly.Memory;
  WebAssembly.Memory = class extends Memory {
    constructor(descriptor) {
      super(descriptor);
      memories.push(this);
    }
  };
  return () => memories.reduce((sum, memory) => sum + memory.buffer.byteLength, 0) || null;
}

/**
 * Facts under the names that the other programs of bundles use, and those that only a browser has.
 * @param {string} runtime the version of onnxruntime-web
 */
export async function browserFacts(runtime) {
  const hints = navigator.userAgentData;
  const more = await (hints
    ?.getHighEntropyValues(["platformVersion", "model", "architecture", "bitness"])
    .catch(() => ({})) ?? {});
  const system = [hints?.platform ?? systemIn(navigator.userAgent), more.platformVersion].filter(Boolean).join(" ");
  return {
    cpu_model: null,
    machine: more.architecture ? `${more.architecture}${more.bitness === "64" ? "_64" : ""}` : null,
    cores: navigator.hardwareConcurrency ?? null,
    governor: null,
    frequency_mhz: null,
    temperature_c: null,
    os: system || null,
    load_average: null,
    onnxruntime: runtime,
    browser: browserIn(hints?.fullVersionList ?? hints?.brands, navigator.userAgent),
    phone: more.model || null,
    memory_gb: navigator.deviceMemory ?? null,
    isolated: globalThis.crossOriginIsolated === true,
    clock_step_ms: clockStep(),
  };
}

/** Name and version, from the brands that a browser names or from its user agent. */
export function browserIn(brands, agent) {
  const named = (brands ?? []).filter(({ brand }) => !/not.?a.?brand/i.test(brand));
  const brand = named.find((each) => each.brand !== "Chromium") ?? named[0];
  if (brand) return `${brand.brand} ${brand.version}`;
  for (const [token, name] of Object.entries(TOKENS)) {
    const found = new RegExp(`${token}/([\\d.]+)`).exec(agent);
    if (found) return `${name} ${found[1]}`;
  }
  return agent.slice(0, 80) || null;
}

// What tells browsers apart, the most telling first: Edge calls itself Chrome, too, and all call themselves Safari.
const TOKENS = {
  Edg: "Edge",
  Firefox: "Firefox",
  FxiOS: "Firefox",
  CriOS: "Chrome",
  Chrome: "Chrome",
  Version: "Safari",
};

function systemIn(agent) {
  return /\(([^;)]*(?:;[^;)]*)?)/.exec(agent)?.[1] ?? null;
}

/** The smallest difference between two readings of the clock, in milliseconds. */
function clockStep() {
  let smallest = Infinity;
  for (let reading = 0; reading < 20; reading++) {
    const start = performance.now();
    let now = start;
    while (now === start) now = performance.now();
    smallest = Math.min(smallest, now - start);
  }
  return Math.round(smallest * 1e6) / 1e6;
}
