from __future__ import annotations

import numpy as np
import pytest
from builders import apply, entries, layer, model, names, normal, parse, run, skip, weight_of
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from edgecompress.errors import ModelError
from edgecompress.factorize.svd import plain_svd
from edgecompress.graph import open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.moments import Moments, output_errors
from edgecompress.orientation import read_weight, stored
from edgecompress.passes.factorize import dense_of, factorize, solve_forms
from edgecompress.plan import FactorizePlan, LayerPlan, Plan


def plan_for(*layers, rank, calibrated=False):
    scheme = FactorizePlan(scheme="svd", rank=rank, calibrated=calibrated)
    plans = (LayerPlan(layer=name, factorize=scheme, weights=None, reason=None) for name in layers)
    return Plan(schema_version=1, model_sha256="", layers=tuple(plans))


def rewrite(source, rank, *names_of_layers, feeds=None):
    """Factorize layers; return the new model and the forms."""
    graph = open_graph(source)
    layers = [each for each in find_layers(graph) if isinstance(each, Layer)]
    forms = solve_forms(graph, layers, plan_for(*(names_of_layers or ("w",)), rank=rank), {})

    def pass_(graph):
        return factorize(graph, [each for each in find_layers(graph) if isinstance(each, Layer)], forms)

    return apply(source, pass_, feeds), forms


def with_dense(source, forms):
    """Return the model with each weight replaced by what its form stands for."""
    proto = type(source.proto)()
    proto.CopyFrom(source.proto)
    found = entries(source)
    for tensor in proto.graph.initializer:
        if tensor.name in forms:
            values = stored(forms[tensor.name].to_dense(), found[tensor.name])
            dtype = numpy_helper.to_array(tensor).dtype
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values).astype(dtype), tensor.name))
    return model(proto)


def agrees(source, feeds, rank, ops):
    result, forms = rewrite(source, rank, feeds=feeds)
    assert names(result, "ops") == ops
    assert "w" not in names(result, "initializer")
    expected, found = run(with_dense(source, forms), **feeds)["y"], run(result, **feeds)["y"]
    assert found.shape == expected.shape
    # Two rounded sums of d products each instead of one: d * 2^-24 relative to the absolute sum, with a wide margin.
    width = forms["w"].right.size + forms["w"].left.size
    np.testing.assert_allclose(found, expected, rtol=0, atol=width * 2.0**-22 * max(1.0, np.abs(expected).max()))
    return result


@st.composite
def convolutions(draw):
    axes = draw(st.integers(1, 3))
    kernel = draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))
    dilations = draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes))
    attributes = {"strides": draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes))}
    auto = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto == "NOTSET":
        attributes["pads"] = draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes))
        attributes["dilations"] = dilations
    else:
        attributes["auto_pad"] = auto
    if draw(st.booleans()):
        attributes["kernel_shape"] = kernel
    sizes = draw(st.lists(st.integers(5, 8), min_size=axes, max_size=axes))
    channels = draw(st.tuples(st.integers(2, 5), st.integers(2, 5)))
    return attributes, (*channels, *kernel), (draw(st.integers(1, 3)), channels[1], *sizes), draw(st.booleans())


