"""Data sets: what is read, what is refused, which rows calibrate and which test."""

from __future__ import annotations

import os
import pickle
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from edgecompress.data import (
    Preprocess,
    batches,
    check_shapes,
    fixed_batch,
    for_validation,
    load_data,
    parse_shape,
    random_feeds,
    rows_used,
    split,
)
from edgecompress.data.description import read_description
from edgecompress.data.preprocess import apply
from edgecompress.errors import DataError, ModelError, UsageError
from edgecompress.metrics import AUTO, Metric
from edgecompress.model import TensorSpec

FLOAT = np.dtype(np.float32)


def spec(*shape: int | None, name: str = "x", dtype: object = np.float32) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


TABLE = (spec(None, 3),)
PICTURES = (spec(None, 3, 4, 6),)


def numbers(rows: int, *shape: int) -> np.ndarray:
    """Rows that can be told apart: row i is filled with i."""
    return np.broadcast_to(np.arange(rows, dtype=np.float32).reshape(-1, *[1] * len(shape)), (rows, *shape)).copy()


def npz(folder: Path, file: str = "d.npz", **arrays: np.ndarray) -> Path:
    np.savez(folder / file, **arrays)
    return folder / file


def picture(path: Path, *, size: tuple[int, int] = (6, 4), colour: tuple[int, int, int] = (10, 20, 30)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def toml(folder: Path, text: str, name: str = "dataset.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def refused(path: Path, inputs: tuple[TensorSpec, ...] = TABLE) -> DataError:
    with pytest.raises(DataError) as caught:
        load_data(path, inputs)
    assert caught.value.hint, "every error says what to do next"
    assert "\n" not in caught.value.message
    return caught.value


# arrays


def test_an_npz_is_read_by_input_name(tmp_path):
    x, y = numbers(5, 3), np.arange(10, dtype=np.int64).reshape(5, 2)
    inputs = (spec(None, 3), spec(None, 2, name="y", dtype=np.int64))
    data = load_data(npz(tmp_path, x=x, y=y, labels=np.arange(5)), inputs)
    assert (data.calibration, data.test, data.all.rows, data.all.metric) == (None, None, 5, AUTO)
    feeds = data.all.feeds(1, 3)
    np.testing.assert_array_equal(feeds["x"], x[1:3])
    np.testing.assert_array_equal(feeds["y"], y[1:3])
    assert feeds["x"].dtype == FLOAT
    assert data.all.labels.tolist() == [0, 1, 2, 3, 4]


def test_selected_rows_keep_their_labels_and_their_order(tmp_path):
    chosen = load_data(npz(tmp_path, x=numbers(5, 3), labels=np.arange(5)), TABLE).all.select([4, 0]).select([1, 0])
    assert chosen.feeds(0, 2)["x"][:, 0].tolist() == [0, 4]
    assert chosen.labels.tolist() == [0, 4]


def test_an_input_called_labels_is_an_input(tmp_path):
    inputs = (spec(None, 3, name="labels"),)
    assert load_data(npz(tmp_path, labels=numbers(2, 3)), inputs).all.labels is None


@pytest.mark.parametrize(
    ("arrays", "message", "hint"),
    [
        ({"xx": numbers(2, 3)}, "no input 'xx'", "did you mean 'x'"),
        ({"x": numbers(2, 3), "z": numbers(2, 3)}, "no input 'z'", "allowed: labels, x"),
        ({"labels": np.arange(2)}, "no array for the model's input 'x'", "x"),
        ({"x": numbers(2, 4)}, "shape (N, 4), the model takes (N, 3)", "first axis"),
        ({"x": numbers(2, 3, 1)}, "shape (N, 3, 1), the model takes (N, 3)", "first axis"),
        ({"x": numbers(2, 3).astype(np.float64)}, "is float64, the model takes float32", ".astype(np.float32)"),
        ({"x": numbers(2, 3).astype(">f4")}, "is >f4, the model takes float32", ".astype(np.float32)"),
        ({"x": numbers(0, 3)}, "'x' is empty, shape (0, 3)", "at least one row"),
        ({"x": np.float32(1)}, "single number", "first axis"),
        ({"x": numbers(2, 3), "labels": np.arange(3)}, "'x' has 2 rows, 'labels' has 3", "equal"),
        ({"x": numbers(2, 3), "labels": np.array(["a", "b"])}, "'labels' holds <U1, not numbers", "numbers"),
        ({"x": numbers(2, 3), "labels": np.array([1.0, np.nan])}, "'labels' has 1 values that are NaN", "remove"),
        ({"x": np.float32([[0], [np.nan]])}, "1 values that are NaN or infinite, the first in row 1", "remove"),
        ({"x": np.array([{}, {}], object)}, "pickled Python objects", "np.savez"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_named(tmp_path, arrays, message, hint):
    error = refused(npz(tmp_path, **arrays))
    assert message in error.message
    assert hint in error.hint


def test_rows_that_differ_between_inputs_are_named(tmp_path):
    inputs = (spec(None, 3), spec(None, 3, name="y"))
    assert "'x' has 2 rows, 'y' has 3" in refused(npz(tmp_path, x=numbers(2, 3), y=numbers(3, 3)), inputs).message


@pytest.mark.parametrize("kept", [0, 1, 10, 60, 150, -1])
def test_a_truncated_npz_is_refused(tmp_path, kept):
    path = npz(tmp_path, x=numbers(9, 3))
    path.write_bytes(path.read_bytes()[:kept])
    assert "not a readable .npz" in refused(path).message or "cannot read" in refused(path).message


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_damaged_npz_is_read_or_refused_but_never_a_traceback(tmp_path, position, value):
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, x=numbers(9, 3), labels=np.arange(9))
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(bytes(content))
    try:
        assert load_data(path, TABLE).all.rows == 9
    except DataError as error:
        assert error.hint  # noqa: PT017  # either outcome is right, a traceback is not


def test_a_pickle_under_the_name_of_an_npz_is_never_loaded(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "was_here"),))

    path = tmp_path / "d.npz"
    path.write_bytes(pickle.dumps(Hostile()))
    refused(path)
    np.savez(path, x=np.array([Hostile()], object))
    refused(path)
    assert not (tmp_path / "was_here").exists()


def test_other_files_are_refused_with_what_is_allowed(tmp_path):
    np.save(tmp_path / "single.npy", numbers(2, 3))
    (tmp_path / "single.npy").rename(tmp_path / "renamed.npz")
    assert "single array" in refused(tmp_path / "renamed.npz").message
    (tmp_path / "d.csv").write_text("1,2\n")
    assert "dataset.toml" in refused(tmp_path / "d.csv").hint
    assert "does not exist" in refused(tmp_path / "nothing.npz").message


# batches


def test_batches_of_a_free_batch_cover_all_rows(tmp_path):
    data = load_data(npz(tmp_path, x=numbers(5, 3)), TABLE).all
    found = [(rows, feeds["x"][:, 0].tolist()) for rows, feeds in batches(data, TABLE, 2)]
    assert found == [(slice(0, 2), [0, 1]), (slice(2, 4), [2, 3]), (slice(4, 5), [4])]
    assert rows_used(5, TABLE) == (5, 0)


def test_batches_of_a_fixed_batch_are_exactly_that_long(tmp_path):
    inputs = (spec(2, 3),)
    data = load_data(npz(tmp_path, x=numbers(5, 3)), inputs).all
    assert [rows for rows, _ in batches(data, inputs, 64)] == [slice(0, 2), slice(2, 4)]
    assert rows_used(5, inputs) == (4, 1)


def test_fewer_rows_than_a_fixed_batch_are_refused(tmp_path):
    inputs = (spec(4, 3),)
    data = load_data(npz(tmp_path, x=numbers(3, 3)), inputs).all
    with pytest.raises(DataError, match="3 rows, but the model takes exactly 4"):
        next(batches(data, inputs, 64))


def test_inputs_without_a_common_axis_of_rows_are_refused():
    assert fixed_batch((spec(None, 3), spec(1, 3, name="y"))) == 1
    with pytest.raises(DataError, match="different fixed leading dimensions"):
        fixed_batch((spec(1, 3), spec(2, 3, name="y")))
    with pytest.raises(DataError, match="'x' is a scalar"):
        fixed_batch((spec(),))


# which rows calibrate and which test


@pytest.mark.parametrize(("rows", "tests"), [(2, 1), (9, 1), (10, 2), (100, 20), (5000, 1000), (6000, 1000)])
def test_the_last_fifth_tests_where_no_split_is_named(tmp_path, rows, tests):
    calibration, test = split(npz(tmp_path, x=numbers(rows, 3), labels=np.arange(rows)), None, TABLE)
    assert (calibration.rows, test.rows) == (rows - tests, tests)
    assert test.feeds(0, rows)["x"][:, 0].tolist() == list(range(rows - tests, rows))
    assert test.labels.tolist() == list(range(rows - tests, rows))
    assert calibration.labels[-1] == rows - tests - 1


def test_the_last_fifth_fills_a_fixed_batch(tmp_path):
    _, test = split(npz(tmp_path, x=numbers(12, 3)), None, (spec(4, 3),))
    assert test.rows == 4


def test_one_row_cannot_both_calibrate_and_test(tmp_path):
    with pytest.raises(DataError, match="one row cannot"):
        split(npz(tmp_path, x=numbers(1, 3)), None, TABLE)


def test_with_test_data_all_rows_of_both_are_used_even_where_they_are_equal(tmp_path):
    first, second = npz(tmp_path, "a.npz", x=numbers(5, 3)), npz(tmp_path, "b.npz", x=numbers(4, 3))
    calibration, test = split(first, second, TABLE)
    assert (calibration.rows, test.rows) == (5, 4)


def test_the_same_file_as_data_and_test_data_is_refused(tmp_path):
    path = npz(tmp_path, x=numbers(5, 3))
    (tmp_path / "link.npz").symlink_to(path)
    for other in (path, tmp_path / "link.npz", tmp_path / "." / "d.npz"):
        with pytest.raises(DataError) as caught:
            split(path, other, TABLE)
        assert "calibration and test rows never overlap" in caught.value.hint


def test_a_folder_and_its_dataset_toml_are_the_same_data(tmp_path):
    npz(tmp_path, x=numbers(5, 3))
    path = toml(tmp_path, 'arrays = "d.npz"')
    with pytest.raises(DataError, match="both as the data and as the test data"):
        split(tmp_path, path, TABLE)


def test_two_descriptions_of_the_same_rows_overlap(tmp_path):
    npz(tmp_path, x=numbers(5, 3))
    first = toml(tmp_path, 'arrays = "d.npz"\n[calibration]\nrows = [0, 3]', "a.toml")
    second = toml(tmp_path, 'arrays = "d.npz"\n[test]\nrows = [2, 5]', "b.toml")
    with pytest.raises(DataError, match="1 rows are in both"):
        split(first, second, TABLE)


def test_validation_uses_all_rows_of_an_npz_and_the_test_split_of_a_dataset_toml(tmp_path):
    path = npz(tmp_path, x=numbers(5, 3))
    assert for_validation(path, TABLE).rows == 5
    assert for_validation(toml(tmp_path, 'arrays = "d.npz"'), TABLE).rows == 5
    both = toml(tmp_path, 'arrays = "d.npz"\n[calibration]\nrows = [0, 3]\n[test]\nrows = [3, 5]')
    assert for_validation(both, TABLE).feeds(0, 9)["x"][:, 0].tolist() == [3, 4]
    only = toml(tmp_path, 'arrays = "d.npz"\n[calibration]\nrows = [0, 3]')
    with pytest.raises(DataError, match="calibration only"):
        for_validation(only, TABLE)


# dataset.toml


def test_arrays_of_a_dataset_toml_are_preprocessed(tmp_path):
    pixels = np.arange(2 * 2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 2, 3)
    npz(tmp_path, pixels=pixels, classes=np.array([3, 4], np.uint8))
    toml(
        tmp_path,
        """
        name = "tiny"
        arrays = "d.npz"
        inputs = "pixels"
        labels = "classes"
        metric = "topk"
        k = 2
        [preprocess]
        channel_order = "BGR"
        scale = "1/2"
        mean = [1, 2, 3]
        std = 4
        layout = "NCHW"
        """,
    )
    data = load_data(tmp_path, (spec(None, 3, 2, 2),)).all
    expected = ((pixels[..., ::-1] / 2 - [1, 2, 3]) / 4).transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_array_equal(data.feeds(0, 2)["x"], expected)
    assert (data.name, data.labels.tolist(), data.metric) == ("tiny", [3, 4], Metric("topk", k=2))


def test_splits_take_their_own_keys_and_share_those_at_the_top(tmp_path):
    arrays = {"a": numbers(6, 3), "b": 10 + numbers(4, 3), "ya": np.arange(6), "yb": np.arange(4)}
    npz(tmp_path, **arrays)
    path = toml(
        tmp_path,
        'arrays = "d.npz"\nmetric = "top1"\n'
        '[calibration]\ninputs = "a"\nlabels = "ya"\nrows = [2, 4]\n[test]\ninputs = "b"\nlabels = "yb"\n',
    )
    data = load_data(path, TABLE)
    assert data.calibration.feeds(0, 9)["x"][:, 0].tolist() == [2, 3]
    assert data.calibration.labels.tolist() == [2, 3]
    assert data.test.feeds(0, 9)["x"][:, 0].tolist() == [10, 11, 12, 13]
    assert split(path, None, TABLE)[1].rows == 4
    assert data.all.rows == 6
    assert data.all.select([5, 1, 0]).feeds(0, 3)["x"][:, 0].tolist() == [13, 3, 2]
    assert data.all.labels.tolist() == [2, 3, 0, 1, 2, 3]


def test_several_inputs_are_named_one_by_one(tmp_path):
    npz(tmp_path, a=numbers(2, 3).astype(np.uint8), b=numbers(2, 2).astype(np.int32))
    path = toml(
        tmp_path,
        'arrays = "d.npz"\ninputs = { x = "a", y = "b" }\n'
        '[preprocess.x]\nscale = 0.5\n[preprocess.y]\ndtype = "int64"\n',
    )
    feeds = load_data(path, (spec(None, 3), spec(None, 2, name="y", dtype=np.int64))).all.feeds(0, 2)
    assert feeds["x"].tolist() == [[0] * 3, [0.5] * 3]
    assert feeds["y"].dtype == np.int64


def test_a_table_with_a_mean_for_each_column(tmp_path):
    npz(tmp_path, x=np.array([[1.0, 2, 3]]))
    path = toml(tmp_path, 'arrays = "d.npz"\n[preprocess]\nmean = [1, 2, 2]\nstd = [1, 1, 2]')
    feeds = load_data(path, TABLE).all.feeds(0, 1)["x"]
    assert feeds.tolist() == [[0, 0, 0.5]]
    assert feeds.dtype == FLOAT


def test_pixels_are_binarized_and_flattened(tmp_path):
    npz(tmp_path, x=np.array([[[0, 1], [5, 6]]], np.uint8))
    path = toml(tmp_path, 'arrays = "d.npz"\n[preprocess]\nbinarize = 5\nlayout = "flat"')
    assert load_data(path, (spec(None, 4),)).all.feeds(0, 1)["x"].tolist() == [[0, 0, 0, 1]]


def test_the_root_may_hold_an_environment_variable(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    npz(tmp_path / "elsewhere", x=numbers(2, 3))
    path = toml(tmp_path, 'root = "${SOME_ROOT}/elsewhere"\narrays = "d.npz"')
    monkeypatch.delenv("SOME_ROOT", raising=False)
    assert "export SOME_ROOT=" in refused(path).hint
    monkeypatch.setenv("SOME_ROOT", str(tmp_path))
    assert load_data(path, TABLE).all.rows == 2


SPLIT = 'arrays = "d.npz"\n[calibration]\nrows = [0, 3]\n'


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("arrays = ", "not valid TOML", "docs/data.md"),
        ("", "neither arrays nor images", "arrays ="),
        ('aray = "d.npz"', "unknown key 'aray'", "did you mean 'arrays'"),
        ('arrays = "d.npz"\n[preprocess]\nscal = 1', "unknown key 'scal'", "did you mean 'scale'"),
        ('arrays = "d.npz"\n[test]\nrow = [0, 1]', "unknown key 'row'", "did you mean 'rows'"),
        ('arrays = "no.npz"', "no.npz", "check the path"),
        ("arrays = 3", "arrays = 3", "text"),
        ('arrays = "d.npz"\nimages = "."', "both arrays and images", "remove the other"),
        ('arrays = "d.npz"\ninputs = "xs"', "no array 'xs'", "did you mean 'x'"),
        ('arrays = "d.npz"\ninputs = 3', "inputs = 3", "INPUT"),
        ('arrays = "d.npz"\ninputs = { z = "x" }', "no input 'z'", "allowed"),
        ('arrays = "d.npz"\nlabels = "label"', "no array 'label'", "did you mean 'labels'"),
        ('arrays = "d.npz"\nmetric = "top2"', "no metric 'top2'", "did you mean 'topk'"),
        ('arrays = "d.npz"\nmetric = "top1"', "needs labels", "agreement"),
        ('arrays = "d.npz"\nmetric = "topk"', "needs k", "k = 5"),
        ('arrays = "d.npz"\nmetric = "top1"\nk = 3', "k is for", "remove k"),
        ('arrays = "d.npz"\nmetric = "top1"\nlabels = "floats"', "labels are float64", ".astype(np.int64)"),
        ('arrays = "d.npz"\n[test]\nrows = [4, 6]', "only 5", "exclusive"),
        ('arrays = "d.npz"\n[test]\nrows = [3, 3]', "rows = [3, 3]", "start < stop"),
        ('arrays = "d.npz"\n[test]\nrows = [true, 3]', "rows = [True, 3]", "start < stop"),
        ('arrays = "d.npz"\n[test]\nsplit = "a"', "arrays have none", "rows ="),
        ('arrays = "d.npz"\ntest = 3', "test = 3", "[test]"),
        (SPLIT + "[test]\nrows = [2, 5]", "1 rows are in both the calibration and the test set", "never overlap"),
        (SPLIT + "[test]", "3 rows are in both the calibration and the test set", "never overlap"),
        ('arrays = "d.npz"\n[preprocess]\nscale = "1/0"', "scale = '1/0'", "1/255"),
        ('arrays = "d.npz"\n[preprocess]\nscale = nan', "scale = nan", "1/255"),
        ('arrays = "d.npz"\n[preprocess]\nmean = []', "mean = []", "channel or column"),
        ('arrays = "d.npz"\n[preprocess]\nmean = [1, 2]', "mean needs a last axis of 2", "[preprocess]"),
        ('arrays = "d.npz"\n[preprocess]\nstd = [1, 0, 1]', "std has a zero", "takes std 1"),
        ('arrays = "d.npz"\n[preprocess]\nlayout = "NHCW"', "layout = 'NHCW'", "did you mean 'NHWC'"),
        ('arrays = "d.npz"\n[preprocess]\nlayout = "NCHW"', "layout NCHW needs", "[preprocess]"),
        ('arrays = "d.npz"\n[preprocess]\nchannel_order = "BGR"', "channel_order needs", "[preprocess]"),
        ('arrays = "d.npz"\n[preprocess]\ndtype = "float31"', "dtype = 'float31'", "did you mean 'float32'"),
        ('arrays = "d.npz"\n[preprocess]\ndtype = "int64"', "is int64, the model takes float32", ".astype"),
        ('arrays = "d.npz"\n[preprocess]\nbinarize = 1\nscale = 1', "nothing to do after it", "remove one"),
        ('arrays = "d.npz"\n[preprocess.y]\nscale = 1', "no such input", "allowed: x"),
        ('arrays = "d.npz"\n[preprocess]\nresize = 5', "resize without crop", "crop = \"centre\""),
        ('arrays = "d.npz"\npreprocess = 3', "preprocess = 3", "[preprocess]"),
        ('arrays = "d.npz"\n[preprocess]\nsize = [1]', "size = [1]", "[height, width]"),
        ('images = "."\ninputs = "x"', "inputs names arrays", "remove inputs"),
        ('root = "${NOT_SET_ANYWHERE}"', "NOT_SET_ANYWHERE", "export"),
    ],
)  # fmt: skip
def test_a_wrong_dataset_toml_is_refused_with_a_next_step(tmp_path, text, message, hint):
    npz(tmp_path, x=numbers(5, 3), labels=np.arange(5), floats=np.arange(5.0))
    error = refused(toml(tmp_path, text))
    assert message in error.message
    assert hint in error.hint
    assert "dataset.toml" in error.message or "npz" in error.message or "input" in error.message


def test_preprocessing_of_several_inputs_must_say_which(tmp_path):
    npz(tmp_path, x=numbers(5, 3), y=numbers(5, 3))
    path = toml(tmp_path, 'arrays = "d.npz"\n[preprocess]\nscale = 2')
    assert "[preprocess.x]" in refused(path, (spec(None, 3), spec(None, 3, name="y"))).hint


def test_values_outside_the_range_of_a_whole_number_type_are_refused(tmp_path):
    npz(tmp_path, x=numbers(1, 3) + 100)
    path = toml(tmp_path, 'arrays = "d.npz"\n[preprocess]\nscale = 2')
    inputs = (spec(None, 3, dtype=np.int8),)
    assert "int8 holds -128 to 127" in refused(path, inputs).message
    toml(tmp_path, 'arrays = "d.npz"\n[preprocess]\nscale = 1.256')
    assert load_data(path, inputs).all.feeds(0, 1)["x"].tolist() == [[126] * 3]


@given(st.integers(0, 2**32 - 1), st.sampled_from(["NCHW", "NHWC", "flat"]))
def test_preprocessing_rows_together_is_preprocessing_each(seed, layout):
    values = np.random.default_rng(seed).integers(0, 256, (4, 3, 2, 3)).astype(np.uint8)
    steps = Preprocess(scale=1 / 255, mean=(0.1, 0.2, 0.3), std=(0.5,), layout=layout, channel_order="BGR")
    together = apply(steps, values, FLOAT, "x")
    each = np.concatenate([apply(steps, values[row : row + 1], FLOAT, "x") for row in range(4)])
    np.testing.assert_array_equal(together, each)
    assert together.flags.c_contiguous


REPOSITORY = Path(__file__).parents[1]
DOCUMENTED = [
    pytest.param(block.split("```")[0], id=f"{page}-{number}")
    for page in ("docs/data.md", "calibration/README.md")
    for number, block in enumerate((REPOSITORY / page).read_text(encoding="utf-8").split("```toml\n")[1:])
]


@pytest.mark.parametrize("text", DOCUMENTED)
def test_the_documented_examples_are_allowed(tmp_path, text):
    read_description(toml(tmp_path, textwrap.dedent(text)))


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "benchmarks" / "datasets").glob("*.toml")), ids=lambda path: path.stem
)
def test_the_data_sets_of_the_benchmarks_are_allowed(path, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGECOMPRESS_BENCH_DATA", str(tmp_path))
    description = read_description(path)
    source = description.parts["test"] if description.parts else description.whole
    assert tmp_path in (source.arrays or source.images).parents


# pictures


def test_a_folder_of_pictures_is_scaled_to_0_to_1_in_the_order_of_names(tmp_path):
    picture(tmp_path / "b.png", colour=(0, 51, 255))
    picture(tmp_path / "a.PNG", colour=(255, 255, 255))
    (tmp_path / "notes.txt").write_text("no picture")
    data = load_data(tmp_path, PICTURES).all
    feeds = data.feeds(0, 2)["x"]
    assert (feeds.shape, feeds.dtype, data.rows, data.labels) == ((2, 3, 4, 6), FLOAT, 2, None)
    np.testing.assert_allclose(feeds[1, :, 0, 0], [0, 0.2, 1], rtol=1e-6)
    assert feeds[0].min() == 1


def test_pictures_become_grey_or_channels_last_as_the_model_takes_them(tmp_path):
    picture(tmp_path / "a.png", colour=(100, 100, 100))
    assert load_data(tmp_path, (spec(None, 1, 4, 6),)).all.feeds(0, 1)["x"].shape == (1, 1, 4, 6)
    last = load_data(tmp_path, (spec(1, 4, 6, 3, dtype=np.uint8),)).all.feeds(0, 1)["x"]
    assert last.shape == (1, 4, 6, 3)
    assert (last == 100).all()


def test_larger_pictures_are_scaled_to_cover_and_cropped_to_the_centre(tmp_path):
    image = Image.new("RGB", (20, 8), (0, 0, 0))  # 12 x 8 in the middle remain of 20 x 8, then 6 x 4
    image.paste((255, 255, 255), (4, 0, 16, 8))
    image.save(tmp_path / "a.png")
    found = load_data(tmp_path, PICTURES).all.feeds(0, 1)["x"]
    assert found[..., 1:-1].min() == 1
    assert found.min() > 0.8  # the filter of the resize lets some of the black in at the edges


def test_labels_csv_gives_labels_and_splits(tmp_path):
    for name in "abcd":
        picture(tmp_path / f"{name}.png", colour=(ord(name), 0, 0))
    (tmp_path / "labels.csv").write_text(
        "file,label,split\nd.png,3,test\na.png,0,calibration\nb.png,1,test\nc.png,2,unused\n"
    )
    data = load_data(tmp_path, PICTURES)
    assert (data.calibration.rows, data.test.rows, data.all.rows) == (1, 2, 4)
    assert data.test.labels.tolist() == [3, 1]
    reds = (data.test.feeds(0, 2)["x"][:, 0, 0, 0] * 255).round().tolist()
    assert reds == [ord("d"), ord("b")]
    assert for_validation(tmp_path, PICTURES).rows == 2


@pytest.mark.parametrize(
    ("table", "message", "hint"),
    [
        ("file,label\na.png,x\n", "label 'x' is not a number", "counted from 0"),
        ("file,label\na.png,nan\n", "label 'nan' is not a number", "counted from 0"),
        ("file,label\nz.png,1\n", "z.png does not exist", "relative"),
        ("file,lable\na.png,1\n", "unknown column 'lable'", "did you mean 'label'"),
        ("label\n1\n", "no column 'file'", "file,label"),
        ("file,label\na.png\n", "line 2", "one line"),
        ("file,label\na.png,1,2\n", "line 2", "one line"),
        ("file,label\na.png,1\na.png,1\n", "1 files are listed twice", "one line"),
        ("file,label\na.png,1\n", "1 pictures of the folder have no label, the first is b.png", "add a line"),
        ("", "no column 'file'", "file,label"),
        ("file,label\n", "2 pictures of the folder have no label", "add a line"),
    ],
)
def test_a_wrong_labels_csv_is_refused_with_its_line(tmp_path, table, message, hint):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "labels.csv").write_text(table)
    error = refused(tmp_path, PICTURES)
    assert message in error.message
    assert hint in error.hint


