/**
 * Decoder of .ecz files: lossless containers of ONNX models (edgecompress/container/SPEC.md, version 2).
 *
 *     import { decode } from "./ecz.js";
 *     const [model, ...data] = await decode(new Uint8Array(await (await fetch("model.ecz")).arrayBuffer()));
 *     const session = await ort.InferenceSession.create(model.data, {
 *       externalData: data.map(({ name, data }) => ({ path: name, data })),
 *     });
 *
 * An ES module without dependencies, for browsers and Node 20. Whatever the bytes, it decodes them or throws EczError.
 */

export class EczError extends Error {
  constructor(message) {
    super(message);
    this.name = "EczError";
  }
}

const SIGNATURE = [0x89, 0x45, 0x43, 0x5a, 0x0d, 0x0a, 0x1a, 0x0a];
const VERSION = 2;
const PREFIX_BYTES = 32;
const MAX_META_BYTES = 2 ** 28;
const SMALL_META_BYTES = 2 ** 26;
const META_MAX_RATIO = 8;
const DEFLATE_MAX_RATIO = 1032;
const MAX_TABLES = 2 ** 10;
const MAX_PIECES = 2 ** 18;
const MAX_FILES = 2 ** 12;
const MAX_STREAM_BYTES = 2 ** 26;
const MAX_LEVEL = 128;
const MAX_PHRASES = 256;
const PHRASE_VALUES = 8; // the most of a phrase, or
const LONG_PHRASE_VALUES = 64;
const LONG_PHRASES = 256; // what a table of long phrases adds to its common level
const CODE_BITS = 12;
const MAX_CLASSES = 8;
const MAX_CLASS_LEVEL = 15;
const CLASS_BIAS = 8;
const RAW = 0;
const HUFFMAN = 1;
const DEFLATE = 2;
// The two separators, what controls a terminal, what is invisible or turns text around, lone surrogates.
const NOT_IN_NAMES = /[\0-\x1f/\\\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]|\p{Cs}/u;

function malformed(what) {
  return new EczError(`malformed .ecz file: ${what}`);
}

/**
 * Decode all files of a container.
 * @param {Uint8Array} bytes an .ecz file
 * @returns {Promise<{name: string, data: Uint8Array}[]>} the model, whose name is "", then its external data files
 * @throws {EczError} for a damaged or foreign file
 */
export async function decode(bytes) {
  const container = await open(bytes);
  const streams = new Map();
  let at = 0;
  const files = [];
  for (const entry of container.files) {
    const data = allocate(entry.length);
    let filled = 0;
    for (const { gap, length, stream } of entry.segments) {
      data.set(container.skeleton.subarray(at, at + gap), filled);
      at += gap;
      filled += gap;
      if (!streams.has(stream)) streams.set(stream, await decodeStream(bytes, container, stream));
      const whole = streams.get(stream);
      data.set(whole.subarray(0, length), filled);
      filled += length;
      if (length < whole.length) streams.set(stream, whole.subarray(length));
      else streams.delete(stream);
    }
    data.set(container.skeleton.subarray(at, at + entry.length - filled), filled);
    at += entry.length - filled;
    if (crc32(data) !== entry.crc) throw malformed("checksum mismatch in a decoded file");
    files.push({ name: entry.name, data });
  }
  return files;
}

function allocate(size) {
  try {
    return new Uint8Array(size);
  } catch {
    throw new EczError(`there is no memory for ${size} bytes`);
  }
}

// --- structure ---

async function open(bytes) {
  if (SIGNATURE.some((byte, index) => bytes[index] !== byte)) throw new EczError("not an .ecz file");
  if (bytes.length < PREFIX_BYTES) throw malformed("truncated");
  const prefix = new DataView(bytes.buffer, bytes.byteOffset, PREFIX_BYTES);
  const version = prefix.getUint32(8, true);
  if (version !== VERSION) throw new EczError(`version ${version} of the .ecz format is not known`);
  const offset = prefix.getUint32(16, true) + prefix.getUint32(20, true) * 2 ** 32;
  const stored = prefix.getUint32(24, true);
  const raw = prefix.getUint32(28, true);
  if (offset < PREFIX_BYTES || offset + stored !== bytes.length) throw malformed("truncated or extended");
  const most = Math.max(SMALL_META_BYTES, META_MAX_RATIO * bytes.length);
  if (raw > Math.min(MAX_META_BYTES, DEFLATE_MAX_RATIO * stored, most)) throw malformed(`a meta block of ${raw} bytes`);
  const head = bytes.slice(0, PREFIX_BYTES);
  head.fill(0, 12, 16);
  const meta = bytes.subarray(offset);
  if (crc32(meta, crc32(head)) !== prefix.getUint32(12, true)) throw malformed("checksum mismatch in the meta block");
  return parse(await inflate(meta, raw), offset, DEFLATE_MAX_RATIO * bytes.length);
}

