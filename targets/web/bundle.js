/** Bundles as the page reads them: the manifest with its own checksum, files checked against it, the model. */

import { decode } from "./ecz.js";
import { sha256 } from "./sha256.js";
import { readTensor } from "./tensor.js";

const SCHEMA_VERSION = 2;

/** A reason why the model is not timed, with what to do next and the exit code that the other programs have for it. */
export class BundleError extends Error {
  constructor(message, hint, exitCode) {
    super(message);
    this.name = "BundleError";
    this.hint = hint;
    this.exit_code = exitCode;
  }
}

function damaged(message, hint = "copy or build the bundle again") {
  return new BundleError(message, hint, 4);
}

/**
 * Fetch the manifest of the bundle at `base` and check it.
 * @param {URL} base the bundle's folder
 */
export async function readManifest(base) {
  const text = new TextDecoder().decode(await fetchBytes(base, "manifest.json"));
  let manifest = null;
  try {
    manifest = JSON.parse(text);
  } catch {
    throw damaged("manifest.json is not JSON");
  }
  if (manifest?.schema_version !== SCHEMA_VERSION) {
    const hint = "use the version of edgecompress that built it";
    throw damaged(`schema_version ${manifest?.schema_version} is not supported (allowed: ${SCHEMA_VERSION})`, hint);
  }
  if ((await sha256(new TextEncoder().encode(canonical(text)))) !== manifest.manifest_sha256) {
    throw damaged("manifest.json was altered: it does not match its own SHA-256");
  }
  return manifest;
}

/**
 * The text that `manifest_sha256` is the digest of: sorted keys, no spaces, numbers and texts spelt as they are in the
 * file (JSON.stringify would spell 1e-05 and 1.0 in its own way).
 */
export function canonical(text) {
  const tokens = text.match(/"(?:[^"\\]|\\.)*"|[{}[\],:]|[^\s{}[\],:"]+/g) ?? [];
  let at = 0;
  const value = (top) => {
    const token = tokens[at++];
    if (token === "[") {
      const items = [];
      while (tokens[at] !== "]") {
        items.push(value(false));
        if (tokens[at] === ",") at++;
      }
      at++;
      return `[${items.join()}]`;
    }
    if (token !== "{") return token;
    const entries = [];
    while (tokens[at] !== "}") {
      const key = tokens[at];
      at += 2; // the key and its colon
      const item = value(false);
      if (!(top && key === '"manifest_sha256"')) entries.push([JSON.parse(key), `${key}:${item}`]);
      if (tokens[at] === ",") at++;
    }
    at++;
    entries.sort(([a], [b]) => (a < b ? -1 : 1));
    return `{${entries.map(([, entry]) => entry).join()}}`;
  };
  return value(true);
}

/**
 * Fetch files of a bundle and check the SHA-256 of each.
 * @param {URL} base
 * @param {object} manifest
 * @param {string[]} paths
 * @param {(path: string) => void} progress called with each file that is whole
 * @returns {Promise<Map<string, Uint8Array>>} their bytes
 */
export async function fetchFiles(base, manifest, paths, progress) {
  const files = new Map();
  for (const path of paths) {
    const bytes = await fetchBytes(base, path);
    const { size_bytes: size, sha256: digest } = manifest.files[path];
    if (bytes.length !== size) throw damaged(`${path} was altered: it has ${bytes.length} bytes instead of ${size}`);
    if ((await sha256(bytes)) !== digest)
      throw damaged(`${path} was altered: its SHA-256 is not that in manifest.json`);
    files.set(path, bytes);
    progress(path);
  }
  return files;
}

async function fetchBytes(base, path) {
  const address = new URL(path.split("/").map(encodeURIComponent).join("/"), base);
  let response = null;
  try {
    response = await fetch(address);
  } catch {
    const hint = "a page cannot read files of the disk: serve the folder, e.g. `python3 -m http.server`";
    throw new BundleError(`${path} cannot be fetched`, hint, 7);
  }
  if (!response.ok) throw damaged(`${path} is missing (HTTP status ${response.status})`);
  return new Uint8Array(await response.arrayBuffer());
}

/** The files that a run of the model reads: the model, its external data, inputs and expected outputs. */
export function neededFiles(manifest) {
  return [...modelFiles(manifest), ...manifest.inputs, ...manifest.outputs];
}

// What lies beside the model and is not its external data has one of these names.
const OWN = /^(?:(?:lib|licenses|test_data)\/|(?:README|run|bench|index|sbom|SHA256SUMS)(?:$|\.))/;

/** The model and, for an .onnx file, its external data, which lies in the same folder. */
function modelFiles({ model, files }) {
  const folder = folderOf(model);
  const beside = Object.keys(files).filter((path) => path.startsWith(folder) && !OWN.test(path.slice(folder.length)));
  return [model, ...beside.filter((path) => path !== model && model.endsWith(".onnx"))];
}

function folderOf(path) {
  return path.slice(0, path.lastIndexOf("/") + 1);
}

/**
 * Create a session of a bundle's model; what is timed is what an application would wait for.
 * @param {object} ort onnxruntime-web
 * @param {object} manifest
 * @param {Map<string, Uint8Array>} files
 * @param {string[]} providers
 * @returns {Promise<{session: object, init_ms: number, decode_ms: number | null}>}
 */
export async function openModel(ort, manifest, files, providers) {
  const start = performance.now();
  const [first, ...others] = modelFiles(manifest);
  let model = files.get(first);
  let data = others.map((path) => ({ path: path.slice(folderOf(first).length), data: files.get(path) }));
  let decoded = null;
  try {
    if (first.endsWith(".ecz")) {
      const [whole, ...external] = await decode(model);
      model = whole.data;
      data = external.map((file) => ({ path: file.name, data: file.data }));
      decoded = performance.now();
    }
    const session = await ort.InferenceSession.create(model, {
      executionProviders: providers,
      externalData: data,
    });
    return { session, init_ms: performance.now() - start, decode_ms: decoded === null ? null : decoded - start };
  } catch (error) {
    const code = error.name === "EczError" ? 4 : 3;
    throw new BundleError(`${manifest.model} does not load: ${error.message ?? error}`, "build the bundle again", code);
  }
}

/** The tensors of a bundle's test data, by the role `inputs` or `outputs`. */
export function testTensors(manifest, files, role) {
  return manifest[role].map((path) => {
    try {
      return readTensor(files.get(path));
    } catch (error) {
      throw damaged(`${path}: ${error.message}`);
    }
  });
}