def test_pictures_of_a_dataset_toml_are_cropped_and_split_by_the_csv(tmp_path):
    (tmp_path / "p").mkdir()
    image = Image.new("RGB", (8, 6), (1, 2, 3))
    image.putpixel((1, 1), (9, 9, 9))  # the first pixel of the middle 6 x 4
    image.save(tmp_path / "p" / "a.png")
    picture(tmp_path / "p" / "b.png", size=(8, 6))
    (tmp_path / "p" / "labels.csv").write_text("file,label,split\na.png,0,train\nb.png,1,val\n")
    text = 'images = "p"\n[preprocess]\ncrop = "centre"\nchannel_order = "BGR"\nmean = [3, 2, 1]\n'
    path = toml(tmp_path, text + '[calibration]\nsplit = "val"\n[test]\nsplit = "train"\n')
    data = load_data(path, PICTURES)
    feeds = data.test.feeds(0, 1)["x"]
    assert feeds[0, :, 0, 0].tolist() == [6, 7, 8]
    assert feeds[0, :, 1:, 1:].any() == np.False_
    assert (data.test.labels.tolist(), data.calibration.labels.tolist()) == ([0], [1])
    toml(tmp_path, text + '[test]\nsplit = "vall"\n')
    assert "found: train, val" in refused(path, PICTURES).hint
    toml(tmp_path, text + '[calibration]\nsplit = "val"\n[test]\nrows = [1, 2]\n')
    assert "1 rows are in both" in refused(path, PICTURES).message


