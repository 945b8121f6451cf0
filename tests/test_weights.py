from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from builders import apply, entries, if_model, model, names, normal, parse, run, skip, weight_of
from onnx import helper, numpy_helper

from edgecompress.errors import ModelError
from edgecompress.graph import open_graph
from edgecompress.layers import Layer
from edgecompress.moments import Moments
from edgecompress.passes.prepare import prepare
from edgecompress.passes.solve import Calibration, solve_layers
from edgecompress.passes.weights import values_as_stored, write_values
from edgecompress.plan import LayerPlan, Plan, WeightsPlan


def plan_for(*layers, bits=2, calibrated=False):
    scheme = WeightsPlan(scheme="kmeans", bits=bits, step=None, prune=0.0, calibrated=calibrated)
    plans = (LayerPlan(layer=name, factorize=None, weights=scheme, reason=None) for name in layers)
    return Plan(schema_version=1, model_sha256="", layers=tuple(plans))


def layers_of(source):
    return [entry for entry in entries(source).values() if isinstance(entry, Layer)]


def solve(source, *, moments=None, bits=2):
    """Return the clusters of every layer, shaped as its weight is stored."""
    graph, found = open_graph(source), layers_of(source)
    plan = plan_for(*(each.name for each in found), bits=bits, calibrated=moments is not None)
    solved = solve_layers(graph, found, plan, Calibration(moments=moments or {}))
    return {
        each.name: values_as_stored(solved[each.name].values[0], each, tuple(each.constant.shape)) for each in found
    }


def cluster(source, feeds=None, **rest):
    forms = solve(source, **rest)
    return apply(source, lambda graph: write_values(graph, forms), feeds), forms


def decoded(result, name):
    """Return what the graph computes for a clustered weight."""
    proto = onnx.ModelProto()
    proto.CopyFrom(result.proto)
    del proto.graph.output[:]
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    del proto.graph.node[2 * len([each for each in names(result, "initializer") if each.endswith(".codebook")]) :]
    del proto.graph.input[:]
    return run(model(proto))[name]


MLP = "g (float[N, 6] x) => (float[N, 5] y) { y = MatMul(x, w) }"


@pytest.mark.parametrize(
    ("body", "shapes", "x"),
    [
        (MLP, {"w": (6, 5)}, (3, 6)),
        ("g (float[6, 3] x) => (float[A, B] y) { y = MatMul(w, x) }", {"w": (5, 6)}, (6, 3)),
        ("g (float[2, N, 6] x) => (float[A, B, C] y) { y = MatMul(x, w) }", {"w": (2, 6, 5)}, (2, 3, 6)),
        ("g (float[N, 6] x) => (float[N, 5] y) { y = Gemm<transB=1, alpha=2.0>(x, w) }", {"w": (5, 6)}, (3, 6)),
        (
            "g (float[N, 4, 6, 6] x) => (float[A, B, C, D] y) { y = Conv<group=2>(x, w) }",
            {"w": (6, 2, 3, 3)},
            (2, 4, 6, 6),
        ),
        (
            "g (float[N, 4, 6] x) => (float[A, B, C] y) { y = ConvTranspose<group=2>(x, w) }",
            {"w": (4, 3, 3)},
            (2, 4, 6),
        ),
        (
            "g (float[7, 1, 5] x) => (float[A, B, C, D] y) "
            '{ y = LSTM<hidden_size=6, direction="bidirectional">(x, w, r) }',
            {"w": (2, 24, 5), "r": (2, 24, 6)},
            (7, 1, 5),
        ),
        (
            "g (float[7, 1, 5] x) => (float[A, B, C, D] y) { y = GRU<hidden_size=6>(x, w, r) }",
            {"w": (1, 18, 5), "r": (1, 18, 6)},
            (7, 1, 5),
        ),
    ],
)
def test_weights_of_every_kind_become_codebooks_with_indices(body, shapes, x):
    weights = {name: normal(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}
    source = model(body, **weights)
    result, forms = cluster(source, {"x": normal(*x)})
    for name in weights:
        assert name not in names(result, "initializer")
        assert np.unique(forms[name].to_dense()).size <= 4
        found = decoded(result, name)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, forms[name].to_dense())
    dense = model(body, **{name: form.to_dense() for name, form in forms.items()})
    np.testing.assert_array_equal(run(result, x=normal(*x))["y"], run(dense, x=normal(*x))["y"])


@pytest.mark.parametrize("opset", [9, 13, 21, 26])
def test_the_operators_are_there_in_every_opset(opset):
    cluster(model(MLP, opset=opset, w=normal(6, 5)), {"x": normal(3, 6)})


