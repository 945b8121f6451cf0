from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import tiny

from edgecompress import validate as module
from edgecompress.container import pack
from edgecompress.data import for_validation
from edgecompress.errors import ModelError, ToleranceError
from edgecompress.metrics import AUTO, Comparison
from edgecompress.metrics.distortion import UNKNOWN, Distortion
from edgecompress.model import read_signature
from edgecompress.validate import TestRows as Rows
from edgecompress.validate import Validation, random_rows, require, rows_of, sample_feeds, validate

if TYPE_CHECKING:
    from conftest import Cli


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return tiny.mlp(tmp_path / "a.onnx"), tiny.mlp(tmp_path / "b.onnx", seed=3)


def random_test(path: Path, rows: int = 12) -> Rows:
    return random_rows(read_signature(path)[0], {}, {}, rows=rows)


def in_batches(test: Rows, size: int) -> Rows:
    """Return the same rows, a few at a time."""

    def read() -> Iterator:
        for feeds, _ in test.read():
            for start in range(0, test.rows, size):
                yield {name: values[start : start + size] for name, values in feeds.items()}, None

    return replace(test, read=read)


def test_a_model_is_equal_to_itself_in_every_form(pair, tmp_path) -> None:
    pack(pair[0], tmp_path / "a.ecz")
    found = validate(pair[0], tmp_path / "a.ecz", random_test(pair[0])).comparison
    assert (found.agreement, found.drop_points, found.samples) == (100.0, 0.0, 12)
    assert found.outputs["y"].error_energy == 0
    assert found.outputs["y"].signal_energy > 0


def test_the_distortion_is_that_of_numpy(pair) -> None:
    test = random_test(pair[0])
    feeds, _ = next(test.read())
    outputs = []
    for seed in (0, 3):
        hidden = feeds["x"] @ tiny.normal(16, 64, seed=seed)
        outputs.append(np.maximum(hidden, 0) @ tiny.normal(64, 4, seed=seed + 1))
    error = outputs[1] - outputs[0]
    found = validate(*pair, test).comparison
    assert found.outputs["y"].sqnr_db == pytest.approx(
        10 * np.log10((outputs[0] ** 2).sum() / (error**2).sum()), abs=1e-4
    )
    assert found.outputs["y"].max_abs == pytest.approx(np.abs(error).max(), rel=1e-5)
    assert found.agreement == pytest.approx(100 * (outputs[0].argmax(-1) == outputs[1].argmax(-1)).mean())


@pytest.mark.parametrize("limit", [1, 2000, 1 << 30])
def test_one_after_the_other_gives_what_side_by_side_gives(pair, own_tempdir, monkeypatch, limit) -> None:
    monkeypatch.setattr(module, "WAITING_LIMIT_BYTES", limit)
    test = in_batches(random_test(pair[0]), 4)
    together, apart = validate(*pair, test), validate(*pair, test, low_memory=True)
    assert apart.comparison.outputs == together.comparison.outputs
    assert apart.comparison.agreement == together.comparison.agreement
    assert list(own_tempdir.iterdir()) == []


def test_one_after_the_other_never_holds_both_and_bounds_what_waits(pair, own_tempdir, monkeypatch) -> None:
    alive, most_alive, most_waiting = set(), [], []

    class Watched(module.Worker):
        def __enter__(self):
            alive.add(id(self))
            most_alive.append(len(alive))
            return super().__enter__()

        def __exit__(self, *details):
            alive.discard(id(self))
            super().__exit__(*details)

        def run(self, feeds):
            most_waiting.append(sum(f.stat().st_size for f in own_tempdir.rglob("*.npz")))
            return super().run(feeds)

    monkeypatch.setattr(module, "Worker", Watched)
    monkeypatch.setattr(module, "WAITING_LIMIT_BYTES", 6000)
    validate(*pair, in_batches(random_test(pair[0]), 1), low_memory=True)
    assert max(most_alive) == 1
    assert len(most_alive) > 2  # the limit was reached, so that each was opened more than once
    assert 0 < max(most_waiting) < 6000 + 2000


def test_progress_counts_every_row_and_ends_at_all(pair) -> None:
    seen: list[tuple[int, int]] = []
    validate(*pair, in_batches(random_test(pair[0]), 5), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 12), (10, 12), (12, 12)]


def test_names_with_dots_and_slashes_and_outputs_of_all_kinds_are_compared(tmp_path) -> None:
    body = """g (float[N, 16] IN) => (float[N, 4] A, int64[N, 1] TOP, float[N, 0] empty, bool[N, 4] CD) {
        A = MatMul(IN, w)  TOP = ArgMax <axis = 1> (A)
        empty = Slice(IN, zero, zero, one)  CD = Greater(A, half) }"""
    names = {"in/x.0:0": "IN", "a/b.0": "A", "top.1": "TOP", "c\\d": "CD"}  # the text format has no such names
    weights = {"zero": np.array([0], np.int64), "one": np.array([1], np.int64), "half": np.array(0.5, np.float32)}
    paths = []
    for seed in (0, 1):
        path = tiny.save(tmp_path / f"{seed}.onnx", body, w=tiny.normal(16, 4, seed=seed), **weights)
        model = onnx.load(path)
        for odd, plain in names.items():
            for node in model.graph.node:
                for place in (node.input, node.output):
                    place[:] = [odd if name == plain else name for name in place]
            for value in (*model.graph.input, *model.graph.output):
                value.name = odd if value.name == plain else value.name
        onnx.save(model, path)
        paths.append(path)
    for low_memory in (False, True):
        found = validate(paths[0], paths[1], random_test(paths[0]), low_memory=low_memory).comparison
        assert list(found.outputs) == ["a/b.0", "top.1", "empty", "c\\d"]
        assert found.outputs["a/b.0"].sqnr_db is not None
        assert found.outputs["top.1"].max_abs in (1.0, 2.0, 3.0)
        assert found.outputs["empty"].max_abs == 0.0
        assert found.outputs["c\\d"].max_abs == 1.0