def test_pictures_for_a_flat_input_need_their_size(tmp_path):
    picture(tmp_path / "a.png")
    inputs = (spec(None, 4 * 6),)
    path = toml(tmp_path, 'images = "."\n[preprocess]\nsize = [4, 6]\nlayout = "flat"')
    assert load_data(path, inputs).all.feeds(0, 1)["x"].shape == (1, 24)
    toml(tmp_path, 'images = "."\n[preprocess]\nsize = [4, 5]\nlayout = "flat"')
    assert "do not make 24" in refused(path, inputs).message


def test_a_picture_too_small_for_its_crop_is_named(tmp_path):
    picture(tmp_path / "a.png", size=(5, 4))
    path = toml(tmp_path, 'images = "."\n[preprocess]\ncrop = "centre"')
    error = refused(path, PICTURES)
    assert "a.png: 5 x 4 pixels are too few for a crop of 6 x 4" in error.message
    assert 'resize = "cover"' in error.hint
    toml(tmp_path, 'images = "."\n[preprocess]\ncrop = "centre"\nresize = 4')
    assert "too few" in refused(path, PICTURES).message  # the shorter side has 4 already
    toml(tmp_path, 'images = "."\n[preprocess]\ncrop = "centre"\nresize = 8')
    assert load_data(path, PICTURES).all.feeds(0, 1)["x"].shape == (1, 3, 4, 6)


