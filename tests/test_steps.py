from __future__ import annotations

import math

import numpy as np
import pytest
from builders import data_of, model, normal
from hypothesis import given
from hypothesis import strategies as st

from edgecompress.errors import BudgetError
from edgecompress.graph import open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.plan import make_plan
from edgecompress.recipe import Recipe, Settings
from edgecompress.steps import (
    LARGEST_SIGMAS,
    Attempt,
    fit_scale,
    grid_layers,
    relative_steps,
    scale_for_bits,
    with_steps,
)

TWO = "g (float[N, 40] x) => (float[N, 30] y) { a = MatMul(x, w1)  b = Relu(a)  y = MatMul(b, w2) }"


def two(scale=1.0):
    """Two layers; the outputs hang on the first one's only through inputs that are ``scale`` times as large."""
    graph = open_graph(model(TWO, w1=normal(40, 50, seed=1), w2=scale * normal(50, 30, seed=2)))
    return graph, [each for each in find_layers(graph) if isinstance(each, Layer)]


def tried(spend, first, budget):
    scales = []

    def attempt(scale):
        scales.append(scale)
        return Attempt(scale, spent=spend(scale), bits=2.0)

    return fit_scale(attempt, first, budget, per_bit=1000.0, unit="bytes"), scales


@given(
    offset=st.floats(0, 5000),
    budget=st.floats(1500, 9000),
    first=st.floats(0.2, 5.0),
    bend=st.floats(0.4, 1.2),
)
def test_a_budget_is_met_from_below(offset, budget, first, bend):
    """Entropies fall with the logarithm of the step, more slowly where few weights are left."""

    def spend(scale):
        return offset + 1000.0 * max(0.0, 4.0 - math.log2(scale)) ** bend

    found, scales = tried(spend, first, offset + budget)
    assert spend(found) <= offset + budget
    assert len(scales) <= 6
    assert found == min(scale for scale in scales if spend(scale) <= offset + budget)


def test_a_good_first_guess_is_taken_at_once():
    found, scales = tried(lambda scale: 995.0 / scale, 1.0, 1000.0)
    assert found == 1.0
    assert scales == [1.0]


def test_a_budget_that_the_widest_steps_miss_says_how_small_it_can_get():
    with pytest.raises(BudgetError, match=r"budget of 100 bytes is out of reach: the least that was found is 500"):
        tried(lambda scale: 500.0 + 100 * (LARGEST_SIGMAS - scale), 6.0, 100.0)


def test_steps_are_as_wide_as_the_output_allows():
    graph, layers = two()
    data = data_of(x=normal(64, 40, seed=3) * np.where(np.arange(40) < 4, 1.0, 0.01).astype(np.float32))
    relative = relative_steps(graph, layers, {}, data)
    sizes = {layer.name: layer.parameters for layer in layers}
    mean = sum(sizes[name] * math.log(step) for name, step in relative.items()) / sum(sizes.values())
    assert mean == pytest.approx(0.0, abs=1e-9)
    assert all(0.25 <= step <= 4 for step in relative.values())
    assert relative_steps(graph, layers, {}, None) == {"w1": 1.0, "w2": 1.0}


def test_a_layer_that_the_output_hardly_depends_on_gets_wider_steps():
    body = """g (float[N, 40] x) => (float[N, 30] y)
    { a = MatMul(x, w1)  b = MatMul(x, w2)  c = Mul(b, s)  y = Add(a, c) }"""
    weights = {"w1": normal(40, 30, seed=1), "w2": normal(40, 30, seed=2), "s": np.float32(0.05)}
    graph = open_graph(model(body, **weights))
    layers = [each for each in find_layers(graph) if isinstance(each, Layer)]
    relative = relative_steps(graph, layers, {}, data_of(x=normal(64, 40, seed=3)))
    assert relative["w2"] > 2 * relative["w1"]


@pytest.mark.parametrize("bits", [0.7, 1.5, 3.0])
def test_the_first_guess_has_the_entropy_that_is_wanted(bits):
    from edgecompress.cluster.grid import entropy_bits, grid_step, to_grid

    graph, layers = two()
    relative = {"w1": 0.8, "w2": 1.3}
    scale = scale_for_bits(graph, layers, relative, bits)
    spent = 0.0
    for name, weight in (("w1", normal(40, 50, seed=1).T), ("w2", normal(50, 30, seed=2).T)):
        spent += entropy_bits(to_grid(weight, grid_step(weight, scale * relative[name])).codes)
    # the last halving of the interval moves the scale by 1e-6; a code more or less is 1e-3 bits a weight
    assert spent / (40 * 50 + 50 * 30) == pytest.approx(bits, abs=5e-3)


def test_a_plan_takes_the_steps_of_its_grids_alone():
    graph, layers = two()
    recipe = Recipe(everywhere=Settings(cluster="grid"), layers={"w2": Settings(bits=3)})
    plan = make_plan(recipe, layers, model_sha256="", calibrated=False)
    assert [layer.name for layer in grid_layers(plan, layers)] == ["w1"]
    first, second = with_steps(plan, {"w1": 2.0}, 1.5).layers
    assert (first.weights.step, second.weights.step, second.weights.bits) == (3.0, None, 3)
    assert with_steps(plan, {"w1": 2.0}, 100.0).layers[0].weights.step == LARGEST_SIGMAS
    assert graph is not None
