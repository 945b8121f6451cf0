"""Few values for the layers that are never factorized: ConvTranspose, LSTM and GRU, judged by what the model gives."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from builders import apply, data_of, entries, model, normal, parse, run, weight_of

from edgecompress.calibrate import calibrate
from edgecompress.cluster.kmeans import kmeans
from edgecompress.graph import constants, open_graph
from edgecompress.layers import find_layers
from edgecompress.passes.biases import add_biases, bias_names, set_constants
from edgecompress.passes.run import run_pass
from edgecompress.passes.solve import Calibration, solve_layers
from edgecompress.passes.weights import values_as_stored, write_values
from edgecompress.plan import LayerPlan, Plan, WeightsPlan
from edgecompress.sequential import Walk

DECONV = "g (float[N, {i}, 6, 6] x) => (float[N, {o}, A, B] y) {{ y = ConvTranspose <strides = [2, 2]{more}> (x, w) }}"
RECURRENT = (
    'g (float[S, N, 8] x) => (float[S, A, N, 12] y) {{ y = {op} <hidden_size = 12, direction = "{way}"> (x, w, r) }}'
)


def correlated(*shape, seed=0):
    """Inputs of few directions along the axis that a layer multiplies, the last one."""
    width = shape[-1]
    mixed = normal(*shape[:-1], 3, seed=seed) @ normal(3, width, seed=50)
    return (mixed + 0.2 * normal(*shape, seed=seed + 1)).astype(np.float32)


def images(channels, seed=0):
    return np.ascontiguousarray(np.moveaxis(correlated(80, 6, 6, channels, seed=seed), -1, 1))


def few_values(source, x, scheme, *, calibrated, **options):
    """The model with every weight in few values."""
    weights = WeightsPlan(**scheme, prune=0.0, calibrated=calibrated)
    layers = list(entries(source).values())
    plan = Plan(
        schema_version=1,
        model_sha256="",
        layers=tuple(LayerPlan(layer=each.name, factorize=None, weights=weights, reason=None) for each in layers),
    )
    data, graph = data_of(x=x), open_graph(source)
    known = Calibration(
        moments=calibrate(source, layers, data), walk=partial(Walk, source, data), feedback=True, **options
    )
    found = solve_layers(graph, layers, plan, known)
    present = constants(graph)
    forms = {
        each.name: values_as_stored(found[each.name].values[0], each, tuple(present[each.name].shape))
        for each in layers
    }
    corrected = {known.biases[name]: each.bias for name, each in found.items() if each.bias is not None}
    source, _ = run_pass(source, "correct", lambda graph: set_constants(graph, corrected), None)
    result = apply(source, lambda graph: write_values(graph, forms), {"x": x})
    onnx.checker.check_model(result.proto)
    return result


def lost(source, result, x):
    before, after = (run(each, x=x)["y"].astype(float) for each in (source, result))
    return np.mean((before - after) ** 2) / np.mean(before**2)


KMEANS = {"scheme": "kmeans", "bits": 2, "step": None}
GRID = {"scheme": "grid", "bits": None, "step": 1.2}


@pytest.mark.parametrize("scheme", [KMEANS, GRID], ids=["kmeans", "grid"])
@pytest.mark.parametrize(("groups", "kernel"), [(1, 2), (1, 3), (1, 4), (2, 3)])
def test_feedback_makes_up_for_the_rounding_of_a_transposed_convolution(scheme, groups, kernel):
    source = model(DECONV.format(i=12, o=8, more=f", group = {groups}"), w=normal(12, 8 // groups, kernel, kernel))
    x, other = images(12), images(12, seed=9)
    plain = lost(source, few_values(source, x, scheme, calibrated=False), other)
    calibrated = lost(source, few_values(source, x, scheme, calibrated=True), other)
    # three directions of twelve carry nearly all: what rounds against them is made up for by the others
    assert calibrated < 0.5 * plain


@pytest.mark.parametrize("scheme", [KMEANS, GRID], ids=["kmeans", "grid"])
@pytest.mark.parametrize("way", ["forward", "bidirectional"])
@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_feedback_makes_up_for_the_rounding_of_a_recurrent_layer(op, gates, way, scheme):
    ways = 2 if way == "bidirectional" else 1
    weights = {"w": normal(ways, gates * 12, 8, seed=1) / 3, "r": normal(ways, gates * 12, 12, seed=2) / 4}
    source = model(RECURRENT.format(op=op, way=way), **weights)
    x, other = correlated(40, 20, 8), correlated(40, 20, 8, seed=9)
    plain = lost(source, few_values(source, x, scheme, calibrated=False), other)
    calibrated = lost(source, few_values(source, x, scheme, calibrated=True), other)
    assert calibrated < 0.8 * plain


def test_the_channels_of_a_depthwise_transposed_convolution_share_a_step():
    """As it is stored, one step per channel would not lie along an axis of the weight."""
    source = model(DECONV.format(i=12, o=12, more=", group = 12"), w=normal(12, 1, 3, 3))
    result = few_values(source, images(12), GRID, calibrated=True)
    step = next(each for each in result.proto.graph.initializer if each.name == "w.step")
    assert list(step.dims) == []


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_outputs_of_a_transposed_convolution_get_their_mean_and_spread_back(has_bias):
    weights = {"w": normal(12, 8, 3, 3)} | ({"b": normal(8, seed=3)} if has_bias else {})
    body = DECONV.format(i=12, o=8, more="").replace("(x, w)", "(x, w, b)" if has_bias else "(x, w)")
    source, x = model(body, **weights), images(12) + np.float32(0.5)
    if not has_bias:
        source, _ = run_pass(source, "biases", lambda graph: add_biases(graph, find_layers(graph), {"w"}), None)
    graph, layers = open_graph(source), list(entries(source).values())
    biases = bias_names(graph, layers)
    assert list(biases) == ["w"]
    result = few_values(source, x, KMEANS, calibrated=True, biases=biases, asymmetric=True, correct=True)
    before, after = (run(each, x=x)["y"].astype(float) for each in (source, result))
    # closed form on these very rows, 80 images of 13 x 13: more than the positions that are looked at
    np.testing.assert_allclose(after.mean(axis=(0, 2, 3)), before.mean(axis=(0, 2, 3)), rtol=0, atol=0.05)
    assert after.var(axis=(0, 2, 3)).sum() == pytest.approx(before.var(axis=(0, 2, 3)).sum(), rel=0.02)


def test_a_recurrence_whose_hidden_state_is_no_tensor_gets_values_from_its_weights():
    body = "g (float[S, N, 8] x) => (float[1, N, 12] y) { y = LSTM <hidden_size = 12> (x, w, r) }"
    proto = parse(body, w=normal(1, 48, 8, seed=1), r=normal(1, 48, 12, seed=2))
    proto.graph.node[0].output[:] = ["", "", "y"]  # the cell's state, which no weight multiplies
    source, x = model(proto), correlated(40, 20, 8)
    result = few_values(source, x, KMEANS, calibrated=True, asymmetric=True, correct=True)
    assert np.isfinite(run(result, x=x)["y"]).all()
    plain = kmeans(normal(1, 48, 12, seed=2), 4)
    np.testing.assert_array_equal(weight_of(result, "r.codebook"), plain.codebook)
    np.testing.assert_array_equal(weight_of(result, "r.indices"), plain.indices)
