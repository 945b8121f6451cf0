from __future__ import annotations

import numpy as np
import pytest
from builders import apply, data_of, entries, model, names, normal, run, weight_of
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompress.cluster.forms import Grid
from edgecompress.graph import open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.passes.align import align
from edgecompress.passes.flow import flow_of
from edgecompress.passes.quantize import quantize
from edgecompress.passes.ranges import activation_ranges


def rows(channels, count=4):
    return data_of(x=normal(count, channels, 8, 8, seed=9))


def in_int8(source, data, chosen=None, grids=None):
    """Return the model with its layers (or those ``chosen``) in int8, without any channel added."""
    graph = open_graph(source)
    layers = [
        each for each in find_layers(graph) if isinstance(each, Layer) and each.name in (chosen or entries(source))
    ]
    ranges = activation_ranges(source, flow_of(graph, layers).ranged, data)

    def rewrite(graph):
        layers = [each for each in find_layers(graph) if isinstance(each, Layer)]
        return quantize(
            graph, [each for each in layers if each.name in (chosen or entries(source))], ranges, grids or {}
        )

    return apply(source, rewrite, data.feeds(0, 4))


def aligned(source, data):
    """Return the model with channels added; that no bit of a result changes is asserted here."""
    result = apply(source, align, data.feeds(0, 4))
    feeds = data.feeds(0, 4)
    before, after = run(source, **feeds), run(result, **feeds)
    for name, wanted in before.items():
        np.testing.assert_array_equal(after[name], wanted)
    return result


def factors(wide, rank, *, bias=True, opset=13):
    body = f"""g (float[N, {wide}, 8, 8] x) => (float[N, {wide}, 8, 8] y) {{
        a = Conv<pads = [1, 0, 1, 0]>(x, w0{", b0" if bias else ""})
        y = Conv<pads = [0, 1, 0, 1]>(a, w1)
    }}"""
    weights = {"w0": normal(rank, wide, 3, 1), "w1": normal(wide, rank, 1, 3, seed=1)}
    return model(body, opset=opset, **weights, **({"b0": normal(rank, seed=2)} if bias else {}))


@pytest.mark.parametrize(("rank", "becomes"), [(1, 16), (12, 16), (16, 16), (19, 24), (24, 24), (38, 40)])
def test_the_rank_of_factors_becomes_a_multiple_of_eight_and_at_least_sixteen(rank, becomes):
    data = rows(16)
    result = aligned(in_int8(factors(16, rank), data), data)
    assert weight_of(result, "w0.codes").shape == (becomes, 16, 3, 1)
    assert weight_of(result, "w1.codes").shape == (16, becomes, 1, 3)
    assert weight_of(result, "b0.codes").shape == (becomes,)
    assert not weight_of(result, "w0.codes")[rank:].any()
    assert not weight_of(result, "w1.codes")[:, rank:].any()


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 3), st.integers(1, 40), st.booleans(), st.booleans())
def test_no_bit_of_a_result_changes(wide, rank, bias, one_step):
    source, data = factors(wide, rank, bias=bias), rows(wide)
    step = np.asarray(0.05, np.float32) if one_step else np.full((rank, 1, 1, 1), 0.05, np.float32)
    grid = Grid(step, np.rint(weight_of(source, "w0") / 0.05).clip(-127, 127).astype(np.int8))
    aligned(in_int8(source, data, grids={"w0": grid}), data)


def test_a_bias_that_stays_float_grows_too():
    source, data = factors(16, 12), rows(16)
    for tensor in source.proto.graph.initializer:
        if tensor.name == "w0":  # steps so small that the bias would not fit 32 bits
            tensor.raw_data = (1e-9 * weight_of(source, "w0")).astype(np.float32).tobytes()
    result = aligned(in_int8(source, data), data)
    assert weight_of(result, "b0").dtype == np.float32
    assert weight_of(result, "b0").shape == (16,)


def test_channels_grow_through_a_depthwise_convolution():
    body = """g (float[N, 16, 8, 8] x) => (float[N, 16, 8, 8] y) {
        a = Conv(x, w0, b0)
        r = Relu(a)
        d = Conv<group = 12, pads = [1, 1, 1, 1]>(r, w1)
        s = Relu(d)
        y = Conv(s, w2)
    }"""
    weights = {"w0": normal(12, 16, 1, 1), "w1": normal(12, 1, 3, 3, seed=1), "w2": normal(16, 12, 1, 1, seed=2)}
    source, data = model(body, opset=13, **weights, b0=normal(12, seed=3)), rows(16)
    result = aligned(in_int8(source, data), data)
    assert weight_of(result, "w1.codes").shape == (16, 1, 3, 3)
    groups = [
        attribute.i for node in result.proto.graph.node for attribute in node.attribute if attribute.name == "group"
    ]
    assert groups == [16]


