from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from builders import entries, if_model, layer, model, normal, parse, run, skip
from onnx import TensorProto, helper, numpy_helper

from edgecompress.errors import ModelError
from edgecompress.graph import open_graph
from edgecompress.layers import find_layers
from edgecompress.orientation import canonical, check_finite, read_weight, stored


def test_a_gemm_is_read_with_outputs_first_whichever_way_it_is_stored():
    x, w = normal(2, 4), normal(4, 3)
    plain = model("g (float[N, 4] x) => (float[N, 3] y) { y = Gemm<alpha=2.0, beta=0.5>(x, w, b) }", w=w, b=normal(3))
    turned = model("g (float[N, 4] x) => (float[N, 3] y) { y = Gemm<transB=1>(x, w) }", w=w.T.copy())
    for source in (plain, turned):
        found = layer(source)
        assert (found.op, found.shape, found.parameters, found.macs) == ("Gemm", (3, 4), 12, 12)
        np.testing.assert_array_equal(read_weight(open_graph(source), found), w.T)
    np.testing.assert_allclose(run(turned, x=x)["y"], x @ w, atol=1e-5)


def test_a_matmul_with_its_constant_on_either_side():
    right = layer(model("g (float[B, S, 4] x) => (float[B, S, 3] y) { y = MatMul(x, w) }", w=normal(4, 3)))
    left = layer(model("g (float[B, 4, S] x) => (float[B, 3, S] y) { y = MatMul(w, x) }", w=normal(3, 4)))
    assert right.shape == left.shape == (3, 4)
    assert (right.orientation, left.orientation) == ("transposed", "as_is")
    assert right.macs == left.macs == 8 * 12
    assert right.fixed_form is left.fixed_form is None


def test_a_stack_of_matrices_is_clustered_only():
    found = layer(model("g (float[5, S, 4] x) => (float[5, S, 3] y) { y = MatMul(x, w) }", w=normal(5, 4, 3)))
    assert found.shape == (5, 3, 4)
    assert found.macs == 5 * 8 * 12
    assert "stack" in found.fixed_form
    assert not found.takes_moments


@pytest.mark.parametrize(
    ("attributes", "w", "x", "macs"),
    [
        ("", (6, 4, 3, 3), (1, 4, 8, 8), 6 * 4 * 9 * 36),
        ("<strides=[2, 2], pads=[1, 1, 1, 1]>", (6, 4, 3, 3), (1, 4, 8, 8), 6 * 4 * 9 * 16),
        ('<auto_pad="SAME_UPPER">', (6, 4, 3, 3), (1, 4, 8, 8), 6 * 4 * 9 * 64),
        ("<dilations=[2, 2]>", (6, 4, 3, 3), (1, 4, 8, 8), 6 * 4 * 9 * 16),
        ("", (6, 4, 3), (1, 4, 8), 6 * 4 * 3 * 6),
        ("", (6, 4, 1, 2, 3), (1, 4, 4, 4, 4), 6 * 4 * 6 * 4 * 3 * 2),
    ],
)
def test_convolutions_of_every_kind(attributes, w, x, macs):
    dims = ", ".join(map(str, x))
    found = layer(
        model(f"g (float[{dims}] x) => (int64[R] y) {{ h = Conv{attributes}(x, w)  y = Shape(h) }}", w=normal(*w))
    )
    assert (found.shape, found.macs, found.fixed_form) == (w, macs, None)


def test_grouped_and_depthwise_convolutions_are_told_apart():
    body = "g (float[1, 4, 8, 8] x) => (int64[R] y) {{ h = Conv<group={}>(x, w)  y = Shape(h) }}"
    grouped = layer(model(body.format(2), w=normal(6, 2, 3, 3)))
    depthwise = layer(model(body.format(4), w=normal(4, 1, 3, 3)))
    assert grouped.fixed_form is None
    assert "a depthwise" in depthwise.fixed_form
    assert (grouped.groups, grouped.macs) == (2, 6 * 2 * 9 * 36)
    assert grouped.takes_moments


