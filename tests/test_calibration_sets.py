"""The data sets and the model that ship with the project."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest

from edgecompress.data import batches, for_validation, split
from edgecompress.files import shared_folder
from edgecompress.metrics import Metric, compare
from edgecompress.model import TensorSpec, read_signature

FOLDER = shared_folder("calibration")
MODEL = FOLDER / "digits" / "digits_cnn.onnx"
WINE_INPUT = (TensorSpec("x", np.dtype(np.float32), (None, 13)),)


@pytest.fixture(scope="module")
def build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calibration_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["digits/digits.npz", "wine/wine.npz"])
def test_the_script_builds_what_is_committed_and_twice_the_same(build_script, tmp_path: Path, name: str):
    for folder in (tmp_path / "a", tmp_path / "b"):
        build_script.build(folder)
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    # bytes after compression depend on the zlib in use, what they hold does not
    with np.load(FOLDER / name) as committed, np.load(tmp_path / "a" / name) as built:
        assert committed.files == built.files
        for key in committed.files:
            np.testing.assert_array_equal(committed[key], built[key])
            assert committed[key].dtype == built[key].dtype


def test_digits_calibrate_and_test_on_different_rows():
    inputs, _ = read_signature(MODEL)
    calibration, test = split(FOLDER / "digits", None, inputs)
    assert (calibration.rows, test.rows, test.metric) == (1437, 360, Metric("top1"))
    feeds = test.feeds(0, 360)["image"]
    assert (feeds.shape, feeds.dtype, feeds.min(), feeds.max()) == ((360, 1, 8, 8), np.float32, 0, 1)
    assert set(test.labels) == set(range(10))


def test_wine_is_standardized_over_its_calibration_rows():
    calibration, test = split(FOLDER / "wine", None, WINE_INPUT)
    assert (calibration.rows, test.rows) == (142, 36)
    values = calibration.feeds(0, 142)["x"]
    # the file gives six digits of each number
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(values.std(axis=0), 1, atol=1e-4)
    assert set(test.labels) == set(calibration.labels) == {0, 1, 2}


def test_the_demo_model_is_small_keeps_its_batch_normalization_and_takes_any_batch():
    assert MODEL.stat().st_size < 400_000
    kinds = [node.op_type for node in onnx.load(MODEL).graph.node]
    assert kinds.count("BatchNormalization") == kinds.count("Conv") == 4
    assert "Gemm" in kinds
    (spec,), _ = read_signature(MODEL)
    assert spec.shape == (None, 1, 8, 8)


def test_the_demo_model_reads_held_out_digits():
    inputs, _ = read_signature(MODEL)
    test = for_validation(FOLDER / "digits", inputs)
    ((_, feeds),) = batches(test, inputs, 360)
    session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    outputs = {"logits": session.run(["logits"], feeds)[0]}
    result = compare(test.metric, outputs, outputs, test.labels, feeds)
    assert result.samples == 360
    assert result.original >= 98.0
