from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import apply, data_of, entries, layer, model, names, normal, run, weight_of
from hypothesis import given
from hypothesis import strategies as st

from edgecompress.cluster.forms import Grid
from edgecompress.errors import DataError, PassError
from edgecompress.graph import open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.passes.flow import flow_of, why_float
from edgecompress.passes.precision import choose_int8, run_int8
from edgecompress.passes.quantize import quantize
from edgecompress.passes.ranges import LEVELS, Range, activation_ranges, best_range

PAIR = ["QuantizeLinear", "DequantizeLinear"]


def rows(*shape, count=32):
    return data_of(x=normal(count, *shape, seed=9))


def ranges_of(source, chosen, data):
    graph = open_graph(source)
    layers = [each for each in find_layers(graph) if isinstance(each, Layer) and each.name in chosen]
    return activation_ranges(source, flow_of(graph, layers).ranged, data)


def to_int8(source, chosen, data, grids=None):
    """Quantize with the checks of every pass, among them that without rounding the model computes the same."""
    ranges = ranges_of(source, chosen, data)

    def rewrite(graph):
        layers = [each for each in find_layers(graph) if isinstance(each, Layer) and each.name in chosen]
        return quantize(graph, layers, ranges, grids or {})

    return apply(source, rewrite, data.feeds(0, 4))


