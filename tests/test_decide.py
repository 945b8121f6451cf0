from __future__ import annotations

import numpy as np
import pytest
from builders import data_of, model, normal, parse

from edgecompress.calibrate import calibrate
from edgecompress.decide import decide
from edgecompress.errors import RecipeError
from edgecompress.graph import open_graph
from edgecompress.layers import find_layers
from edgecompress.recipe import Recipe, Settings

CLASSIFIER = """g (float[N, 40] x) => (float[N, 8] y) {
    a = MatMul(x, w1)  b = Relu(a)  c = MatMul(b, w2)  y = Softmax(c) }"""


def random_directions():
    """Weights without any that matter more than others: half of the ranks lose a third of the output."""
    return {"w1": normal(40, 40, seed=1), "w2": normal(40, 8, seed=2)}


def decided(folder, body, weights, *, x=None, **recipe):
    proto = parse(body, **weights)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    source = model(proto, folder=folder)
    graph = open_graph(source)
    found = find_layers(graph)
    data = None if x is None else data_of(x=x)
    moments = {} if data is None else calibrate(source, found, data)
    plan = decide(Recipe(**recipe), source, graph, found, moments=moments, data=data, shrink={})
    return {entry.layer: entry for entry in plan.layers}


AUTO = Settings(factorize="auto", keep=0.5, cluster="none")


@pytest.mark.parametrize("calibrated", [True, False])
def test_auto_leaves_a_last_layer_whole_that_would_lose_much(tmp_path, calibrated):
    x = normal(300, 40, seed=3) if calibrated else None
    found = decided(tmp_path, CLASSIFIER, random_directions(), x=x, everywhere=AUTO)
    assert found["w2"].factorize is None
    assert "svd rank 3 would lose" in found["w2"].reason
    assert "no layer behind" in found["w2"].reason
    assert found["w1"].factorize is not None  # it loses as much, but there is a layer behind it


def test_auto_takes_a_last_layer_that_loses_little(tmp_path):
    weights = random_directions() | {"w2": normal(40, 2, seed=2) @ normal(2, 8, seed=4)}
    assert decided(tmp_path, CLASSIFIER, weights, everywhere=AUTO)["w2"].factorize.rank == 3


def test_a_form_that_is_named_is_taken_for_a_last_layer_too(tmp_path):
    named = Settings(factorize="svd", keep=0.5, cluster="none")
    assert decided(tmp_path, CLASSIFIER, random_directions(), everywhere=named)["w2"].factorize.rank == 3


def test_the_way_to_another_layer_may_be_long_and_one_of_several(tmp_path):
    body = """g (float[N, 40] x) => (float[N, 40] y, float[N, 8] z) {
        a = MatMul(x, w1)  y = Relu(a)  b = Transpose<perm=[1, 0]>(a)  c = Transpose<perm=[1, 0]>(b)
        z = MatMul(c, w2) }"""
    found = decided(tmp_path, body, random_directions(), everywhere=AUTO)
    assert found["w1"].factorize is not None
    assert found["w2"].factorize is None


def test_a_dead_layer_loses_nothing(tmp_path):
    found = decided(tmp_path, CLASSIFIER, random_directions(), x=np.zeros((9, 40), np.float32), everywhere=AUTO)
    assert found["w1"].factorize is not None
    assert found["w2"].factorize is not None


def test_spectral_layers_cannot_share_a_budget_of_macs(tmp_path):
    everywhere = Settings(factorize="spectral", keep=0.5)
    with pytest.raises(RecipeError, match=r"budget_unit.*macs.*spectral") as raised:
        decided(tmp_path, CLASSIFIER, random_directions(), everywhere=everywhere, allocate=True, budget_unit="macs")
    assert "parameters" in raised.value.hint
