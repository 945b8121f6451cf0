"""Every form in the graph computes, in onnxruntime, what the layer computes with the weight that the form stands for.

The tolerance is derived. A sum of ``n`` products in floating point of unit roundoff ``u`` is off by at most
``gamma_n = n u / (1 - n u)`` times the sum of the products' absolute values (Higham, "Accuracy and Stability of
Numerical Algorithms", 3.1), whatever the order. A chain of sums of ``n_1, n_2, ...`` products is off by
``gamma_(n_1 + n_2 + ...)`` times the same chain of absolute values: the original layer, run on ``|x|`` with the product
of the absolute factors for a weight. Both sides of the comparison stay within that bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import pytest
from builders import apply, layer, model, names, normal, run, skip, weight_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from edgecompress.factorize.cosines import cosines
from edgecompress.factorize.factors import Form, Grouped, factors, with_factors
from edgecompress.factorize.forms import AffineLowRank, Spectral
from edgecompress.factorize.rank import max_ranks, supported
from edgecompress.factorize.solve import FORM_NAMES, solve_layer
from edgecompress.graph import open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.orientation import group_shape, read_bias, read_weight, stored, why_not
from edgecompress.passes.factorize import dense_of, factorize

if TYPE_CHECKING:
    from edgecompress.factorize.sizes import FormName
    from edgecompress.model import Model

Array = NDArray[Any]

OPSETS = st.sampled_from([9, 10, 11, 12, 13, 17, 20, 22, 24])
MATRIX_FORMS = ("svd", "svd_bias", "spectral")
COSINE_ERROR = 2e-6
"""An angle in ``[0, 2 pi)`` is rounded twice in float32, 2 * 2 pi * 2^-24 = 7.5e-7, and so is its cosine."""


def solved(source: Model, form: FormName, seed: int) -> Form | None:
    """Return a form of layer ``w`` with random ranks, ``None`` where the layer cannot have it."""
    graph, found = open_graph(source), layer(source)
    if why_not(form, found, source.opset) is not None:
        return None
    shape = group_shape(found)
    limits = max_ranks(form, shape)
    wanted = np.random.default_rng(seed).integers(1, np.minimum(limits, 5), endpoint=True)
    ranks = supported(form, shape, tuple(int(rank) for rank in wanted))
    weight, bias = read_weight(graph, found), read_bias(graph, found)
    return solve_layer(form, weight, ranks, None, groups=found.groups, bias=bias)


def rewritten(source: Model, form: Form, feeds: Mapping[str, Array] | None) -> Model:
    """Return the model after the pass, which checks the model that it makes, too."""

    def rewrite(graph: Any) -> Any:
        return factorize(graph, [each for each in find_layers(graph) if isinstance(each, Layer)], {"w": form})

    return apply(source, rewrite, feeds)


def with_values(source: Model, values: Mapping[str, Array], *, bound: bool) -> Model:
    """Return a model with other constants; for a bound its Gemm scales by absolute values, too."""
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            dtype = numpy_helper.to_array(tensor).dtype
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[tensor.name], dtype), tensor.name))
    for attribute in proto.graph.node[0].attribute:
        if bound and attribute.name in ("alpha", "beta"):
            attribute.f = abs(attribute.f)
    return model(proto)


def dense_values(form: Form, found: Layer, *, bound: bool) -> dict[str, Array]:
    """Return the constants of the original layer that a form stands for, or those of its absolute factors."""
    if bound and isinstance(form, Spectral):  # no cosine is above 1
        total = form.gain * np.abs(form.coefficients).sum(dtype=np.float64)
        return {"w": stored(np.full(form.shape, total), found)}
    absolute = with_factors(form, [np.abs(part) for part in factors(form)]) if bound else form
    values = {"w": stored(absolute.to_dense(), found)}
    if isinstance(form, AffineLowRank):
        assert isinstance(absolute, AffineLowRank)
        inner = np.abs(form.bias) if bound else form.bias
        values["b"] = absolute.left.astype(np.float64) @ inner
    return values


def roundings(form: Form, found: Layer) -> float:
    """Return by how much both sides may differ, in units of the bound."""
    u = float(np.finfo(found.constant.dtype).eps) / 2
    inner = math.prod(found.shape[1:])
    lengths = [inner] * 2 + [part[0].size for part in factors(form)]
    count = sum(lengths) + 4 * len(lengths)  # the bias, alpha and beta, rounding of the constants themselves
    extra = 0.0
    if isinstance(form, Spectral):
        count += sum(form.ranks)
        extra = 2 * COSINE_ERROR * (2.0**-29 if found.constant.dtype == np.float64 else 1.0)
    return count * u / (1 - count * u) + extra


def check(source: Model, form: Form, *batches: Mapping[str, Array]) -> Model:
    """Compare the rewritten model with the original on batches, whose sizes may differ."""
    found = layer(source)
    result = rewritten(source, form, batches[0])
    oracle = with_values(source, dense_values(form, found, bound=False), bound=False)
    absolute = {name: np.abs(weight_of(source, name)) for name in names(source, "initializer")}
    bounding = with_values(source, {**absolute, **dense_values(form, found, bound=True)}, bound=True)
    for feeds in batches:
        expected, actual = run(oracle, **feeds)["y"], run(result, **feeds)["y"]
        most = run(bounding, **{name: np.abs(values) for name, values in feeds.items()})["y"].astype(np.float64)
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        error = np.abs(actual.astype(np.float64) - expected)
        assert (error <= roundings(form, found) * most).all(), float(np.max(error / np.maximum(most, 1e-300)))
    return result


def text(attributes: Mapping[str, Any]) -> str:
    shown = (f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in attributes.items())
    return f"<{', '.join(shown)}>" if attributes else ""


@st.composite
def convolutions(draw: Any) -> tuple[Model, list[dict[str, Array]]]:
    axes = draw(st.integers(1, 3))
    each = {"min_size": axes, "max_size": axes}
    kernel = draw(st.lists(st.integers(1, 3), **each))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    shape = (groups * draw(st.integers(2, 4)), draw(st.integers(2, 4)), *kernel)
    attributes: dict[str, Any] = {"strides": draw(st.lists(st.integers(1, 3), **each))} if draw(st.booleans()) else {}
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if auto == "NOTSET":
        attributes["pads"] = draw(st.lists(st.integers(0, 2), min_size=2 * axes, max_size=2 * axes))
    else:
        attributes["auto_pad"] = auto
    if not auto.startswith("SAME") and draw(st.booleans()):  # the runtime refuses dilations there
        attributes["dilations"] = draw(st.lists(st.integers(1, 2), **each))
    if groups > 1 or draw(st.booleans()):
        attributes["group"] = groups
    if draw(st.booleans()):
        attributes["kernel_shape"] = kernel
    bias = {"b": normal(shape[0], seed=3)} if draw(st.booleans()) else {}
    spatial = draw(st.lists(st.integers(5, 7), **each))
    dims, made = ", ".join(["N", str(groups * shape[1]), *map(str, spatial)]), ", ".join("ABCDE"[: len(shape)])
    body = f"g (float[{dims}] x) => (float[{made}] y) {{ y = Conv{text(attributes)}(x, w{', b' if bias else ''}) }}"
    source = model(body, opset=draw(OPSETS), w=normal(*shape, seed=draw(st.integers(0, 99))), **bias)
    batches = [{"x": normal(rows, groups * shape[1], *spatial, seed=rows)} for rows in (1, 3)]
    return source, batches


@settings(max_examples=350, deadline=None, derandomize=True)
@given(case=convolutions(), seed=st.integers(0, 99))
def test_every_form_of_a_convolution_computes_its_dense_weight(
    case: tuple[Model, list[dict[str, Array]]], seed: int
) -> None:
    source, batches = case
    for name in np.random.default_rng(seed).permutation(FORM_NAMES)[:3]:
        form = solved(source, name, seed)
        if form is not None:
            check(source, form, *batches)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("form", FORM_NAMES)
def test_every_form_is_written_for_a_square_kernel_with_everything_set(form: FormName, groups: int) -> None:
    attributes = {"strides": [2, 1], "pads": [0, 2, 1, 0], "dilations": [1, 2], "group": groups}
    body = f"g (float[N, {4 * groups}, 8, 9] x) => (float[A, B, C, D] y) {{ y = Conv{text(attributes)}(x, w, b) }}"
    source = model(body, w=normal(5 * groups, 4, 3, 3), b=normal(5 * groups, seed=3))
    found = solved(source, form, 1)
    if groups > 1 and form in ("svd_bias", "spectral"):
        assert found is None
        assert "grouped" in str(why_not(form, layer(source), 17))
        return
    assert found is not None
    assert isinstance(found, Grouped) == (groups > 1)
    check(source, found, *({"x": normal(rows, 4 * groups, 8, 9, seed=rows)} for rows in (1, 4)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    turned=st.tuples(st.booleans(), st.booleans()),
    scale=st.sampled_from([(1.0, 1.0), (1.0, 1.0), (-0.5, 1.0), (3.0, 2.5), (1.0, 0.0)]),
    bias=st.sampled_from([None, (), (5,), (5,), (1, 5), (1, 1)]),
    opset=OPSETS,
    form=st.tuples(st.sampled_from(MATRIX_FORMS), st.integers(0, 99)),
)
def test_every_form_of_a_gemm_computes_its_dense_weight(
    turned: tuple[bool, bool],
    scale: tuple[float, float],
    bias: tuple[int, ...] | None,
    opset: int,
    form: tuple[FormName, int],
) -> None:
    name, seed = form
    if bias is None and opset < 11:
        bias = ()  # needed there
    attributes = {"transA": int(turned[0]), "transB": int(turned[1]), "alpha": scale[0], "beta": scale[1]}
    third = {} if bias is None else {"b": normal(*bias, seed=3)}
    body = f"g (float[P, Q] x) => (float[A, B] y) {{ y = Gemm{text(attributes)}(x, w{', b' if third else ''}) }}"
    source = model(body, opset=opset, w=normal(*((5, 6) if turned[1] else (6, 5)), seed=seed), **third)
    found = solved(source, name, seed)
    if found is not None:
        check(source, found, *({"x": normal(*((6, rows) if turned[0] else (rows, 6)))} for rows in (1, 4)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    side=st.sampled_from(["left", "right"]),
    leading=st.lists(st.integers(1, 3), max_size=3),
    opset=OPSETS,
    form=st.sampled_from(["svd", "spectral"]),
    seed=st.integers(0, 99),
)
def test_every_form_of_a_matmul_computes_its_dense_weight(
    side: str, leading: list[int], opset: int, form: FormName, seed: int
) -> None:
    axes = len(leading) + (2 if side == "left" else 1)
    dims, made = ", ".join("PQRST"[:axes]), ", ".join("ABCDE"[:axes])
    body = f"g (float[{dims}] x) => (float[{made}] y) {{ y = MatMul({'w, x' if side == 'left' else 'x, w'}) }}"
    source = model(body, opset=opset, w=normal(*((5, 6) if side == "left" else (6, 5)), seed=seed))
    found = solved(source, form, seed)
    if found is not None:
        tails = [(6, 1), (6, 3)] if side == "left" else [(6,)]
        check(source, found, *({"x": normal(*leading, *tail)} for tail in tails))


@pytest.mark.parametrize(("kind", "dtype"), [("float16", np.float16), ("double", np.float64)])
@pytest.mark.parametrize("form", MATRIX_FORMS)
def test_forms_of_other_types_are_as_exact_as_the_type(form: FormName, kind: str, dtype: Any) -> None:
    body = f"g ({kind}[N, 40] x) => ({kind}[N, 30] y) {{ y = Gemm(x, w, b) }}"
    source = model(body, w=normal(40, 30, dtype=dtype), b=normal(30, seed=2, dtype=dtype))
    found = solved(source, form, 0)
    assert found is not None
    result = check(source, found, {"x": normal(3, 40, seed=1, dtype=dtype)})
    assert {part.dtype for part in factors(found)} == {np.dtype(dtype)}
    if form == "spectral":
        assert weight_of(result, "w.coefficients").dtype == dtype


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("form", FORM_NAMES)
@pytest.mark.parametrize("op", ["Conv", "Gemm", "Gemm<transB=1>", "MatMul"])
def test_the_constants_in_the_graph_multiply_out_to_the_form(op: str, form: FormName, groups: int) -> None:
    if op == "Conv":
        body = f"g (float[N, {4 * groups}, 5, 5] x) => (float[A, B, C, D] y) {{ y = Conv<group={groups}>(x, w, b) }}"
        source = model(body, w=normal(6 * groups, 4, 2, 3), b=normal(6 * groups))
    else:
        call = f"{op}(x, w)" if op == "MatMul" else f"{op}(x, w, b)"
        weights = {"w": normal(6, 6)} if op == "MatMul" else {"w": normal(6, 6), "b": normal(6)}
        source = model(f"g (float[N, 6] x) => (float[N, 6] y) {{ y = {call} }}", **weights)
    found = solved(source, form, 3)
    if found is None:
        return
    result = rewritten(source, found, None)
    kept = ["w.coefficients"] if form == "spectral" else [f"w.{step}" for step in range(len(factors(found)))]
    parts = [weight_of(result, name) for name in kept]
    np.testing.assert_array_equal(dense_of(parts, layer(source), found), found.to_dense())
    doubled = dense_of([2 * parts[0], *parts[1:]], layer(source), found)
    np.testing.assert_array_equal(doubled, 2 * found.to_dense())


def optimised_operators(source: Model, folder: Any) -> set[str]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(source.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node}


@pytest.mark.parametrize("opset", [11, 13, 24])
@pytest.mark.parametrize("kind", ["float", "float16", "double"])
def test_the_runtime_folds_the_cosines_when_a_session_starts(kind: str, opset: int, tmp_path: Any) -> None:
    dtype = {"float": np.float32, "float16": np.float16, "double": np.float64}[kind]
    body = f"g ({kind}[N, 30] x) => ({kind}[N, 20] y) {{ h = MatMul(x, w)  y = Relu(h) }}"
    source = model(body, opset=opset, w=normal(30, 20, dtype=dtype))
    form = solved(source, "spectral", 0)
    assert form is not None
    result = rewritten(source, form, None)
    assert "Cos" in names(result, "ops")
    # float16 products run in float32 on a processor: casts of the activations stay
    assert optimised_operators(result, tmp_path) <= {"MatMul", "Relu", "Cast", "Gemm"}


@pytest.mark.parametrize("length", [784, 5003])
def test_the_cosines_of_the_graph_are_exact_to_float32(length: int) -> None:
    # x picks nothing but one frequency: y is a row of the basis. Were the phase not reduced before it is cast, it would
    # be off by (2 i + 1) k pi / (2 N) 2^-24: 2e-4 at N = 784 and 1e-3 at 5003.
    count = 200
    source = model("g (float[N, 1] x) => (float[N, M] y) { y = MatMul(x, w) }", w=normal(1, length))
    for frequency in (1, count // 2, count - 1):
        coefficients = np.zeros((length, 1), np.float32)[:count]
        coefficients[frequency] = 1.0
        form = Spectral(coefficients, (length, 1))
        y = run(rewritten(source, form, None), x=np.ones((1, 1), np.float32))["y"][0]
        expected = cosines(frequency + 1, length)[frequency]
        assert np.max(np.abs(y / form.gain - expected)) < COSINE_ERROR


def test_weights_of_the_frequency_form_stand_just_before_their_first_use() -> None:
    body = "g (float[N, 6] x) => (float[N, 6] y) { h = Relu(x)  g = MatMul(h, w)  y = MatMul(g, w) }"
    source = model(body, w=normal(6, 6))
    form = solved(source, "spectral", 2)
    assert form is not None
    result = check(source, form, {"x": normal(2, 6)})
    ops = names(result, "ops")
    assert ops[0] == "Relu"
    assert ops[-3:] == ["MatMul"] * 3  # the last of the decoder, and the two that use the weight
    assert "w" not in names(result, "initializer")


@pytest.mark.parametrize("op", ["MatMul", "Conv"])
def test_a_weight_in_its_frequency_form_is_known_when_the_model_is_read_again(op: str) -> None:
    if op == "Conv":
        source = model("g (float[N, 4, 9] x) => (float[N, 6, 7] y) { y = Conv(x, w) }", w=normal(6, 4, 3))
    else:
        source = model("g (float[N, 6] x) => (float[N, 6] y) { y = MatMul(x, w) }", w=normal(6, 6))
    form = solved(source, "spectral", 2)
    assert form is not None
    assert "computes it from constants" in skip(rewritten(source, form, None)).reason


def test_an_older_operator_set_or_an_absent_bias_is_a_reason() -> None:
    body = "g (float[N, 6] x) => (float[N, 5] y) {{ y = Gemm<{}>(x, w, b) }}"
    old = model(body.format("alpha=1.0"), opset=10, w=normal(6, 5), b=normal(5))
    assert "opset 11" in str(why_not("spectral", layer(old), 10))
    assert why_not("spectral", layer(old), 11) is why_not("svd_bias", layer(old), 10) is None
    for other in ("alpha=2.0", "beta=0.5"):
        assert "bias" in str(why_not("svd_bias", layer(model(body.format(other), w=normal(6, 5), b=normal(5))), 17))
    scalar = model(body.format("alpha=1.0"), w=normal(6, 5), b=normal(1))
    assert "bias" in str(why_not("svd_bias", layer(scalar), 17))
    both = "g (float[N, 6] x) => (float[N, 5] y) { h = Gemm(x, w, b)  y = Add(h, b) }"
    assert "bias" in str(why_not("svd_bias", layer(model(both, w=normal(6, 5), b=normal(5))), 17))
    plain = model("g (float[N, 6] x) => (float[N, 5] y) { y = MatMul(x, w) }", w=normal(6, 5))
    assert "bias" in str(why_not("svd_bias", layer(plain), 17))
    assert "kernel" in str(why_not("separable", layer(plain), 17))


def test_an_absorbed_bias_moves_between_the_factors() -> None:
    source = model("g (float[N, 13] x) => (float[N, 10] y) { y = Gemm(x, w, b) }", w=normal(13, 10), b=normal(10))
    form = solve_layer("svd_bias", normal(13, 10).T, (2,), None, bias=normal(10))
    result = rewritten(source, form, {"x": normal(3, 13)})
    assert sorted(names(result, "initializer")) == ["w.0", "w.1", "w.bias"]
    assert sum(weight_of(result, name).size for name in names(result, "initializer")) == 48
