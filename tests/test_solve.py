from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from builders import data_of, model, normal, run, weight_of

from edgecompress.calibrate import calibrate
from edgecompress.graph import open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.passes.biases import add_biases, bias_names, set_constants
from edgecompress.passes.run import run_pass
from edgecompress.passes.solve import Calibration, solve_corrections, solve_forms
from edgecompress.plan import FactorizePlan, LayerPlan, Plan
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


def compressed(source, data, **options):
    """The model with every weight replaced by its form, its biases by the corrected ones."""
    calibration = known(source, data, **options)
    graph = open_graph(source)
    forms = solve_forms(graph, layers_of(source), plan(), calibration)
    dense = {name: form.to_dense for name, form in forms.items()}
    found = solve_corrections(graph, layers_of(source), dense, calibration)
    values = {
        name: (form.to_dense() * (found[name].gain if name in found else 1.0)).astype(np.float32)
        for name, form in forms.items()
    }
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


def test_corrections_mend_weights_that_shrink_and_shift():
    source, x = deep(), inputs()
    calibration = known(source, data_of(x=x), correct=True)
    graph = open_graph(source)
    noisy = {name: partial(lambda values: values, 0.8 * weight_of(source, name) + 0.02) for name in NAMES}
    found = solve_corrections(graph, layers_of(source), noisy, calibration)
    values = {name: noisy[name]() for name in NAMES}
    mended = {name: values[name] * found[name].gain for name in NAMES}
    mended |= {calibration.biases[name]: found[name].bias for name in NAMES}
    damaged = output_error(source, with_values(source, values), x)
    assert output_error(source, with_values(source, mended), x) < 0.3 * damaged
    assert all(1.0 < found[name].gain < 2.0 for name in NAMES)


def test_a_layer_left_alone_has_only_its_bias_corrected():
    source, x = deep(), inputs()
    calibration = known(source, data_of(x=x), correct=True)
    changed = {"w1": partial(np.asarray, 0.7 * weight_of(source, "w1"))}
    found = solve_corrections(open_graph(source), layers_of(source), changed, calibration)
    assert found["w1"].gain == pytest.approx(1 / 0.7, rel=1e-5)
    assert found["w2"].gain == found["w3"].gain == 1.0
    np.testing.assert_allclose(found["w3"].bias, weight_of(source, "b3"), rtol=0, atol=1e-5)  # w1 was mended whole


def test_outputs_that_never_vary_get_no_gain():
    source = deep()
    calibration = known(source, data_of(x=np.zeros((20, 16), np.float32)), correct=True)
    zeros = {"w1": partial(np.zeros, (16, 16), np.float32)}
    assert solve_corrections(open_graph(source), layers_of(source), zeros, calibration)["w1"].gain == 1.0


def test_without_data_nothing_is_corrected():
    source = deep()
    dense = {"w1": partial(weight_of, source, "w1")}
    assert solve_corrections(open_graph(source), layers_of(source), dense, Calibration()) == {}


def test_layers_that_are_not_calibrated_are_solved_from_their_weights():
    source, x = deep(), inputs()
    graph = open_graph(source)
    plain = solve_forms(graph, layers_of(source), plan(calibrated=False), Calibration())
    among = solve_forms(graph, layers_of(source), plan(calibrated=False), known(source, data_of(x=x), asymmetric=True))
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
