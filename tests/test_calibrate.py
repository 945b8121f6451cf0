from __future__ import annotations

import itertools

import numpy as np
import pytest
from builders import data_of, entries, layer, model, normal, parse, run

from edgecompress import calibrate as module
from edgecompress import patches
from edgecompress.calibrate import calibrate
from edgecompress.errors import DataError, ModelError
from edgecompress.layers import Layer


def moments_of(source, **arrays):
    layers = [entry for entry in entries(source).values() if isinstance(entry, Layer)]
    return calibrate(source, layers, data_of(**arrays))


def patches_by_loops(x, kernel, *, groups=1, strides=None, pads=None, dilations=None):
    """im2col by plain loops over every output position: (positions, groups, C / groups * prod(kernel))."""
    axes = len(kernel)
    strides, dilations, pads = strides or [1] * axes, dilations or [1] * axes, pads or [0] * (2 * axes)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:axes], pads[axes:], strict=True)])
    counts = [
        (size - (k - 1) * d - 1) // s + 1
        for size, k, s, d in zip(padded.shape[2:], kernel, strides, dilations, strict=True)
    ]
    found = []
    for image in padded:
        for place in itertools.product(*map(range, counts)):
            window = tuple(
                slice(p * s, p * s + (k - 1) * d + 1, d)
                for p, s, k, d in zip(place, strides, kernel, dilations, strict=True)
            )
            found.append(image[(slice(None), *window)].reshape(groups, -1))
    return np.array(found, np.float64)


