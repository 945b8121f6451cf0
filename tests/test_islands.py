from __future__ import annotations

import numpy as np
from builders import data_of, model, normal

from edgecompress.graph import open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.passes.islands import losing_islands
from edgecompress.passes.precision import choose_int8


def lost(source, names):
    graph = open_graph(source)
    return losing_islands(
        graph, [each for each in find_layers(graph) if isinstance(each, Layer) and each.name in names]
    )


def three(channels, kernel, size, between=""):
    """Three equal convolutions in a row, with Relus, or with ``between`` instead of the second Relu."""
    pads = f"pads = [{', '.join([str(kernel // 2)] * 4)}]"
    body = f"""g (float[1, {channels}, {size}, {size}] x) => (float[1, {channels}, {size}, {size}] y) {{
        a = Conv<{pads}>(x, w0)
        b = Relu(a)
        c = Conv<{pads}>(b, w1)
        {between or "d = Relu(c)"}
        y = Conv<{pads}>(d, w2)
    }}"""
    return model(body, opset=13, **{f"w{each}": normal(channels, channels, kernel, kernel) for each in range(3)})


def test_a_narrow_convolution_alone_in_int8_loses_and_a_wide_one_does_not():
    # 16 x 16 x 9 x 1024 = 2.4 M multiply-accumulates, 32,768 values that change sides: measured as no gain at all
    assert lost(three(16, 3, 32), {"w1"}) == {"w1"}
    # 64 x 64 x 9 x 784 = 29 M, 100,352 values: measured at about half of the time
    assert not lost(three(64, 3, 28), {"w1"})
    assert lost(three(64, 1, 28), {"w1"}) == {"w1"}


def test_layers_that_pass_integers_to_each_other_share_the_cost():
    source = three(32, 3, 16)
    assert lost(source, {"w0"}) == set()
    narrow = three(16, 3, 32)
    assert lost(narrow, {"w0", "w1"}) == set()
    assert lost(narrow, {"w0", "w2"}) == {"w0", "w2"}


def test_what_runs_in_floats_between_two_layers_parts_them():
    # Tanh has no int8 kernel
    assert lost(three(16, 3, 32, between="d = Tanh(c)"), {"w1", "w2"}) == {"w1", "w2"}
    assert lost(three(16, 3, 32, between="d = Sigmoid(c)"), {"w1", "w2"}) == set()


def test_matrices_do_not_lose_on_their_own():
    source = model("g (float[4, 20] x) => (float[4, 12] y) { y = MatMul(x, w) }", opset=13, w=normal(20, 12))
    assert not lost(source, {"w"})


def test_an_unknown_size_keeps_an_island():
    body = "g (float[N, 16, h, h] x) => (float[N, 16, h, h] y) { s = Unknown(x) y = Conv(s, w) }"
    source = model(body.replace("Unknown", "custom.Unknown"), opset=13, w=normal(16, 16, 1, 1))
    assert not lost(source, {"w"})


def test_a_choice_leaves_a_losing_layer_float_and_says_why():
    source = three(16, 3, 32, between="d = Tanh(c)")
    found = choose_int8(source, {}, data_of(x=normal(4, 16, 32, 32)), max_effect=np.inf)
    assert found.names == {"w0", "w1"}
    assert "more time than it saves" in found.reasons["w2"]