@pytest.mark.parametrize(
    ("between", "outputs"),
    [
        ("s = Sigmoid(a) y = Conv(a, w1) z = Conv(s, w1)", "float[N, 16, 8, 8] y, float[N, 16, 8, 8] z"),
        ("z = Neg(a) y = Conv(a, w1)", "float[N, 16, 8, 8] y, float[N, 12, 8, 8] z"),
        ("y = Conv(a, w1)", "float[N, 16, 8, 8] y, float[N, 12, 8, 8] a"),
    ],
)
def test_channels_that_something_else_reads_stay_as_they_are(between, outputs):
    body = f"g (float[N, 16, 8, 8] x) => ({outputs}) {{ a = Conv(x, w0) {between} }}"
    source = model(body, opset=13, w0=normal(12, 16, 1, 1), w1=normal(16, 12, 1, 1, seed=1))
    data = rows(16)
    result = aligned(in_int8(source, data), data)
    assert weight_of(result, "w0.codes").shape == (12, 16, 1, 1)


def test_a_weight_of_two_nodes_keeps_its_shape():
    body = """g (float[N, 16, 8, 8] x) => (float[N, 16, 8, 8] y) {
        a = Conv(x, w0)
        b = Conv(a, w1)
        c = Conv(b, w0)
        y = Conv(c, w1)
    }"""
    source = model(body, opset=13, w0=normal(12, 16, 1, 1) / 4, w1=normal(16, 12, 1, 1, seed=1) / 4)
    data = rows(16)
    result = aligned(in_int8(source, data), data)
    assert weight_of(result, "w0.codes").shape == (12, 16, 1, 1)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_an_image_is_read_as_four_channels(channels):
    source, data = factors(channels, 16), rows(channels)
    result = aligned(in_int8(source, data), data)
    assert weight_of(result, "w0.codes").shape == (16, 4, 3, 1)
    assert names(result, "ops").count("Pad") == 1
    # what the four channels replace is not left behind for the runtime to compute
    read = {name for node in result.proto.graph.node for name in node.input}
    assert all(set(node.output) & (read | {"y"}) for node in result.proto.graph.node)


def test_a_float_convolution_and_a_wide_one_are_not_touched():
    data = rows(16)
    source = in_int8(factors(16, 12), data, chosen={"w0"})
    assert apply(source, align, data.feeds(0, 4)) is source


def test_known_shapes_of_what_grows_are_forgotten(tmp_path):
    from onnx import shape_inference

    data, source = rows(16), factors(16, 12)
    source.proto.CopyFrom(shape_inference.infer_shapes(source.proto))
    result = aligned(in_int8(source, data), data)
    assert "a" not in {value.name for value in result.proto.graph.value_info}
    shape_inference.infer_shapes(result.proto, check_type=True, strict_mode=True)


SHORTCUT = """g (float[N, 16, 8, 8] x) => (float[N, 32, 4, 4] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w0)
    r = Relu(a)
    c = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(r, w1)
    s = Slice(r, starts, ends, axes, steps)
    p = Pad(s, pads%s)
    t = Add(c, p)
    y = Conv(t, w2)
}"""


def shortcut(value=None):
    places = {"starts": [0, 0], "ends": [8, 8], "axes": [2, 3], "steps": [2, 2], "pads": [0, 8, 0, 0, 0, 8, 0, 0]}
    given_value = {} if value is None else {"value": np.float32(value)}
    return model(
        SHORTCUT % ("" if value is None else ", value"),
        opset=13,
        w0=normal(16, 16, 3, 3) / 4,
        w1=normal(32, 16, 3, 3, seed=1) / 4,
        w2=normal(32, 32, 1, 1, seed=2),
        **{name: np.array(values, np.int64) for name, values in places.items()},
        **given_value,
    )


@pytest.mark.parametrize("value", [None, 0.0])
def test_a_shortcut_that_pads_channels_stays_in_integers(value):
    data = rows(16)
    result = aligned(in_int8(shortcut(value), data), data)
    pad = next(node for node in result.proto.graph.node if node.op_type == "Pad")
    quantized = {node.output[0] for node in result.proto.graph.node if node.op_type == "QuantizeLinear"}
    assert pad.input[0] in quantized
    assert weight_of(result, pad.input[2]).dtype == np.uint8


def test_a_shortcut_that_pads_with_another_value_stays_float():
    data = rows(16)
    result = aligned(in_int8(shortcut(0.5), data), data)
    pad = next(node for node in result.proto.graph.node if node.op_type == "Pad")
    assert weight_of(result, pad.input[2]) == np.float32(0.5)
