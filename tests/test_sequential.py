from __future__ import annotations

import numpy as np
import pytest
from builders import data_of, entries, layer, model, normal, run

from edgecompress.errors import DataError
from edgecompress.layers import Layer
from edgecompress.sequential import Walk

TWO = "g (float[N, 6] x) => (float[N, 4] y) { a = MatMul(x, w1)  b = Relu(a)  y = MatMul(b, w2) }"
CONVS = """g (float[N, 4, 7, 7] x) => (float[N, 6, 7, 7] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1)  b = Relu(a)  y = Conv <pads = [1, 1, 1, 1], group = 2> (b, w2) }"""


def walk_of(source, **arrays):
    return Walk(source, data_of(**arrays), [each for each in entries(source).values() if isinstance(each, Layer)])


def test_the_moments_pair_what_flows_into_a_layer_in_both_models():
    source = model(TWO, w1=normal(6, 5, seed=1), w2=normal(5, 4, seed=2))
    x, changed = normal(300, 6, seed=3), normal(6, 5, seed=4)
    walk = walk_of(source, x=x)
    first = walk.pair(layer(source, "w1"))
    np.testing.assert_allclose(first.cross[0], first.moments.second_moment[0], rtol=0, atol=1e-5)  # nothing changed yet
    walk.settle(layer(source, "w1"), {"w1": changed})
    pair = walk.pair(layer(source, "w2"))
    before, after = (np.maximum(x.astype(float) @ w, 0) for w in (normal(6, 5, seed=1), changed))
    # float32 products of 300 rows of size about 5
    np.testing.assert_allclose(pair.moments.second_moment[0], after.T @ after / 300, rtol=0, atol=1e-3)
    np.testing.assert_allclose(pair.cross[0], before.T @ after / 300, rtol=0, atol=1e-3)
    np.testing.assert_allclose(pair.source_mean[0], before.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(pair.moments.mean[0], after.mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_have_the_means_and_variances_of_both_models(groups):
    weights = {"w1": normal(4, 4, 3, 3, seed=1), "w2": normal(6, 4 // groups, 3, 3, seed=2)}
    body = CONVS.replace("group = 2", f"group = {groups}")
    source = model(body, **weights)
    x, changed, new = normal(20, 4, 7, 7, seed=3), normal(4, 4, 3, 3, seed=4), normal(6, 4 // groups, 3, 3, seed=5)
    walk = walk_of(source, x=x)
    walk.settle(layer(source, "w1"), {"w1": changed})
    found = walk.outputs(layer(source, "w2"), weights["w2"], new)
    for place, (w1, w2) in enumerate([(weights["w1"], weights["w2"]), (changed, new)]):
        y = run(model(body, w1=w1, w2=w2), x=x)["y"].astype(float)
        # 980 positions, fewer than are sampled: all of them count, so that only rounding is left
        np.testing.assert_allclose(found.means[place], y.mean(axis=(0, 2, 3)), rtol=0, atol=1e-3)
        np.testing.assert_allclose(found.variances[place], y.var(axis=(0, 2, 3)), rtol=1e-3)


def test_a_layer_fed_by_nan_is_refused():
    source = model(TWO, w1=normal(6, 5, seed=1), w2=normal(5, 4, seed=2))
    x = normal(30, 6, seed=3)
    x[7, 2] = np.nan
    with pytest.raises(DataError, match=r"w1.*NaN"):
        walk_of(source, x=x).pair(layer(source, "w1"))
