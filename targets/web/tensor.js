/** ONNX TensorProto files as a bundle has them: name, dims, data_type, and raw_data or string_data. */

// data_type -> [name in onnxruntime, class of the values]. Half precision keeps its bits.
const TYPES = {
  1: ["float32", Float32Array],
  2: ["uint8", Uint8Array],
  3: ["int8", Int8Array],
  4: ["uint16", Uint16Array],
  5: ["int16", Int16Array],
  6: ["int32", Int32Array],
  7: ["int64", BigInt64Array],
  8: ["string", Array],
  9: ["bool", Uint8Array],
  10: ["float16", Uint16Array],
  11: ["float64", Float64Array],
  12: ["uint32", Uint32Array],
  13: ["uint64", BigUint64Array],
};
const VARINT = 0;
const BYTES = 2;

/**
 * Read one tensor.
 * @param {Uint8Array} bytes a serialized TensorProto
 * @returns {{name: string, type: string, dims: number[], data: ArrayLike}}
 * @throws {Error} for anything else
 */
export function readTensor(bytes) {
  const text = new TextDecoder("utf-8", { fatal: true });
  const dims = [];
  const strings = [];
  let [name, number, raw] = ["", 0, null];
  for (const { field, wire, value } of fields(bytes)) {
    if (field === 1 && wire === VARINT) dims.push(value);
    else if (field === 1 && wire === BYTES) dims.push(...varints(value));
    else if (field === 2 && wire === VARINT) number = value;
    else if (field === 6 && wire === BYTES) strings.push(text.decode(value));
    else if (field === 8 && wire === BYTES) name = text.decode(value);
    else if (field === 9 && wire === BYTES) raw = value;
    else if (field === 13 || field === 14) throw malformed("its values lie in another file");
    else if (field === 4 || field === 5 || field === 7 || field === 10 || field === 11) throw malformed("no raw_data");
  }
  if (!(number in TYPES)) throw malformed(`data_type ${number} is not supported`);
  const [type, Values] = TYPES[number];
  const data = Values === Array ? strings : valuesOf(raw ?? new Uint8Array(0), Values);
  const size = dims.reduce((product, dim) => product * dim, 1);
  if (data.length !== size) throw malformed(`${data.length} values for the shape [${dims}]`);
  return { name, type, dims, data };
}

function malformed(what) {
  return new Error(`malformed tensor: ${what}`);
}

function valuesOf(raw, Values) {
  if (raw.length % Values.BYTES_PER_ELEMENT) throw malformed(`${raw.length} bytes of raw_data`);
  return new Values(raw.slice().buffer); // a copy: the values have to be aligned
}

function* fields(bytes) {
  const reader = { bytes, at: 0 };
  while (reader.at < bytes.length) {
    const key = varint(reader);
    const [field, wire] = [Math.floor(key / 8), key % 8];
    if (wire === VARINT) yield { field, wire, value: varint(reader) };
    else if (wire === BYTES) yield { field, wire, value: take(reader, varint(reader)) };
    else if (wire === 1 || wire === 5) yield { field, wire, value: take(reader, wire === 1 ? 8 : 4) };
    else throw malformed(`wire type ${wire}`);
  }
}

function varints(bytes) {
  const reader = { bytes, at: 0 };
  const values = [];
  while (reader.at < bytes.length) values.push(varint(reader));
  return values;
}

function varint(reader) {
  let value = 0;
  for (let shift = 0; shift < 64; shift += 7) {
    const byte = take(reader, 1)[0];
    value += (byte & 127) * 2 ** shift;
    if (byte < 128) {
      if (value > Number.MAX_SAFE_INTEGER) throw malformed("a number out of range");
      return value;
    }
  }
  throw malformed("a number of more than 64 bits");
}

function take(reader, size) {
  if (size > reader.bytes.length - reader.at) throw malformed("it ends too early");
  reader.at += size;
  return reader.bytes.subarray(reader.at - size, reader.at);
}