@pytest.mark.parametrize("groups", [1, 2])
def test_a_deconvolution_is_turned_and_turned_back(groups):
    w = normal(4, 3, 2, 2)
    body = f"g (float[1, 4, 5, 5] x) => (float[1, M, 6, 6] y) {{ y = ConvTranspose<group={groups}>(x, w) }}"
    source = model(body, w=w)
    found = layer(source)
    assert found.shape == (3 * groups, 4 // groups, 2, 2)
    assert found.macs == w.size * 25
    turned = canonical(w, found)
    np.testing.assert_array_equal(stored(turned, found), w)
    # each output pixel at (0, 0) is the first tap of the kernel: the canonical weight says so directly
    x = normal(1, 4, 5, 5)
    corner = np.einsum("gof,gf->go", turned[..., 0, 0].reshape(groups, 3, -1), x[0, :, 0, 0].reshape(groups, -1))
    np.testing.assert_allclose(run(source, x=x)["y"][0, :, 0, 0], corner.reshape(-1), atol=1e-5)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_recurrent_weights_are_two_layers_each(op, gates):
    node = f'{op}<hidden_size=6, direction="bidirectional">(x, w, r, b)'
    body = f"g (float[7, 1, 5] x) => (float[7, 2, 1, 6] y) {{ y = {node} }}"
    source = model(body, w=normal(2, gates * 6, 5), r=normal(2, gates * 6, 6), b=normal(2, 2 * gates * 6))
    found = entries(source)
    assert list(found) == ["w", "r"]
    assert found["w"].macs == 7 * 2 * gates * 6 * 5
    assert all("never factorized" in entry.fixed_form and entry.takes_moments for entry in found.values())
    assert (found["w"].shape, found["r"].shape) == ((2 * gates * 6, 5), (2 * gates * 6, 6))
    weight = normal(2, gates * 6, 5)
    assert canonical(weight, found["w"]).shape == found["w"].shape
    np.testing.assert_array_equal(stored(canonical(weight, found["w"]), found["w"]), weight)


@pytest.mark.parametrize(
    ("results", "known"), [(["y"], True), (["y", "h"], True), (["", "h"], True), (["", "", "c"], False)]
)
def test_a_recurrence_takes_moments_where_its_hidden_state_is_a_tensor(results, known):
    weights = {"w": normal(1, 24, 5), "r": normal(1, 24, 6)}
    proto = parse("g (float[7, 1, 5] x) => (float[A, B, C] y) { y = Identity(x) }", **weights)
    proto.graph.node[0].CopyFrom(helper.make_node("LSTM", ["x", "w", "r"], results, hidden_size=6))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info(results[-1], TensorProto.FLOAT, None))
    found = entries(model(proto))
    assert found["w"].takes_moments
    assert found["r"].takes_moments == known


def test_a_weight_that_multiplies_a_constant_takes_no_moments():
    source = model(
        "g (float[1, 1, 6, 6] x) => (float[1, 3, 6, 6] y) { h = ConvTranspose(k, w)  y = Add(h, x) }",
        k=normal(1, 4, 5, 5),
        w=normal(4, 3, 2, 2),
    )
    assert not layer(source).takes_moments


def test_tables_are_layers_and_look_ups_of_shapes_are_not():
    body = """g (int64[N] i) => (float[N, 3] y, float[N] z, int64[N, 2] k)
    { y = Gather(table, i)  z = Gather(line, i)  k = Gather(numbers, i) }"""
    source = model(body, table=normal(9, 3), line=normal(9), numbers=np.ones((9, 2), np.int64))
    found = entries(source)
    assert list(found) == ["table"]
    assert (found["table"].macs, found["table"].parameters) == (0, 27)


# weights that are shared


def test_a_weight_of_several_nodes_is_one_layer():
    found = layer(model("g (float[N, 4] x) => (float[N, 4] y) { h = MatMul(x, w)  y = MatMul(h, w) }", w=normal(4, 4)))
    assert len(found.nodes) == 2
    assert found.macs == 2 * 16
    assert found.fixed_form is None


def test_a_weight_of_several_convolutions_keeps_its_form():
    body = """g (float[1, 3, 8, 8] x) => (int64[R] y, int64[S] z)
    { a = Conv(x, w)  b = Conv<strides=[2, 2]>(x, w)  y = Shape(a)  z = Shape(b) }"""
    found = layer(model(body, w=normal(4, 3, 3, 3)))
    assert "several convolutions" in found.fixed_form
    assert found.takes_moments
    assert found.macs == 4 * 27 * (36 + 9)


def test_a_weight_that_nodes_read_in_different_ways_keeps_its_form():
    for body in (
        "h = MatMul(x, w)  y = MatMul(w, h)",
        "h = Gemm(x, w)  y = Gemm<transB=1>(h, w)",
        "h = Gather(w, i)  y = MatMul(h, w)",
        "h = MatMul(x, w)  y = Gather(w, i)",
    ):
        source = model(f"g (float[4, 4] x, int64[4] i) => (float[4, 4] y) {{ {body} }}", w=normal(4, 4))
        found = layer(source)
        assert found.fixed_form is not None
        assert found.is_mixed
        assert not found.takes_moments
        assert len(found.nodes) == 2