def check(found, patches):
    expected = np.einsum("pga,pgb->gab", patches, patches) / len(patches)
    assert found.count == len(patches)
    np.testing.assert_allclose(found.second_moment, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


CONVS = {
    "plain": ((6, 3, 3, 3), (5, 3, 8, 9), {}, {}),
    "strided": ((6, 3, 3, 2), (5, 3, 8, 9), {"strides": [2, 3]}, {}),
    "padded": ((6, 3, 3, 3), (5, 3, 8, 9), {"pads": [1, 2, 0, 1]}, {}),
    "dilated": ((6, 3, 3, 3), (5, 3, 8, 9), {"dilations": [2, 3], "pads": [1, 1, 1, 1]}, {}),
    "grouped": ((6, 2, 3, 3), (5, 4, 6, 6), {"group": 2, "pads": [1, 1, 1, 1]}, {}),
    "depthwise": ((4, 1, 3, 3), (5, 4, 6, 6), {"group": 4}, {}),
    "one axis": ((6, 3, 4), (5, 3, 11), {"strides": [2], "pads": [1, 2]}, {}),
    "three axes": ((3, 2, 2, 3, 2), (3, 2, 4, 5, 4), {"pads": [1, 0, 0, 0, 1, 1]}, {}),
    "valid": ((6, 3, 3, 3), (5, 3, 8, 9), {"auto_pad": "VALID"}, {}),
    "same upper": ((6, 3, 2, 3), (5, 3, 8, 9), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, {"pads": [0, 1, 0, 1]}),
    "same lower": ((6, 3, 4, 3), (5, 3, 8, 9), {"auto_pad": "SAME_LOWER"}, {"pads": [2, 1, 1, 1]}),
}


def attributes(values):
    text = ", ".join(
        f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in values.items()
    )
    return f"<{text}>" if text else ""


@pytest.mark.parametrize("case", CONVS)
def test_moments_of_a_convolution_are_those_of_its_patches(case):
    shape, x_shape, given, explicit = CONVS[case]
    weight, x = normal(*shape), normal(*x_shape, seed=1)
    dims = ", ".join(["N", *map(str, x_shape[1:])])
    source = model(f"g (float[{dims}] x) => (float[N, M] y) {{ y = Conv{attributes(given)}(x, w) }}", w=weight)
    geometry = {key: value for key, value in {**given, **explicit}.items() if key in ("strides", "pads", "dilations")}
    groups = given.get("group", 1)
    patches = patches_by_loops(x, shape[2:], groups=groups, **geometry)
    # the oracle itself agrees with the runtime: weight times patch is the output
    expected = np.einsum("god,pgd->pgo", weight.reshape(groups, shape[0] // groups, -1), patches)
    result = np.moveaxis(run(source, x=x)["y"], 1, -1).reshape(len(patches), groups, -1)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4)
    check(moments_of(source, x=x)["w"], patches)


def gathered(x, index):
    """The values of an image ``(C, *spatial)`` at a position, zeros where it is outside or between two values."""
    inside = all(each == int(each) and 0 <= each < size for each, size in zip(index, x.shape[1:], strict=True))
    return x[(slice(None), *map(int, index))] if inside else np.zeros(len(x))


def deconvolution_by_loops(x, kernel, sizes, *, groups=1, strides=None, pads=None, dilations=None):
    """What the outputs of ConvTranspose are made of, by definition: (positions, groups, C / groups * prod(kernel))."""
    axes = len(kernel)
    strides, dilations, pads = strides or [1] * axes, dilations or [1] * axes, pads or [0] * axes
    found = []
    for image in x:
        for place in itertools.product(*map(range, sizes)):
            taps = [
                gathered(
                    image,
                    [(q + p - k * d) / s for q, p, k, d, s in zip(place, pads, tap, dilations, strides, strict=True)],
                )
                for tap in itertools.product(*map(range, kernel))
            ]
            found.append(np.stack(taps, axis=1).reshape(groups, -1))
    return np.array(found, np.float64)


# (weight, input, attributes, the padding before the first output where attributes do not say it)
DECONVS = {
    "plain": ((3, 4, 3, 2), (3, 3, 4, 5), {}, {}),
    "stride equal to the kernel": ((3, 4, 2, 2), (3, 3, 4, 5), {"strides": [2, 2]}, {}),
    "strided": ((3, 4, 3, 4), (3, 3, 4, 5), {"strides": [2, 3], "pads": [1, 2, 0, 1]}, {}),
    "wider stride than kernel": ((3, 4, 2, 2), (3, 3, 4, 5), {"strides": [3, 4], "output_padding": [2, 1]}, {}),
    "dilated": ((3, 4, 3, 2), (3, 3, 4, 5), {"dilations": [2, 3], "strides": [2, 1], "output_padding": [1, 0]}, {}),
    "grouped": ((4, 2, 3, 3), (3, 4, 4, 4), {"group": 2, "strides": [2, 2]}, {}),
    "depthwise": ((4, 1, 4, 4), (3, 4, 4, 4), {"group": 4, "strides": [2, 2], "pads": [1, 1, 1, 1]}, {}),
    "one axis": ((3, 4, 4), (3, 3, 7), {"strides": [2], "pads": [1, 2]}, {}),
    "cut to the kernel's inside": ((3, 4, 2, 2), (3, 3, 5, 5), {"pads": [2, 2, 2, 2]}, {}),
    "output shape": ((3, 4, 4, 4), (3, 3, 4, 4), {"strides": [2, 2], "output_shape": [9, 7]}, {"pads": [1, 2]}),
    "same upper": ((3, 4, 3, 4), (3, 3, 4, 4), {"strides": [2, 1], "auto_pad": "SAME_UPPER"}, {"pads": [0, 1]}),
    "same lower": ((3, 4, 3, 4), (3, 3, 4, 4), {"strides": [2, 1], "auto_pad": "SAME_LOWER"}, {"pads": [1, 2]}),
}


@pytest.mark.parametrize("case", DECONVS)
def test_moments_of_a_transposed_convolution_are_those_of_what_its_outputs_are_made_of(case):
    shape, x_shape, given, explicit = DECONVS[case]
    weight, x = normal(*shape), normal(*x_shape, seed=1)
    dims = ", ".join(["N", *map(str, x_shape[1:])])
    source = model(f"g (float[{dims}] x) => (float[N, M] y) {{ y = ConvTranspose{attributes(given)}(x, w) }}", w=weight)
    geometry = {key: value for key, value in {**given, **explicit}.items() if key in ("strides", "pads", "dilations")}
    groups, axes = given.get("group", 1), len(shape) - 2
    if "pads" in geometry:
        geometry["pads"] = geometry["pads"][:axes]
    output = run(source, x=x)["y"]
    patches = deconvolution_by_loops(x, shape[2:], output.shape[2:], groups=groups, **geometry)
    # the oracle itself agrees with the runtime: weight times patch is the output
    turned = weight.reshape(groups, shape[0] // groups, *shape[1:]).swapaxes(1, 2).reshape(groups, shape[1], -1)
    expected = np.einsum("god,pgd->pgo", turned, patches)
    result = np.moveaxis(output, 1, -1).reshape(len(patches), groups, -1)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4)
    check(moments_of(source, x=x)["w"], patches)


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3)])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_recurrent_weights_see_the_input_and_what_the_node_gives(op, gates, direction):
    ways = 2 if direction == "bidirectional" else 1
    x = normal(7, 3, 5)
    source = model(
        "g (float[7, N, 5] x) => (float[7, A, N, 6] y) "
        f'{{ y = {op}<hidden_size=6, direction="{direction}">(x, w, r) }}',
        w=normal(ways, gates * 6, 5, seed=1),
        r=normal(ways, gates * 6, 6, seed=2),
    )
    # what counts as rows of data is the first axis, here the time
    found, y = moments_of(source, x=x), run(source, x=x)["y"]
    assert found["w"].second_moment.shape == (ways, 5, 5)
    check(found["w"], np.repeat(x.reshape(-1, 1, 5), ways, axis=1))
    check(found["r"], y.swapaxes(1, 2).reshape(-1, ways, 6))


