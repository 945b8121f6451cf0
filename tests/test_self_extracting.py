from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import apply, model, names, normal, run, weight_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from edgecompress.errors import RecipeError
from edgecompress.graph import open_graph
from edgecompress.passes import self_extracting
from edgecompress.passes.run import run_pass
from edgecompress.passes.self_extracting import extract_in_graph

MATMUL = """g (float[N, {rows}] x) => (float[N, {columns}] y)
{{ k = Cast<to=6>(indices)  w = Gather(codebook, k)  y = MatMul(x, w) }}"""
GRID = """g (float[N, {rows}] x) => (float[N, {columns}] y)
{{ k = Cast<to=1>(codes)  w = Mul(k, step)  y = MatMul(x, w) }}"""


def bell(*shape, seed=0, middle=8, width=2.4):
    """Return integers from 0 to 15, distributed as indices into a codebook are."""
    values = np.round(np.random.default_rng(seed).normal(size=shape) * width + middle)
    return np.clip(values, 0, 15).astype(np.uint8)


def clustered(rows=96, columns=100, *, opset=17):
    body = MATMUL.format(rows=rows, columns=columns)
    return model(body, opset=opset, indices=bell(rows, columns), codebook=normal(16))


def grid(rows=96, columns=100, *, opset=17, step=0.25):
    body = GRID.format(rows=rows, columns=columns)
    codes = bell(rows, columns).astype(np.int8) - np.int8(8)
    return model(body, opset=opset, codes=codes, step=np.asarray(step, np.float32))


def giving(**tensors):
    """Return a model that gives its integer tensors and nothing else; its input is not used by them."""
    specs = [helper.make_tensor_value_info(f"{name}.out", 6, list(values.shape)) for name, values in tensors.items()]
    nodes = [helper.make_node("Cast", [name], [f"{name}.out"], to=onnx.TensorProto.INT32) for name in tensors]
    stored = [numpy_helper.from_array(values, name) for name, values in tensors.items()]
    return helper.make_graph(nodes, "g", [], specs, stored)


