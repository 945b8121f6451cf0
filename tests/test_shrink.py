"""Units are removed where the graph allows it, the right ones, and what reads the others is fitted as well as can be.

The rewriting is compared bit for bit: weights and inputs are small integers, activations keep them multiples of a small
power of two, so that every sum is exact in float32, in whatever order the runtime forms it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from builders import apply, data_of, model, names, normal, run, weight_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgecompress.calibrate import calibrate
from edgecompress.factorize.shrink import refit, select_units, take_units
from edgecompress.graph import open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.moments import Moments, accumulate, regularised
from edgecompress.orientation import read_weight, stored
from edgecompress.passes.biases import bias_names
from edgecompress.passes.pairs import Pair, find_pairs
from edgecompress.passes.shrink import Shrunk, shrink, solve_shrink
from edgecompress.passes.solve import Calibration
from edgecompress.sequential import Walk

if TYPE_CHECKING:
    from edgecompress.model import Model

Array = NDArray[Any]


# Choosing and fitting


def moments_of(rows: Array) -> Moments:
    return accumulate(None, "w", rows.astype(np.float64)[:, None], full=True)


def loss(weight: Array, fitted: Array, moments: Moments) -> float:
    """Return what a refit costs under the regularised moment, which is what it minimises."""
    wrong = (weight - fitted).reshape(len(weight), -1)
    return float(np.sum((wrong @ regularised(moments.second_moment[0])) * wrong))


def one_by_one(weight: Array, moments: Moments, units: int, count: int) -> Array:
    """Return what remains when, each time, every unit is tried and refitted without: slow, and nothing to get wrong."""
    alive = list(range(units))
    while len(alive) > count:
        trials = [[unit for unit in alive if unit != gone] for gone in alive]
        alive = min(trials, key=lambda kept: loss(weight, refit(weight, moments, units, np.array(kept)), moments))
    return np.array(alive)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), units=st.integers(2, 7), block=st.integers(1, 3), outputs=st.integers(1, 30))
def test_each_removal_is_the_one_that_costs_least_after_refitting(
    seed: int, units: int, block: int, outputs: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(outputs, units * block))
    moments = moments_of(rng.normal(size=(50, units * block)) @ rng.normal(size=(units * block, units * block)))
    for count in range(1, units + 1):
        assert (
            select_units(weight, moments, units, count).tolist() == one_by_one(weight, moments, units, count).tolist()
        )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), data=st.data())
def test_a_refit_is_the_least_squares_solution_on_the_samples(seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    units, block = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, units - 1), min_size=1))))
    weight, rows = rng.normal(size=(3, units * block)), rng.normal(size=(40, units * block)) + 1.0
    moments = moments_of(rows)
    damping = 0.01 * np.mean(moments.diagonal)
    samples = np.vstack([rows / np.sqrt(len(rows)), np.sqrt(damping) * np.eye(units * block)])
    columns = (kept[:, None] * block + np.arange(block)).reshape(-1)
    oracle = np.zeros_like(weight)
    oracle[:, columns] = np.linalg.lstsq(samples[:, columns], samples @ weight.T, rcond=None)[0].T
    # both solve a system in float64 whose condition is below 1e4: some 12 digits remain
    np.testing.assert_allclose(refit(weight, moments, units, kept), oracle, atol=1e-9)


def test_where_all_units_are_kept_the_weight_stays() -> None:
    weight, moments = normal(4, 3, 2, 2), moments_of(normal(60, 12, seed=1))
    np.testing.assert_allclose(refit(weight, moments, 3, np.arange(3)), weight, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 4])
def test_of_every_two_units_that_do_the_same_one_is_kept(block: int) -> None:
    # 80 units: so many that several are removed between two updates, which must not remove both of a pair
    single = normal(400, 40, block, seed=2)
    rows = np.concatenate([single, single], axis=1)[:, np.random.default_rng(3).permutation(80)]
    twins = np.random.default_rng(3).permutation(80) % 40
    kept = select_units(normal(10, 80 * block, seed=4), moments_of(rows.reshape(400, -1)), 80, 40)
    assert sorted(twins[kept]) == list(range(40))


def test_units_that_others_make_up_for_are_removed_at_no_loss() -> None:
    rows = normal(500, 12, seed=5) @ normal(12, 48, seed=6)
    weight, moments = normal(5, 48, seed=7), moments_of(rows)
    kept = select_units(weight, moments, 48, 12)
    error = np.mean((rows @ (weight - refit(weight, moments, 48, kept)).T) ** 2)
    magnitude = np.sort(np.argsort(-np.linalg.norm(weight, axis=0))[:12])
    other = np.mean((rows @ (weight - refit(weight, moments, 48, magnitude)).T) ** 2)
    signal = np.mean((rows @ weight.T) ** 2)
    assert error < 0.002 * signal  # the damping of 1 % alone keeps it from zero
    assert error < other


@pytest.mark.parametrize("cause", ["dead", "not read"])
def test_units_that_give_nothing_go_first(cause: str) -> None:
    rows, weight = normal(200, 24, seed=8).reshape(200, 8, 3), normal(5, 8, 3, seed=9)
    useless = [1, 4, 6]
    (rows if cause == "dead" else weight)[:, useless] = 0.0
    kept = select_units(weight, moments_of(rows.reshape(200, -1)), 8, 5)
    assert kept.tolist() == [0, 2, 3, 5, 7]


def test_with_the_diagonal_alone_the_most_energy_is_kept_and_nothing_is_refitted() -> None:
    weight = np.array([[1.0, 1.0, 5.0, 0.1, 2.0, 2.0]], np.float32)
    moments = Moments("w", np.array([[9.0, 9.0, 0.1, 0.1, 1.0, 1.0]]), 10)
    kept = select_units(weight, moments, 3, 2)
    assert kept.tolist() == [0, 2]
    assert refit(weight, moments, 3, kept).tolist() == [[1.0, 1.0, 0.0, 0.0, 2.0, 2.0]]


@pytest.mark.parametrize(
    ("units", "count", "groups", "message"),
    [
        (4, 0, 1, "0 units are outside 1 .. 4"),
        (4, 5, 1, "5 units are outside 1 .. 4"),
        (5, 1, 1, "5 units do not divide 8 inputs"),
        (4, 1, 2, "ungrouped"),
    ],
)
def test_units_that_cannot_be_chosen_are_refused(units: int, count: int, groups: int, message: str) -> None:
    moments = Moments("w", np.ones((groups, 8)), 1)
    with pytest.raises(ValueError, match=message):
        select_units(normal(3, 8), moments, units, count)


def test_taking_units_takes_their_inputs() -> None:
    weight = np.arange(24.0).reshape(1, 4, 2, 3)
    np.testing.assert_array_equal(take_units(weight, 4, np.array([0, 3])), weight[:, [0, 3]])
    flattened = take_units(weight.reshape(1, 24), 4, np.array([0, 3]))
    np.testing.assert_array_equal(flattened, weight[:, [0, 3]].reshape(1, 12))


# The graph


def layers_of(source: Model, graph: Any = None) -> list[Layer]:
    return [each for each in find_layers(graph or open_graph(source)) if isinstance(each, Layer)]


def pairs_of(source: Model) -> dict[str, Pair | str]:
    graph = open_graph(source)
    return find_pairs(graph, layers_of(source, graph))


def integers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def with_values(source: Model, values: dict[str, Array]) -> Model:
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[tensor.name]), tensor.name))
    return model(proto)


def chosen(pair: Pair, source: Model, kept: Array) -> Shrunk:
    """Return a choice of units with another weight and bias for the consumer, all integers."""
    graph = open_graph(source)
    consumer = next(each for each in layers_of(source, graph) if each.name == pair.consumer.name)
    weight = integers(*consumer.shape, seed=99).reshape(consumer.shape[0], pair.units, -1)
    weight[:, np.setdiff1d(np.arange(pair.units), kept)] = 0.0
    name = bias_names(graph, layers_of(source, graph)).get(consumer.name)
    bias = None if name is None else integers(*weight_of(source, name).shape, seed=98)
    return Shrunk(
        consumer=consumer.name,
        units=pair.units,
        kept=kept,
        weight=weight.reshape(consumer.shape),
        bias_name=name,
        bias=bias,
        signal=1.0,
        error=0.0,
    )


def rewritten(source: Model, shrunk: dict[str, Shrunk], feeds: dict[str, Array]) -> Model:
    return apply(source, lambda graph: shrink(graph, layers_of(source, graph), shrunk), feeds)


def oracle_of(source: Model, shrunk: dict[str, Shrunk]) -> Model:
    """Return the model of the original size whose weights are zero where a unit that is removed is read."""
    found = {layer.name: layer for layer in layers_of(source)}
    values = {each.consumer: stored(each.weight, found[each.consumer]) for each in shrunk.values()}
    values |= {each.bias_name: each.bias for each in shrunk.values() if each.bias_name and each.bias is not None}
    return with_values(source, values)


def check(source: Model, kept: dict[str, Array], *batches: Array) -> Model:
    """Remove all but ``kept`` of the units of some layers, and compare bit for bit."""
    pairs = pairs_of(source)
    shrunk = {}
    for name, units in kept.items():
        pair = pairs[name]
        assert isinstance(pair, Pair), pair
        shrunk[name] = chosen(pair, source, units)
    result = rewritten(source, shrunk, {"x": batches[0]})
    for batch in batches:
        np.testing.assert_array_equal(run(result, x=batch)["y"], run(oracle_of(source, shrunk), x=batch)["y"])
    for name, units in kept.items():
        layer = next(each for each in layers_of(result) if each.name == name)
        assert layer.shape[0] == len(units)
    return result


def subset(data: st.DataObject, units: int) -> Array:
    return np.array(sorted(data.draw(st.sets(st.integers(0, units - 1), min_size=1, max_size=units))))


CONV_STEPS = {
    "none": "Identity({0})",
    "relu": "Relu({0})",
    "clip": "Clip({0}, low, high)",
    "leaky": "LeakyRelu <alpha = 0.5> ({0})",
    "max": "MaxPool <kernel_shape = [2, 2], strides = [2, 1], pads = [1, 0, 0, 1]> ({0})",
    "average": "AveragePool <kernel_shape = [2, 2]> ({0})",
    "add": "Add({0}, c_channel)",
    "spatial": "Mul(c_row, {0})",
    "slope": "PRelu({0}, c_slope)",
    "subtract": "Sub(c_full, {0})",
}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), steps=st.lists(st.sampled_from(sorted(CONV_STEPS)), max_size=3), bias=st.booleans())
def test_a_convolution_loses_channels_exactly(data: st.DataObject, steps: list[str], bias: bool) -> None:
    units, kernel = data.draw(st.integers(2, 5)), data.draw(st.sampled_from([1, 3]))
    stride, pad = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 1))
    lines, last = [f"t0 = Conv <strides = [{stride}, 1], pads = [1, 0, 1, 1]> (x, w{', b' if bias else ''})"], "t0"
    for number, step in enumerate(steps, start=1):
        lines.append(f"t{number} = {CONV_STEPS[step].format(last)}")
        last = f"t{number}"
    lines.append(f"y = Conv <strides = [1, {stride}], pads = [{pad}, 0, 1, {pad}]> ({last}, v{', d' if bias else ''})")
    constants = {
        "w": integers(units, 2, 3, 3),
        "v": integers(3, units, kernel, kernel, seed=1),
        "low": np.float32(-2),
        "high": np.float32(6),
        "c_channel": integers(units, 1, 1, seed=2),
        "c_row": np.float32(2.0),
        "c_slope": integers(units, 1, 1, seed=3) / 2,
        "c_full": integers(1, units, 1, 1, seed=4),
    }
    constants |= {"b": integers(units, seed=5), "d": integers(3, seed=6)} if bias else {}
    text = "g (float[N, 2, H, W] x) => (float[N, 3, P, Q] y) { " + "  ".join(lines) + " }"
    used = {name: values for name, values in constants.items() if any(f"{name}" in line for line in lines)}
    source = model(text, **used)
    check(source, {"w": subset(data, units)}, integers(2, 2, 20, 13, seed=7), integers(1, 2, 17, 9, seed=8))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), first=st.sampled_from(["Gemm", "GemmT", "MatMul"]), second=st.sampled_from(["Gemm", "MatMul"]))
def test_a_matrix_loses_units_exactly(data: st.DataObject, first: str, second: str) -> None:
    units = data.draw(st.integers(2, 6))
    lines = {
        "Gemm": "t = Gemm <alpha = 2.0, beta = 3.0> (x, w, b)",
        "GemmT": "t = Gemm <transB = 1> (x, w, b)",
        "MatMul": "z = MatMul(x, w)  t = Add(z, b)",
    }
    last = {"Gemm": "y = Gemm <transB = 1> (r, v, d)", "MatMul": "q = MatMul(r, v)  y = Add(d, q)"}
    body = f"g (float[N, 4] x) => (float[N, 3] y) {{ {lines[first]}  r = Relu(t)  {last[second]} }}"
    weight = integers(units, 4) if first == "GemmT" else integers(4, units)
    shape = data.draw(st.sampled_from([(units,), (1, units)]))
    reader = integers(3, units, seed=1) if second == "Gemm" else integers(units, 3, seed=1)
    source = model(body, w=weight, b=integers(*shape, seed=2), v=reader, d=integers(3, seed=3))
    check(source, {"w": subset(data, units)}, integers(5, 4, seed=4), integers(1, 4, seed=5))


def test_units_of_sequences_are_removed_along_the_last_axis() -> None:
    source = model(
        "g (float[N, S, 4] x) => (float[N, S, 3] y) { z = MatMul(x, w)  t = Add(b, z)  r = Relu(t)  y = MatMul(r, v) }",
        w=integers(4, 6),
        b=integers(6, seed=1),
        v=integers(6, 3, seed=2),
    )
    result = check(source, {"w": np.array([1, 2, 5])}, integers(2, 7, 4, seed=3))
    assert weight_of(result, "b").shape == (3,)


CHAIN = """g (float[N, 4] x) => (float[N, 2] y) {
    a = Gemm(x, w1, b1)  p = Relu(a)
    c = MatMul(p, w2)  e = Add(c, b2)  q = Relu(e)
    y = Gemm <transB = 1> (q, w3, b3) }"""


def chain(make: Any = integers) -> Model:
    weights = {"w1": make(4, 8), "w2": make(8, 6, seed=1), "w3": make(2, 6, seed=2)}
    return model(CHAIN, **weights, b1=make(8, seed=3), b2=make(6, seed=4), b3=make(2, seed=5))


def test_a_layer_in_the_middle_is_refitted_and_loses_units_of_its_own() -> None:
    result = check(chain(), {"w1": np.array([0, 3, 7]), "w2": np.array([1, 2])}, integers(9, 4, seed=6))
    shapes = {name: weight_of(result, name).shape for name in ("w1", "b1", "w2", "b2", "w3", "b3")}
    assert shapes == {"w1": (4, 3), "b1": (3,), "w2": (3, 2), "b2": (2,), "w3": (2, 2), "b3": (2,)}


@pytest.mark.parametrize(
    "flatten",
    [
        "Flatten(m)",
        "Flatten <axis = 1> (m)",
        "Reshape(m, all_columns)",
        "Reshape(m, all_rows)",
        "Reshape(m, fixed)",
    ],
)
@pytest.mark.parametrize("pool", ["MaxPool <kernel_shape = [2, 2]> (r)", "GlobalAveragePool(r)"])
def test_channels_are_followed_through_flattening(flatten: str, pool: str) -> None:
    block = 9 if pool.startswith("Max") else 1
    sizes = {"all_columns": [0, -1], "all_rows": [-1, 5 * block], "fixed": [2, 5 * block]}
    name = next((each for each in sizes if each in flatten), None)
    constants = {} if name is None else {name: np.array(sizes[name], np.int64)}
    source = model(
        "g (float[2, 1, 4, 4] x) => (float[2, 3] y) "
        f"{{ t = Conv <pads = [0, 0, 1, 1]> (x, w, b)  r = Relu(t)  m = {pool}  f = {flatten}  s = Neg(f)"
        "  y = Gemm <transB = 1> (s, v) }",
        **{"w": integers(5, 1, 2, 2), "b": integers(5, seed=1), "v": integers(3, 5 * block, seed=2), **constants},
    )
    check(source, {"w": np.array([1, 4])}, integers(2, 1, 4, 4, seed=3))


def test_batch_normalization_behind_an_activation_loses_channels_too() -> None:
    statistics = {name: integers(4, seed=10 + number) for number, name in enumerate(("scale", "shift", "mean"))}
    source = model(
        "g (float[N, 2, 5, 5] x) => (float[N, 3, 3, 3] y) { t = Conv(x, w)  r = Relu(t)"
        "  n = BatchNormalization <epsilon = 0.0> (r, scale, shift, mean, variance)  y = Conv(n, v) }",
        w=integers(4, 2, 1, 1),
        v=integers(3, 4, 3, 3, seed=1),
        **{**statistics, "variance": np.full(4, 4.0, np.float32)},
    )
    check(source, {"w": np.array([0, 2])}, integers(2, 2, 5, 5, seed=2))


def test_a_constant_that_something_else_uses_stays_as_it_is() -> None:
    source = model(
        "g (float[N, 4] x) => (float[N, 4] y) { t = Gemm(x, w, b)  r = Relu(t)  s = Gemm(r, v)  y = Add(s, b) }",
        w=integers(4, 4),
        v=integers(4, 4, seed=1),
        b=integers(4, seed=2),
    )
    result = check(source, {"w": np.array([0, 2])}, integers(3, 4, seed=3))
    assert weight_of(result, "b").shape == (4,)
    assert weight_of(result, "b.shrunk").shape == (2,)


def test_shapes_that_the_file_states_are_not_left_behind() -> None:
    source = chain()
    for name, size in (("a", 8), ("p", 8), ("c", 6)):
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size])
        source.proto.graph.value_info.append(value)
    result = check(source, {"w1": np.array([0, 3, 7])}, integers(9, 4, seed=6))
    assert names(result, "value_info") == ["c"]
    onnx.shape_inference.infer_shapes(result.proto, strict_mode=True, check_type=True)


REASONS = [
    ("t = Gemm(x, w)  y = Relu(t)", "the model gives its units as an output"),
    ("t = Gemm(x, w)  r = Relu(t)  s = Add(r, t)  y = Gemm(s, v)", "its units are not read just once"),
    ("t = Gemm(x, w)  s = Mul(t, t)  y = Gemm(s, v)", "its units are not read just once"),
    ("t = Gemm(x, w)  s = Add(t, x)  y = Gemm(s, v)", "a Add joins its units with something else"),
    ("t = Gemm(x, w, x)  y = Gemm(t, v)", "a Gemm joins its units with something else"),
    ("t = Gemm(x, w)  s = Softmax(t)  y = Gemm(s, v)", "a Softmax reads its units, which may mix them"),
    ("t = Gemm(x, w)  s = Transpose(t)  y = Gemm(s, v)", "a Transpose reads its units, which may mix them"),
    ("t = Gemm(x, w)  s = Gemm <transA = 1> (t, v)  y = Relu(s)", "v reads it along another axis"),
    ("t = Gemm(x, w)  s = Flatten(t)  y = Gemm(s, v)", "a Flatten lays its units out in another way"),
    ("t = Gemm(x, w)  y = MatMul(t, x)", "a MatMul reads its units, which may mix them"),
    ("t = Gemm(x, w)  y = MatMul(v, t)", "v, which reads its units, has its weight on the left"),
    ("t = MatMul(w, x)  y = Gemm(t, v)", "it has its weight on the left"),
    ("t = Gemm(x, w)  y = Gemm(t, w)", "it has a weight that several nodes share"),
    (
        "t = Gemm(x, w)  s = Gemm(t, v)  y = Gemm(s, v)",
        "v, which reads its units, has a weight that several nodes share",
    ),
    ("t = Gemm(x, w)  s = Gemm(t, v)  y = Add(s, w)", "it has a weight that something else uses, too"),
    ("t = Gemm(x, w)  r = PRelu(v, t)  y = Gemm(r, v)", "a PRelu reads its units, which may mix them"),
]


@pytest.mark.parametrize(("body", "reason"), REASONS)
def test_a_matrix_that_keeps_its_units_says_why(body: str, reason: str) -> None:
    constants = {"w": integers(4, 4), "v": integers(4, 4, seed=1)}
    used = {name: values for name, values in constants.items() if f"{name}" in body}
    assert pairs_of(model(f"g (float[4, 4] x) => (float[4, 4] y) {{ {body} }}", **used))["w"] == reason


CONV_REASONS = [
    (
        "r = Relu(t)  d = Conv <group = 4> (r, g4)  y = Conv(d, v)",
        "g4, which reads its units, is a grouped convolution",
    ),
    ("s = LRN <size = 3> (t)  y = Conv(s, v)", "a LRN reads its units, which may mix them"),
    ("s = Reshape(t, mixed)  y = Gemm(s, m)", "a Reshape lays its units out in another way"),
    ("s = Reshape(t, three)  y = MatMul(s, m)", "a Reshape lays its units out in another way"),
    ("s = Flatten <axis = 2> (t)  y = Gemm(s, m)", "a Flatten lays its units out in another way"),
    ("y = MatMul(t, m)", "m reads it along another axis"),
    ("y = ConvTranspose(t, v)", "a ConvTranspose reads its units, which may mix them"),
    ("s = Add(t, five)  y = Conv(s, v)", "a Add reads its units, which may mix them"),
]


@pytest.mark.parametrize(("body", "reason"), CONV_REASONS)
def test_a_convolution_that_keeps_its_channels_says_why(body: str, reason: str) -> None:
    constants = {
        "g4": integers(4, 1, 1, 1),
        "v": integers(4, 4, 1, 1),
        "m": integers(4, 4),
        "mixed": np.array([8, -1], np.int64),
        "three": np.array([2, 4, -1], np.int64),
        "five": integers(1, 1, 4, 1, 1),
    }
    used = {name: values for name, values in constants.items() if f" {name}" in body}
    text = f"g (float[2, 3, 2, 4] x) => (float[A, B, C, D] y) {{ t = Conv(x, w)  {body} }}"
    assert pairs_of(model(text, w=integers(4, 3, 1, 1), **used))["w"] == reason


def test_pooling_along_the_axis_of_the_units_mixes_them() -> None:
    text = """g (float[N, 3, 4] x) => (float[N, 3, 2] y) {
        t = MatMul(x, w)  p = MaxPool <kernel_shape = [3], pads = [1, 1]> (t)  y = MatMul(p, v) }"""
    pairs = pairs_of(model(text, w=integers(4, 6), v=integers(6, 2, seed=1)))
    assert pairs["w"] == "a MaxPool reads its units, which may mix them"


def test_channels_of_a_free_picture_size_are_not_followed_through_a_fixed_reshape() -> None:
    text = "g (float[N, 3, H, W] x) => (float[A, 4] y) { t = Conv(x, w)  s = Reshape(t, shape)  y = Gemm(s, m) }"
    constants = {"w": integers(4, 3, 1, 1), "m": integers(16, 4), "shape": np.array([-1, 16], np.int64)}
    assert pairs_of(model(text, **constants))["w"] == "a Reshape lays its units out in another way"


def test_a_branch_that_a_body_reads_keeps_its_units() -> None:
    source = chain()
    branch = helper.make_graph(
        [helper.make_node("Identity", ["p"], ["o"])],
        "body",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
    )
    node = helper.make_node("If", ["flag"], ["unused"], then_branch=branch, else_branch=branch)
    source.proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    source.proto.graph.node.insert(2, node)
    assert pairs_of(source)["w1"] == "its units are not read just once"


# All together


def known(source: Model, data: Any, **options: Any) -> Calibration:
    layers = layers_of(source)
    return Calibration(
        moments=calibrate(source, layers, data),
        biases=bias_names(open_graph(source), layers),
        walk=partial(Walk, source, data),
        **options,
    )


def solved(source: Model, rows: Array, wanted: dict[str, int], **options: Any) -> dict[str, Shrunk]:
    graph = open_graph(source)
    found = find_pairs(graph, layers_of(source, graph)).values()
    pairs = [pair for pair in found if isinstance(pair, Pair)]
    return solve_shrink(graph, pairs, wanted, known(source, data_of(x=rows), **options))


def rows_of_few_directions() -> Array:
    return normal(600, 5, seed=20) @ normal(5, 16, seed=21) + 0.1 * normal(600, 16, seed=22)


def deep() -> Model:
    names_ = ("w1", "w2", "w3", "w4")
    weights = {name: normal(16, 16, seed=number) / 3 for number, name in enumerate(names_)}
    biases = {f"b{number}": normal(16, seed=10 + number) for number in range(1, 5)}
    body = """g (float[N, 16] x) => (float[N, 16] y) {
        a = Gemm <transB = 1> (x, w1, b1)  p = Relu(a)
        c = Gemm <transB = 1> (p, w2, b2)  q = Relu(c)
        e = Gemm <transB = 1> (q, w3, b3)  r = Relu(e)
        y = Gemm <transB = 1> (r, w4, b4) }"""
    return model(body, **weights, **biases)


def error_of(source: Model, result: Model, rows: Array) -> float:
    before, after = (run(each, x=rows)["y"].astype(np.float64) for each in (source, result))
    return float(np.mean((before - after) ** 2) / np.mean((before - before.mean(axis=0)) ** 2))


@pytest.mark.parametrize(("asymmetric", "names_"), [(False, ["w3"]), (True, ["w3"]), (True, ["w1", "w2", "w3"])])
def test_the_bias_keeps_the_mean_of_the_outputs(asymmetric: bool, names_: list[str]) -> None:
    source, rows = deep(), rows_of_few_directions()
    shrunk = solved(source, rows, dict.fromkeys(names_, 6), asymmetric=asymmetric)
    result = rewritten(source, shrunk, {"x": rows[:4]})
    before, after = (run(each, x=rows)["y"].astype(np.float64) for each in (source, result))
    # float32 rounds every output by some 1e-6 of a value of about 10
    np.testing.assert_allclose(after.mean(axis=0), before.mean(axis=0), atol=1e-4)


def test_the_error_that_is_told_is_that_of_the_outputs() -> None:
    source, rows = deep(), rows_of_few_directions()
    shrunk = solved(source, rows, {"w3": 6})["w3"]
    result = rewritten(source, {"w3": shrunk}, {"x": rows[:4]})
    # both are of the same rows; float32 activations are off by 1e-6
    assert shrunk.error / shrunk.signal == pytest.approx(error_of(source, result, rows), rel=1e-3)


def test_branches_are_fitted_in_the_order_of_their_consumers() -> None:
    body = """g (float[N, 16] x) => (float[N, 16] y) {
        a = Gemm(x, w1)  p = Relu(a)  b = Gemm(x, w2)  q = Relu(b)
        c = Gemm(q, v2, d2)  e = Add(p, zero)  f = Gemm(e, v1, d1)  y = Add(c, f) }"""
    weights = {name: normal(16, 16, seed=number) / 3 for number, name in enumerate(("w1", "w2", "v1", "v2"))}
    biases = {"d1": normal(16, seed=5), "d2": normal(16, seed=6), "zero": np.zeros(16, np.float32)}
    source, rows = model(body, **weights, **biases), rows_of_few_directions()
    shrunk = solved(source, rows, {"w1": 8, "w2": 8}, asymmetric=True)
    assert list(shrunk) == ["w2", "w1"]
    result = rewritten(source, shrunk, {"x": rows[:4]})
    assert error_of(source, result, rows) < 0.2


def test_what_the_model_shrunk_so_far_gives_is_a_better_thing_to_fit() -> None:
    source, rows = deep(), rows_of_few_directions()
    wanted = dict.fromkeys(("w1", "w2", "w3"), 8)
    errors = {}
    for asymmetric in (False, True):
        shrunk = solved(source, rows, wanted, asymmetric=asymmetric)
        errors[asymmetric] = error_of(source, rewritten(source, shrunk, {"x": rows[:4]}), rows)
    assert errors[True] < 0.9 * errors[False] < 0.9


def test_a_consumer_without_a_bias_is_fitted_to_the_second_moment() -> None:
    source = model(
        "g (float[N, 16] x) => (float[N, 3] y) { t = MatMul(x, w)  r = Relu(t)  y = MatMul(r, v) }",
        w=normal(16, 12),
        v=normal(12, 3, seed=1),
    )
    rows = rows_of_few_directions()
    found = solved(source, rows, {"w": 5})["w"]
    assert found.bias is None
    graph = open_graph(source)
    layer = next(each for each in layers_of(source, graph) if each.name == "v")
    moments = moments_of(np.maximum(rows @ weight_of(source, "w"), 0.0))
    oracle = refit(read_weight(graph, layer), moments, 12, found.kept)
    np.testing.assert_allclose(found.weight, oracle, atol=1e-4)  # the activations are float32 here and there
