"""How far outputs diverge, and measuring it with other weights in a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from builders import Array, model, normal, parse, run
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompress import sensitivity as module
from edgecompress.data import DataSet
from edgecompress.data.sets import ArraySource
from edgecompress.errors import ModelError
from edgecompress.metrics import AUTO
from edgecompress.sensitivity import TEMPERATURE, Probe, divergence


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def one(reference: Array, output: Array) -> float:
    return divergence({"y": reference}, {"y": output})


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), classes=st.integers(2, 30), scale=st.floats(0.1, 10.0))
def test_logits_are_compared_by_the_softened_divergence(seed: int, classes: int, scale: float) -> None:
    first, second = scale * normal(9, classes, seed=seed), scale * normal(9, classes, seed=seed + 1)
    p, q = (softmax(logits.astype(np.float64) / TEMPERATURE) for logits in (first, second))
    expected = TEMPERATURE**2 * np.mean(np.sum(p * np.log(p / q), axis=1))
    assert one(first, second) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert one(first, first) == 0.0


def test_probabilities_and_their_logits_diverge_alike() -> None:
    first, second = normal(9, 5), normal(9, 5, seed=1)
    expected = one(first, second)
    assert one(softmax(first), softmax(second)) == pytest.approx(expected, rel=1e-4)  # float32 probabilities
    assert one(softmax(first)[:, :, None, None], softmax(second)[:, :, None, None]) == pytest.approx(expected, rel=1e-4)


def test_a_shift_of_all_logits_changes_nothing_and_no_logit_overflows() -> None:
    logits = normal(9, 5)
    assert one(logits, logits + 30) == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(one(1e4 * logits, -1e4 * logits))
    certain = np.eye(4, dtype=np.float32)
    assert np.isfinite(one(certain, certain[::-1].copy()))


@pytest.mark.parametrize("shape", [(6, 1), (6, 3, 4), (6,), ()])
def test_other_outputs_are_compared_by_their_relative_error(shape: tuple[int, ...]) -> None:
    reference = np.float32(2.0) * np.ones(shape, np.float32)
    assert one(reference, 1.1 * reference) == pytest.approx(0.01, rel=1e-4)
    assert one(0 * reference, reference) == pytest.approx(reference.size * 4.0)


def test_a_small_error_counts_with_its_square() -> None:
    for reference in (normal(9, 5), normal(9, 5, 3)):
        change = 1e-3 * normal(*reference.shape, seed=2)
        ratio = one(reference, reference + 2 * change) / one(reference, reference + change)
        assert ratio == pytest.approx(4.0, rel=0.02)  # the next term is of relative size 1e-3 to 1e-2


def test_outputs_are_averaged_integers_left_out_and_what_is_not_finite_is_infinite() -> None:
    first, second = {"a": np.ones(4), "b": np.ones(4), "i": np.arange(4)}, {"a": np.ones(4), "b": np.zeros(4)}
    assert divergence(first, second) == pytest.approx(0.5)
    assert divergence({"i": np.arange(4)}, {}) == 0.0
    assert one(np.ones(3), np.array([1.0, np.nan, 1.0])) == np.inf


BODY = "g (float[N, 6] x) => (float[N, 4] y) { h = MatMul(x, a)  r = Relu(h)  y = MatMul(r, b) }"


def data_set(x: Array) -> DataSet:
    return DataSet("rows", ArraySource({"x": x}, {}, {}, {}), np.arange(len(x)), None, AUTO)


def test_a_probe_measures_what_a_model_with_these_weights_gives() -> None:
    weights = {"a": normal(6, 5), "b": normal(5, 4, seed=1)}
    source, x = model(BODY, **weights), normal(30, 6, seed=2)
    probe = Probe(source, data_set(x), macs=50, variants=3)
    for changed in (
        {"a": normal(6, 5, seed=3)},
        {"b": normal(5, 4, seed=4)},
        {name: 2 * w for name, w in weights.items()},
    ):
        other = model(BODY, **{**weights, **changed})
        expected = divergence(run(source, x=x), run(other, x=x))
        assert probe.divergence(changed) == pytest.approx(expected, rel=1e-4)
    assert probe.divergence({}) == 0.0  # and the weights are back
    np.testing.assert_array_equal(run(source, x=x)["y"], run(model(BODY, **weights), x=x)["y"])


def test_weights_come_back_even_where_the_model_does_not_run_with_them() -> None:
    probe = Probe(model(BODY, a=normal(6, 5), b=normal(5, 4)), data_set(normal(9, 6)), macs=50, variants=1)
    with pytest.raises(ModelError):
        probe.divergence({"a": normal(6, 3)})
    assert probe.divergence({}) == 0.0


class Counting:
    """A source that remembers which rows were read."""

    def __init__(self, x: Array) -> None:
        self.x, self.seen = x, set[int]()

    def read(self, rows: Array) -> dict[str, Array]:
        self.seen |= set(map(int, rows))
        return {"x": self.x[rows]}

    def origins(self, rows: Array) -> set[Any]:
        return {int(row) for row in rows}


@pytest.mark.parametrize(("macs", "variants", "rows"), [(50, 1, 256), (10**10, 16, 50), (10**12, 1000, 8), (0, 0, 256)])
def test_the_rows_are_bounded_by_the_work(monkeypatch: pytest.MonkeyPatch, macs: int, variants: int, rows: int) -> None:
    source = Counting(normal(400, 6))
    data = DataSet("rows", source, np.arange(400), None, AUTO)
    probe = Probe(model(BODY, a=normal(6, 5), b=normal(5, 4)), data, macs=macs, variants=variants)
    assert sum(len(feeds["x"]) for feeds, _ in probe._batches) == rows


def test_the_rows_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OUTPUT_BUDGET_BYTES", 100 * 4 * (6 + 4))
    data = data_set(normal(400, 6))
    probe = Probe(model(BODY, a=normal(6, 5), b=normal(5, 4)), data, macs=1, variants=1)
    assert sum(len(feeds["x"]) for feeds, _ in probe._batches) == 64  # a second batch of 64 would be too much


def test_a_model_with_a_fixed_batch_is_run_in_its_batches() -> None:
    fixed = parse(BODY.replace("N", "5"), a=normal(6, 5), b=normal(5, 4))
    probe = Probe(model(fixed), data_set(normal(13, 6)), macs=50, variants=1)
    assert [len(feeds["x"]) for feeds, _ in probe._batches] == [5, 5]
    assert probe.divergence({"b": normal(5, 4, seed=3)}) > 0
