"""Sharing a budget: the knapsack against brute force, and whole models whose layers matter differently."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from builders import Array, entries, model, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompress import allocate as module
from edgecompress.allocate import Candidate, allocate, allocate_ranks, interpolate
from edgecompress.calibrate import calibrate
from edgecompress.data import DataSet
from edgecompress.data.sets import ArraySource
from edgecompress.errors import BudgetError, RecipeError
from edgecompress.factorize.sizes import FormName, count_parameters
from edgecompress.factorize.solve import solve_layer
from edgecompress.graph import Graph, open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.metrics import AUTO
from edgecompress.orientation import read_weight, why_not
from edgecompress.passes.factorize import factorize
from edgecompress.passes.run import run_pass

if TYPE_CHECKING:
    from edgecompress.model import Model

CHOICES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 50)), min_size=1, max_size=4)


def candidates_of(pairs: list[tuple[int, int]], scale: int = 1) -> list[Candidate]:
    return [Candidate("svd", (1,), scale * cost, float(error)) for cost, error in pairs]


def brute_force(candidates: list[list[Candidate]], budget: float) -> float | None:
    totals = [
        sum(each.error for each in combination)
        for combination in itertools.product(*candidates)
        if sum(each.cost for each in combination) <= budget
    ]
    return min(totals, default=None)


@settings(max_examples=300, deadline=None)
@given(layers=st.lists(CHOICES, min_size=1, max_size=5), budget=st.integers(0, 200), scale=st.sampled_from([1, 7, 96]))
def test_the_knapsack_is_as_good_as_brute_force(layers: list[list[tuple[int, int]]], budget: int, scale: int) -> None:
    candidates = [candidates_of(pairs, scale) for pairs in layers]
    best = brute_force(candidates, scale * budget)
    if best is None:
        with pytest.raises(BudgetError):
            allocate(candidates, scale * budget)
        return
    chosen = allocate(candidates, scale * budget)
    taken = [choices[index] for choices, index in zip(candidates, chosen, strict=True)]
    assert sum(each.cost for each in taken) <= scale * budget
    assert sum(each.error for each in taken) == best


@settings(max_examples=60, deadline=None)
@given(layers=st.lists(CHOICES, min_size=1, max_size=4), share=st.floats(0, 1))
def test_rounding_costs_no_more_than_it_says(layers: list[list[tuple[int, int]]], share: float) -> None:
    # Prime scales make the divisor 1 and the room larger than STEPS: costs are rounded.
    candidates = [
        candidates_of(pairs, scale) for pairs, scale in zip(layers, (10007, 10009, 10037, 10039), strict=False)
    ]
    least, most = (sum(pick(each.cost for each in choices) for choices in candidates) for pick in (min, max))
    budget = int(least + share * (most - least))
    taken = [choices[index] for choices, index in zip(candidates, allocate(candidates, budget), strict=True)]
    assert sum(each.cost for each in taken) <= budget
    unit = -(-(budget - least) // module.STEPS)
    tighter = brute_force(candidates, budget - len(layers) * unit)
    assert tighter is None or sum(each.error for each in taken) <= tighter


def test_a_budget_out_of_reach_says_how_small_it_can_get() -> None:
    with pytest.raises(BudgetError, match=r"budget of 9 is out of reach.* 10") as caught:
        allocate([candidates_of([(4, 1), (9, 0)]), candidates_of([(6, 1)])], 9)
    assert caught.value.exit_code == 6


def test_an_infinite_error_is_chosen_only_where_nothing_else_fits() -> None:
    candidates = [candidates_of([(1, 0), (2, 0)]), candidates_of([(1, 0), (2, 0)])]
    candidates[0][0] = Candidate("svd", (1,), 1, np.inf)
    assert allocate(candidates, 4)[0] == 1
    assert allocate(candidates, 2) == [0, 0]


def test_nothing_to_share_is_no_error() -> None:
    assert allocate([], 0) == []


@settings(max_examples=50, deadline=None)
@given(power=st.floats(0.5, 2.0), scale=st.floats(1e-3, 1e3))
def test_a_power_of_the_error_is_interpolated_exactly(power: float, scale: float) -> None:
    known, between = np.array([1e-3, 1e-2, 1.0]), np.array([3e-3, 0.5])
    found = interpolate(between, known, scale * known**power)
    np.testing.assert_allclose(found, scale * between**power, rtol=1e-9)


def test_divergences_rise_with_the_error_and_are_proportional_beyond_what_is_known() -> None:
    found = interpolate(np.array([0.01, 0.1, 0.3, 1.0, 10.0]), np.array([1.0, 0.1]), np.array([0.2, 0.4]))
    np.testing.assert_allclose(found, [0.04, 0.4, 0.4, 0.4, 4.0], rtol=1e-9)


# whole models


def data_set(x: Array) -> DataSet:
    source = ArraySource({"x": x}, {}, {}, {})
    return DataSet("rows", source, np.arange(len(x)), None, AUTO)


def prepared(proto: Model, x: Array) -> dict[str, Any]:
    graph = open_graph(proto)
    layers = [each for each in find_layers(graph) if isinstance(each, Layer)]
    data = data_set(x)
    return {"model": proto, "graph": graph, "layers": layers, "moments": calibrate(proto, layers, data), "data": data}


BODY = """g (float[N, 24] x) => (float[N, 24] y)
{ a = MatMul(x, loud)  b = MatMul(x, quiet)  c = Mul(b, small)  y = Add(a, c) }"""
TWO_LAYERS = model(BODY, loud=normal(24, 24, seed=1), quiet=normal(24, 24, seed=1), small=np.float32(0.01))


def ranks_of(keep: float, **changes: Any) -> dict[str, Any]:
    case = {**prepared(TWO_LAYERS, normal(200, 24, seed=2)), **changes}
    forms = {"loud": ("svd",), "quiet": ("svd",)}
    return dict(
        allocate_ranks(
            case["model"], case["graph"], case["layers"], forms,
            moments=case["moments"], data=case["data"], keep=keep, unit="parameters",
        )
    )  # fmt: skip


def test_a_layer_that_the_output_hardly_depends_on_gets_the_low_rank() -> None:
    found = ranks_of(0.75)
    assert found["loud"] is None  # the whole of it, 576 of 864 parameters
    assert found["quiet"] == ("svd", (6,))  # 6 * 48 = 288, all the rest


def test_without_data_layers_with_the_same_weights_get_the_same() -> None:
    found = ranks_of(0.5, data=None, moments={})
    assert found["loud"] is not None
    assert abs(found["loud"][1][0] - found["quiet"][1][0]) <= 1


@pytest.mark.parametrize("keep", [0.1, 0.33, 0.5, 0.8, 1.0])
def test_the_budget_is_kept_and_used(keep: float) -> None:
    found = ranks_of(keep)
    used = sum(576 if each is None else count_parameters(each[0], (24, 24), each[1]) for each in found.values())
    assert used <= keep * 1152
    assert used > keep * 1152 - 48  # one more rank would not fit


def test_a_share_below_rank_one_is_refused() -> None:
    with pytest.raises(BudgetError, match="the least that the layers can have is 96"):
        ranks_of(0.05)


CONV = """g (float[N, 6, 8, 8] x) => (float[N, 8, 4, 4] y)
{ a = Conv<pads = [1, 1, 1, 1]>(x, first)  b = Relu(a)  y = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(b, second) }"""


def conv_model() -> Model:
    return model(CONV, first=normal(8, 6, 3, 3), second=normal(8, 8, 3, 3, seed=3))


@pytest.mark.parametrize("unit", ["parameters", "macs"])
def test_every_form_may_be_chosen_and_its_cost_is_counted_as_asked(unit: Any) -> None:
    case = prepared(conv_model(), normal(40, 6, 8, 8))
    forms = dict.fromkeys(("first", "second"), ("svd", "svd_in", "separable", "tucker2"))
    arguments = case["model"], case["graph"], case["layers"], forms
    options = {"moments": case["moments"], "data": case["data"], "unit": unit}
    found = allocate_ranks(*arguments, keep=0.6, **options)
    by_name = {layer.name: layer for layer in case["layers"]}
    costs = {
        name: module._cost(by_name[name], unit) if each is None else module._form_cost(by_name[name], *each, unit)
        for name, each in found.items()
    }
    whole = sum(module._cost(layer, unit) for layer in case["layers"])
    assert 0.5 * whole < sum(costs.values()) <= 0.6 * whole
    assert allocate_ranks(*arguments, keep=0.6, **options) == found  # the same input, the same choice


@pytest.mark.parametrize("form", ["svd", "svd_bias", "svd_in", "separable", "tucker2", "cp"])
@pytest.mark.parametrize(
    ("attributes", "weight", "x"),
    [
        ("pads = [1, 1, 1, 1]", (8, 6, 3, 3), (2, 6, 9, 7)),
        ("strides = [2, 3]", (8, 6, 3, 2), (2, 6, 11, 13)),
        ("dilations = [2, 1], pads = [1, 0, 2, 0]", (8, 6, 3, 3), (1, 6, 9, 9)),
        ("group = 2, strides = [2, 2]", (8, 3, 3, 3), (2, 6, 9, 9)),
        ("MatMul(x, w)", (6, 8), (2, 5, 6)),
        ("MatMul(w, x)", (8, 6), (3, 6, 4)),
        ("Gemm<transB = 1>(x, w, b)", (8, 6), (7, 6)),
        ("Gemm<transA = 1>(x, w, b)", (6, 8), (6, 7)),
    ],
)
def test_costs_are_those_of_the_graph_that_a_form_becomes(
    form: FormName, attributes: str, weight: tuple[int, ...], x: tuple[int, ...]
) -> None:
    node = attributes if "(" in attributes else f"Conv<{attributes}>(x, w, b)"
    sizes = ", ".join(map(str, x))
    source = model(f"g (float[{sizes}] x) => (float y) {{ y = {node} }}", w=normal(*weight), b=normal(8))
    if "b" not in node:
        del source.proto.graph.initializer[1]
    source.proto.graph.output[0].type.tensor_type.ClearField("shape")
    graph = open_graph(source)
    (layer,) = find_layers(graph)
    assert isinstance(layer, Layer)
    if why_not(form, layer, 17) is not None:
        return
    ranks = (2, 3) if form == "tucker2" else (2,)
    dense, bias = read_weight(graph, layer), normal(8)
    solved = solve_layer(form, dense, ranks, None, groups=layer.groups, bias=bias)
    rewritten, _ = run_pass(source, "factorize", lambda each: factorize(each, [layer_in(each)], {"w": solved}), None)
    parts = [each for each in find_layers(open_graph(rewritten)) if isinstance(each, Layer)]
    assert module._form_cost(layer, form, ranks, "macs") == sum(each.macs or 0 for each in parts)
    stored = sum(each.parameters for each in parts)
    moved = ranks[0] - 8 if form == "svd_bias" else 0  # an inner bias in place of the outer one
    assert module._form_cost(layer, form, ranks, "parameters") == stored + moved
    assert module._cost(layer, "macs") == layer.parameters * sum(
        each.rows * int(np.prod(each.outputs)) for each in layer.extents or ()
    )


def layer_in(graph: Graph) -> Layer:
    (found,) = find_layers(graph)
    assert isinstance(found, Layer)
    return found


def test_progress_counts_the_layers_that_share() -> None:
    case = prepared(conv_model(), normal(20, 6, 8, 8))
    seen: list[tuple[int, int]] = []
    allocate_ranks(
        case["model"], case["graph"], case["layers"], {"second": ("separable",)},
        moments=case["moments"], data=case["data"], keep=0.5, unit="parameters",
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 1)]


def test_a_budget_of_macs_needs_shapes() -> None:
    proto = model("g (float[N, M, 4] x) => (float y) { h = Reshape(x, s)  y = MatMul(h, w) }", w=normal(4, 4))
    proto.proto.graph.input.append(model("g (int64[K] s) => (int64[K] y) { y = Identity(s) }").proto.graph.input[0])
    (layer,) = (each for each in entries(proto).values() if isinstance(each, Layer))
    with pytest.raises(RecipeError, match="multiply-accumulates of layer 'w' are unknown"):
        allocate_ranks(proto, open_graph(proto), [layer], {"w": ("svd",)}, moments={}, data=None, keep=0.5, unit="macs")