async function inflate(data, length) {
  const out = await inflated(data, length);
  if (out === null) throw malformed("broken DEFLATE data, or of another length than announced");
  // Some engines ignore what comes after the end; then the data is still whole without its last byte.
  if ((await inflated(data.subarray(0, -1), length)) !== null) throw malformed("bytes after the end of DEFLATE data");
  return out;
}

/** The bytes of a DEFLATE stream, null where it is not whole or has not `length` bytes. */
async function inflated(data, length) {
  const out = allocate(length);
  let filled = 0;
  try {
    const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    const reader = stream.getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      if (part.value.length > length - filled) {
        await reader.cancel();
        return null;
      }
      out.set(part.value, filled);
      filled += part.value.length;
    }
  } catch {
    return null;
  }
  return filled === length ? out : null;
}

/** The inflated meta block and a position in it. */
class Reader {
  constructor(data) {
    this.data = data;
    this.at = 0;
  }

  take(size) {
    if (size > this.data.length - this.at) throw malformed("the meta block ends too early");
    this.at += size;
    return this.data.subarray(this.at - size, this.at);
  }

  fixed32() {
    const bytes = this.take(4);
    return new DataView(bytes.buffer, bytes.byteOffset, 4).getUint32(0, true);
  }

  /** A number of up to 63 bits; one above 2^53 is beyond every limit, so it need not be exact. */
  number() {
    let value = 0;
    for (let shift = 0; shift < 63; shift += 7) {
      const byte = this.take(1)[0];
      value += (byte & 127) * 2 ** shift;
      if (byte < 128) return value;
    }
    throw malformed("a number of more than 63 bits");
  }

  count(limit, what) {
    const count = this.number();
    if (count > limit) throw malformed(`${count} ${what}, at most ${limit} are allowed`);
    return count;
  }
}

function parse(meta, payloadEnd, mostBytes) {
  const reader = new Reader(meta);
  const lanePhrases = reader.number();
  if (lanePhrases < 64 || lanePhrases > 4096) throw malformed(`${lanePhrases} phrases a lane`);
  const tables = [];
  for (let left = reader.count(MAX_TABLES, "tables"); left > 0; left--) tables.push(parseTable(reader));
  const streams = parseStreams(reader, tables, payloadEnd);
  const blocks = streams.reduce((sum, { planes = [] }) => sum + blocksOf(planes), 0);
  const left = streams.map(({ count, width }) => count * width);
  const files = parseFiles(reader, left, MAX_PIECES - streams.length - blocks);
  if (left.some((size) => size > 0)) throw malformed("payload that no file uses");
  let total = 0;
  let gaps = 0;
  for (const { length, segments } of files) {
    total += length;
    gaps += length - segments.reduce((sum, segment) => sum + segment.length, 0);
  }
  if (total > mostBytes) throw malformed(`${total} bytes out of a file that can hold at most ${mostBytes}`);
  const skeleton = meta.subarray(reader.at);
  if (gaps !== skeleton.length) throw malformed("a skeleton of another length");
  return { lanePhrases, tables, streams, files, skeleton, codes: new Map() };
}

function parseTable(reader) {
  const base = reader.number();
  const alphabet = reader.number();
  const splits = reader.number();
  let common = splits ? reader.number() : 0;
  const longest = common < LONG_PHRASES ? PHRASE_VALUES : LONG_PHRASE_VALUES;
  if (common >= LONG_PHRASES) common -= LONG_PHRASES;
  if (base > 255 || alphabet < 2 || alphabet > 256) throw malformed(`an alphabet of ${alphabet} values`);
  const levels = reader.take(alphabet);
  const used = levels.filter((level) => level > 0).length;
  const many = common ? levels.filter((level) => level >= common).length : 0;
  if (used < 2 || levels.some((level) => level > MAX_LEVEL)) throw malformed("levels out of range");
  if (splits > mostSplits(used, many, longest)) throw malformed(`${splits} splits of ${used} values`);
  return { base, levels, splits, common, longest };
}

