from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from builders import apply, external, if_model, model, names, normal, parse, run, weight_of
from onnx import TensorProto, helper, numpy_helper

from edgecompress.passes.prepare import prepare


def statistics(channels, seed=3, dtype=np.float32):
    """gamma, beta, mean, variance."""
    rng = np.random.default_rng(seed)
    parts = (
        rng.normal(size=channels) + 1.5,
        rng.normal(size=channels),
        rng.normal(size=channels),
        rng.random(channels) + 0.2,
    )
    return dict(zip(("gamma", "beta", "mean", "var"), (part.astype(dtype) for part in parts), strict=True))


def per_channel(values, rank):
    return values.astype(np.float64).reshape(1, -1, *(1,) * (rank - 2))


def normalised(y, gamma, beta, mean, var):
    """BatchNormalization by its definition."""
    gamma, beta, mean, var = (per_channel(part, y.ndim) for part in (gamma, beta, mean, var))
    return gamma * (y.astype(np.float64) - mean) / np.sqrt(var + 1e-5) + beta


BN = "y = BatchNormalization(h, gamma, beta, mean, var)"

LAYERS = {
    "conv without bias": ("Conv(x, w)", (5, 3, 3, 3), (2, 3, 6, 6), None),
    "conv with bias": ("Conv<pads=[1, 1, 1, 1]>(x, w, b)", (5, 3, 3, 3), (2, 3, 6, 6), (5,)),
    "conv in groups": ("Conv<group=2>(x, w, b)", (6, 2, 3, 3), (2, 4, 6, 6), (6,)),
    "conv on one axis": ("Conv(x, w)", (5, 3, 3), (2, 3, 9), None),
    "conv on three axes": ("Conv(x, w, b)", (5, 3, 1, 2, 2), (2, 3, 4, 4, 4), (5,)),
    "deconvolution": ("ConvTranspose(x, w, b)", (3, 5, 2, 2), (2, 3, 4, 4), (5,)),
    "gemm": ("Gemm(x, w)", (4, 5), (3, 4), None),
    "gemm turned": ("Gemm<transB=1, alpha=0.5>(x, w)", (5, 4), (3, 4), None),
    "gemm with everything": ("Gemm<transA=1, transB=1, alpha=0.5, beta=-2.0>(x, w, b)", (5, 4), (4, 3), (5,)),
    "gemm with a scalar bias": ("Gemm<beta=3.0>(x, w, b)", (4, 5), (3, 4), ()),
    "gemm with a bias per row": ("Gemm<beta=3.0>(x, w, b)", (4, 5), (3, 4), (3, 1)),
    "gemm with a whole bias": ("Gemm(x, w, b)", (4, 5), (3, 4), (3, 5)),
}


def source_of(case, follower, **more):
    node, w, x, b = LAYERS[case]
    bias = {} if b is None else {"b": normal(*b, seed=2)}
    dims = ", ".join(map(str, x))
    body = f"g (float[{dims}] x) => (float[{', '.join('ABCDE'[: len(x)])}] y) {{ h = {node}  {follower} }}"
    return model(body, w=normal(*w, seed=1), **bias, **more), normal(*x)


def plain(case):
    """Return the output of the layer alone."""
    source, x = source_of(case, "y = Identity(h)")
    return run(source, x=x)["y"]


@pytest.mark.parametrize("case", LAYERS)
def test_batch_normalization_folds_into_the_layer_before_it(case):
    channels = plain(case).shape[1]
    source, x = source_of(case, BN, **statistics(channels))
    result = apply(source, prepare, {"x": x})
    assert len(names(result, "ops")) == 1
    found, before = run(result, x=x)["y"], run(source, x=x)["y"]
    # float32 rounding of the folded weights: some hundred products of size one at most
    np.testing.assert_allclose(found, before, rtol=0, atol=2e-5)
    np.testing.assert_allclose(found, normalised(plain(case), **statistics(channels)), rtol=0, atol=2e-5)
    assert set(names(result, "initializer")) <= {"w", "b", "w.bias"}


@pytest.mark.parametrize("case", LAYERS)
def test_a_chain_of_factors_and_terms_folds(case):
    y = plain(case)
    shape = (1, y.shape[1], *(1,) * (y.ndim - 2))
    factor, term = normal(*shape[1:], seed=8), normal(*shape, seed=9)
    source, x = source_of(
        case, "a = Mul(h, f)  c = Add(t, a)  d = Mul(two, c)  y = Add(d, two)", f=factor, t=term, two=np.float32(2)
    )
    result = apply(source, prepare, {"x": x})
    assert len(names(result, "ops")) == 1
    np.testing.assert_allclose(run(result, x=x)["y"], (y * factor.reshape(shape) + term) * 2 + 2, rtol=0, atol=5e-5)


