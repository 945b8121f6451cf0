"""Store small integers as a Huffman stream that operators of the model decode; runtimes fold them at session start.

Every step works on all bits of the stream at once. One transposed convolution of stride 8 gives the 24-bit word that
starts at each bit; a table gives the length of the code that would start there, so every bit knows where the next code
starts. Pointer jumping (Wyllie, "The complexity of parallel computations", 1979) then finds the places of ``2 ** k``
codes of each lane in ``k`` rounds. A ``Loop`` would be smaller still, but runtimes do not fold it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from edgecompress.coding import canonical_codes, encode
from edgecompress.errors import RecipeError
from edgecompress.graph import Graph, constants, fresh_name, values_of
from edgecompress.passes.run import Change
from edgecompress.runtime.codes import code_lengths

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgecompress.model import Array, Model

START_BYTES_PER_BIT = 160
"""What a session start takes at most, per bit of the stream: 70 bytes are alive at its end, because the runtime frees
nothing before all is folded, and memory that is not given back to the system doubles that. Measured with onnxruntime
1.31 on Linux: 150 at 1 million bits, 144 at 3.4 million (1 M weights), 78 at 13 million."""

START_LIMIT_BYTES = 1 << 30
"""Models whose session start would take more memory than this are refused: above about 1.7 M weights of 4 bits each."""

_MIN_OPSET = 11  # Range
_ROUNDS = 10  # 1,024 symbols in a lane: its start costs 0.03 bits a symbol, one round more 4 bytes of memory a bit
_LANE_SYMBOLS = 1 << _ROUNDS
_MAX_BITS = 12  # of a code; with 7 bits before it in its byte it lies within three bytes
_WORD_BYTES = 3
_DECODER_BYTES = 1400  # nodes and small constants that all tensors share
_TENSOR_BYTES = 100  # nodes and constants of each tensor


class _Code(NamedTuple):
    """A prefix code for bytes: (256,) lengths; no code is longer than ``bits``."""

    lengths: Array
    bits: int


def extract_in_graph(graph: Graph) -> Sequence[Change]:
    """Replace the uint8 and int8 constants that get smaller by nodes that decode them; the tensors keep their names.

    These are indices into codebooks and codes of grids; what uses them stays as it is, and so does the opset. All
    tensors of a type are one stream with one code. Nothing changes where nothing gets smaller.

    Raises:
        RecipeError: a session start would take more memory than ``START_LIMIT_BYTES``, or the opset is below 11.
    """
    found: dict[str, Array] = {name: values_of(graph, each) for name, each in constants(graph).items() if _fits(each)}
    changes: list[Change] = []
    streams: list[_Stream] = []
    for dtype in (np.uint8, np.int8):
        tensors = {name: values for name, values in found.items() if values.dtype == dtype}
        chosen, code = _choose(tensors)
        if chosen:
            streams.append(_Stream(chosen, code))
    if streams:
        _check(graph.model, sum(stream.total_bits for stream in streams))
    nodes: list[gs.Node] = []
    for stream in streams:
        decoder = _Decoder(graph)
        nodes += decoder.decode(stream)
        changes += [Change(name, "huffman", tensors=(decoder.stream_name,)) for name in stream.tensors]
    graph.surgeon.nodes = [*nodes, *graph.surgeon.nodes]
    return changes


def _fits(constant: gs.Constant) -> bool:
    return constant.dtype in (np.uint8, np.int8) and int(np.prod(constant.shape)) > _TENSOR_BYTES


def _check(model: Model, bits: int) -> None:
    if model.opset < _MIN_OPSET:
        raise RecipeError(
            f"{model.path}: opset {model.opset} lacks the operators of a self-extracting model (allowed: from 11)",
            hint="leave --self-extracting out, or convert the model with onnx.version_converter",
        )
    needed = bits * START_BYTES_PER_BIT
    if needed > START_LIMIT_BYTES:
        raise RecipeError(
            f"{model.path}: {bits // 8:,} bytes of coded weights in a self-extracting model would take up to "
            f"{needed >> 20:,} MiB of memory whenever a session starts (allowed: {START_LIMIT_BYTES >> 20:,})",
            hint="leave --self-extracting out and ship model.ecz, or use fewer bits",
        )


def _choose(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], _Code]:
    """Return the tensors that are worth coding together, if any, and the code for them."""
    counts = {name: np.bincount(values.view(np.uint8).ravel(), minlength=256) for name, values in tensors.items()}
    code = _best_code(sum(counts.values(), np.zeros(256, np.int64)))
    gains = {name: each.sum() - each @ code.lengths / 8 - _TENSOR_BYTES for name, each in counts.items()}
    chosen = {name: tensors[name] for name, gain in gains.items() if gain > 0}
    if sum(gains[name] for name in chosen) <= _DECODER_BYTES + _table_bytes(code.bits):
        return {}, code
    return chosen, _best_code(sum((counts[name] for name in chosen), np.zeros(256, np.int64)))


def _best_code(counts: Array) -> _Code:
    """Return the code whose stream and tables are smallest together: a bit more for the longest doubles the tables."""
    shortest = max(int(np.count_nonzero(counts)) - 1, 1).bit_length()
    codes = [_Code(code_lengths(counts, bits).astype(np.int64), bits) for bits in range(shortest, _MAX_BITS + 1)]
    return min(codes, key=lambda code: int(counts @ code.lengths) / 8 + _table_bytes(code.bits))


def _table_bytes(bits: int) -> int:
    return 2 << bits


class _Stream:
    """Tensors of one type in one bit stream. Lane ``l`` of ``L`` holds the symbols ``l, l + L, l + 2 L, ...``."""

    def __init__(self, tensors: Mapping[str, Array], code: _Code) -> None:
        self.tensors = tensors
        self.bits = code.bits
        symbols = np.concatenate([values.view(np.uint8).ravel() for values in tensors.values()])
        self.dtype = next(iter(tensors.values())).dtype
        lanes = -(-symbols.size // _LANE_SYMBOLS)
        used = np.flatnonzero(code.lengths)
        shortest = used[np.argmin(code.lengths[used])]
        self.padding = lanes * _LANE_SYMBOLS - symbols.size
        symbols = np.append(symbols, np.full(self.padding, shortest, np.uint8))
        lengths = code.lengths.astype(np.uint8)
        widths, self.stream = encode(symbols.reshape(_LANE_SYMBOLS, lanes).T.ravel(), lengths, _LANE_SYMBOLS)
        self.starts = (np.cumsum(widths) - widths).astype(np.int32)
        codes, table = canonical_codes(lengths), np.full(1 << self.bits, shortest)
        for symbol in used.tolist():
            table[int(codes[symbol]) :: 1 << int(lengths[symbol])] = symbol
        self.symbol_table = table.astype(np.uint8).view(self.dtype)
        self.length_table = lengths[table]

    @property
    def total_bits(self) -> int:
        return 8 * self.stream.size


class _Decoder:
    """Writes the nodes that decode one stream. Names are short: a decoder has some sixty tensors."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._nodes: list[gs.Node] = []
        self._shapes: dict[tuple[int, ...], gs.Constant] = {}
        self.stream_name = fresh_name(graph, "huffman.stream")

    def decode(self, stream: _Stream) -> list[gs.Node]:
        """Return the nodes; the constants that ``stream`` holds become variables."""
        windows = self._windows(stream)
        places = self._places(stream, self._next_codes(stream, windows))
        symbols = self._add("Gather", self._constant(stream.symbol_table), self._add("Gather", windows, places))
        sizes = [values.size for values in stream.tensors.values()] + [stream.padding] * (stream.padding > 0)
        flat = [self._variable() for _ in sizes]
        split = np.array(sizes, np.int64)
        if self._graph.model.opset < 13:
            self._nodes.append(gs.Node("Split", attrs={"split": split.tolist()}, inputs=[symbols], outputs=flat))
        else:
            self._nodes.append(gs.Node("Split", inputs=[symbols, self._constant(split)], outputs=flat))
        present = constants(self._graph)
        for name, piece in zip(stream.tensors, flat, strict=False):
            tensor = present[name]
            shape = tuple(tensor.shape)
            tensor.to_variable(dtype=stream.dtype, shape=list(shape))
            self._nodes.append(gs.Node("Reshape", inputs=[piece, self._shape(shape)], outputs=[tensor]))
        return self._nodes

    def _windows(self, stream: _Stream) -> gs.Variable:
        """Return the bits that start at each bit of the stream, as many as the longest code has, first bit lowest.

        Exact in float32: the word at bit ``o`` of byte ``b`` is ``(x[b] + 2**8 x[b+1] + 2**16 x[b+2]) / 2**o``, a
        24-bit integer and a power of two. The cast to integers drops what is behind the point.
        """
        data = gs.Constant(self.stream_name, stream.stream.reshape(1, 1, -1))
        scales = 2.0 ** (8 * np.arange(_WORD_BYTES)[::-1, np.newaxis] - np.arange(8))
        kernel = self._constant(scales.reshape(1, 1, -1).astype(np.float32))
        floats = self._add("Cast", data, to=onnx.TensorProto.FLOAT)
        words = self._add("ConvTranspose", floats, kernel, strides=[8], pads=[8 * (_WORD_BYTES - 1), 0])
        flat = self._add("Reshape", words, self._shape((-1,)))
        return self._add("Mod", self._add("Cast", flat, to=onnx.TensorProto.INT32), self._integer(1 << stream.bits))

    def _next_codes(self, stream: _Stream, windows: gs.Variable) -> gs.Variable:
        """Return, for every bit, where the code after the one that starts there starts, counted back from the end.

        So Gather itself wraps around what is behind the end, where nothing is of use any more.
        """
        table = self._add("Cast", self._constant(stream.length_table), to=onnx.TensorProto.INT32)
        lengths = self._add("Gather", table, windows)
        bounds = [self._integer(value) for value in (-stream.total_bits, 0, 1)]
        return self._add("Add", self._add("Range", *bounds), lengths)

    def _places(self, stream: _Stream, following: gs.Variable) -> gs.Tensor:
        """Return where the codes of all symbols start: the first of all lanes, the second of all lanes, ..."""
        places: gs.Tensor = self._constant(stream.starts - np.int32(stream.total_bits))
        for number in range(_ROUNDS):
            if number:
                following = self._add("Gather", following, following)
            places = self._add("Concat", places, self._add("Gather", following, places), axis=0)
        return places

    def _add(self, op: str, *inputs: gs.Tensor, **attributes: Any) -> gs.Variable:
        output = self._variable()
        self._nodes.append(gs.Node(op, attrs=attributes, inputs=list(inputs), outputs=[output]))
        return output

    def _variable(self) -> gs.Variable:
        return gs.Variable(fresh_name(self._graph, "h"))

    def _constant(self, values: Array) -> gs.Constant:
        return gs.Constant(fresh_name(self._graph, "h"), values)

    def _integer(self, value: int) -> gs.Constant:
        return self._constant(np.array(value, np.int32))

    def _shape(self, shape: tuple[int, ...]) -> gs.Constant:
        if shape not in self._shapes:
            self._shapes[shape] = self._constant(np.array(shape, np.int64))
        return self._shapes[shape]