function mostSplits(used, common, longest) {
  if (common === 0) return 0;
  let shorter = 0;
  for (let size = 1; size < longest; size++) shorter += common ** size;
  return Math.min(Math.floor((MAX_PHRASES - used) / (common - (used === common ? 1 : 0))), shorter);
}

function parseStreams(reader, tables, payloadEnd) {
  const streams = [];
  let offset = PREFIX_BYTES;
  const many = reader.count(MAX_PIECES, "streams");
  let room = MAX_PIECES - many;
  for (let left = many; left > 0; left--) {
    const count = reader.number();
    const width = reader.number();
    if (width === 0) {
      const number = reader.number();
      const rows = reader.number();
      const source = streams[number];
      if (!source?.planes || source.count !== count || rows < 1 || count % rows) throw malformed("a copy of nothing");
      streams.push({ count, width: source.width, source: number, rows });
      continue;
    }
    if (![1, 2, 4, 8].includes(width) || count < 1 || count * width > MAX_STREAM_BYTES) {
      throw malformed(`a stream of ${count} elements of ${width} bytes`);
    }
    const planes = [];
    for (let plane = 0; plane < width; plane++) planes.push(parsePlane(reader, count, tables));
    streams.push({ count, width, planes, offset, crc: reader.fixed32() });
    offset += planes.reduce((sum, plane) => sum + plane.stored, 0);
    if (offset > payloadEnd) throw malformed("streams reach into the meta block");
    room -= blocksOf(planes);
    if (room < 0) throw malformed(`more than ${MAX_PIECES} streams and blocks`);
  }
  if (offset !== payloadEnd) throw malformed("bytes between the streams and the meta block");
  return streams;
}

function blocksOf(planes) {
  return planes.reduce((sum, { blocks = [] }) => sum + blocks.length, 0);
}

function parsePlane(reader, count, tables) {
  const mode = reader.number();
  if (mode === HUFFMAN) return parseHuffman(reader, count, tables);
  const stored = reader.number();
  if (!((mode === RAW && stored === count) || (mode === DEFLATE && DEFLATE_MAX_RATIO * stored >= count))) {
    throw malformed(`a plane of mode ${mode} with ${stored} bytes for ${count} values`);
  }
  return { mode, stored };
}

function parseHuffman(reader, count, tables) {
  const classes = reader.number();
  if (classes < 1 || classes > MAX_CLASSES) throw malformed(`${classes} classes of values`);
  let sizes = [count];
  let map = null;
  if (classes > 1) {
    const rows = reader.number();
    const columns = reader.number();
    if (!(rows * columns >= 1 && rows * columns <= count) || count % (rows * columns)) {
      throw malformed(`${rows} rows and ${columns} columns of ${count} values`);
    }
    map = { classes, rows: reader.take(rows), columns: reader.take(columns), run: count / (rows * columns) };
    if ([map.rows, map.columns].some((levels) => levels.some((level) => level > MAX_CLASS_LEVEL))) {
      throw malformed("classes of rows or columns out of range");
    }
    sizes = classSizes(map);
  }
  const blocks = sizes.filter((size) => size > 0).map((size) => parseBlock(reader, size, tables));
  return { mode: HUFFMAN, stored: blocks.reduce((sum, block) => sum + block.stored, 0), blocks, map };
}

function classOf(map, row, column) {
  return Math.min(Math.max(row + column - CLASS_BIAS, 0), map.classes - 1);
}

function levelCounts(levels) {
  const counts = new Array(MAX_CLASS_LEVEL + 1).fill(0);
  for (const level of levels) counts[level]++;
  return counts;
}

function classSizes(map) {
  const sizes = new Array(map.classes).fill(0);
  const columns = levelCounts(map.columns);
  levelCounts(map.rows).forEach((rows, row) => {
    columns.forEach((many, column) => {
      sizes[classOf(map, row, column)] += rows * many * map.run;
    });
  });
  return sizes;
}