def test_a_file_that_is_no_picture_is_found_before_anything_runs(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("text")
    assert "b.png: not a readable picture" in refused(tmp_path, PICTURES).message


def test_a_truncated_picture_is_named_when_it_is_decoded(tmp_path):
    picture(tmp_path / "a.png", size=(60, 40))
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000])
    data = load_data(tmp_path, PICTURES).all
    with pytest.raises(DataError, match=r"b\.png: not a readable picture"):
        data.feeds(0, 2)


def test_pixels_of_16_bits_are_refused_instead_of_cut_off(tmp_path):
    Image.fromarray(np.full((4, 6), 40000, np.uint16)).save(tmp_path / "a.png")
    assert "8 bits a channel" in refused(tmp_path, (spec(None, 1, 4, 6),)).message


def test_pictures_for_models_that_take_none_are_refused(tmp_path):
    picture(tmp_path / "a.png")
    assert "pictures do not fit input 'x' of shape (N, 3)" in refused(tmp_path, TABLE).message
    assert (
        "leaves the size of its pictures open: (N, 3, ?, ?)" in refused(tmp_path, (spec(None, 3, None, None),)).message
    )
    assert "2 inputs (x, y)" in refused(tmp_path, (*PICTURES, spec(None, 1, name="y"))).message


def test_an_empty_folder_is_refused(tmp_path):
    assert "no pictures" in refused(tmp_path, PICTURES).message


