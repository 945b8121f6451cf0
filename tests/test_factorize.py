from __future__ import annotations

import numpy as np
import pytest
from builders import apply, entries, layer, model, names, normal, parse, run, skip, weight_of

from edgecompress.errors import ModelError
from edgecompress.factorize.svd import plain_svd
from edgecompress.graph import open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.moments import Moments, output_errors
from edgecompress.orientation import read_weight
from edgecompress.passes.factorize import factorize
from edgecompress.passes.solve import Calibration, solve_layers
from edgecompress.plan import FactorizePlan, LayerPlan, Plan


def plan_for(*layers, rank, calibrated=False):
    scheme = FactorizePlan(scheme="svd", rank=rank, calibrated=calibrated)
    plans = (LayerPlan(layer=name, factorize=scheme, weights=None, reason=None) for name in layers)
    return Plan(schema_version=1, model_sha256="", layers=tuple(plans))


def rewrite(source, rank, *names_of_layers, feeds=None):
    """Factorize layers; return the new model and the forms."""
    graph, found = open_graph(source), entries(source)
    forms = {name: plain_svd(read_weight(graph, found[name]), rank) for name in names_of_layers or ("w",)}

    def pass_(graph):
        return factorize(graph, [each for each in find_layers(graph) if isinstance(each, Layer)], forms)

    return apply(source, pass_, feeds), forms


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


def test_calibrated_forms_leave_less_of_the_output_than_plain_ones():
    source = model("g (float[N, 6] x) => (float[N, 5] y) { y = MatMul(x, w) }", w=normal(6, 5))
    graph, found = open_graph(source), layer(source)
    x = normal(50, 6, seed=4) * np.logspace(0, 2, 6)
    for second in ((x.T @ x / 50)[None], np.mean(x**2, axis=0)[None]):  # the diagonal alone is used as well
        moments = Moments("w", second, 50)
        errors = [
            output_errors(
                read_weight(graph, found),
                solve_layers(
                    graph, [found], plan_for("w", rank=2, calibrated=calibrated), Calibration(moments={"w": moments})
                )["w"].to_dense(),
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
        solve_layers(open_graph(source), [layer(source)], plan_for("w", rank=2), Calibration())


def test_a_factorized_model_is_found_to_have_two_layers_per_layer():
    source = model("g (float[N, 6] x) => (float[N, 6] y) { y = MatMul(x, w) }", w=normal(6, 6))
    result, _ = rewrite(source, 2)
    assert [each.shape for each in entries(result).values()] == [(2, 6), (6, 2)]


def test_a_computed_weight_stays_a_skip():
    body = "g (float[N, 6] x) => (float[N, 6] y) { w = Transpose(v)  y = MatMul(x, w) }"
    assert skip(model(body, v=normal(6, 6)))