function parseBlock(reader, count, tables) {
  const number = reader.number();
  if (number >= tables.length) throw malformed(`a block of table ${number} of ${tables.length}`);
  const stored = reader.number();
  const phrases = tables[number].splits ? reader.number() : count;
  const size = tables[number].splits ? tables[number].longest : 1;
  if (!(phrases <= Math.min(count, 8 * stored) && size * phrases >= count)) {
    throw malformed(`a block of ${count} values in ${phrases} phrases and ${stored} bytes`);
  }
  return { table: number, count, stored, phrases };
}

function parseFiles(reader, left, pieces) {
  const files = [];
  const names = new Set();
  let room = pieces;
  for (let more = reader.count(MAX_FILES, "files"); more > 0; more--) {
    const name = parseName(reader, files.length === 0);
    if (names.has(name)) throw malformed("two files of one name");
    names.add(name);
    const length = reader.number();
    if (length === 0 && files.length > 0) throw malformed(`the file ${name} is empty`);
    const crc = reader.fixed32();
    const segments = [];
    let end = 0;
    for (let count = reader.count(room, "more segments"); count > 0; count--) {
      const segment = { gap: reader.number(), length: reader.number(), stream: reader.number() };
      if (!(segment.length >= 1 && segment.length <= left[segment.stream])) throw malformed("a segment of nothing");
      left[segment.stream] -= segment.length;
      end += segment.gap + segment.length;
      segments.push(segment);
    }
    if (end > length) throw malformed("segments that reach beyond the end of their file");
    room -= segments.length;
    files.push({ name, length, crc, segments });
  }
  if (files.length === 0) throw malformed("no model in it");
  return files;
}

function parseName(reader, isModel) {
  const raw = reader.take(reader.number());
  if (isModel && raw.length === 0) return "";
  let name = "";
  try {
    name = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(raw);
  } catch {
    throw malformed("a file name that is not UTF-8");
  }
  if (isModel || raw.length < 1 || raw.length > 255 || name.startsWith(".") || NOT_IN_NAMES.test(name)) {
    throw malformed("a file name that is not plain");
  }
  return name;
}

// --- codes ---

/** Phrases of a table, `longest` bytes each, and for the next 12 bits phrase << 10 | (size - 1) << 4 | bits. */
function codeOf(container, number) {
  if (!container.codes.has(number)) container.codes.set(number, buildCode(container.tables[number]));
  return container.codes.get(number);
}

function buildCode(table) {
  const phrases = growPhrases(table);
  const lengths = codeLengths(phrases.map((phrase) => phrase.likelihood));
  const values = new Uint8Array(MAX_PHRASES * table.longest);
  phrases.forEach((phrase, index) => values.set(phrase.values, table.longest * index));
  const entries = new Uint32Array(2 ** CODE_BITS);
  let code = 0;
  for (let length = 1; length <= CODE_BITS; length++, code *= 2) {
    for (let index = 0; index < phrases.length; index++) {
      if (lengths[index] !== length) continue;
      let mirrored = 0;
      for (let bit = 0; bit < length; bit++) mirrored |= ((code >> bit) & 1) << (length - 1 - bit);
      const entry = (index << 10) | ((phrases[index].values.length - 1) << 4) | length;
      for (; mirrored < entries.length; mirrored += 2 ** length) entries[mirrored] = entry;
      code++;
    }
  }
  return { entries, values, longest: table.longest };
}

