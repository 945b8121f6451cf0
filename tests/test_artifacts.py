from __future__ import annotations

import json

import numpy as np
import pytest
from builders import external, normal, parse
from onnx import numpy_helper

from edgecompress.artifacts import artifact_bytes, is_container, open_artifact
from edgecompress.container import pack
from edgecompress.errors import FormatError, ModelError

BODY = "g (float[N, 60] x) => (float[N, 50] y) { y = MatMul(x, w) }"


@pytest.fixture
def onnx_file(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(parse(BODY, w=normal(60, 50)).SerializeToString())
    return path


def test_a_model_is_the_same_from_its_file_its_container_and_a_bundle(tmp_path, onnx_file):
    packed = tmp_path / "m.ecz"
    pack(onnx_file, packed)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "m.ecz").write_bytes(packed.read_bytes())
    (bundle / "manifest.json").write_text(json.dumps({"model": "m.ecz"}))
    found = [open_artifact(path).proto for path in (onnx_file, packed, bundle)]
    assert found[0] == found[1] == found[2]
    assert [is_container(path) for path in (onnx_file, packed)] == [False, True]
    assert artifact_bytes(onnx_file) == onnx_file.stat().st_size
    assert artifact_bytes(packed) == artifact_bytes(bundle) == packed.stat().st_size


def test_the_size_of_an_ort_file_needs_no_parser(tmp_path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model.ort").write_bytes(b"flatbuffer")
    (bundle / "manifest.json").write_text(json.dumps({"model": "model.ort"}))
    assert artifact_bytes(bundle) == 10


def test_a_container_is_known_by_its_content(tmp_path, onnx_file):
    pack(onnx_file, tmp_path / "m.ecz")
    renamed = (tmp_path / "m.ecz").rename(tmp_path / "other.onnx")
    assert is_container(renamed)
    assert open_artifact(renamed).opset == 17


def test_external_payloads_are_counted_and_those_of_a_container_are_not_decoded(tmp_path):
    proto = parse(BODY)
    (tmp_path / "d.bin").write_bytes(normal(60, 50).tobytes())
    proto.graph.initializer.append(external(numpy_helper.from_array(normal(60, 50), "w"), "d.bin"))
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    assert artifact_bytes(path) == path.stat().st_size + 12_000
    pack(path, tmp_path / "m.ecz")
    found = open_artifact(tmp_path / "m.ecz")
    assert found.proto == proto
    assert not found.proto.graph.initializer[0].raw_data


def test_what_is_no_model_is_refused(tmp_path, onnx_file):
    with pytest.raises(ModelError, match="no such file"):
        open_artifact(tmp_path / "none.ecz")
    with pytest.raises(ModelError, match=r"manifest\.json"):
        open_artifact(tmp_path)
    packed = tmp_path / "m.ecz"
    pack(onnx_file, packed)
    damaged = bytearray(packed.read_bytes())
    damaged[-1] ^= 1
    packed.write_bytes(damaged)
    with pytest.raises(FormatError):
        open_artifact(packed)


def test_the_values_of_a_container_are_those_of_the_model(tmp_path, onnx_file):
    pack(onnx_file, tmp_path / "m.ecz")
    tensor = open_artifact(tmp_path / "m.ecz").proto.graph.initializer[0]
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), normal(60, 50))
