from __future__ import annotations

import numpy as np
import onnx
import pytest
from builders import external, model, normal, parse
from onnx import TensorProto, helper, numpy_helper

from edgecompress import model as model_module
from edgecompress import save as save_module
from edgecompress.errors import ModelError
from edgecompress.model import (
    Model,
    infer_shapes,
    load_model,
    payload_bytes,
    read_signature,
    signature,
    stored_bytes,
)
from edgecompress.save import inlined, save_model
from edgecompress.tensors import all_tensors, tensor_bytes, tensor_values

BODY = "g (float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }"


def write(path, proto):
    path.write_bytes(proto.SerializeToString())
    return path


def with_external(folder, location="data.bin", payload=None, *, create=True, **ranges):
    """Write a model whose weight lies in a file; ``create`` says whether the file is there."""
    proto = parse(BODY)
    values = normal(4, 3)
    proto.graph.initializer.append(external(numpy_helper.from_array(values, "w"), location, **ranges))
    folder.mkdir(exist_ok=True)
    if create:
        target = folder / location
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_bytes(values.tobytes() if payload is None else payload)
    return write(folder / "m.onnx", proto), values


def value_of(path, name="w"):
    loaded = load_model(path)
    tensor = next(each for each in loaded.proto.graph.initializer if each.name == name)
    return tensor_values(tensor, loaded.folder)


# opsets


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21, 26])
def test_supported_opsets_are_read(tmp_path, opset):
    assert load_model(write(tmp_path / "m.onnx", parse(BODY, opset=opset, w=normal(4, 3)))).opset == opset


@pytest.mark.parametrize("opset", [1, 8, 27, 99])
def test_other_opsets_are_refused_with_the_allowed_range(tmp_path, opset):
    path = write(tmp_path / "m.onnx", parse(BODY, opset=opset, w=normal(4, 3)))
    with pytest.raises(ModelError, match=f"opset {opset} is not supported .*9 to 26") as caught:
        load_model(path)
    assert "pack" in caught.value.hint


def test_the_opset_is_that_of_the_standard_domain(tmp_path):
    proto = parse(BODY, w=normal(4, 3))
    proto.opset_import.insert(0, helper.make_opsetid("com.example", 3))
    assert load_model(write(tmp_path / "m.onnx", proto)).opset == 17
    del proto.opset_import[:]
    with pytest.raises(ModelError, match="opset 0"):
        load_model(write(tmp_path / "m.onnx", proto))


# files that are no models


@pytest.mark.parametrize("content", [b"", b"hello, this is text", bytes(range(256)), b"\x08\x08"])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="not an ONNX file"):
        load_model(path)


def test_every_truncation_is_refused(tmp_path):
    whole = parse(BODY, w=normal(4, 3)).SerializeToString()
    path = tmp_path / "m.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            load_model(path)


def test_a_model_is_known_by_its_content_and_not_by_its_name(tmp_path):
    assert load_model(write(tmp_path / "m.json", parse(BODY, w=normal(4, 3)))).opset == 17


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(tmp_path)


# external data


@pytest.mark.parametrize("location", ["data.bin", "sub/data.bin", "./data.bin"])
def test_external_data_is_mapped_from_the_folder_or_below(tmp_path, location):
    path, values = with_external(tmp_path, location)
    found = value_of(path)
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, values)
    assert stored_bytes(path) == path.stat().st_size + values.nbytes


def test_offset_and_length_pick_a_range_of_the_file(tmp_path):
    payload = b"\xff" * 12 + normal(4, 3).tobytes() + b"\xff" * 5
    path, values = with_external(tmp_path, payload=payload, offset=12, length=48)
    np.testing.assert_array_equal(value_of(path), values)


@pytest.mark.parametrize(
    ("ranges", "reason"),
    [
        ({"offset": 4}, "too short"),
        ({"offset": -4}, "too short"),
        ({"length": 44}, "too short"),
        ({"length": 52}, "too short"),
        ({"offset": "four"}, "malformed range"),
    ],
)
def test_a_range_that_does_not_fit_is_refused(tmp_path, ranges, reason):
    path, _ = with_external(tmp_path, **ranges)
    with pytest.raises(ModelError, match=reason):
        load_model(path)


def test_missing_and_truncated_data_files_are_named(tmp_path):
    path, values = with_external(tmp_path, create=False)
    with pytest.raises(ModelError, match=r"data\.bin is missing"):
        load_model(path)
    (tmp_path / "data.bin").write_bytes(values.tobytes()[:-1])
    with pytest.raises(ModelError, match=r"data\.bin is too short"):
        load_model(path)