function growPhrases({ base, levels, splits, common, longest }) {
  const used = [];
  levels.forEach((level, index) => {
    if (level) used.push({ value: (base + index) & 255, level });
  });
  const weights = used.map(({ level }) => (8 + ((level - 1) % 8)) * 2 ** Math.floor((level - 1) / 8));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  used.forEach((each, index) => {
    each.share = Math.max(1, Math.floor((weights[index] * 65536) / total));
  });
  const extending = used.filter(({ level }) => level >= common);
  const rare = used.filter(({ level }) => level < common).reduce((sum, { share }) => sum + share, 0);
  const phrases = used.map(({ value, level, share }) => ({
    values: [value],
    likelihood: share * 16384,
    kind: level < common ? "rare" : "whole",
  }));
  for (let split = 0; split < splits; split++) {
    let chosen = null;
    for (const phrase of phrases) {
      const open = phrase.kind === "whole" && phrase.values.length < longest;
      if (open && (chosen === null || phrase.likelihood > chosen.likelihood)) chosen = phrase;
    }
    const { values, likelihood } = chosen;
    extending.forEach(({ value, share }, index) => {
      const child = { values: [...values, value], likelihood: atLeastOne(likelihood * share), kind: "whole" };
      if (index === 0 && rare === 0) Object.assign(chosen, child);
      else phrases.push(child);
    });
    if (rare > 0) Object.assign(chosen, { likelihood: atLeastOne(likelihood * rare), kind: "cut" });
  }
  favourRare(phrases);
  return phrases;
}

function atLeastOne(product) {
  return Math.max(1, Math.floor(product / 65536));
}

function favourRare(phrases) {
  const sums = { rare: 0, cut: 0, whole: 0 };
  for (const { kind, likelihood } of phrases) sums[kind] += likelihood;
  if (sums.rare === 0) return;
  const factor = Math.floor(((sums.rare + sums.cut) * 16) / sums.rare);
  for (const phrase of phrases) {
    if (phrase.kind === "rare") phrase.likelihood = Math.floor((phrase.likelihood * factor) / 16);
  }
}

/** Package-merge: lengths of an optimal code of at most 12 bits. */
function codeLengths(likelihoods) {
  const order = likelihoods.map((_, index) => index).sort((a, b) => likelihoods[a] - likelihoods[b] || a - b);
  const lists = [];
  let packages = [];
  for (let level = 0; level < CODE_BITS; level++) {
    const list = [];
    let coin = 0;
    let package_ = 0;
    while (coin < order.length || package_ < packages.length) {
      const next = coin < order.length ? likelihoods[order[coin]] : Infinity;
      const isCoin = package_ === packages.length || next <= packages[package_];
      list.push({ isCoin, weight: isCoin ? next : packages[package_] });
      if (isCoin) coin++;
      else package_++;
    }
    packages = [];
    for (let index = 0; index + 1 < list.length; index += 2) packages.push(list[index].weight + list[index + 1].weight);
    lists.push(list);
  }
  const lengths = new Uint8Array(order.length);
  let taken = 2 * order.length - 2;
  for (const list of lists.reverse()) {
    const coins = list.slice(0, taken).filter(({ isCoin }) => isCoin).length;
    for (let index = 0; index < coins; index++) lengths[order[index]]++;
    taken = 2 * (taken - coins);
  }
  return lengths;
}

// --- payload ---

async function decodeStream(bytes, container, number) {
  const stream = container.streams[number];
  if (stream.planes) return decodePlanes(bytes, container, stream);
  const source = await decodePlanes(bytes, container, container.streams[stream.source]);
  return stream.rows === 1 ? source : transpose(source, stream);
}

function transpose(source, { count, width, rows }) {
  const out = new Uint8Array(source.length);
  const columns = count / rows;
  let at = 0;
  for (let column = 0; column < columns; column++) {
    for (let row = 0; row < rows; row++) {
      const from = (row * columns + column) * width;
      for (let byte = 0; byte < width; byte++) out[at++] = source[from + byte];
    }
  }
  return out;
}

async function decodePlanes(bytes, container, { count, width, planes, offset, crc }) {
  const stored = planes.reduce((sum, plane) => sum + plane.stored, 0);
  if (crc32(bytes.subarray(offset, offset + stored)) !== crc) throw malformed("checksum mismatch in a payload stream");
  const out = allocate(count * width);
  let at = offset;
  for (let index = 0; index < width; index++) {
    const plane = planes[index];
    const data = bytes.subarray(at, at + plane.stored);
    at += plane.stored;
    let values = data;
    if (plane.mode === DEFLATE) values = await inflate(data, count);
    if (plane.mode === HUFFMAN) values = decodeHuffman(container, plane, data, count);
    if (width === 1) out.set(values);
    else for (let each = 0; each < count; each++) out[each * width + index] = values[each];
  }
  return out;
}

