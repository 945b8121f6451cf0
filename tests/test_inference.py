from __future__ import annotations

import numpy as np
import pytest
from builders import external, model, normal, parse, run
from onnx import numpy_helper

from edgecompress.errors import ModelError
from edgecompress.inference import open_session, run_session

BODY = "g (float[N, 6] x) => (float[N, 5] y) { h = MatMul(x, w)  y = Relu(h) }"


def test_inner_tensors_can_be_asked_for_and_the_model_stays_as_it_was():
    source = model(BODY, w=normal(6, 5))
    before = source.proto.SerializeToString()
    found = run_session(source, open_session(source, ["h", "y"]), {"x": normal(3, 6)})
    assert list(found) == ["y", "h"]
    np.testing.assert_array_equal(found["y"], np.maximum(found["h"], 0))
    assert source.proto.SerializeToString() == before


def test_external_data_is_read_from_the_folder_of_the_model(tmp_path):
    proto = parse(BODY)
    (tmp_path / "d.bin").write_bytes(b"----" + normal(6, 5).tobytes())
    proto.graph.initializer.append(external(numpy_helper.from_array(normal(6, 5), "w"), "d.bin", offset=4))
    found = run(model(proto, folder=tmp_path), x=normal(3, 6))["y"]
    np.testing.assert_array_equal(found, run(model(BODY, w=normal(6, 5)), x=normal(3, 6))["y"])


def test_what_the_runtime_refuses_is_a_model_error_of_one_line():
    with pytest.raises(ModelError, match=r"model\.onnx: onnxruntime .* refuses it") as caught:
        open_session(model(parse("g (float[N] x) => (float[N] y) { y = NoSuchOperator(x) }")))
    assert "\n" not in caught.value.message


def test_feeds_that_do_not_fit_are_a_model_error_that_names_the_option():
    with pytest.raises(ModelError) as caught:
        run(model(BODY, w=normal(6, 5)), x=normal(3, 7))
    assert "--shape" in caught.value.hint