# random inputs


def test_random_inputs_fill_in_free_dimensions():
    inputs = (spec(None, 3, None), spec(2, 5, name="y"), spec(name="scalar"))
    feeds = random_feeds(inputs, rows=4, integer_limits={}, shapes={})
    assert {name: values.shape for name, values in feeds.items()} == {"x": (4, 3, 8), "y": (2, 5), "scalar": ()}
    feeds = random_feeds(inputs, rows=4, integer_limits={}, shapes={"x": (1, 3, 16)})
    assert feeds["x"].shape == (1, 3, 16)


def test_random_inputs_have_the_models_types_and_stay_below_their_limits():
    dtypes = [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int64, np.uint64, np.bool_]
    inputs = tuple(spec(None, 50, name=np.dtype(each).name, dtype=each) for each in dtypes)
    limits = {"int64": 7, "int8": 10**6}
    feeds = random_feeds(inputs, rows=20, integer_limits=limits, shapes={})
    assert [feeds[each.name].dtype for each in inputs] == [each.dtype for each in inputs]
    assert set(np.unique(feeds["int64"])) == set(range(7))
    assert feeds["int8"].min() >= 0
    assert feeds["int8"].max() > 1
    assert set(np.unique(feeds["uint8"])) == {0, 1}
    assert abs(feeds["float32"].std() - 1) < 0.1  # 1,000 draws: the standard error is 0.02


