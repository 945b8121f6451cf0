from __future__ import annotations

import numpy as np
import onnx
import pytest
from builders import apply, if_model, model, names, normal, parse, run
from onnx import TensorProto, helper, numpy_helper

from edgecompress.errors import ModelError
from edgecompress.graph import (
    close_graph,
    constants,
    fresh_name,
    integer_limits,
    is_weight_constant,
    open_graph,
    operator,
    values_of,
)


def test_opening_and_closing_changes_nothing():
    proto = rich_model()
    before = proto.SerializeToString(deterministic=True)
    source = model(proto)
    result = close_graph(open_graph(source)).proto
    assert proto.SerializeToString(deterministic=True) == before
    assert result.SerializeToString(deterministic=True) == before


def rich_model():
    """A model with one of everything that the rewriter's own graph would drop or change."""
    proto = parse(
        "g (float[N, 4] x) => (float[N, 4] y) { h = MatMul(x, w)  k = Relu(h)  y = Identity(k) }", w=normal(4, 4)
    )
    proto.producer_name, proto.producer_version, proto.doc_string = "maker", "1.2", "the model"
    proto.model_version, proto.domain = 7, "com.example"
    proto.metadata_props.add(key="author", value="someone")
    proto.graph.doc_string = "the graph"
    proto.graph.node[0].doc_string, proto.graph.node[0].name = "the node", "first"
    proto.graph.node[0].metadata_props.add(key="line", value="12")
    proto.graph.metadata_props.add(key="graph", value="yes")
    proto.graph.initializer[0].doc_string = "the weight"
    proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 4]))
    proto.graph.quantization_annotation.add(tensor_name="h").quant_parameter_tensor_names.add(key="SCALE", value="w")
    proto.opset_import.append(helper.make_opsetid("com.example", 2))
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([5.0], np.float32), "sparse"), numpy_helper.from_array(np.array([1])), [4]
    )
    proto.graph.sparse_initializer.append(sparse)
    custom = helper.make_node("Custom", ["k", "sparse"], ["z"], domain="com.example")
    custom.attribute.append(onnx.AttributeProto(name="bytes", type=onnx.AttributeProto.STRING, s=b"\xff\xfe"))
    custom.attribute.append(helper.make_attribute("type", helper.make_tensor_type_proto(TensorProto.FLOAT, [2])))
    custom.attribute.append(helper.make_attribute("sparse", sparse))
    custom.attribute.append(helper.make_attribute("tensors", [numpy_helper.from_array(normal(2), "t")]))
    proto.graph.node.append(custom)
    identity = helper.make_node("Identity", ["a"], ["b"])
    proto.functions.append(
        helper.make_function("com.example", "F", ["a"], ["b"], [identity], [helper.make_opsetid("", 17)])
    )
    return proto


def test_bytes_in_attributes_hide_nothing_else():
    graph = open_graph(model(rich_model()))
    custom = graph.surgeon.nodes[-1]
    assert "bytes" not in custom.attrs
    assert operator(custom) == ""
    assert operator(graph.surgeon.nodes[0]) == "MatMul"


def test_a_graph_that_cannot_be_followed_is_a_model_error():
    proto = parse("g (float[N, 4] x) => (float[N, 4] y) { y = MatMul(x, w) }", w=normal(4, 4))
    proto.graph.initializer[0].data_type = 99
    with pytest.raises(ModelError, match="malformed"):
        open_graph(model(proto))


def test_initializers_that_nothing_uses_are_dropped_and_those_of_bodies_and_outputs_are_not():
    proto = if_model(normal(4, 2), normal(4, 2), outer="u = MatMul(x, used)", used=normal(4, 4), loose=normal(3))
    proto.graph.initializer.append(numpy_helper.from_array(normal(4, 2), "in_body"))
    proto.graph.initializer.append(numpy_helper.from_array(normal(2), "given"))
    proto.graph.node[-1].attribute[0].g.node[0].input[1] = "in_body"
    proto.graph.output.append(helper.make_tensor_value_info("given", TensorProto.FLOAT, [2]))
    result = close_graph(open_graph(model(proto)))
    assert names(result, "initializer") == ["used", "in_body", "given"]


def test_initializers_listed_as_inputs_become_true_constants():
    body = "g (float[N, 4] x, float[4, 3] w) => (float[N, 3] y) { y = MatMul(x, w) }"
    source = model(body, ir_version=3, opset=9, w=normal(4, 3))
    result = close_graph(open_graph(source))
    assert names(result, "input") == ["x"]
    assert result.proto.ir_version == 4
    onnx.checker.check_model(result.proto)
    x = normal(2, 4)
    np.testing.assert_array_equal(run(result, x=x)["y"], run(source, x=x)["y"])


def test_a_newer_ir_version_is_kept():
    source = model("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", ir_version=10, w=normal(4, 3))
    assert close_graph(open_graph(source)).proto.ir_version == 10


def test_fresh_names_avoid_every_name_of_the_model_and_those_given_before():
    proto = if_model(normal(4, 2), normal(4, 2), outer="a = MatMul(x, used)", used=normal(4, 4))
    graph = open_graph(model(proto))
    assert fresh_name(graph, "r") == "r_2"  # in a body
    assert fresh_name(graph, "used") == "used_2"
    assert fresh_name(graph, "new") == "new"
    assert fresh_name(graph, "new") == "new_2"
    assert graph.body_names >= {"x", "w", "r"}
    assert graph.output_names == {"y"}


def test_constants_are_read_without_being_cached():
    source = model("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", w=normal(4, 3))
    graph = open_graph(source)
    weight = constants(graph)["w"]
    np.testing.assert_array_equal(values_of(graph, weight), normal(4, 3))
    assert not isinstance(weight._values, np.ndarray)
    assert is_weight_constant(weight)


def test_a_sparse_initializer_is_no_dense_constant():
    proto = parse("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }")
    values = numpy_helper.from_array(np.array([2.0], np.float32), "w")
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([4])), [4, 3])
    )
    graph = open_graph(model(proto))
    assert not is_weight_constant(graph.surgeon.nodes[0].inputs[1])
    assert constants(graph) == {}


def test_a_pass_that_does_nothing_returns_the_very_model():
    source = model("g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", w=normal(4, 3))
    assert apply(source, lambda _: []) is source


def test_integer_inputs_stay_below_the_smallest_table_they_reach():
    body = """g (int64[N, 2] i, int64[N] j, int64[N] free) => (float[N, 2, 3] y, float[N, 3] z, int64[N] f)
    { c = Cast<to=7>(i)  y = Gather(big, c)  k = Gather(small, c)  z = Gather(big, j)  f = Identity(free) }"""
    graph = open_graph(model(body, big=normal(50, 3), small=normal(9, 3)))
    assert integer_limits(graph) == {"i": 9, "j": 50}


def test_the_table_is_counted_along_the_axis_of_the_look_up():
    body = "g (int64[N] i) => (float[3, N] y, float[N] z) { y = Gather<axis=-1>(t, i)  z = Gather<axis=5>(t, i) }"
    assert integer_limits(open_graph(model(body, t=normal(3, 8)))) == {"i": 8}
