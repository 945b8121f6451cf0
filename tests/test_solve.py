from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from builders import data_of, model, normal, run
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgecompress.calibrate import calibrate
from edgecompress.graph import open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.passes.biases import add_biases, bias_names, rounded_bias, set_constants
from edgecompress.passes.run import run_pass
from edgecompress.passes.solve import Calibration, solve_layers
from edgecompress.plan import FactorizePlan, LayerPlan, Plan, WeightsPlan
from edgecompress.sequential import Walk

DEEP = """g (float[N, 16] x) => (float[N, 16] y) {
    a = Gemm <transB = 1> (x, w1, b1)  b = Relu(a)
    c = Gemm <transB = 1> (b, w2, b2)  d = Relu(c)
    y = Gemm <transB = 1> (d, w3, b3) }"""
NAMES = ("w1", "w2", "w3")


def deep():
    weights = {name: normal(16, 16, seed=number) / 3 for number, name in enumerate(NAMES)}
    biases = {f"b{number}": normal(16, seed=10 + number) for number in (1, 2, 3)}
    return model(DEEP, **weights, **biases)


def inputs():
    """Rows of few directions, so that calibration has something to find."""
    return normal(600, 5, seed=20) @ normal(5, 16, seed=21) + 0.1 * normal(600, 16, seed=22)


def plan(rank=5, names=NAMES, calibrated=True):
    stage = FactorizePlan(scheme="svd", rank=rank, calibrated=calibrated)
    layers = tuple(LayerPlan(layer=name, factorize=stage, weights=None, reason=None) for name in names)
    return Plan(schema_version=1, model_sha256="", layers=layers)


def layers_of(source):
    return [each for each in find_layers(open_graph(source)) if isinstance(each, Layer)]


def known(source, data, **options):
    moments = calibrate(source, layers_of(source), data)
    biases = bias_names(open_graph(source), layers_of(source)) if options.get("correct") else {}
    return Calibration(moments=moments, biases=biases, walk=partial(Walk, source, data), **options)


def compressed(source, data, entries=None, **options):
    """The model with every weight replaced by what its solution multiplies out to, its biases by the corrected ones."""
    calibration = known(source, data, **options)
    found = solve_layers(open_graph(source), layers_of(source), entries or plan(), calibration)
    values = {name: each.to_dense().astype(np.float32) for name, each in found.items() if each.is_changed}
    values |= {calibration.biases[name]: each.bias for name, each in found.items() if each.bias is not None}
    return with_values(source, values)


def with_values(source, values):
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values[tensor.name]), tensor.name))
    return model(proto)


def output_error(source, result, x):
    before, after = (run(each, x=x)["y"].astype(float) for each in (source, result))
    return np.mean((before - after) ** 2) / np.mean(before**2)


def test_layers_solved_on_what_compressed_layers_give_make_up_for_their_errors():
    source, x = deep(), inputs()
    calibration, test = data_of(x=x[:400]), x[400:]
    alone = output_error(source, compressed(source, calibration, asymmetric=False), test)
    together = output_error(source, compressed(source, calibration, asymmetric=True), test)
    assert together < 0.8 * alone


def test_corrected_outputs_have_the_mean_and_spread_of_the_original():
    source, x = deep(), inputs()
    result = compressed(source, data_of(x=x), asymmetric=True, correct=True)
    before, after = (run(each, x=x)["y"].astype(float) for each in (source, result))
    # closed form on these very rows: only float32 is in between
    np.testing.assert_allclose(after.mean(axis=0), before.mean(axis=0), rtol=0, atol=1e-4)
    assert after.var(axis=0).sum() == pytest.approx(before.var(axis=0).sum(), rel=1e-4)


def test_corrections_mend_what_few_values_do_to_every_layer():
    source, x = deep(), inputs()
    two = clusters_plan(bits=2)
    damaged = output_error(source, compressed(source, data_of(x=x), two), x)
    mended = output_error(source, compressed(source, data_of(x=x), two, correct=True), x)
    assert mended < 0.8 * damaged


def test_layers_clustered_on_what_clustered_layers_give_make_up_for_their_errors():
    source, x = deep(), inputs()
    calibration, test = data_of(x=x[:400]), x[400:]
    two = clusters_plan(bits=2)
    alone = output_error(source, compressed(source, calibration, two, correct=True), test)
    together = output_error(source, compressed(source, calibration, two, correct=True, asymmetric=True), test)
    assert together < 0.9 * alone


def clusters_plan(bits, names=NAMES):
    scheme = WeightsPlan(scheme="kmeans", bits=bits, step=None, prune=0.0, calibrated=True)
    layers = tuple(LayerPlan(layer=name, factorize=None, weights=scheme, reason=None) for name in names)
    return Plan(schema_version=1, model_sha256="", layers=layers)


def test_biases_beside_few_values_leave_the_low_bytes_of_their_floats_zero():
    source, x = deep(), inputs()
    rounded, exact = (
        np.concatenate([each.bias.view(np.uint32) for each in solved(source, x, entries).values()])
        for entries in (clusters_plan(bits=2), plan())
    )
    # units are 7 bits below the spread, and the first 16 bits of a float32 hold 8 of its number
    assert (rounded & 0xFF == 0).all()
    assert (rounded & 0xFFFF == 0).mean() > 0.5
    assert (exact & 0xFF != 0).mean() > 0.9


def solved(source, x, entries):
    calibration = known(source, data_of(x=x), correct=True, asymmetric=True)
    return solve_layers(open_graph(source), layers_of(source), entries, calibration)


