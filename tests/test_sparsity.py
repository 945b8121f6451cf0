from __future__ import annotations

import numpy as np
import pytest
from builders import data_of, entries, model, normal, parse, run
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgecompress import sparsity
from edgecompress.calibrate import calibrate
from edgecompress.cluster.prune import prune
from edgecompress.decide import decide
from edgecompress.graph import open_graph
from edgecompress.layers import find_layers
from edgecompress.recipe import Recipe, Settings
from edgecompress.sparsity import shares_of_zeros

TWO = "g (float[N, 30] x) => (float[N, 5] y) { a = MatMul(x, w1)  b = Relu(a)  y = MatMul(b, w2) }"
SIDE = """g (float[N, 20] x) => (float[N, 20] y) {
    a = MatMul(x, w1)  b = MatMul(x, w2)  c = Mul(b, little)  y = Add(a, c) }"""
WEIGHTS = st.lists(
    st.integers(1, 30).flatmap(lambda size: arrays(np.float32, (size, 2), elements=st.integers(-9, 9))),
    min_size=1,
    max_size=4,
)


def layers_of(source):
    return list(entries(source).values())


def two(seed=0):
    return model(TWO, w1=normal(30, 40, seed=seed), w2=normal(40, 5, seed=seed + 1))


def shares(source, share, x=None):
    layers, data = layers_of(source), None if x is None else data_of(x=x)
    moments = {} if data is None else calibrate(source, layers, data)
    return shares_of_zeros(open_graph(source), layers, share, moments=moments, data=data)


def separate(*weights):
    """A model of layers side by side, one for each weight ``(d, 2)``, which nothing but a sum ties together."""
    names = [f"w{number}" for number in range(len(weights))]
    inputs = ", ".join(f"float[N, {len(each)}] x{number}" for number, each in enumerate(weights))
    nodes = " ".join(f"h{number} = MatMul(x{number}, {name})" for number, name in enumerate(names))
    total = f"y = Sum({', '.join(f'h{number}' for number in range(len(weights)))})"
    return model(f"g ({inputs}) => (float[N, 2] y) {{ {nodes} {total} }}", **dict(zip(names, weights, strict=True)))


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.floats(0.05, 0.95))
def test_all_layers_together_have_the_share_and_each_keeps_a_weight(weights, share):
    found = shares(separate(*weights), share)
    zeros = [round(found[f"w{number}"] * each.size) for number, each in enumerate(weights)]
    assert all(count < each.size for count, each in zip(zeros, weights, strict=True))
    wanted = round(share * sum(each.size for each in weights))
    # a layer that would lose all of its weights keeps one, so that up to one a layer may be missing
    assert wanted - len(weights) - 1 <= sum(zeros) <= wanted + 1


def test_without_data_the_scores_are_those_of_lamp():
    weights = [normal(8, 2, seed=1), 5 * normal(20, 2, seed=2) ** 3, normal(3, 2, seed=3)]
    scores = []
    for weight in weights:  # by the definition: w^2 over the sum of all squares that are not less
        squares = weight.astype(float).reshape(-1) ** 2
        scores.append([square / squares[squares >= square].sum() for square in squares])
    limit = np.sort(np.concatenate(scores))[31]
    for share, own in zip(shares(separate(*weights), 0.5).values(), scores, strict=True):
        assert share == pytest.approx(np.mean(np.array(own) < limit), abs=1e-9)


def test_without_data_the_scale_of_a_layer_does_not_count():
    weights = [normal(8, 2, seed=1), normal(20, 2, seed=2)]
    assert shares(separate(*weights), 0.6) == shares(separate(weights[0], 64 * weights[1]), 0.6)


def test_a_layer_that_hardly_moves_the_output_loses_more():
    weights = {"w1": normal(20, 20, seed=1), "w2": normal(20, 20, seed=2), "little": np.float32(0.01)}
    found = shares(model(SIDE, **weights), 0.6, x=normal(400, 20, seed=3))
    assert found["w2"] > 0.95
    assert found["w1"] < 0.25