def stays(source, count=2):
    """The nodes stay, whatever else happens."""
    result = apply(source, prepare)
    assert len(names(result, "ops")) == count
    return result


CONV = "g (float[2, 3, 6, 6] x) => (float[A, B, C, D] y) { h = Conv(x, w) "
W = normal(5, 3, 3, 3)


@pytest.mark.parametrize(
    ("follower", "values"),
    [
        ("y = Mul(h, f) }", normal(4, 4)),  # per position
        ("y = Mul(h, f) }", normal(5, 4, 4)),
        ("y = Mul(h, f) }", normal(2, 5, 1, 1)),  # per row of the batch
        ("y = Add(h, f) }", normal(1, 1, 1, 1, 5)),  # another rank
        ("y = Sub(h, f) }", normal(5, 1, 1)),
        ("y = Mul(h, h) }", None),
        ("y = Mul(h, x) }", None),
    ],
)
def test_what_is_not_one_number_per_channel_does_not_fold(follower, values):
    rest = {} if values is None else {"f": values}
    stays(model(CONV + follower, w=W, **rest))


def test_a_broadcast_that_adds_channels_does_not_fold():
    stays(model(CONV + "y = Mul(h, f) }", w=W[:1], f=normal(5, 1, 1)))


def test_a_factor_that_overflows_does_not_fold():
    w = W.astype(np.float16)
    body = "g (float16[2, 3, 6, 6] x) => (float16[A, B, C, D] y) { h = Conv(x, w)  y = Mul(h, f) }"
    stays(model(body, w=w * np.float16(100), f=np.full((5, 1, 1), 6e4, np.float16)))


def test_a_negative_variance_does_not_fold():
    stays(model(CONV + BN + "}", w=W, **{**statistics(5), "var": np.full(5, -1, np.float32)}))


def test_a_layer_with_a_shared_weight_does_not_fold():
    body = CONV + "y = Mul(h, two)  z = Conv(x, w) }"
    result = stays(model(body.replace("y)", "y, float[A, B, C, D] z)"), w=W, two=np.float32(2)), 3)
    np.testing.assert_array_equal(weight_of(result, "w"), W)


def test_a_layer_whose_output_is_used_elsewhere_does_not_fold():
    stays(model(CONV + "k = Mul(h, two)  y = Sub(h, k) }", w=W, two=np.float32(2)), 3)
    stays(model((CONV + "y = Mul(h, two) }").replace("y)", "y, float[A, B, C, D] h)"), w=W, two=np.float32(2)))


def test_a_layer_whose_weight_or_bias_is_an_output_keeps_it():
    stays(model((CONV + "y = Mul(h, two) }").replace("y)", "y, float[5, 3, 3, 3] w)"), w=W, two=np.float32(2)))
    body = "g (float[3, 4] x) => (float[3, 5] y, float[5] b) { h = Gemm(x, w, b)  y = Mul(h, two) }"
    source = model(body, w=normal(4, 5), b=normal(5), two=np.float32(2))
    result = apply(source, prepare, {"x": normal(3, 4)})
    assert names(result, "ops") == ["Gemm"]
    np.testing.assert_array_equal(run(result, x=normal(3, 4))["b"], normal(5))


def test_a_shared_bias_is_copied():
    body = (
        "g (float[3, 4] x) => (float[3, 5] y, float[3, 5] z) { h = Gemm(x, w, b)  y = Mul(h, two)  z = Gemm(x, v, b) }"
    )
    source = model(body, w=normal(4, 5), v=normal(4, 5, seed=1), b=normal(5), two=np.float32(2))
    result = apply(source, prepare, {"x": normal(3, 4)})
    assert set(names(result, "initializer")) == {"w", "v", "b", "w.bias"}


def test_training_mode_and_extra_outputs_do_not_fold():
    training = BN.replace("BatchNormalization", "BatchNormalization<training_mode=1>").replace("y =", "y, m, v =")
    stays(model(CONV + training + "}", w=W, **statistics(5)))


def test_unnamed_extra_outputs_do_not_hinder_and_are_not_carried_over():
    proto = parse(CONV + BN + "}", opset=9, w=W, **statistics(5))
    proto.graph.node[1].output.extend(["", ""])
    result = apply(model(proto), prepare)
    assert list(result.proto.graph.node[0].output) == ["y"]