def test_strings_are_outputs_that_cannot_be_measured(tmp_path) -> None:
    body = "g (float[N, 2] x) => (string[N, 2] y) { y = Cast <to = 8> (x) }"
    model = tiny.save(tmp_path / "m.onnx", body)
    for low_memory in (False, True):
        found = validate(model, model, random_test(model), low_memory=low_memory).comparison
        assert found.outputs["y"].max_abs is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            tiny.MLP.replace("float[N, 4] y)", "float[N, 4] y, float[N, 64] h)"),
            "different outputs: y float32 in .*h float32",
        ),
        (tiny.MLP.replace(" x)", " z)").replace("(x,", "(z,"), "different inputs: x float32 in .*, but z float32"),
    ],
)
def test_models_of_different_signatures_cannot_be_compared(pair, tmp_path, body, words) -> None:
    other = tiny.save(tmp_path / "other.onnx", body, w1=tiny.normal(16, 64), w2=tiny.normal(64, 4))
    with pytest.raises(ModelError, match=words):
        validate(pair[0], other, random_test(pair[0]))


def test_agreement_is_unknown_where_there_is_nothing_to_choose(cli: Cli, tmp_path) -> None:
    body = "g (float[N, 16] x) => (float[N, 1] y) { y = MatMul(x, w) }"
    model = tiny.save(tmp_path / "m.onnx", body, w=tiny.normal(16, 1))
    data = tiny.rows(tmp_path / "d.npz")
    outcome = cli("validate", model, model, "--data", data, "--json")
    assert outcome.code == 0
    assert outcome.json["accuracy"]["agreement"] is None
    assert outcome.json["accuracy"]["samples"] == 20
    assert outcome.json["outputs"] == {"y": {"sqnr_db": None, "max_abs": 0.0}}


def test_rows_that_do_not_fill_a_fixed_batch_are_not_counted(tmp_path) -> None:
    body = tiny.MLP.replace("[N,", "[8,")
    model = tiny.save(tmp_path / "m.onnx", body, w1=tiny.normal(16, 64), w2=tiny.normal(64, 4))
    inputs = read_signature(model)[0]
    test = rows_of(for_validation(tiny.rows(tmp_path / "d.npz"), inputs), inputs)
    found = validate(model, model, test)
    assert (test.rows, found.comparison.samples) == (16, 16)
    assert "16 rows" in found.data


def test_one_run_has_one_row_where_the_batch_is_free(pair, tmp_path) -> None:
    inputs = read_signature(pair[0])[0]
    assert sample_feeds(random_test(pair[0]), inputs, {})["x"].shape == (1, 16)
    given = {"x": (3, 16)}
    assert sample_feeds(random_rows(inputs, {}, given), inputs, given)["x"].shape == (3, 16)


def comparison(*, drop: float | None = 0.0, **outputs: Distortion) -> Validation:
    return Validation(Comparison(AUTO, 90.0, None, drop, None, 10, None, outputs), "data", 1.0)


@pytest.mark.parametrize(
    ("found", "limits", "words"),
    [
        (
            comparison(y=Distortion(100.0, 1.0, 1.0)),
            {"min_sqnr_db": 20.01},
            "output 'y': SQNR 20.00 dB is below 20.01 dB",
        ),
        (comparison(y=UNKNOWN), {"min_sqnr_db": 1.0}, "'y': SQNR unknown"),
        (comparison(y=Distortion(0.0, 1.0, 1.0)), {"min_sqnr_db": 1.0}, "'y': SQNR unknown"),
        (comparison(drop=0.51), {"max_drop": 0.5}, "drop 0.51 is above 0.5 points"),
        (comparison(drop=None), {"max_drop": 100.0}, "drop unknown"),
    ],
)
def test_a_missed_tolerance_says_by_how_much(found, limits, words) -> None:
    with pytest.raises(ToleranceError, match=words):
        require(found, **{"min_sqnr_db": None, "max_drop": None, **limits})


def test_a_tolerance_that_is_met_is_silent() -> None:
    good = comparison(drop=0.5, y=Distortion(100.0, 1.0, 1.0), same=Distortion(5.0, 0.0, 0.0))
    require(good, min_sqnr_db=20.0, max_drop=0.5)
    require(comparison(drop=-3.0, y=UNKNOWN), min_sqnr_db=None, max_drop=0.0)
    require(comparison(drop=None, y=UNKNOWN), min_sqnr_db=None, max_drop=None)


def test_nothing_is_left_in_the_temporary_folder_when_a_model_fails(pair, tmp_path, own_tempdir) -> None:
    body = "g (float[N, 16] x) => (float[N, 4] y) { a = Reshape(x, shape) b = MatMul(a, w) y = Identity(b) }"
    bad = tiny.save(tmp_path / "bad.onnx", body, w=tiny.normal(7, 4), shape=np.array([-1, 7], np.int64))
    for low_memory in (False, True):
        with pytest.raises(ModelError, match=r"bad\.onnx"):
            validate(pair[0], bad, random_test(pair[0]), low_memory=low_memory)
    assert list(own_tempdir.iterdir()) == []
    assert tempfile.gettempdir() == str(own_tempdir)