def text(attributes):
    shown = (f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in attributes.items())
    return f"<{', '.join(shown)}>" if attributes else ""


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.data())
def test_a_convolution_becomes_two_that_compute_its_form(case, data):
    attributes, shape, x_shape, has_bias = case
    rank = data.draw(st.integers(1, min(shape[0], int(np.prod(shape[1:])))))
    bias = {"b": normal(shape[0], seed=3)} if has_bias else {}
    dims = ", ".join(["N", *map(str, x_shape[1:])])
    node = f"Conv{text(attributes)}(x, w{', b' if bias else ''})"
    outputs = ", ".join("ABCDE"[: len(shape)])
    source = model(f"g (float[{dims}] x) => (float[{outputs}] y) {{ y = {node} }}", w=normal(*shape), **bias)
    agrees(source, {"x": normal(*x_shape, seed=1)}, rank, ["Conv", "Conv"])


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.booleans(), st.booleans()),
    st.sampled_from([1.0, -0.5, 3.0]),
    st.sampled_from([1.0, 0.0, 2.5]),
    st.sampled_from([None, (), (5,), (1, 5), (7, 1), (7, 5)]),
    st.sampled_from([9, 11, 17]),
)
def test_a_gemm_becomes_two_that_compute_its_form(turned, alpha, beta, bias, opset):
    turn_a, turn_b = turned
    if bias is None and opset < 11:
        bias = ()  # needed there
    attributes = text({"transA": int(turn_a), "transB": int(turn_b), "alpha": alpha, "beta": beta})
    third = {} if bias is None else {"b": normal(*bias, seed=3)}
    body = f"g (float[P, Q] x) => (float[A, B] y) {{ y = Gemm{attributes}(x, w{', b' if third else ''}) }}"
    source = model(body, opset=opset, w=normal(*((5, 6) if turn_b else (6, 5))), **third)
    agrees(source, {"x": normal(*((6, 7) if turn_a else (7, 6)), seed=1)}, 2, ["Gemm", "Gemm"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(1, 5))
def test_a_matmul_with_its_constant_on_the_right(batch_axes, rank):
    shape = (*(2, 3, 2)[:batch_axes], 6)
    given, made = ", ".join("PQRS"[:batch_axes] + "6"), ", ".join("ABCD"[: len(shape)])
    body = f"g (float[{given}] x) => (float[{made}] y) {{ y = MatMul(x, w) }}"
    agrees(model(body, w=normal(6, 5)), {"x": normal(*shape, seed=1)}, rank, ["MatMul", "MatMul"])


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(6,), (6, 3), (2, 6, 3), (2, 3, 6, 1)]), st.integers(1, 5))
def test_a_matmul_with_its_constant_on_the_left(shape, rank):
    given, made = ", ".join("PQRS"[: len(shape)]), ", ".join("ABCD"[: len(shape)])
    body = f"g (float[{given}] x) => (float[{made}] y) {{ y = MatMul(w, x) }}"
    agrees(model(body, w=normal(5, 6)), {"x": normal(*shape, seed=1)}, rank, ["MatMul", "MatMul"])


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_factors_keep_the_type_of_the_weight(kind, dtype):
    source = model(f"g ({kind}[N, 6] x) => ({kind}[N, 5] y) {{ y = MatMul(x, w) }}", w=normal(6, 5, dtype=dtype))
    result, forms = rewrite(source, 2, feeds={"x": normal(3, 6, dtype=dtype)})
    assert weight_of(result, "w.0").dtype == weight_of(result, "w.1").dtype == dtype
    assert forms["w"].left.dtype == dtype


def test_a_shared_weight_is_factorized_once_and_its_factors_are_shared():
    source = model("g (float[N, 6] x) => (float[N, 6] y) { h = MatMul(x, w)  y = MatMul(h, w) }", w=normal(6, 6))
    result, forms = rewrite(source, 2, feeds={"x": normal(3, 6)})
    assert names(result, "initializer") == ["w.0", "w.1"]
    assert names(result, "ops") == ["MatMul"] * 4
    dense = forms["w"].to_dense().T
    np.testing.assert_allclose(run(result, x=normal(3, 6))["y"], normal(3, 6) @ dense @ dense, rtol=0, atol=1e-4)


def test_factors_get_other_names_where_theirs_are_taken():
    body = "g (float[N, 6] x) => (float[N, 6] y) { h = MatMul(x, w)  y = Add(h, v) }"
    proto = parse(body, w=normal(6, 6), v=normal(6))
    proto.graph.initializer[1].name = proto.graph.node[1].input[1] = "w.0"
    result, _ = rewrite(model(proto), 2, feeds={"x": normal(3, 6)})
    assert names(result, "initializer") == ["w.0", "w.0_2", "w.1"]


def test_names_outputs_and_free_dimensions_stay():
    proto = parse("g (float[N, 6] x) => (float[N, 5] y) { y = MatMul(x, w) }", w=normal(6, 5))
    proto.graph.node[0].name = "dense/1"
    result, _ = rewrite(model(proto), 2)
    assert [node.name for node in result.proto.graph.node] == ["dense/1.0", "dense/1.1"]
    assert result.proto.graph.input == proto.graph.input
    assert result.proto.graph.output == proto.graph.output
    for rows in (1, 4):
        assert run(result, x=normal(rows, 6))["y"].shape == (rows, 5)