def test_computed_biases_and_statistics_do_not_fold():
    stays(
        model(
            "g (float[3, 4] x, float[5] b) => (float[3, 5] y) { h = Gemm(x, w, b)  y = Mul(h, t) }",
            w=normal(4, 5),
            t=np.float32(2),
        )
    )
    rest = {name: values for name, values in statistics(5).items() if name != "mean"}
    stays(model(CONV.replace("x)", "x, float[5] mean)") + BN + "}", w=W, **rest))


def test_a_grouped_deconvolution_and_a_gemm_without_its_bias_do_not_fold():
    body = "g (float[2, 4, 5, 5] x) => (float[A, B, C, D] y) { h = ConvTranspose<group=2>(x, w)  y = Mul(h, two) }"
    stays(model(body, w=normal(4, 3, 2, 2), two=np.float32(2)))
    body = "g (float[3, 4] x) => (float[3, 5] y) { h = Gemm<beta=0.0>(x, w, b)  y = Add(h, two) }"
    stays(model(body, w=normal(4, 5), b=normal(5), two=np.float32(2)))


def test_bfloat16_is_left_alone():
    proto = parse(CONV.replace("float", "bfloat16") + "y = Mul(h, two) }", w=W.astype(ml_dtypes.bfloat16))
    proto.graph.initializer.append(numpy_helper.from_array(np.array(2, ml_dtypes.bfloat16), "two"))
    stays(model(proto))


def test_layers_of_other_domains_are_left_alone():
    proto = parse(CONV + "y = Mul(h, two) }", w=W, two=np.float32(2))
    proto.graph.node[0].domain = "com.example"
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    assert len(names(apply(model(proto), prepare), "ops")) == 2


