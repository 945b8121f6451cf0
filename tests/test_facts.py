from __future__ import annotations

import numpy as np
import pytest
from builders import data_of, model, normal, parse

from edgecompress.case import Request
from edgecompress.facts import caveats
from edgecompress.pipeline import compress
from edgecompress.recipe import Recipe, Settings

TWO_INPUTS = """g (float[N, 6] x, float[N, 6] z, int64[N, 1] mask) => (float[N, 5] y)
{ a = Add(x, z)  b = Cast<to=1>(mask)  c = Mul(a, b)  y = MatMul(c, w) }"""


def notes(data, source):
    found = caveats(source, data, data, has_data=True, too_large_to_time=False)
    return [note for note in found if "calibration" in note]


@pytest.fixture
def on_disk(tmp_path):
    def write(body, **weights):
        proto = parse(body, **weights)
        (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
        return model(proto, folder=tmp_path)

    return write


PLAIN = "g (float[N, 6] x) => (float[N, 5] y) { y = MatMul(x, w) }"


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_calibration_data_that_are_one_number_are_warned_of(on_disk, value):
    (note,) = notes(data_of(x=np.full((50, 6), value, np.float32)), on_disk(PLAIN, w=normal(6, 5)))
    assert f"the same everywhere ({value:g})" in note


def test_rows_that_are_all_the_same_are_warned_of(on_disk):
    source = on_disk(PLAIN, w=normal(6, 5))
    (note,) = notes(data_of(x=np.repeat(normal(1, 6), 50, axis=0)), source)
    assert "all 50 calibration rows are the same" in note
    assert notes(data_of(x=normal(1, 6)), source) == []  # one row alone is poor, but not broken


@pytest.mark.parametrize("place", [1, 49])
def test_a_single_value_that_differs_is_enough(on_disk, place):
    x = np.zeros((50, 6), np.float32)
    x[place, 3] = 1
    assert notes(data_of(x=x), on_disk(PLAIN, w=normal(6, 5))) == []


def test_an_input_may_be_the_same_everywhere_where_another_is_not_and_integers_do_not_count(on_disk):
    source = on_disk(TWO_INPUTS, w=normal(6, 5))
    zeros, ones = np.zeros((50, 6), np.float32), np.ones((50, 1), np.int64)
    assert notes(data_of(x=normal(50, 6), z=zeros, mask=ones), source) == []
    (note,) = notes(data_of(x=zeros, z=zeros + 1, mask=np.arange(50)[:, None]), source)
    assert "the same everywhere (0, 1)" in note


def test_one_note_says_how_many_layers_have_no_bias_for_svd_bias(tmp_path):
    body = """g (float[N, 40] x) => (float[N, 40] y) {
        a = Gemm(x, w1, b1)  b = Relu(a)  c = MatMul(b, w2)  d = Relu(c)  y = MatMul(d, w3) }"""
    weights = {f"w{number}": normal(40, 40, seed=number) for number in (1, 2, 3)}
    path = tmp_path / "model.onnx"
    path.write_bytes(parse(body, b1=normal(40), **weights).SerializeToString())
    recipe = Recipe(everywhere=Settings(factorize="svd_bias", keep=0.5, cluster="none"))
    report = compress(path, tmp_path / "out", Request(recipe=recipe))
    (note,) = [each for each in report.warnings if "svd_bias" in each]
    assert note.startswith("2 of 3 layers have no bias of their own")
    plain = Recipe(everywhere=Settings(factorize="svd", keep=0.5, cluster="none"))
    report = compress(path, tmp_path / "plain", Request(recipe=plain))
    assert not [each for each in report.warnings if "svd_bias" in each]