def giving_model(opset, **tensors):
    proto = helper.make_model(giving(**tensors), opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return model(proto)


def size(source):
    return len(source.proto.SerializeToString())


def optimized_operators(source, path):
    """Return the operators that are left after onnxruntime's own simplifications, in its default settings."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(source.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.fixture
def everything_pays(monkeypatch):
    """Code every tensor, however small."""
    monkeypatch.setattr(self_extracting, "_TENSOR_BYTES", -(10**6))


@pytest.mark.parametrize("opset", [11, 13, 18, 21, 26])
@pytest.mark.parametrize("build", [clustered, grid])
def test_outputs_are_the_same_bits_in_every_opset(build, opset):
    source, x = build(opset=opset), normal(3, 96)
    result = apply(source, extract_in_graph, {"x": x})
    assert size(result) < 0.7 * size(source)
    assert result.opset == opset
    np.testing.assert_array_equal(run(result, x=x)["y"], run(source, x=x)["y"])


@pytest.mark.parametrize("opset", [11, 13, 18, 26])
@pytest.mark.parametrize("build", [clustered, grid])
def test_the_runtime_folds_the_whole_decoder_when_a_session_starts(build, opset, tmp_path):
    result = apply(build(opset=opset), extract_in_graph)
    assert optimized_operators(result, tmp_path / "optimized.onnx") == ["MatMul"]


def test_the_stream_is_near_the_entropy_and_the_rest_is_small():
    values = bell(400, 500)
    source = model(MATMUL.format(rows=400, columns=500), indices=values, codebook=normal(16))
    result = apply(source, extract_in_graph)
    shares = np.unique(values, return_counts=True)[1] / values.size
    entropy = -float(np.sum(shares * np.log2(shares))) * values.size / 8
    # Huffman is within 2 % here; 196 starts of lanes have 4 bytes each, tables and nodes stay below 2,200 bytes.
    assert size(result) - (size(source) - values.size) < 1.02 * entropy + 4 * 196 + 2200


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(
        st.tuples(st.integers(1, 256), st.integers(1, 3000), st.integers(0, 2**32 - 1), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    opset=st.sampled_from([11, 13, 18, 26]),
)
def test_any_integers_come_back_as_they_were(values, opset):
    tensors = {}
    for number, (alphabet, count, seed, signed) in enumerate(values):
        generator = np.random.default_rng(seed)
        symbols = generator.permutation(256)[:alphabet].astype(np.uint8)
        skewed = np.minimum(generator.geometric(1 / (1 + alphabet / 8), count) - 1, alphabet - 1)
        tensors[f"t{number}"] = symbols[skewed].view(np.int8 if signed else np.uint8)
    source = giving_model(opset, **tensors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_extracting, "_TENSOR_BYTES", -(10**6))
        result = apply(source, extract_in_graph)
    assert not set(names(result, "initializer")) & set(tensors)
    for name, found in run(result).items():
        np.testing.assert_array_equal(found, tensors[name.removesuffix(".out")])


@pytest.mark.usefixtures("everything_pays")
@pytest.mark.parametrize(
    "values",
    [
        np.array([7], np.uint8),
        np.array(255, np.uint8),
        np.array([[-128]], np.int8),
        np.full(5000, 3, np.uint8),
        np.full((16, 64), -1, np.int8),
        np.arange(256, dtype=np.uint8).reshape(2, 128),
        np.arange(1024).astype(np.uint8),
        np.arange(1025).astype(np.uint8),
    ],
    ids=["one element", "a scalar", "the least", "one symbol", "one lane full", "all symbols", "full", "one more"],
)
def test_the_smallest_and_the_fullest_cases_decode(values):
    result = apply(giving_model(13, t=values), extract_in_graph)
    assert "t" not in names(result, "initializer")
    found = run(result)["t.out"]
    assert found.shape == values.shape
    np.testing.assert_array_equal(found, values)


@pytest.mark.usefixtures("everything_pays")
def test_codes_of_the_greatest_length_decode():
    """Counts that double make a code as long as its alphabet; here it is cut at 12 bits, so all windows are read."""
    counts = [2**power for power in range(15)]
    values = np.random.default_rng(0).permutation(np.repeat(np.arange(15, dtype=np.uint8), counts))
    source = giving_model(13, t=values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_extracting, "_table_bytes", lambda _: 0)
        result = apply(source, extract_in_graph)
    assert 1 << 12 in [np.prod(tensor.dims) for tensor in result.proto.graph.initializer]
    np.testing.assert_array_equal(run(result)["t.out"], values)


def test_small_tensors_stay_as_they_are_beside_coded_ones():
    small = np.arange(16, dtype=np.uint8)
    result = apply(giving_model(13, large=bell(9000), small=small), extract_in_graph)
    assert "large" not in names(result, "initializer")
    np.testing.assert_array_equal(weight_of(result, "small"), small)


def test_a_tensor_that_huffman_cannot_shrink_stays_as_it_is():
    noise = np.random.default_rng(0).integers(0, 256, 20000).astype(np.uint8)
    source = giving_model(13, noise=noise)
    assert apply(source, extract_in_graph) is source
    result = apply(giving_model(13, noise=noise, large=bell(9000)), extract_in_graph)
    np.testing.assert_array_equal(weight_of(result, "noise"), noise)
    assert "large" not in names(result, "initializer")


def test_a_decoder_is_not_added_where_it_takes_more_than_it_saves():
    source = giving_model(13, t=bell(1000))
    assert apply(source, extract_in_graph) is source


def test_both_types_are_decoded_side_by_side():
    tensors = {"u": bell(90, 100), "v": bell(80, 100, seed=1), "s": bell(9000).astype(np.int8) - np.int8(8)}
    result, changes = run_pass(giving_model(13, **tensors), "tested", extract_in_graph, None)
    assert {change.layer: change.tensors for change in changes} == {
        "u": ("huffman.stream",),
        "v": ("huffman.stream",),
        "s": ("huffman.stream_2",),
    }
    for name, found in run(result).items():
        np.testing.assert_array_equal(found, tensors[name.removesuffix(".out")])


def test_weights_that_are_no_bytes_stay():
    source = model("g (float[N, 90] x) => (float[N, 100] y) { y = MatMul(x, w) }", w=normal(90, 100))
    assert apply(source, extract_in_graph) is source


def test_names_that_the_decoder_would_take_stay_with_their_owners():
    body = """g (float[N, 96] h) => (float[N, 100] h_2)
    { k = Cast<to=6>(huffman.stream)  w = Gather(codebook, k)  h_2 = MatMul(h, w) }"""
    proto = model(body.replace("huffman.stream", "i"), i=bell(96, 100), codebook=normal(16)).proto
    proto.graph.initializer[0].name = proto.graph.node[0].input[0] = "huffman.stream"
    source, x = model(proto), normal(2, 96)
    result = apply(source, extract_in_graph, {"h": x})
    assert "huffman.stream_2" in names(result, "initializer")
    np.testing.assert_array_equal(run(result, h=x)["h_2"], run(source, h=x)["h_2"])


def test_the_size_at_which_a_start_takes_too_much_memory_is_refused_with_the_figures(monkeypatch):
    source = clustered()
    stream = next(
        np.prod(tensor.dims)
        for tensor in apply(source, extract_in_graph).proto.graph.initializer
        if tensor.name == "huffman.stream"
    )
    needed = int(stream) * 8 * self_extracting.START_BYTES_PER_BIT
    monkeypatch.setattr(self_extracting, "START_LIMIT_BYTES", needed)
    apply(source, extract_in_graph)
    monkeypatch.setattr(self_extracting, "START_LIMIT_BYTES", needed - 1)
    with pytest.raises(RecipeError, match=rf"{stream:,} bytes of coded weights .* {needed >> 20:,} MiB of memory"):
        extract_in_graph(open_graph(source))


def test_ten_million_weights_are_refused():
    source = giving_model(13, t=np.tile(bell(100_000), 100))
    with pytest.raises(RecipeError, match=r"up to \d,\d{3} MiB .* \(allowed: 1,024\)"):
        extract_in_graph(open_graph(source))


def test_an_opset_without_the_operators_is_refused_where_something_would_be_coded():
    with pytest.raises(RecipeError, match="opset 10 lacks"):
        extract_in_graph(open_graph(clustered(opset=10)))
    few = clustered(4, 5, opset=10)
    assert apply(few, extract_in_graph) is few