@pytest.mark.parametrize(("share", "most"), [(0.5, 0.6), (0.7, 0.85), (0.9, 0.95)])
def test_the_output_loses_less_than_where_every_layer_has_the_same_share(share, most):
    """A wide layer that reads correlated inputs, and a narrow one behind it."""
    for seed in range(4):
        x = normal(600, 6, seed=20) @ normal(6, 30, seed=21) + 0.3 * normal(600, 30, seed=22)
        source = two(seed)
        moments = calibrate(source, layers_of(source), data_of(x=x))
        lost = [pruned_loss(source, given, moments, x) for given in (shares(source, share, x=x), even(share))]
        assert lost[0] < most * lost[1]


def even(share):
    return {"w1": share, "w2": share}


def pruned_loss(source, given, moments, x):
    graph = open_graph(source)
    weights = {
        each.name: prune(sparsity.read_weight(graph, each), given[each.name], moments[each.name]).T
        for each in layers_of(source)
    }
    before, after = run(source, x=x)["y"].astype(float), run(model(TWO, **weights), x=x)["y"]
    return np.sum((before - after) ** 2)


def test_a_large_layer_is_judged_by_a_sample(monkeypatch):
    exact = shares(two(), 0.6)
    monkeypatch.setattr(sparsity, "_SAMPLE", 300)
    sampled = shares(two(), 0.6)
    assert sampled != exact
    for name in exact:
        # a quarter of 1,200 weights: the standard error of a share of 0.6 is 0.03
        assert sampled[name] == pytest.approx(exact[name], abs=0.06)


def test_a_layer_of_zeros_goes_first_and_breaks_nothing():
    found = shares(separate(np.zeros((9, 2), np.float32), normal(9, 2)), 0.4)
    assert found["w0"] == pytest.approx(14 / 18)  # of 36 weights 14 become zero
    assert found["w1"] == 0.0
    x = {f"x{number}": normal(30, 9, seed=number) for number in (0, 1)}
    source = separate(np.zeros((9, 2), np.float32), normal(9, 2))
    layers, data = layers_of(source), data_of(**x)
    moments = calibrate(source, layers, data)
    assert shares_of_zeros(open_graph(source), layers, 0.4, moments=moments, data=data) == found


def test_progress_counts_layers():
    seen = []
    source = two()
    graph, layers = open_graph(source), layers_of(source)
    shares_of_zeros(graph, layers, 0.5, moments={}, data=None, progress=lambda *each: seen.append(each))
    assert seen == [(1, 2), (2, 2)]


# from a recipe to a plan

THREE = """g (float[N, 30] x) => (float[N, 6] y) {
    a = MatMul(x, w1)  b = Relu(a)  c = MatMul(b, w2)  d = Relu(c)  y = MatMul(d, w3) }"""


def planned(folder, **recipe):
    proto = parse(THREE, w1=normal(30, 40, seed=1), w2=normal(40, 30, seed=2) ** 3, w3=normal(30, 6, seed=3))
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    source = model(proto, folder=folder)
    graph = open_graph(source)
    found = find_layers(graph)
    plan = decide(Recipe(**recipe), source, graph, found, moments={}, data=None, shrink={})
    return {entry.layer: entry.weights.prune for entry in plan.layers}


HALF = Settings(cluster="grid", prune=0.5)


def test_the_plan_holds_the_share_of_every_layer(tmp_path):
    found = planned(tmp_path, everywhere=HALF)
    assert found["w2"] > 0.5  # its cubes are far apart in size
    assert len(set(found.values())) == 3
    sizes = {"w1": 1200, "w2": 1200, "w3": 180}
    assert sum(found[name] * size for name, size in sizes.items()) == pytest.approx(1290, abs=1)


def test_every_layer_has_the_share_where_the_scope_is_the_layer(tmp_path):
    assert set(planned(tmp_path, everywhere=HALF, prune_scope="layer").values()) == {0.5}


def test_a_share_of_its_own_stays_with_a_layer_and_the_others_share_the_rest(tmp_path):
    found = planned(tmp_path, everywhere=HALF, layers={"w3": Settings(prune=0.1)})
    assert found["w3"] == 0.1
    assert (found["w1"] + found["w2"]) / 2 == pytest.approx(0.5, abs=1e-3)
    assert planned(tmp_path, everywhere=Settings(cluster="grid"), ops={"MatMul": Settings(prune=0.3)}) == dict.fromkeys(
        found, 0.3
    )


def test_factors_have_the_share_each(tmp_path):
    found = planned(tmp_path, everywhere=HALF, layers={"w1": Settings(factorize="svd", rank=4)})
    assert found["w1"] == 0.5
    assert found["w2"] > 0.5