def test_a_recurrence_that_gives_its_last_state_only_is_judged_by_that():
    x = normal(7, 40, 5)
    body = "g (float[7, N, 5] x) => (float[1, N, 6] h) {{ {} = LSTM<hidden_size=6>(x, w, r) }}"
    weights = {"w": normal(1, 24, 5, seed=1), "r": normal(1, 24, 6, seed=2)}
    proto = parse(body.format("h"), **weights)
    proto.graph.node[0].output[:] = ["", "h"]
    source = model(proto)
    check(moments_of(source, x=x)["r"], run(source, x=x)["h"].swapaxes(0, 1))


def test_a_gemm_with_its_input_transposed():
    x = normal(6, 40)
    source = model("g (float[6, M] x) => (float[M, N] y) { y = Gemm<transA=1, alpha=3.0>(x, w) }", w=normal(6, 5))
    check(moments_of(source, x=x)["w"], x.T[:, None])


def test_a_matmul_on_batches_of_sequences():
    x = normal(4, 7, 6)
    source = model("g (float[B, S, 6] x) => (float[B, S, N] y) { y = MatMul(x, w) }", w=normal(6, 5))
    check(moments_of(source, x=x)["w"], x.reshape(-1, 1, 6))


def test_a_matmul_with_its_constant_on_the_left_sees_columns():
    x = normal(4, 6, 7)
    source = model("g (float[B, 6, S] x) => (float[B, M, S] y) { y = MatMul(w, x) }", w=normal(5, 6))
    check(moments_of(source, x=x)["w"], x.swapaxes(1, 2).reshape(-1, 1, 6))


def test_a_weight_of_two_nodes_sees_the_inputs_of_both():
    x = normal(30, 6)
    body = "g (float[N, 6] x) => (float[N, 6] y) { a = Gemm(x, w)  b = Tanh(a)  y = Gemm(b, w) }"
    source = model(body, w=normal(6, 6))
    hidden = np.tanh(x @ normal(6, 6))
    check(moments_of(source, x=x)["w"], np.concatenate([x, hidden])[:, None])


def test_batches_give_what_one_batch_gives(monkeypatch):
    x = normal(50, 3, 6, 6)
    source = model("g (float[N, 3, 6, 6] x) => (float[N, M] y) { y = Conv(x, w) }", w=normal(4, 3, 3, 3))
    whole = moments_of(source, x=x)["w"]
    monkeypatch.setattr(module, "ACTIVATION_BUDGET_BYTES", 7 * 4 * 4 * 4 * 4)  # the output of seven rows
    monkeypatch.setattr(patches, "PATCH_BUDGET_BYTES", 27 * 4 * 5)  # five patches at a time
    parts = moments_of(source, x=x)["w"]
    assert parts.count == whole.count == 50 * 16
    np.testing.assert_allclose(parts.second_moment, whole.second_moment, rtol=0, atol=1e-5)