def test_a_weight_that_another_node_needs_whole_keeps_its_form():
    found = layer(model("g (float[4, 4] x) => (float[4, 4] y) { h = MatMul(x, w)  y = Add(h, w) }", w=normal(4, 4)))
    assert "other kinds" in found.fixed_form
    assert found.takes_moments


def test_a_weight_that_the_model_gives_out_keeps_its_form():
    found = layer(model("g (float[4, 4] x) => (float[4, 4] y, float[4, 4] w) { y = MatMul(x, w) }", w=normal(4, 4)))
    assert "output" in found.fixed_form


# weights in bodies


def test_weights_in_bodies_are_skipped_under_names_of_their_own():
    found = entries(model(if_model(normal(4, 2), normal(4, 3))))  # attributes are sorted: else comes first
    assert {name: entry.shape for name, entry in found.items()} == {"w": (4, 3), "w_2": (4, 2)}
    assert all("body of an If, Loop or Scan" in entry.reason for entry in found.values())


def test_constant_nodes_in_bodies_are_reported_as_well():
    proto = if_model(normal(4, 2), normal(4, 2))
    body = proto.graph.node[-1].attribute[0].g
    body.node.insert(0, helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(normal(4, 2))))
    body.node[1].input[1] = "c"
    assert skip(model(proto), "c").parameters == 8


def test_a_weight_that_a_body_uses_too_is_clustered_and_keeps_its_form():
    proto = if_model(normal(4, 4), normal(4, 4), outer="h = MatMul(x, outer)", outer_=normal(1))
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(normal(4, 4), "outer"))
    body = proto.graph.node[-1].attribute[0].g
    for node in (["Relu", ["outer"]], ["MatMul", ["x", "outer"]]):  # as a weight, and as anything else
        body.node[0].CopyFrom(helper.make_node(node[0], node[1], ["r"]))
        found = entries(model(proto))
        assert "body" in found["outer"].fixed_form
        assert list(found) == ["outer", "w"]  # "w" is that of the other branch


def test_a_weight_that_only_a_body_uses_is_skipped():
    proto = if_model(normal(4, 4), normal(4, 4))
    proto.graph.initializer.append(numpy_helper.from_array(normal(4, 4), "outer"))
    proto.graph.node[-1].attribute[0].g.node[0].input[1] = "outer"
    assert "body" in skip(model(proto), "outer").reason


# weights that are skipped


def test_types_that_are_no_plain_floats_are_skipped_by_name():
    body = "g (bfloat16[N, 4] x) => (bfloat16[N, 3] y) { y = MatMul(x, w) }"
    assert "BFLOAT16" in skip(model(body, w=normal(4, 3, dtype=ml_dtypes.bfloat16))).reason
    body = "g (int32[N, 4] x) => (int32[N, 3] y) { y = MatMul(x, w) }"
    assert "int32" in skip(model(body, w=np.ones((4, 3), np.int32))).reason


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_layers(dtype):
    kind = {np.float16: "float16", np.float64: "double"}[dtype]
    assert layer(model(f"g ({kind}[N, 4] x) => ({kind}[N, 3] y) {{ y = MatMul(x, w) }}", w=normal(4, 3, dtype=dtype)))


def test_an_empty_weight_is_skipped():
    found = skip(model("g (float[N, 0] x) => (float[N, 3] y) { y = MatMul(x, w) }", w=np.zeros((0, 3), np.float32)))
    assert (found.reason, found.parameters) == ("it is empty", 0)


def test_scalars_and_vectors_are_no_layers():
    body = "g (float[N, 4] x) => (float[N] y) { h = Mul(x, s)  y = MatMul(h, v) }"
    assert entries(model(body, s=np.float32(2), v=normal(4))) == {}


def test_weights_computed_while_the_model_runs_are_skipped_and_activations_are_not_mentioned():
    body = """g (float[1, 4, 5] x, float[6, 4, 3] k, float[5, 5] a) => (float[1, 6, 3] y, float[1, 4, 5] z)
    { y = Conv(x, k)  b = Mul(a, two)  z = MatMul(x, b) }"""
    found = entries(model(body, two=np.float32(2)))
    assert {name: entry.reason for name, entry in found.items()} == {"k": "it is computed while the model runs"}


def test_weights_computed_from_constants_are_skipped_with_the_operator():
    body = """g (float[N, 4] x) => (float[N, 3] y) { d = DequantizeLinear(q, s)  t = Transpose(d)  y = MatMul(x, t) }"""
    source = model(body, q=np.ones((3, 4), np.int8), s=np.float32(0.1))
    assert skip(source, "t").reason == "a Transpose node computes it from constants"