@given(
    bias=arrays(np.float32, 6, elements=st.floats(-100, 100, width=32)),
    variances=arrays(np.float64, 6, elements=st.floats(0, 1e4, allow_subnormal=False)),
)
def test_a_rounded_bias_moves_an_output_by_a_256th_of_its_spread_at_most(bias, variances):
    rounded = rounded_bias(bias, variances)
    spread = np.sqrt(variances)
    # half a unit; the result is float32 again
    allowed = spread / 256 + np.abs(bias) * np.finfo(np.float32).eps
    assert rounded.dtype == np.float32
    assert (np.abs(rounded.astype(float) - bias) <= allowed).all()


def only(name, bits):
    entries = clusters_plan(bits, (name,)).layers
    entries += tuple(LayerPlan(layer=each, factorize=None, weights=None, reason="") for each in NAMES if each != name)
    return Plan(schema_version=1, model_sha256="", layers=entries)


def test_a_layer_left_alone_has_only_its_bias_corrected():
    source, x = deep(), inputs()
    calibration = known(source, data_of(x=x), correct=True, asymmetric=True)
    found = solve_layers(open_graph(source), layers_of(source), only("w1", 2), calibration)
    assert found["w1"].is_changed
    assert not found["w2"].is_changed
    assert not found["w3"].is_changed
    result = compressed(source, data_of(x=x), only("w1", 2), correct=True, asymmetric=True)
    before, after = (run(each, x=x)["y"].astype(float).mean(axis=0) for each in (source, result))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4)


def test_outputs_that_never_vary_get_no_gain():
    source = deep()
    calibration = known(source, data_of(x=np.zeros((20, 16), np.float32)), correct=True)
    found = solve_layers(open_graph(source), layers_of(source), only("w1", 3), calibration)["w1"]
    plain = solve_layers(open_graph(source), layers_of(source), only("w1", 3), Calibration(moments=calibration.moments))
    np.testing.assert_array_equal(found.to_dense(), plain["w1"].to_dense())


def test_without_data_nothing_is_corrected():
    source = deep()
    found = solve_layers(open_graph(source), layers_of(source), only("w1", 3), Calibration())
    assert list(found) == ["w1"]
    assert found["w1"].bias is None


def test_layers_that_are_not_calibrated_are_solved_from_their_weights():
    source, x = deep(), inputs()
    graph = open_graph(source)
    plain = solve_layers(graph, layers_of(source), plan(calibrated=False), Calibration())
    among = solve_layers(graph, layers_of(source), plan(calibrated=False), known(source, data_of(x=x), asymmetric=True))
    for name in NAMES:
        np.testing.assert_array_equal(among[name].to_dense(), plain[name].to_dense())


# --- which biases may be corrected


def biases_in(body, **weights):
    source = model(body, **weights)
    return bias_names(open_graph(source), layers_of(source))


VECTOR = np.ones(5, np.float32)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("g (float[N, 6] x) => (float[N, 5] y) { y = Gemm(x, w, b) }", {"w": "b"}),
        ("g (float[N, 6] x) => (float[N, 5] y) { m = MatMul(x, w)  y = Add(m, b) }", {"w": "b"}),
        ("g (float[N, 6] x) => (float[N, 5] y) { m = MatMul(x, w)  y = Add(b, m) }", {"w": "b"}),
        ("g (float[N, 6] x) => (float[N, 5] y) { y = Gemm <beta = 2.0> (x, w, b) }", {}),
        ("g (float[N, 6] x) => (float[N, 5] y) { y = Gemm <alpha = 2.0> (x, w, b) }", {}),
        ("g (float[N, 6] x) => (float[N, 5] y, float[N, 5] m) { m = MatMul(x, w)  y = Add(m, b) }", {"w": "b"}),
        ("g (float[N, 6] x) => (float[N, 5] y, float[N, 5] z) { m = MatMul(x, w)  y = Add(m, b)  z = Neg(m) }", {}),
        ("g (float[N, 6] x) => (float[N, 5] y) { m = Gemm(x, w, b)  y = Mul(m, b) }", {}),
        ("g (float[N, 6] x) => (float[N, 5] y) { y = MatMul(x, w) }", {}),
    ],
)
def test_a_bias_is_corrected_only_where_it_is_the_layer_s_own(body, found):
    weights = {"w": normal(6, 5)} | ({"b": VECTOR} if "b)" in body or "(b" in body else {})
    assert biases_in(body, **weights) == found


def test_a_convolution_without_a_bias_gets_one_of_zeros_that_changes_nothing():
    body = "g (float[N, 3, 6, 6] x) => (float[N, 4, 4, 4] y) { y = Conv(x, w) }"
    source = model(body, w=normal(4, 3, 3, 3))
    result, _ = run_pass(
        source,
        "biases",
        lambda graph: add_biases(graph, [each for each in find_layers(graph) if isinstance(each, Layer)], {"w"}),
        None,
    )
    assert bias_names(open_graph(result), layers_of(result)) == {"w": "w.bias"}
    x = normal(2, 3, 6, 6)
    np.testing.assert_array_equal(run(result, x=x)["y"], run(source, x=x)["y"])
    changed, _ = run_pass(
        result, "set", lambda graph: set_constants(graph, {"w.bias": np.ones(4, np.float32)}), {"x": x}
    )
    np.testing.assert_allclose(run(changed, x=x)["y"], run(source, x=x)["y"] + 1, rtol=0, atol=1e-5)
