"""Metrics: scores per row, paired comparison, distortion."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgecompress.errors import DataError
from edgecompress.metrics import (
    AUTO,
    Distortion,
    Metric,
    add,
    check_labels,
    compare,
    distortion,
    finish,
    merge,
    parse_metric,
    resolve,
    score,
    start,
)

TOP1, RMSE, AGREEMENT = Metric("top1"), Metric("rmse"), Metric("agreement")


def logits(*classes: int, count: int = 4) -> dict[str, np.ndarray]:
    return {"y": np.eye(count, dtype=np.float32)[list(classes)]}


def test_top1_counts_the_rows_whose_largest_value_is_the_label():
    values = score(TOP1, logits(0, 1, 2, 3), labels=np.array([0, 1, 1, 3]))
    assert values.tolist() == [100, 100, 0, 100]


def test_top1_reads_outputs_with_trailing_axes_of_one_element():
    values = score(TOP1, {"y": logits(2)["y"].reshape(1, 4, 1, 1)}, labels=np.array([2]))
    assert values.tolist() == [100]


def test_a_model_that_gives_all_classes_the_same_value_is_right_for_the_first_class_only():
    flat = {"y": np.zeros((4, 4), np.float32)}
    assert score(TOP1, flat, labels=np.arange(4)).tolist() == [100, 0, 0, 0]
    assert score(Metric("topk", k=2), flat, labels=np.arange(4)).tolist() == [100, 100, 0, 0]


def test_a_row_with_nan_is_wrong():
    broken = {"y": np.full((2, 4), np.nan, np.float32)}
    assert score(TOP1, broken, labels=np.array([0, 1])).tolist() == [0, 0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_topk_is_membership_among_the_k_largest(seed: int, k: int):
    generator = np.random.default_rng(seed)
    values, labels = generator.permuted(np.tile(np.arange(7.0), (5, 1)), axis=1), generator.integers(0, 7, 5)
    expected = [100.0 * (label in np.argsort(-row)[:k]) for row, label in zip(values, labels, strict=True)]
    assert score(Metric("topk", k=k), {"y": values}, labels=labels).tolist() == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([1, 4]), "label 4 is not a class"),
        (np.array([-1, 0]), "label -1 is not a class"),
        (np.array([1.0, 2.0]), "float64"),
        (np.array([[1], [2]]), r"shape \(N, 1\)"),
        (None, "needs labels"),
    ],
)
def test_labels_that_do_not_fit_top1_are_named(labels, message):
    with pytest.raises(DataError, match=message) as caught:
        score(TOP1, logits(0, 1), labels=labels)
    assert caught.value.hint


def test_top1_of_an_output_that_is_no_table_of_classes_is_refused():
    with pytest.raises(DataError, match="needs an output of shape"):
        score(TOP1, {"y": np.zeros((2, 3, 4), np.float32)}, labels=np.array([0, 1]))


def test_a_k_that_covers_all_classes_is_refused():
    with pytest.raises(DataError, match="always 100"):
        score(Metric("topk", k=4), logits(0), labels=np.array([0]))


def test_agreement_is_the_share_of_positions_of_each_row():
    original = np.zeros((2, 2, 3), np.float32)
    changed = original.copy()
    changed[0, 1, 2] = 1  # one of the two positions of row 0
    values = score(AGREEMENT, {"y": changed}, reference={"y": original})
    assert values.tolist() == [50, 100]


def test_agreement_is_unknown_where_there_is_nothing_to_choose():
    for shape in ((3, 1), (3,), (2, 5, 1)):
        result = compare(AGREEMENT, {"y": np.ones(shape, np.float32)}, {"y": np.ones(shape, np.float32)})
        assert (result.original, result.compressed, result.drop_points, result.agreement) == (None,) * 4


def test_agreement_reads_the_first_output_of_floats():
    original = {"ids": np.array([[1, 2]]), "y": np.array([[0.0, 1.0]]), "z": np.array([[0.0, 1.0]])}
    result = compare(AUTO, original, {**original, "ids": np.array([[2, 1]]), "z": np.array([[1.0, 0.0]])})
    assert result.agreement == 100


def test_a_compressed_model_that_gives_nan_does_not_agree():
    original = {"y": np.array([[1.0, 0.0]])}
    result = compare(AGREEMENT, original, {"y": np.array([[np.nan, 0.0]])})
    assert (result.original, result.compressed, result.drop_points) == (100, 0, 100)


def test_rows_are_told_from_the_inputs_where_the_output_has_other_ones():
    boxes = {"y": np.array([[0.0, 1], [0, 1], [1, 0]])}
    state = add(start(AGREEMENT), boxes, {"y": boxes["y"][[0, 1, 1]]}, inputs={"x": np.zeros((1, 3))})
    result = finish(state)
    assert result.samples == 1
    assert result.compressed == pytest.approx(200 / 3)


def test_rmse_compares_with_labels_and_otherwise_with_the_input():
    target = np.array([[0.0, 0.0], [0.0, 0.0]])
    output = {"y": np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)}
    assert compare(RMSE, output, output, inputs={"n": np.zeros((2, 3)), "x": target}).original == pytest.approx(2.5)
    assert compare(RMSE, output, output, labels=output["y"], inputs={"x": target}).original == 0


def test_rmse_counts_a_larger_error_as_a_positive_drop():
    target = {"x": np.zeros((4, 2))}
    result = compare(RMSE, {"y": np.full((4, 2), 0.1)}, {"y": np.full((4, 2), 0.3)}, inputs=target)
    assert result.drop_points == pytest.approx(0.2)


def test_rmse_without_anything_of_the_outputs_shape_is_refused():
    with pytest.raises(DataError, match="no input to compare"):
        score(RMSE, {"y": np.zeros((2, 3))}, inputs={"x": np.zeros((2, 4))})
    with pytest.raises(DataError, match="labels of shape"):
        score(RMSE, {"y": np.zeros((2, 3))}, labels=np.zeros((2, 4)))


def test_the_standard_error_is_that_of_the_paired_difference():
    labels = np.zeros(8, np.int64)
    result = compare(TOP1, logits(*[0] * 8), logits(0, 0, 0, 0, 0, 0, 1, 1), labels)
    # two of eight rows lose 100 points: sample deviation sqrt(8/7 * 1/4 * 3/4) * 100, over sqrt(8)
    assert (result.original, result.compressed, result.drop_points, result.samples) == (100, 75, 25, 8)
    assert result.standard_error_points == pytest.approx(100 * math.sqrt(8 / 7 * 3 / 16 / 8))


def test_rows_that_both_models_get_wrong_add_no_uncertainty():
    labels = np.array([0, 1, 2, 3])
    result = compare(TOP1, logits(0, 0, 0, 0), logits(0, 0, 0, 0), labels)
    assert (result.original, result.drop_points, result.standard_error_points) == (25, 0, 0)


def test_one_row_has_no_standard_error():
    assert compare(TOP1, logits(0), logits(1), np.array([0])).standard_error_points is None


def test_the_standard_error_of_rmse_is_that_of_repeated_draws():
    generator = np.random.default_rng(0)
    drops, errors = [], []
    for _ in range(300):
        before = generator.normal(0, 1.0, (200, 1))
        after = before + generator.normal(0, 0.5, (200, 1))
        result = compare(RMSE, {"y": before}, {"y": after}, inputs={"x": np.zeros((200, 1))})
        drops.append(result.drop_points)
        errors.append(result.standard_error_points)
    # the deviation of 300 draws has a relative standard error of 4 %: 5 of those are allowed
    assert np.mean(errors) == pytest.approx(np.std(drops), rel=0.2)


def test_batches_add_up_to_the_whole():
    generator = np.random.default_rng(1)
    before = generator.standard_normal((10, 4)).astype(np.float32)
    after = before + generator.normal(0, 1, (10, 4)).astype(np.float32)
    labels = generator.integers(0, 4, 10)
    whole = compare(AUTO, {"y": before}, {"y": after}, labels)
    state = start(AUTO)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 10)):
        state = add(state, {"y": before[rows]}, {"y": after[rows]}, labels=labels[rows])
    parts = finish(state)
    assert parts.metric == TOP1
    assert (parts.original, parts.compressed, parts.samples) == (whole.original, whole.compressed, 10)
    assert parts.standard_error_points == whole.standard_error_points
    assert parts.outputs["y"].sqnr_db == pytest.approx(whole.outputs["y"].sqnr_db)
    assert parts.outputs["y"].max_abs == whole.outputs["y"].max_abs


def test_nothing_added_is_unknown():
    result = finish(start(TOP1))
    assert (result.original, result.drop_points, result.standard_error_points, result.samples) == (None, None, None, 0)


@pytest.mark.parametrize(
    ("labels", "shape", "name"),
    [
        (None, (None, 10), "agreement"),
        (np.zeros(3, np.uint8), (None, 10), "top1"),
        (np.zeros(3, np.int64), (None, 1000, 1, 1), "top1"),
        (np.zeros((3, 5), np.int64), (None, 5, 100), "agreement"),
        (np.zeros(3), (None, 1), "rmse"),
        (np.zeros(3), (None,), "rmse"),
        (np.zeros((3, 4), np.float32), (None, 4), "rmse"),
        (np.zeros(3, np.int64), (None, 1), "rmse"),
        (np.zeros(3, np.int64), (), "agreement"),
    ],
)
def test_the_metric_that_auto_stands_for(labels, shape, name):
    assert resolve(AUTO, labels, shape).name == name


def test_auto_with_float_class_labels_says_how_to_convert_them():
    with pytest.raises(DataError, match="float64") as caught:
        resolve(AUTO, np.zeros(3), (None, 10))
    assert ".astype(np.int64)" in caught.value.hint


def test_a_metric_that_was_named_stays_whatever_the_labels():
    assert resolve(RMSE, np.zeros(3, np.int64), (None, 10)) == RMSE


@pytest.mark.parametrize(
    ("text", "k", "expected"),
    [
        ("top1", None, TOP1),
        ("topk", 5, Metric("topk", k=5)),
        ("agreement", None, AGREEMENT),
        ("a.b:f1", None, Metric("function", function="a.b:f1")),
    ],
)
def test_metric_names_are_read(text, k, expected):
    assert parse_metric(text, k, "here") == expected


@pytest.mark.parametrize(
    ("text", "k", "hint"),
    [
        ("top11", None, "did you mean 'top1'"),
        ("topk", None, "k = 5"),
        ("topk", 0, "k = 5"),
        ("topk", True, "k = 5"),
        ("a.b:", None, "mymetrics:f1"),
        (5, None, "rmse"),
    ],
)
def test_a_wrong_metric_is_refused_with_a_next_step(text, k, hint):
    with pytest.raises(DataError, match="here") as caught:
        parse_metric(text, k, "here")
    assert hint in caught.value.hint


def test_titles_are_what_reports_show():
    assert [each.title for each in (TOP1, Metric("topk", k=5), Metric("function", function="m:f"))] == [
        "top1",
        "top5",
        "m:f",
    ]


def test_labels_are_only_needed_by_the_metrics_that_count_classes():
    check_labels(RMSE, None, "here")
    check_labels(AGREEMENT, None, "here")
    with pytest.raises(DataError, match="here"):
        check_labels(TOP1, None, "here")


def test_distortion_by_hand():
    found = distortion(np.array([3.0, 4.0], np.float32), np.array([3.0, 4.5], np.float32))
    assert found == Distortion(25.0, 0.25, 0.5)
    assert found.sqnr_db == pytest.approx(20)


@pytest.mark.parametrize(
    "pair",
    [
        (np.ones(3), np.ones(3)),
        (np.zeros(3), np.ones(3)),
        (np.ones(3), np.ones(4)),
        (np.array([1.0, np.inf]), np.ones(2)),
        (np.array(["a"]), np.array(["a"])),
        ([{"a": 1}], [{"a": 1}]),
        (np.ones(3), None),
    ],
)
def test_sqnr_is_unknown_where_it_has_no_number(pair):
    assert distortion(*pair).sqnr_db is None


def test_equal_outputs_have_a_largest_difference_of_zero_and_unequal_shapes_none():
    assert distortion(np.ones(3), np.ones(3)).max_abs == 0
    assert distortion(np.ones(3), np.ones(4)).max_abs is None
    assert merge(Distortion(1, 1, 1), distortion(np.ones(3), np.ones(4))).max_abs is None


def test_unsigned_outputs_do_not_wrap_around():
    assert distortion(np.array([0], np.uint8), np.array([255], np.uint8)).max_abs == 255


@given(hnp.arrays(np.float64, st.integers(2, 30), elements=st.floats(-1e100, 1e100)), st.data())
def test_merging_distortions_is_the_distortion_of_the_whole(values, data):
    cut = data.draw(st.integers(1, len(values) - 1))
    other = values * 0.5
    merged = merge(distortion(values[:cut], other[:cut]), distortion(values[cut:], other[cut:]))
    whole = distortion(values, other)
    assert merged.max_abs == whole.max_abs
    assert merged.signal_energy == pytest.approx(whole.signal_energy)
    assert merged.error_energy == pytest.approx(whole.error_energy)


@pytest.fixture
def own_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_metrics_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "def share(outputs, labels):\n    return 100.0 * float((outputs['y'].argmax(1) == labels).mean())\n"
        "def broken(outputs, labels):\n    raise RuntimeError('no such\\ncolumn')\n"
        "def text(outputs, labels):\n    return 'good'\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_a_function_of_the_users_own_gets_the_whole_outputs(own_metrics: str):
    state = start(Metric("function", function=f"{own_metrics}:share"))
    labels = np.array([0, 1, 2])
    for rows in (slice(0, 2), slice(2, 3)):
        before, after = logits(0, 1, 2)["y"][rows], logits(0, 0, 0)["y"][rows]
        state = add(state, {"y": before}, {"y": after}, labels=labels[rows])
    result = finish(state)
    assert result.original == 100
    assert result.compressed == pytest.approx(100 / 3)
    assert (result.samples, result.standard_error_points, result.agreement) == (3, None, pytest.approx(100 / 3))


@pytest.mark.parametrize("function", ["broken", "text"])
def test_a_function_that_fails_is_a_data_error_in_one_line(own_metrics: str, function: str):
    state = add(start(Metric("function", function=f"{own_metrics}:{function}")), logits(0), logits(0))
    with pytest.raises(DataError, match=f"{own_metrics}:{function} failed") as caught:
        finish(state)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(("function", "message"), [("shares", "has no 'shares'"), ("number", "cannot be called")])
def test_a_function_that_is_not_there_is_found_out_before_the_first_batch(own_metrics, function, message):
    with pytest.raises(DataError, match=message):
        start(Metric("function", function=f"{own_metrics}:{function}"))


def test_a_module_that_is_not_there_is_found_out_before_the_first_batch():
    with pytest.raises(DataError, match="cannot import no_such_module_at_all") as caught:
        start(Metric("function", function="no_such_module_at_all:f"))
    assert "Python path" in caught.value.hint