@pytest.mark.parametrize("use", ["y = MatMul(x, w)", "y = Gather(w, i)", "y = Conv(x, w)"])
def test_a_codebook_of_an_earlier_run_is_told_apart(use):
    body = f"g (float[N, 4] x, int64[N] i) => (float[N, 3] y) {{ p = Cast<to=6>(n)  w = Gather(b, p)  {use} }}"
    found = skip(model(body, n=np.zeros((4, 3), np.uint8), b=normal(8)))
    assert found.reason == "it is a codebook with indices already"
    assert found.parameters == 12


def test_a_sparse_weight_is_skipped():
    proto = parse("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }")
    values = numpy_helper.from_array(np.array([2.0], np.float32), "w")
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([4])), [4, 3])
    )
    assert "sparse" in skip(model(proto)).reason


def test_a_product_of_two_constants_is_skipped():
    source = model(
        "g (float[N, 3] x) => (float[N, 3] y) { c = MatMul(v, w)  y = Add(x, c) }", v=normal(1, 4), w=normal(4, 3)
    )
    assert "constant too" in skip(source).reason


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        ("Gemm(x, w)", (2, 3, 4)),
        ("Conv(x, w)", (4, 3)),
        ("Conv<group=3>(x, w)", (4, 1, 3, 3)),
        ("Conv<group=0>(x, w)", (4, 1, 3, 3)),
        ("ConvTranspose<group=3>(x, w)", (4, 1, 3, 3)),
        ("LSTM<hidden_size=1>(x, w, w)", (4, 3)),
    ],
)
def test_weights_that_no_such_node_can_have_are_skipped(node, shape):
    assert skip(model(f"g (float[N, 3, 8, 8] x) => (float[N] y) {{ y = {node} }}", w=normal(*shape))).reason


def test_operators_of_other_domains_are_left_alone():
    proto = parse("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", w=normal(4, 3))
    proto.graph.node[0].domain = "com.example"
    assert entries(model(proto)) == {}


def test_layers_come_in_graph_order_with_macs_of_the_shapes_asked_for():
    body = "g (float[N, 4] x) => (float[N, 2] y) { h = MatMul(x, b)  r = Relu(h)  y = MatMul(r, a) }"
    found = find_layers(open_graph(model(body, a=normal(3, 2), b=normal(4, 3))), {"x": (10, 4)})
    assert [(each.name, each.macs) for each in found] == [("b", 120), ("a", 60)]


def test_unknown_shapes_give_unknown_macs():
    proto = parse("g (float[N, 4] x) => (float[N, 3] y) { h = Unknown(x)  y = MatMul(h, w) }", w=normal(4, 3))
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    assert layer(model(proto)).macs is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name_and_count(value):
    w = normal(4, 3)
    w[1, :2] = value
    source = model("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", w=w)
    with pytest.raises(ModelError, match="weight 'w' holds 2 NaN or Inf"):
        read_weight(open_graph(source), layer(source))
    check_finite("w", normal(4, 3, dtype=np.float16))


def test_hostile_names_are_names():
    for name in ("a/b:0", "größe", "w.codebook", "[x]*", "a b\n"):
        proto = parse("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", w=normal(4, 3))
        proto.graph.initializer[0].name = proto.graph.node[0].input[1] = name
        assert list(entries(model(proto))) == [name]


def test_a_body_is_a_body_whatever_control_flow_it_belongs_to():
    step = helper.make_graph(
        [helper.make_node("MatMul", ["s", "inner"], ["s_out"]), helper.make_node("Identity", ["s_out"], ["o"])],
        "step",
        [
            helper.make_tensor_value_info("s", TensorProto.FLOAT, [4, 4]),
            helper.make_tensor_value_info("e", TensorProto.FLOAT, [4]),
        ],
        [
            helper.make_tensor_value_info("s_out", TensorProto.FLOAT, [4, 4]),
            helper.make_tensor_value_info("o", TensorProto.FLOAT, [4, 4]),
        ],
        [numpy_helper.from_array(normal(4, 4), "inner")],
    )
    proto = parse("g (float[4, 4] x, float[3, 4] e) => (float[4, 4] y, float[3, 4, 4] z) { y, z = Identity(x) }")
    proto.graph.node[0].CopyFrom(helper.make_node("Scan", ["x", "e"], ["y", "z"], body=step, num_scan_inputs=1))
    assert "body" in skip(model(proto), "inner").reason