@pytest.mark.parametrize("location", ["../data.bin", "sub/../../data.bin", "ABSOLUTE", ".."])
def test_data_outside_the_folder_is_refused_even_where_it_exists(tmp_path, location):
    (tmp_path / "data.bin").write_bytes(normal(4, 3).tobytes())
    location = str(tmp_path / "data.bin") if location == "ABSOLUTE" else location
    path, _ = with_external(tmp_path / "model", location, create=False)
    with pytest.raises(ModelError, match="leaves the model's folder"):
        load_model(path)


def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_not(tmp_path):
    path, values = with_external(tmp_path / "model", create=False)
    link = tmp_path / "model" / "data.bin"
    outside = tmp_path / "outside.bin"
    outside.write_bytes(values.tobytes())
    link.symlink_to(outside)
    with pytest.raises(ModelError, match="leaves"):
        load_model(path)
    link.unlink()
    (tmp_path / "model" / "real.bin").write_bytes(values.tobytes())
    link.symlink_to("real.bin")
    np.testing.assert_array_equal(value_of(path), values)
    link.unlink()
    link.symlink_to("data.bin")  # to itself
    with pytest.raises(ModelError):
        load_model(path)


@pytest.mark.parametrize("location", ["", "a" * 5000, "a\0b"])
def test_a_location_that_is_no_file_name_is_refused(tmp_path, location):
    path, _ = with_external(tmp_path, location, create=False)
    with pytest.raises(ModelError):
        load_model(path)


def test_external_tensors_without_values_and_of_half_bytes_are_read(tmp_path):
    proto = parse(BODY, w=normal(4, 3))
    empty = TensorProto(name="e", data_type=TensorProto.FLOAT, dims=[0, 3])
    nibbles = TensorProto(name="n", data_type=TensorProto.INT4, dims=[3])
    proto.graph.initializer.extend([external(empty, "d.bin", length=0), external(nibbles, "d.bin", length=2)])
    (tmp_path / "d.bin").write_bytes(bytes([0x21, 0x0F]))
    path = write(tmp_path / "m.onnx", proto)
    assert value_of(path, "e").shape == (0, 3)
    assert value_of(path, "n").astype(int).tolist() == [1, 2, -1]


# tensors


@pytest.mark.parametrize("change", [{"data_type": 0}, {"data_type": 77}, {"dims": [-4, 3]}])
def test_a_tensor_of_unknown_type_or_impossible_shape_is_refused(tmp_path, change):
    proto = parse(BODY)
    fields = {"name": "w", "data_type": TensorProto.FLOAT, "dims": [4, 3], "raw_data": bytes(48), **change}
    proto.graph.initializer.append(TensorProto(**fields))
    with pytest.raises(ModelError, match="tensor 'w'"):
        load_model(write(tmp_path / "m.onnx", proto))


def test_a_payload_that_does_not_fit_its_shape_is_a_model_error(tmp_path):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3], raw_data=bytes(44))
    with pytest.raises(ModelError, match="tensor 'w' is malformed"):
        tensor_values(tensor, tmp_path)


def test_sizes_of_astronomic_shapes_do_not_wrap_around():
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 40, 1 << 40])
    assert tensor_bytes(tensor) == 4 << 80


def test_all_tensors_are_those_of_graphs_bodies_functions_and_attributes():
    tensor = numpy_helper.from_array(normal(2), "t")
    sparse = helper.make_sparse_tensor(tensor, numpy_helper.from_array(np.array([0, 3]), "i"), [4])
    inner = helper.make_graph([helper.make_node("C", [], ["a"], t=tensor)], "b", [], [], [tensor])
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=inner), helper.make_node("C", [], ["z"], s=sparse)]
    function = helper.make_function("d", "f", [], ["q"], [helper.make_node("C", [], ["q"], body=inner)], [])
    proto = helper.make_model(helper.make_graph(nodes, "g", [], [], [tensor]), functions=[function])
    proto.graph.sparse_initializer.append(sparse)
    # initializer; sparse initializer; body: initializer and attribute; sparse attribute; function: the body again
    assert len(list(all_tensors(proto))) == 1 + 2 + 2 + 2 + 2


# signature and shapes


def test_initializers_listed_as_inputs_are_no_inputs(tmp_path):
    proto = parse(
        "g (float[N, 4] x, float[4, 3] w) => (float[N, 3] y) { y = MatMul(x, w) }", ir_version=3, w=normal(4, 3)
    )
    inputs, outputs = read_signature(write(tmp_path / "m.onnx", proto))
    assert [(spec.name, spec.dtype, spec.shape) for spec in inputs] == [("x", np.float32, (None, 4))]
    assert [(spec.name, spec.shape) for spec in outputs] == [("y", (None, 3))]