def test_a_table_tied_to_a_matmul_is_clustered_once_and_stays_tied():
    body = "g (int64[N] i) => (float[N, 6] y) { e = Gather(w, i)  y = MatMul(e, w) }"
    result, forms = cluster(model(body, w=normal(6, 6)), {"i": np.arange(4)})
    assert names(result, "initializer") == ["w.indices", "w.codebook"]
    assert names(result, "ops") == ["Cast", "Gather", "Gather", "MatMul"]
    dense = forms["w"].to_dense()
    np.testing.assert_allclose(run(result, i=np.arange(4))["y"], dense[:4] @ dense, rtol=0, atol=1e-5)


def test_a_body_sees_the_clustered_weight_too():
    proto = if_model(normal(4, 4), normal(4, 4, seed=1), outer="h = MatMul(x, outer)")
    proto.graph.initializer.append(numpy_helper.from_array(normal(4, 4, seed=2), "outer"))
    body = next(each.g for each in proto.graph.node[-1].attribute if each.name == "then_branch")
    body.node[0].input[0], body.node[0].input[1] = "h", "outer"
    source = model(proto)
    inner = proto.graph.node[-1].SerializeToString(deterministic=True)
    for taken in (True, False):
        feeds = {"x": normal(3, 4), "c": np.array(taken)}
        result, forms = cluster(source, feeds)
        assert list(forms) == ["outer"]
        dense = forms["outer"].to_dense()
        expected = normal(3, 4) @ dense @ dense if taken else normal(3, 4) @ normal(4, 4, seed=1)
        np.testing.assert_allclose(run(result, **feeds)["y"], expected, rtol=0, atol=1e-5)
    assert result.proto.graph.node[-1].SerializeToString(deterministic=True) == inner


def test_an_initializer_that_is_an_output_is_given_out_as_it_became():
    body = "g (float[N, 6] x) => (float[N, 5] y, float[6, 5] w) { y = MatMul(x, w) }"
    result, forms = cluster(model(body, w=normal(6, 5)), {"x": normal(3, 6)})
    assert [value.name for value in result.proto.graph.output] == ["y", "w"]
    np.testing.assert_array_equal(run(result, x=normal(3, 6))["w"], forms["w"].to_dense())


def test_weights_listed_as_inputs_of_an_old_model_are_clustered():
    body = "g (float[N, 6] x, float[6, 5] w) => (float[N, 5] y) { y = MatMul(x, w) }"
    result, _ = cluster(model(body, ir_version=3, opset=9, w=normal(6, 5)), {"x": normal(3, 6)})
    assert names(result, "input") == ["x"]


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("double", np.float64)])
def test_codebooks_have_the_type_of_the_weight(kind, dtype):
    source = model(MLP.replace("float", kind), w=normal(6, 5, dtype=dtype))
    result, _ = cluster(source, {"x": normal(3, 6, dtype=dtype)})
    assert weight_of(result, "w.codebook").dtype == dtype
    assert weight_of(result, "w.indices").dtype == np.uint8


@pytest.mark.parametrize("name", ["a/b:0", "größe", "w.codebook", "[x]*", "w.indices"])
def test_hostile_names_stay(name):
    proto = parse(
        "g (float[N, 6] x) => (float[N, 6] y) { h = MatMul(x, w)  y = MatMul(h, v) }",
        w=normal(6, 6),
        v=normal(6, 6, seed=1),
    )
    proto.graph.initializer[1].name = proto.graph.node[1].input[1] = name
    result, forms = cluster(model(proto), {"x": normal(3, 6)})
    assert len(set(names(result, "initializer"))) == 4
    for each in ("w", name):
        np.testing.assert_array_equal(run_weight(result, each), forms[each].to_dense())


def run_weight(result, name):
    """Read codebook[indices] off the nodes that make a tensor."""
    makers = {node.output[0]: node for node in result.proto.graph.node}
    gather = makers[name]
    return weight_of(result, gather.input[0])[weight_of(result, makers[gather.input[1]].input[0])]


def test_one_distinct_value_needs_one_cluster():
    result, _ = cluster(model(MLP, w=np.full((6, 5), 0.25, np.float32)), {"x": normal(3, 6)})
    assert weight_of(result, "w.codebook").tolist() == [0.25]


def test_a_model_that_is_compressed_already_is_reported_and_stays_as_it_is():
    once, forms = cluster(model(MLP, w=normal(6, 5)))
    assert skip(once).reason == "it is a codebook with indices already"
    assert skip(once).parameters == 30
    assert layers_of(once) == []
    prepared = apply(once, prepare)
    assert prepared is once
    np.testing.assert_array_equal(decoded(prepared, "w"), forms["w"].to_dense())