def test_an_empty_attribute_list_is_left_out():
    proto = parse("g (float[N, 3, 8] x) => (float[N, 4, A] y) { y = Conv(x, w) }", w=normal(4, 3, 3))
    attribute = proto.graph.node[0].attribute.add(name="strides")
    attribute.type = attribute.INTS
    graph = open_graph(model(proto))
    found = [each for each in find_layers(graph) if isinstance(each, Layer)]
    changes = factorize(graph, found, {"w": plain_svd(normal(4, 3, 3), 2)})
    assert len(changes) == 1
    assert "strides" not in graph.surgeon.nodes[0].attrs


def test_only_the_layers_of_the_plan_change():
    source = model(
        "g (float[N, 6] x) => (float[N, 6] y) { h = MatMul(x, w)  y = MatMul(h, v) }",
        w=normal(6, 6),
        v=normal(6, 6, seed=1),
    )
    result, _ = rewrite(source, 2, "v")
    assert names(result, "initializer") == ["w", "v.0", "v.1"]
    np.testing.assert_array_equal(weight_of(result, "w"), normal(6, 6))


@pytest.mark.parametrize("body", ["y = MatMul(x, w)", "y = MatMul(w, x)", "y = Gemm<transB=1>(x, w)", "y = Conv(c, w)"])
def test_the_factors_in_the_graph_multiply_out_to_the_form(body):
    w = normal(6, 6, 3) if "Conv" in body else normal(6, 6)
    source = model(f"g (float[6, 6] x, float[1, 6, 9] c) => (float[A] y) {{ {body} }}", w=w)
    result, forms = rewrite(source, 2)
    parts = [weight_of(result, name) for name in ("w.0", "w.1")]
    np.testing.assert_array_equal(dense_of(parts, layer(source)), forms["w"].to_dense())


def test_calibrated_forms_leave_less_of_the_output_than_plain_ones():
    source = model("g (float[N, 6] x) => (float[N, 5] y) { y = MatMul(x, w) }", w=normal(6, 5))
    graph, found = open_graph(source), layer(source)
    x = normal(50, 6, seed=4) * np.logspace(0, 2, 6)
    for second in ((x.T @ x / 50)[None], np.mean(x**2, axis=0)[None]):  # the diagonal alone is used as well
        moments = Moments("w", second, 50)
        errors = [
            output_errors(
                read_weight(graph, found),
                solve_forms(graph, [found], plan_for("w", rank=2, calibrated=calibrated), {"w": moments})[
                    "w"
                ].to_dense(),
                moments,
            )[1]
            for calibrated in (True, False)
        ]
        assert errors[0] < 0.5 * errors[1]


def test_weights_that_are_not_finite_are_refused():
    w = normal(6, 5)
    w[0, 0] = np.nan
    source = model("g (float[N, 6] x) => (float[N, 5] y) { y = MatMul(x, w) }", w=w)
    with pytest.raises(ModelError, match="'w' holds 1 NaN"):
        solve_forms(open_graph(source), [layer(source)], plan_for("w", rank=2), {})


def test_progress_counts_layers():
    source = model(
        "g (float[N, 6] x) => (float[N, 6] y) { h = MatMul(x, w)  y = MatMul(h, v) }", w=normal(6, 6), v=normal(6, 6)
    )
    seen = []
    layers = [layer(source, "w"), layer(source, "v")]
    solve_forms(
        open_graph(source),
        layers,
        plan_for("w", "v", rank=1),
        {},
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]


def test_a_factorized_model_is_found_to_have_two_layers_per_layer():
    source = model("g (float[N, 6] x) => (float[N, 6] y) { y = MatMul(x, w) }", w=normal(6, 6))
    result, _ = rewrite(source, 2)
    assert [each.shape for each in entries(result).values()] == [(2, 6), (6, 2)]


def test_a_computed_weight_stays_a_skip():
    body = "g (float[N, 6] x) => (float[N, 6] y) { w = Transpose(v)  y = MatMul(x, w) }"
    assert skip(model(body, v=normal(6, 6)))