def test_a_follower_inside_a_body_does_not_fold():
    proto = if_model(normal(4, 2), normal(4, 2), outer="h = Gemm(x, q)", q=normal(4, 4))
    body = proto.graph.node[-1].attribute[0].g
    body.node[0].CopyFrom(helper.make_node("Mul", ["h", "two"], ["r"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    source = model(proto)
    result = apply(source, prepare)
    assert names(result, "ops") == ["Gemm", "If"]


def test_float16_folds_with_float16_rounding():
    body = CONV.replace("float", "float16") + BN + "}"
    source = model(body, opset=14, w=(W / 4).astype(np.float16), **statistics(5, dtype=np.float16))
    x = normal(2, 3, 6, 6, dtype=np.float16)
    result = apply(source, prepare, {"x": x})
    assert names(result, "ops") == ["Conv"]
    assert weight_of(result, "w").dtype == np.float16
    # outputs of size ten at eleven bits
    np.testing.assert_allclose(run(result, x=x)["y"], run(source, x=x)["y"], rtol=0, atol=0.1)


def test_external_weights_fold_too(tmp_path):
    proto = parse(CONV + BN + "}", **statistics(5))
    (tmp_path / "d.bin").write_bytes(W.tobytes())
    proto.graph.initializer.append(external(numpy_helper.from_array(W, "w"), "d.bin"))
    source = model(proto, folder=tmp_path)
    x = normal(2, 3, 6, 6)
    assert names(apply(source, prepare, {"x": x}), "ops") == ["Conv"]
    np.testing.assert_array_equal(np.fromfile(tmp_path / "d.bin", np.float32), W.reshape(-1))


# Constant nodes

SPARSE = helper.make_sparse_tensor(
    numpy_helper.from_array(np.array([7.0, 9.0], np.float32), "other"), numpy_helper.from_array(np.array([1, 3])), [4]
)

KINDS = {
    "value": (numpy_helper.from_array(np.array([[1.0], [2.0]], np.float32)), np.array([[1], [2]], np.float32)),
    "value_float": (1.5, np.array(1.5, np.float32)),
    "value_floats": ([1.5, 2.5], np.array([1.5, 2.5], np.float32)),
    "value_int": (3, np.array(3)),
    "value_ints": ([3, 4], np.array([3, 4])),
    "value_string": ("text", np.array("text", object)),
    "value_strings": (["a", "b"], np.array(["a", "b"], object)),
    "sparse_value": (SPARSE, np.array([0, 7, 0, 9], np.float32)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_constant_nodes_of_every_kind_become_initializers(kind):
    value, expected = KINDS[kind]
    dtype = {"f": "float", "i": "int64", "O": "string"}[expected.dtype.kind]
    dims = f"[{', '.join(map(str, expected.shape))}]" if expected.shape else "[]"
    proto = parse(f"g () => ({dtype}{dims} y) {{ c = Constant()  y = Identity(c) }}")
    if not expected.shape:
        proto.graph.output[0].type.tensor_type.shape.Clear()
    del proto.graph.node[0].attribute[:]
    proto.graph.node[0].attribute.append(helper.make_attribute(kind, value))
    result = apply(model(proto), prepare, {})
    assert names(result, "ops") == ["Identity"]
    found = run(result)["y"]
    np.testing.assert_array_equal(found, expected)
    assert found.shape == expected.shape
    sparse = [each.values.name for each in result.proto.graph.sparse_initializer]
    assert [*names(result, "initializer"), *sparse] == ["c"]


def test_a_constant_that_is_an_output_or_holds_nothing_known_stays():
    proto = parse("g () => (float[2] y, float[2] z) { y = Constant<value_floats=[1.0, 2.0]>()  z = Neg(y) }")
    assert names(apply(model(proto), prepare, {}), "ops") == ["Constant", "Neg"]
    proto = parse("g (float[2] x) => (float[2] y) { c = Constant()  y = Add(x, c) }")
    proto.graph.node[0].domain = "com.example"
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    assert names(apply(model(proto), prepare), "ops") == ["Constant", "Add"]


def test_a_constant_that_only_a_body_uses_is_still_there():
    proto = if_model(normal(4, 2), normal(4, 2), outer="q = Constant()")
    proto.graph.node[0].attribute.append(helper.make_attribute("value", numpy_helper.from_array(normal(4, 2, seed=7))))
    proto.graph.node[-1].attribute[1].g.node[0].input[1] = "q"
    assert proto.graph.node[-1].attribute[1].name == "then_branch"
    source, feeds = model(proto), {"x": normal(3, 4), "c": np.array(True)}
    result = apply(source, prepare, feeds)
    assert names(result, "ops") == ["If"]
    assert names(result, "initializer") == ["q"]
    np.testing.assert_allclose(run(result, **feeds)["y"], normal(3, 4) @ normal(4, 2, seed=7), atol=1e-5)


def test_bodies_are_kept_bit_by_bit():
    proto = if_model(normal(4, 2), normal(4, 2, seed=1), outer="k = Constant<value_float=1.0>()  h = Mul(x, k)")
    body = proto.graph.node[-1].attribute[0].g
    body.node.insert(0, helper.make_node("Constant", [], ["inner"], value=numpy_helper.from_array(normal(2), "inner")))
    body.node[0].doc_string = "inside"
    before = proto.graph.node[-1].SerializeToString(deterministic=True)
    result = apply(model(proto), prepare)
    assert result.proto.graph.node[-1].SerializeToString(deterministic=True) == before


def test_folding_works_on_weights_and_statistics_in_constant_nodes():
    proto = parse(CONV + BN + "}", w=W, **statistics(5))
    nodes = [helper.make_node("Constant", [], [each.name], value=each) for each in list(proto.graph.initializer)]
    del proto.graph.initializer[:]
    kept = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *kept])
    source, x = model(proto), normal(2, 3, 6, 6)
    result = apply(source, prepare, {"x": x})
    assert names(result, "ops") == ["Conv"]
    np.testing.assert_allclose(run(result, x=x)["y"], run(source, x=x)["y"], rtol=0, atol=2e-5)


def test_a_folded_weight_is_made_of_float64_arithmetic():
    gamma = {**statistics(5), "mean": np.full(5, 1e4, np.float32), "beta": np.full(5, 1e4, np.float32)}
    result = apply(model(CONV + BN + "}", w=W, **gamma), prepare)
    exact = gamma["gamma"].astype(np.float64) / np.sqrt(gamma["var"].astype(np.float64) + np.float32(1e-5))
    np.testing.assert_array_equal(weight_of(result, "w.bias"), (1e4 - 1e4 * exact).astype(np.float32))


def test_the_name_of_the_weight_stays_and_that_of_the_output_too():
    result = apply(model(CONV + BN + "}", w=W, **statistics(5), **{"w.bias": normal(2)}), prepare)
    node = result.proto.graph.node[0]
    assert list(node.input)[:2] == ["x", "w"]
    assert node.input[2] == "w.bias_2"  # the other one is in the file, though unused
    assert list(node.output) == ["y"]
    assert result.proto.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    onnx.checker.check_model(result.proto)