def test_only_what_the_plan_names_is_clustered():
    body = "g (float[N, 6] x) => (float[N, 6] y) { h = MatMul(x, w)  y = MatMul(h, v) }"
    source = model(body, w=normal(6, 6), v=normal(6, 6))
    assert list(solve_layers(open_graph(source), layers_of(source), plan_for("v"), Calibration())) == ["v"]


def test_bfloat16_and_integer_weights_keep_their_bytes():
    body = """g (bfloat16[N, 4] x, int32[N, 4] k) => (bfloat16[N, 3] y, int32[N, 3] z)
    { y = MatMul(x, w)  z = MatMul(k, v) }"""
    source = model(body, w=normal(4, 3, dtype=ml_dtypes.bfloat16), v=np.ones((4, 3), np.int32))
    assert solve(source) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value):
    w = normal(6, 5)
    w[2, 3] = value
    with pytest.raises(ModelError, match="'w' holds 1 NaN or Inf"):
        solve(model(MLP, w=w))


# calibration


def output_error(form, w, x):
    return float(np.sum((x @ (form.to_dense() - w)) ** 2))


@pytest.mark.parametrize("side", ["right", "left"])
def test_importance_follows_the_inputs_whichever_side_the_constant_is_on(side):
    """Small weights meet large inputs: to be right about them is worth more."""
    sizes = np.logspace(0, 2, 32)
    x = (normal(4000, 32, seed=2) * sizes).astype(np.float32)
    w = (normal(32, 8) / sizes[:, None]).astype(np.float32)
    moments = {"w": Moments("w", np.mean(x.astype(float) ** 2, axis=0)[None], len(x))}
    if side == "right":
        source = model("g (float[N, 32] x) => (float[N, 8] y) { y = MatMul(x, w) }", w=w)
        weighted, plain = solve(source, moments=moments)["w"], solve(source)["w"]
        errors = [output_error(form, w, x) for form in (weighted, plain)]
    else:
        source = model("g (float[32, N] x) => (float[8, N] y) { y = MatMul(w, x) }", w=w.T.copy())
        weighted, plain = solve(source, moments=moments)["w"], solve(source)["w"]
        errors = [float(np.sum(((form.to_dense() - w.T) @ x.T) ** 2)) for form in (weighted, plain)]
    assert errors[0] < 0.85 * errors[1]


def test_importance_of_a_grouped_convolution_is_that_of_its_group():
    w = np.concatenate([normal(40, 1, 1, 1), normal(40, 1, 1, 1, seed=1)])
    source = model("g (float[1, 2, 4, 4] x) => (float[A, B, C, D] y) { y = Conv<group=2>(x, w) }", w=w)
    moments = {"w": Moments("w", np.array([[[1e6]], [[1.0]]]), 10)}
    errors = (solve(source, moments=moments)["w"].to_dense() - w) ** 2
    assert errors[:40].sum() < 0.5 * errors[40:].sum()


def test_progress_counts_layers():
    body = "g (float[N, 6] x) => (float[N, 6] y) { h = MatMul(x, w)  y = MatMul(h, v) }"
    source, seen = model(body, w=normal(6, 6), v=normal(6, 6)), []
    solve_layers(
        open_graph(source),
        layers_of(source),
        plan_for("w", "v"),
        Calibration(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 2), (2, 2)]


def test_a_scan_body_keeps_its_weights():
    step = helper.make_graph(
        [helper.make_node("MatMul", ["s", "w"], ["t"]), helper.make_node("Identity", ["t"], ["o"])],
        "step",
        [helper.make_tensor_value_info(name, 1, shape) for name, shape in (("s", [4, 4]), ("e", [4]))],
        [helper.make_tensor_value_info(name, 1, [4, 4]) for name in ("t", "o")],
    )
    proto = parse(
        "g (float[4, 4] x, float[3, 4] e) => (float[4, 4] y, float[3, 4, 4] z) "
        "{ h = MatMul(x, w)  y, z = Identity(h) }",
        w=normal(4, 4),
    )
    proto.graph.node[1].CopyFrom(helper.make_node("Scan", ["h", "e"], ["y", "z"], body=step, num_scan_inputs=1))
    feeds = {"x": normal(4, 4), "e": normal(3, 4)}
    result, forms = cluster(model(proto), feeds)
    dense = forms["w"].to_dense()
    np.testing.assert_allclose(
        run(result, **feeds)["y"], normal(4, 4) @ np.linalg.matrix_power(dense, 4), rtol=1e-4, atol=1e-4
    )