def optimized(source, tmp_path):
    """Return the operators that the runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(source.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


def sqnr_db(wanted, got):
    return 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - got) ** 2))


def node_of(source, output):
    return next(node for node in source.proto.graph.node if output in node.output)


CONVS = """g (float[N, 16, 8, 8] x) => (float[N, 16, 8, 8] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)
    r = Relu(a)
    y = Conv<pads = [1, 1, 1, 1]>(r, w1)
}"""
RESIDUAL = """g (float[N, 16, 8, 8] x) => (float[N, 16] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w0, b0)
    r = Relu(a)
    c = Conv<pads = [1, 1, 1, 1]>(r, w1)
    s = Add(c, r)
    t = Relu(s)
    p = MaxPool<kernel_shape = [8, 8]>(t)
    f = Flatten(p)
    y = Gemm<transB = 1>(f, w2)
}"""


def kernel(seed):
    return 0.1 * normal(16, 16, 3, 3, seed=seed)


def convs(opset=13):
    return model(CONVS, opset=opset, w0=kernel(0), w1=kernel(1), b0=normal(16, seed=2))


def residual():
    weights = {"w0": kernel(0), "w1": kernel(1), "w2": normal(16, 16, seed=3), "b0": normal(16, seed=2)}
    return model(RESIDUAL, opset=13, **weights)


@pytest.mark.parametrize("step", [np.float32(0.05), np.linspace(0.01, 0.1, 16, dtype=np.float32).reshape(16, 1, 1, 1)])
def test_a_weight_on_a_grid_keeps_its_codes_and_means_step_times_codes(step):
    codes = np.random.default_rng(0).integers(-3, 4, (16, 16, 3, 3)).astype(np.int8)
    result = to_int8(convs(), {"w1"}, rows(16, 8, 8), {"w1": Grid(np.asarray(step), codes)})
    node = node_of(result, "w1")
    assert node.op_type == "DequantizeLinear"
    stored, scale, zero = (weight_of(result, name) for name in node.input)
    assert stored.dtype == np.int8
    np.testing.assert_array_equal(stored, codes)
    assert not zero.any()
    along = scale.reshape(-1, 1, 1, 1) if scale.ndim else scale
    np.testing.assert_array_equal(stored.astype(np.float32) * along, codes.astype(np.float32) * step)


@pytest.mark.parametrize(("op", "attributes"), [("Gemm", ""), ("Gemm", "<transB = 1>"), ("MatMul", "")])
def test_a_step_for_each_output_lies_along_the_outputs_of_a_matrix(op, attributes, tmp_path):
    # outputs of very different sizes: along the wrong axis the small ones would all round to nothing
    sizes = np.logspace(-3, 0, 12, dtype=np.float32)
    weight = normal(20, 12) * sizes
    if attributes:
        weight = np.ascontiguousarray(weight.T)
    body = f"g (float[N, 20] x) => (float[N, 12] y) {{ y = {op}{attributes}(x, w) }}"
    source, data = model(body, opset=13, w=weight), rows(20)
    result = to_int8(source, {"w"}, data)
    wanted, got = (run(each, **data.feeds(0, 32))["y"] for each in (source, result))
    # 8 bits on both sides are worth 35 to 45 dB each, in every column
    assert min(sqnr_db(wanted[:, column], got[:, column]) for column in range(12)) > 30
    assert not {"Gemm", "MatMul"} & {*optimized(result, tmp_path)}


def test_the_runtime_fuses_convolutions_with_their_bias_and_relu(tmp_path):
    result = to_int8(convs(), {"w0", "w1"}, rows(16, 8, 8))
    found = optimized(result, tmp_path)
    assert found.count("QLinearConv") == 2
    assert "Relu" not in found
    assert [found.count(op) for op in PAIR] == [1, 1]  # in at the input, out at the output
    assert weight_of(result, "b0.codes").dtype == np.int32


def test_integers_flow_through_a_residual_block_and_a_pooling_up_to_the_output(tmp_path):
    found = optimized(to_int8(residual(), {"w0", "w1", "w2"}, rows(16, 8, 8)), tmp_path)
    assert not {"Conv", "Gemm", "Relu", "Add", "DequantizeLinear"} & {*found}
    assert {"QLinearConv", "QLinearAdd", "QGemm"} <= {*found}


@pytest.mark.parametrize(
    ("between", "wide"),
    [
        ("r = Conv(x, w0) t = Mul(r, c)", 16),
        ("r = Conv(x, w0) t = Concat<axis = 1>(r, c)", 32),
        ("t = AveragePool<kernel_shape = [2, 2]>(c)", 16),
        ("t = GlobalAveragePool(c)", 16),
        ("t = Sigmoid(c)", 16),
        ("t = LeakyRelu(c)", 16),
        ("t = MaxPool<kernel_shape = [2, 2]>(c)", 16),
    ],
)
def test_operators_between_layers_run_on_integers(between, wide, tmp_path):
    body = f"""g (float[N, 16, 8, 8] x) => (float[N, 16, h, h] y) {{
        c = Conv(x, w1)
        {between}
        y = Conv(t, w2)
    }}"""
    weights = {f"w{each}": normal(16, 16, 1, 1, seed=each) for each in range(2)}
    source = model(body, opset=13, **weights, w2=normal(16, wide, 1, 1, seed=3))
    found = optimized(to_int8(source, {"w0", "w1", "w2"}, rows(16, 8, 8)), tmp_path)
    assert [found.count(op) for op in PAIR] == [1, 1]


def test_an_operator_that_no_int8_layer_needs_stays_float():
    body = """g (float[N, 16, 8, 8] x) => (float[N, 16, 8, 8] y) {
        a = Conv(x, w0)
        s = Add(a, x)
        y = Sigmoid(s)
    }"""
    result = to_int8(model(body, opset=13, w0=normal(16, 16, 1, 1)), {"w0"}, rows(16, 8, 8))
    made = {node.output[0] for node in result.proto.graph.node if node.op_type == "DequantizeLinear"}
    assert not {"s", "y"} & made


@pytest.mark.parametrize("pool", ["MaxPool<kernel_shape = [2, 2], strides = [2, 2]>", "GlobalAveragePool"])
def test_fewer_values_go_back_to_floats_behind_a_pooling(pool, tmp_path):
    body = f"g (float[N, 16, 8, 8] x) => (float[N, 16, h, h] y) {{ a = Conv(x, w0) p = {pool}(a) y = Neg(p) }}"
    found = to_int8(model(body, opset=13, w0=normal(16, 16, 1, 1)), {"w0"}, rows(16, 8, 8))
    assert node_of(found, "p").op_type == "DequantizeLinear"
    assert "Conv" not in optimized(found, tmp_path)


def test_a_float_pooling_is_not_taken_over_by_the_rounding_behind_it(tmp_path):
    # the runtime would move the rounding before the MaxPool and run that in its slow integer form
    body = """g (float[N, 16, 8, 8] x) => (float[N, 16, 4, 4] y) {
        a = Conv(x, w0)
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)
        y = Conv(p, w1)
    }"""
    source = model(body, opset=13, w0=normal(16, 16, 1, 1), w1=normal(16, 16, 1, 1, seed=1))
    found = optimized(to_int8(source, {"w1"}, rows(16, 8, 8)), tmp_path)
    assert found.index("MaxPool") < found.index("QuantizeLinear")
    assert "Clip" not in found


def test_what_a_concat_joins_has_the_range_of_the_result():
    body = """g (float[N, 16, 8, 8] x) => (float[N, 16, 8, 8] y) {
        a = Conv(x, w0)
        b = Conv(x, w1)
        c = Concat<axis = 1>(a, b)
        y = Conv(c, w2)
    }"""
    weights = {"w0": normal(16, 16, 1, 1), "w1": 9 * normal(16, 16, 1, 1, seed=1), "w2": normal(16, 32, 1, 1, seed=2)}
    result = to_int8(model(body, opset=13, **weights), {"w0", "w1", "w2"}, rows(16, 8, 8))
    assert len({tuple(node_of(result, name).input[1:]) for name in ("a", "b", "c")}) == 1


def test_a_pad_with_other_values_than_zero_is_no_integer_operator():
    # the value may lie outside the range of what is padded
    body = """g (float[N, 16, 8, 8] x) => (float[N, 16, 8, 8] y) {
        a = Conv(x, w0)
        p = Pad(a, pads, value)
        y = Conv(p, w1)
    }"""
    weights = {"w0": normal(16, 16, 1, 1), "w1": normal(16, 16, 3, 3, seed=1)}
    pads = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    source = model(body, opset=13, pads=pads, value=np.float32(1e4), **weights)
    flow = flow_of(graph := open_graph(source), [each for each in find_layers(graph) if isinstance(each, Layer)])
    assert set(flow.taken) == {"x", "p"}
    assert set(flow.made) == {"a", "y"}


def test_a_layer_that_stays_float_is_not_touched():
    source = residual()
    result = to_int8(source, {"w1"}, rows(16, 8, 8))
    for name in ("w0", "b0", "w2"):
        np.testing.assert_array_equal(weight_of(result, name), weight_of(source, name))
    for output in ("a", "y"):
        assert node_of(result, output).SerializeToString() == node_of(source, output).SerializeToString()


def test_a_float_reader_of_a_float_tensor_gets_it_without_rounding():
    body = "g (float[N, 20] x) => (float[N, 12] y, float[N, 20] z) { y = MatMul(x, w) \n z = Neg(x) }"
    source, data = model(body, opset=13, w=normal(20, 12)), rows(20)
    result = to_int8(source, {"w"}, data)
    np.testing.assert_array_equal(run(result, **data.feeds(0, 4))["z"], -data.feeds(0, 4)["x"])


def test_the_last_matrix_gives_floats_without_a_second_rounding():
    body = "g (float[N, 20] x) => (float[N, 12] y) { y = MatMul(x, w) }"
    assert names(to_int8(model(body, opset=13, w=normal(20, 12)), {"w"}, rows(20)), "ops").count("QuantizeLinear") == 1


def test_a_clip_at_six_is_dropped_by_the_runtime(tmp_path):
    body = """g (float[N, 16, 8, 8] x) => (float[N, 16, 8, 8] y) { a = Conv(x, w0)
        c = Clip(a, low, high)
        y = Conv(c, w1) }"""
    weights = {"w0": 9 * normal(16, 16, 1, 1), "w1": normal(16, 16, 1, 1, seed=1)}
    source = model(body, opset=13, **weights, low=np.float32(0), high=np.float32(6))
    found = optimized(to_int8(source, {"w0", "w1"}, rows(16, 8, 8)), tmp_path)
    assert found.count("QLinearConv") == 2
    assert "Clip" not in found


def test_a_bias_that_would_not_fit_32_bits_stays_float():
    weight = np.full((16, 16, 3, 3), 1e-9, np.float32)
    source = model(CONVS, opset=13, w0=weight, w1=kernel(1), b0=np.full(16, 1e3, np.float32))
    result = to_int8(source, {"w0"}, rows(16, 8, 8))
    assert weight_of(result, "b0").dtype == np.float32


def test_channels_of_zeros_stay_zeros():
    weight = kernel(1)
    weight[3] = 0.0
    source, data = model(CONVS, opset=13, w0=kernel(0), w1=weight, b0=normal(16)), rows(16, 8, 8)
    result = run(to_int8(source, {"w1"}, data), **data.feeds(0, 4))["y"]
    assert not result[:, 3].any()


@pytest.mark.parametrize(
    ("body", "shape", "opset", "reason"),
    [
        ("g (float[N, 6] x) => (float[N, 5] y) { y = MatMul(x, w) }", (6, 5), 12, "opset 13"),
        ("g (float[N, 6] x) => (float[N, 5] y) { y = Gemm<alpha = 2.0>(x, w) }", (6, 5), 13, "alpha"),
        ("g (float[6, N] x) => (float[N, 5] y) { y = Gemm<transA = 1>(x, w) }", (6, 5), 13, "transposes its input"),
        ("g (float[6, N] x) => (float[5, N] y) { y = MatMul(w, x) }", (5, 6), 13, "on the right"),
        ("g (float[N, 6, 4] x) => (float[N, 5, 4] y) { y = ConvTranspose(x, w) }", (6, 5, 1), 13, "ConvTranspose"),
    ],
)
def test_a_layer_without_an_int8_form_says_why(body, shape, opset, reason):
    assert reason in (why_float(layer(model(body, opset=opset, w=normal(*shape))), opset) or "")


def test_a_half_precision_weight_says_why():
    body = "g (float16[N, 6] x) => (float16[N, 5] y) { y = MatMul(x, w) }"
    assert "float16" in (why_float(layer(model(body, w=normal(6, 5, dtype=np.float16))), 17) or "")


def test_every_other_layer_can_run_in_int8():
    assert [why_float(each, 13) for each in entries(residual()).values() if isinstance(each, Layer)] == [None] * 3


@given(st.floats(-1e3, 0), st.floats(0, 1e3))
def test_zero_is_exact_in_every_range(low, high):
    span = Range(low, high)
    assert 0 <= span.zero_point <= LEVELS
    assert span.scale > 0
    # the code of a value in the range lies in 0 .. 255, but for the rounding of the zero point
    codes = np.rint(np.array([low, high], np.float32) / span.scale) + span.zero_point
    assert codes.min() >= -1
    assert codes.max() <= LEVELS + 1


def test_an_outlier_is_cut_off_where_that_rounds_the_rest_finer():
    values = np.append(np.abs(normal(100_000)), 9.0)
    assert 4.0 < best_range(values).high < 8.5
    uniform = np.linspace(-1, 1, 1001, dtype=np.float32)
    assert best_range(uniform) == Range(-1.0, 1.0)


def test_ranges_do_not_depend_on_how_rows_are_batched(monkeypatch):
    source, data = convs(), rows(16, 8, 8)
    at_once = ranges_of(source, {"w0", "w1"}, data)
    monkeypatch.setattr("edgecompress.calibrate.ACTIVATION_BUDGET_BYTES", 1)
    one_by_one = ranges_of(source, {"w0", "w1"}, data)
    assert at_once == one_by_one


def test_activations_that_are_not_finite_are_refused():
    broken = normal(4, 16, 8, 8)
    broken[2, 3] = np.nan
    with pytest.raises(DataError, match="NaN or Inf"):
        ranges_of(convs(), {"w0"}, data_of(x=broken))


def test_a_pass_that_rounds_and_gets_the_weights_wrong_is_caught():
    source, data = convs(), rows(16, 8, 8)
    ranges = ranges_of(source, {"w1"}, data)

    def wrong(graph):
        chosen = [each for each in find_layers(graph) if isinstance(each, Layer) and each.name == "w1"]
        changes = quantize(graph, chosen, ranges, {})
        graph.surgeon.nodes = [node for node in graph.surgeon.nodes if node.op != "Relu"]
        next(node for node in graph.surgeon.nodes if "r" in [each.name for each in node.inputs]).inputs[0].name = "a"
        return changes

    with pytest.raises(PassError):
        apply(source, wrong, data.feeds(0, 4))


def test_the_layer_that_hurts_most_stays_float_and_the_sum_keeps_the_limit(monkeypatch):
    monkeypatch.setattr("edgecompress.passes.precision.losing_islands", lambda *_: frozenset())  # all are tiny
    data = rows(16, 8, 8)
    free = choose_int8(residual(), {}, data, max_effect=np.inf)
    assert free.names == {"w0", "w1", "w2"}
    assert not free.reasons
    worst = max(free.effects, key=lambda name: free.effects[name])
    limit = 0.99 * sum(free.effects.values())
    tight = choose_int8(residual(), {}, data, max_effect=limit)
    assert tight.names == free.names - {worst}
    assert "moves the output" in tight.reasons[worst]
    result, _ = run_int8(residual(), tight.names, tight.ranges, {}, feeds=data.feeds(0, 4))
    assert weight_of(result, worst).dtype == np.float32


def test_the_codes_of_a_grid_are_no_effect_of_int8():
    # a grid as coarse as this one moves the output by far more than rounding activations does
    data, step = rows(16, 8, 8), np.asarray(0.2, np.float32)
    grid = Grid(step, np.rint(kernel(1) / step).astype(np.int8))
    chosen = choose_int8(convs(), {"w1": grid}, data)
    assert chosen.effects["w1"] < 1e-3


def test_fewer_layers_in_int8_need_no_range_of_another_tensor():
    graph = open_graph(residual())
    layers = [each for each in find_layers(graph) if isinstance(each, Layer)]
    everything = set(flow_of(graph, layers).ranged)
    for bits in range(8):
        chosen = [each for place, each in enumerate(layers) if bits >> place & 1]
        assert set(flow_of(graph, chosen).ranged) <= everything