def test_a_size_of_minus_one_is_a_free_dimension():
    proto = parse(BODY, w=normal(4, 3))
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert signature(proto)[0][0].shape == (None, 4)


def test_inputs_that_are_no_tensors_are_refused():
    with pytest.raises(ModelError, match="'x' is not a tensor"):
        signature(parse("g (seq(float[N]) x) => (float[N] y) { y = ConcatFromSequence<axis=0>(x) }"))


def test_shapes_are_inferred_without_the_weights_and_for_the_sizes_asked():
    source = model("g (float[N, 400] x) => (float[N, M] y) { h = MatMul(x, w)  y = Relu(h) }", w=normal(400, 300))
    before = source.proto.SerializeToString()
    assert infer_shapes(source.proto, {"x": (7, 400)})["h"] == (7, 300)
    assert source.proto.SerializeToString() == before
    assert infer_shapes(parse("g (float[2] x) => (float[3] y) { y = Unknown(x) }"), {}).get("h") is None


# saving


def test_a_model_is_saved_in_one_file_and_left_as_it_was(tmp_path):
    path, values = with_external(tmp_path / "in")
    source = load_model(path)
    before = source.proto.SerializeToString()
    save_model(source, tmp_path / "out.onnx")
    assert source.proto.SerializeToString() == before
    again = load_model(tmp_path / "out.onnx")
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["out.onnx"]
    np.testing.assert_array_equal(numpy_helper.to_array(again.proto.graph.initializer[0]), values)
    assert inlined(again) is again.proto


def test_a_large_model_is_saved_with_a_data_file(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    weights = {"w": normal(4, 300), "h": normal(600, dtype=np.float16), "s": normal(3)}
    proto = parse("g (float[N, 4] x) => (float[N, M] y) { y = MatMul(x, w) }")
    proto.graph.doc_string = "kept"
    (folder / "d.bin").write_bytes(b"-" * 8 + weights["w"].tobytes() + weights["s"].tobytes())
    offsets = {"w": 8, "s": 8 + weights["w"].nbytes}
    for name, values in weights.items():
        tensor = numpy_helper.from_array(values, name)
        tensor.doc_string = f"about {name}"
        proto.graph.initializer.append(external(tensor, "d.bin", offset=offsets[name]) if name in offsets else tensor)
    proto.graph.initializer.append(helper.make_tensor("f", TensorProto.FLOAT, [400], [0.5] * 400))  # not raw
    proto.graph.initializer.append(helper.make_tensor("n", TensorProto.INT4, [3001], [-3] * 3001))
    proto.graph.initializer.append(helper.make_tensor("t", TensorProto.STRING, [300], [b"text"] * 300))
    source = load_model(write(folder / "m.onnx", proto))
    monkeypatch.setattr(save_module, "INLINE_LIMIT_BYTES", 1000)
    out = tmp_path / "out"
    out.mkdir()
    save_model(source, out / "model.onnx")

    assert sorted(each.name for each in out.iterdir()) == ["model.onnx", "model.onnx.data"]
    again = load_model(out / "model.onnx")
    assert again.proto.graph.doc_string == "kept"
    assert payload_bytes(again) == payload_bytes(source)
    assert [each.name for each in again.proto.graph.initializer] == [each.name for each in proto.graph.initializer]
    for mine, theirs in zip(again.proto.graph.initializer, source.proto.graph.initializer, strict=True):
        assert mine.doc_string == theirs.doc_string
        found = tensor_values(mine, again.folder)
        np.testing.assert_array_equal(found, tensor_values(theirs, source.folder))
        assert isinstance(found, np.memmap) == (mine.name in ("w", "h", "f"))
    onnx.checker.check_model(str(out / "model.onnx"))


def test_a_data_file_that_shrinks_while_it_is_copied_is_an_error(tmp_path, monkeypatch):
    path, _ = with_external(tmp_path)
    source = load_model(path)
    monkeypatch.setattr(save_module, "INLINE_LIMIT_BYTES", 0)
    monkeypatch.setattr(save_module, "SMALL_TENSOR_BYTES", 0)
    monkeypatch.setattr(save_module, "external_range", lambda *_: (tmp_path / "data.bin", 0, 49))
    with pytest.raises(ModelError, match="cut short"):
        save_model(source, tmp_path / "out.onnx")


def test_the_limit_leaves_room_below_two_gigabytes():
    assert model_module.INLINE_LIMIT_BYTES < 2**31 - 2**27


def test_a_model_knows_its_folder(tmp_path):
    assert Model(tmp_path / "m.onnx", onnx.ModelProto()).folder == tmp_path