function decodeHuffman(container, { blocks, map }, data, count) {
  const values = allocate(count);
  let at = 0;
  let filled = 0;
  for (const block of blocks) {
    const out = values.subarray(filled, filled + block.count);
    const code = codeOf(container, block.table);
    decodeBlock(code, data.subarray(at, at + block.stored), block.phrases, container.lanePhrases, out);
    at += block.stored;
    filled += block.count;
  }
  return map ? orderRuns(map, values) : values;
}

function orderRuns(map, values) {
  const out = new Uint8Array(values.length);
  const next = [];
  let first = 0;
  for (const size of classSizes(map)) {
    next.push(first);
    first += size;
  }
  let at = 0;
  for (const row of map.rows) {
    for (const column of map.columns) {
      const found = classOf(map, row, column);
      for (let each = 0; each < map.run; each++) out[at++] = values[next[found]++];
    }
  }
  return out;
}

/** Decode a block. JavaScript gains nothing from several lanes, so they are only checked to end where they should. */
function decodeBlock(code, data, phrases, lanePhrases, out) {
  const lanes = Math.ceil(phrases / lanePhrases);
  const { ends, bits } = laneEnds(data, lanes - 1);
  let position = 0;
  let filled = 0;
  for (let lane = 0; lane < lanes; lane++) {
    const many = lane < lanes - 1 ? lanePhrases : phrases - lane * lanePhrases;
    const reached = decodeLane(code, bits, position, many, out, filled, lane === lanes - 1);
    position = reached.position;
    filled = reached.filled;
    if (lane < lanes - 1 && position !== ends[lane]) throw malformed("a lane that does not end where the next starts");
  }
  const spare = 8 * bits.length - position;
  if (filled !== out.length) throw malformed("phrases of another number of values than announced");
  if (spare < 0 || spare > 7 || (spare > 0 && bits[bits.length - 1] >> (8 - spare))) {
    throw malformed("a block longer or shorter than its code");
  }
}

function laneEnds(data, known) {
  if (known <= 0) return { ends: [], bits: data };
  if (data.length < 3) throw malformed("a block without lane lengths");
  const least = data[0] | (data[1] << 8);
  const width = data[2];
  const packed = Math.ceil((known * width) / 8);
  if (width > 16 || 3 + packed > data.length) throw malformed("lane lengths that do not fit their block");
  const rest = (known * width) % 8;
  if (rest && data[2 + packed] >> rest) throw malformed("bits set in the padding of lane lengths");
  const ends = [];
  let end = 0;
  for (let lane = 0, at = 24; lane < known; lane++) {
    end += least;
    for (let bit = 0; bit < width; bit++, at++) end += ((data[at >> 3] >> (at & 7)) & 1) << bit;
    ends.push(end);
  }
  return { ends, bits: data.subarray(3 + packed) };
}

/** Decode phrases from a bit position on; the last one of the last lane may reach beyond the end of out. */
function decodeLane({ entries, values, longest }, bits, start, phrases, out, filled, isLast) {
  let next = start >> 3;
  let ahead = (next < bits.length ? bits[next++] : 0) >> (start & 7);
  let have = 8 - (start & 7);
  let used = 0;
  for (let phrase = 0; phrase < phrases; phrase++) {
    while (have < CODE_BITS) {
      ahead |= (next < bits.length ? bits[next] : 0) << have;
      next++;
      have += 8;
    }
    const entry = entries[ahead & 4095];
    const length = entry & 15;
    ahead >>>= length;
    have -= length;
    used += length;
    let from = (entry >> 10) * longest;
    let size = ((entry >> 4) & 63) + 1;
    if (size > out.length - filled) {
      if (!isLast || phrase < phrases - 1 || filled === out.length) {
        throw malformed("phrases of another number of values than announced");
      }
      size = out.length - filled;
    }
    for (; size > 0; size--) out[filled++] = values[from++];
  }
  return { position: start + used, filled };
}

const CRC_TABLE = new Uint32Array(256).map((_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = (value >>> 1) ^ (value & 1 ? 0xedb88320 : 0);
  return value >>> 0;
});

function crc32(data, previous = 0) {
  let value = ~previous;
  for (let index = 0; index < data.length; index++) value = (value >>> 8) ^ CRC_TABLE[(value ^ data[index]) & 255];
  return ~value >>> 0;
}