def test_many_positions_are_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(patches, "_MIN_POSITIONS", 500)
    source = model("g (float[N, 1, 40, 40] x) => (float[N, M] y) { y = Conv(x, w) }", w=normal(2, 1, 1, 1))
    x = np.broadcast_to(np.arange(40, dtype=np.float32), (20, 1, 40, 40)).copy()
    found = moments_of(source, x=x)["w"]
    assert 400 <= found.count <= 520
    # every column of the image counts alike
    assert found.second_moment[0, 0, 0] == pytest.approx(np.mean(np.arange(40.0) ** 2), rel=0.05)


def test_a_wide_layer_keeps_only_the_diagonal(monkeypatch):
    monkeypatch.setattr(module, "MAX_FULL_DIMENSION", 5)
    x = normal(30, 6)
    found = moments_of(model("g (float[N, 6] x) => (float[N, M] y) { y = MatMul(x, w) }", w=normal(6, 5)), x=x)["w"]
    np.testing.assert_allclose(found.second_moment, [np.mean(x.astype(float) ** 2, axis=0)], rtol=1e-5)


def test_where_memory_is_short_the_widest_layers_keep_only_the_diagonal(monkeypatch):
    body = "g (float[N, 6] x) => (float[N, 5] y) { a = MatMul(x, w1)  b = MatMul(a, w2)  y = MatMul(b, w3) }"
    weights = {"w1": normal(6, 12, seed=1), "w2": normal(12, 4, seed=2), "w3": normal(4, 5, seed=3)}
    monkeypatch.setattr(module, "MOMENT_BUDGET_BYTES", 8 * (6**2 + 4**2))
    found = moments_of(model(body, **weights), x=normal(30, 6))
    assert {name: each.is_full for name, each in found.items()} == {"w1": True, "w2": False, "w3": True}


def test_layers_whose_moment_says_nothing_are_left_out():
    body = """g (int64[N] i, float[N, 2, 6] x) => (float[N, 6] e, float[2, N, 5] y)
    { e = Gather(table, i)  t = Transpose<perm=[1, 0, 2]>(x)  y = MatMul(t, stack) }"""
    source = model(body, table=normal(9, 6), stack=normal(2, 6, 5))
    assert moments_of(source, i=np.arange(4), x=normal(4, 2, 6)) == {}


def test_a_table_that_is_tied_to_a_matmul_is_left_out():
    body = "g (int64[N] i) => (float[N, 6] y) { e = Gather(w, i)  y = MatMul(e, w) }"
    source = model(body, w=normal(6, 6))
    assert not layer(source).takes_moments
    assert moments_of(source, i=np.arange(4)) == {}


def test_float16_inputs_are_multiplied_in_float32():
    x = np.full((5, 2), 300, np.float16)  # squares are above the largest float16
    source = model("g (float16[N, 2] x) => (float16[N, M] y) { y = MatMul(x, w) }", w=normal(2, 3, dtype=np.float16))
    np.testing.assert_allclose(moments_of(source, x=x)["w"].second_moment, 9e4, rtol=1e-6)


def test_progress_counts_rows():
    source = model("g (float[2, 6] x) => (float[2, M] y) { y = MatMul(x, w) }", w=normal(6, 5))
    seen = []
    calibrate(source, [layer(source)], data_of(x=normal(6, 6)), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 6), (4, 6), (6, 6)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_input_that_is_not_finite_is_named(value):
    source = model("g (float[N, 6] x) => (float[N, M] y) { h = Relu(x)  y = MatMul(h, w) }", w=normal(6, 5))
    with pytest.raises(DataError, match="layer 'w' is NaN or Inf"):
        moments_of(source, x=np.full((3, 6), value, np.float32))


def test_what_the_runtime_refuses_is_a_model_error():
    proto = parse("g (float[N, 6] x) => (float[N, M] y) { y = MatMul(x, w) }", w=normal(6, 5))
    source = model(proto)
    with pytest.raises(ModelError):
        moments_of(source, x=normal(3, 7))