def test_random_inputs_are_the_same_for_the_same_seed():
    first, again, other = (
        random_feeds(TABLE, rows=2, integer_limits={}, shapes={}, seed=seed)["x"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_no_random_text_is_drawn():
    with pytest.raises(ModelError, match="holds object"):
        random_feeds((spec(None, dtype=object),), rows=1, integer_limits={}, shapes={})


def test_shapes_are_read():
    assert parse_shape("name=1,16") == ("name", (1, 16))
    assert parse_shape("a=b:0=3") == ("a=b:0", (3,))


@pytest.mark.parametrize(
    "text", ["", "x", "x=", "=1", "x=0", "x=-1", "x=1,", "x=1.5", "x=a", "x=1x2", "x=²", "x=9999999999"]
)
def test_malformed_shapes_are_usage_errors(text):
    with pytest.raises(UsageError, match="NAME=DIMS") as caught:
        parse_shape(text)
    assert "--shape tokens=1,16" in caught.value.hint


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"tokens": (1, 3)}, "no input 'tokens'"),
        ({"x": (1, 4)}, "does not fit the model's x=?,3"),
        ({"x": (1,)}, "does not fit"),
    ],
)
def test_shapes_that_do_not_fit_the_model_are_usage_errors(shapes, message):
    with pytest.raises(UsageError) as caught:
        check_shapes(shapes, TABLE)
    assert message in caught.value.message
