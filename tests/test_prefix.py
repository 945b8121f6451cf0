from __future__ import annotations

import numpy as np
import pytest
from builders import data_of, model, normal, run

from edgecompress import prefix as module
from edgecompress.prefix import Prefix, feeds_of

CHAIN = """g (float[N, 6] x) => (float[N, 4] y) {
    a = MatMul(x, w1)  b = Relu(a)  c = MatMul(b, w2)  d = Add(c, b)  e = MatMul(d, w3)  y = Tanh(e) }"""
BRANCH = """g (float[N, 6] x, bool p) => (float[N, 6] y) {
    a = MatMul(x, w1)
    b = If(p) <then_branch = t () => (float[N, 6] u) { u = Relu(a) },
               else_branch = f () => (float[N, 6] v) { v = Neg(a) }>
    y = MatMul(b, w2) }"""


def chain(seed=0):
    weights = {f"w{n}": normal(6, size, seed=seed + n) for n, size in ((1, 6), (2, 6), (3, 4))}
    return model(CHAIN, **weights), weights


def reached(prefix, *names):
    """Return the named tensors of all rows."""
    batches = [found for _, found in prefix.run(names)]
    return [np.concatenate([batch[name] for batch in batches]) for name in names]


def everything(weights, x):
    """The tensors of CHAIN, in numpy."""
    b = np.maximum(x @ weights["w1"], 0)
    return {"x": x, "b": b, "d": b @ weights["w2"] + b}


def test_every_tensor_is_what_the_whole_model_computes_whatever_was_reached_before():
    source, weights = chain()
    x = normal(10, 6, seed=9)
    prefix = Prefix(source, feeds_of(source, data_of(x=x), 4), pending=[])
    expected = everything(weights, x)
    for name in ("x", "b", "d", "b", "x"):
        np.testing.assert_allclose(reached(prefix, name)[0], expected[name], rtol=1e-5, atol=1e-5)
    both = reached(prefix, "d", "x")
    np.testing.assert_allclose(both[0], expected["d"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(both[1], x)


@pytest.mark.parametrize("budget", [0, 400, 1 << 30])
def test_later_tensors_see_the_weights_that_were_replaced_whatever_was_kept(monkeypatch, budget):
    monkeypatch.setattr(module, "CACHE_BUDGET_BYTES", budget)
    source, weights = chain()
    x = normal(10, 6, seed=9)
    prefix = Prefix(source, feeds_of(source, data_of(x=x), 4), pending=["w1", "w2", "w3"])
    changed = dict(weights)
    for number, (weight, entering, after) in enumerate([("w1", "x", ["b", "d"]), ("w2", "b", ["d"]), ("w3", "d", [])]):
        np.testing.assert_allclose(
            reached(prefix, entering)[0], everything(changed, x)[entering], rtol=1e-5, atol=1e-5, err_msg=entering
        )
        changed[weight] = normal(*weights[weight].shape, seed=50 + number)
        prefix.replace({weight: changed[weight]}, settled=weight)
        prefix.forget(after)


def test_a_tensor_behind_a_weight_that_is_still_to_change_is_not_kept():
    source, weights = chain()
    x = normal(5, 6, seed=9)
    prefix = Prefix(source, feeds_of(source, data_of(x=x), 2), pending=["w1"])
    np.testing.assert_allclose(reached(prefix, "d")[0], everything(weights, x)["d"], rtol=1e-5, atol=1e-5)
    weights["w1"] = normal(6, 6, seed=77)
    prefix.replace({"w1": weights["w1"]}, settled="w1")
    np.testing.assert_allclose(reached(prefix, "d")[0], everything(weights, x)["d"], rtol=1e-5, atol=1e-5)


def test_going_through_a_model_runs_each_node_once(monkeypatch):
    built: list[list[str]] = []
    original = Prefix._build

    def spy(self, nodes, *rest):
        built.append([node.output[0] for node in nodes])
        return original(self, nodes, *rest)

    monkeypatch.setattr(Prefix, "_build", spy)
    source, _ = chain()
    prefix = Prefix(source, feeds_of(source, data_of(x=normal(10, 6)), 4), pending=["w1", "w2", "w3"])
    for weight, name, later in (("w1", "x", ["b", "d"]), ("w2", "b", ["d"]), ("w3", "d", [])):
        reached(prefix, name)
        prefix.replace({}, settled=weight)
        prefix.forget(later)
    assert built == [["a", "b"], ["c", "d"]]


def test_what_the_bodies_of_an_if_read_is_part_of_the_way():
    weights = {"w1": normal(6, 6, seed=1), "w2": normal(6, 6, seed=2)}
    source = model(BRANCH, **weights)
    x = normal(4, 6, seed=3)
    feeds = module.Feeds(4, lambda: [(slice(0, 4), {"x": x, "p": np.array(False)})])
    prefix = Prefix(source, feeds, pending=[])
    np.testing.assert_allclose(reached(prefix, "b")[0], -(x @ weights["w1"]), rtol=1e-5, atol=1e-5)


def test_a_model_with_a_fixed_batch_runs_as_many_rows_at_a_time():
    source = model("g (float[3, 6] x) => (float[3, 6] y) { y = MatMul(x, w1) }", w1=normal(6, 6))
    x = normal(9, 6, seed=1)
    prefix = Prefix(source, feeds_of(source, data_of(x=x), 5), pending=[])
    expected = np.concatenate([run(source, x=x[start : start + 3])["y"] for start in (0, 3, 6)])
    np.testing.assert_array_equal(reached(prefix, "y")[0], expected)


def test_data_too_large_to_hold_is_read_again(monkeypatch):
    monkeypatch.setattr(module, "CACHE_BUDGET_BYTES", 10)
    source, weights = chain()
    x = normal(10, 6, seed=9)
    prefix = Prefix(source, feeds_of(source, data_of(x=x), 4), pending=[])
    for _ in range(2):
        np.testing.assert_allclose(reached(prefix, "d")[0], everything(weights, x)["d"], rtol=1e-5, atol=1e-5)
