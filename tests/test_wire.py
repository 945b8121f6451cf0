from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgecompress.container.wire import Weights, find_weights, scan
from edgecompress.errors import ModelError


def graph(
    nodes: list[onnx.NodeProto], initializers: list[TensorProto] | None = None, name: str = "g"
) -> onnx.GraphProto:
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_graph(nodes, name, [], [output], initializer=initializers or [])


def model_bytes(main: onnx.GraphProto, **options: object) -> bytes:
    return helper.make_model(main, opset_imports=[helper.make_opsetid("", 17)], **options).SerializeToString()


def values(found: Weights, data: bytes) -> dict[str, bytes]:
    return {payload.name: data[payload.start : payload.end] for payload in found.payloads}


def raw(name: str, array: np.ndarray) -> TensorProto:
    return numpy_helper.from_array(array, name)


A = np.arange(6, dtype=np.float32)


def test_raw_and_packed_values_of_initializers_are_found() -> None:
    floats = helper.make_tensor("floats", TensorProto.FLOAT, [6], A * 2)
    doubles = helper.make_tensor("doubles", TensorProto.DOUBLE, [2], [0.5, 0.25])
    data = model_bytes(graph([], [raw("raw", A), floats, doubles, raw("half", A.astype(np.float16))]))
    found = scan(data, "m")
    assert values(found, data) == {
        "raw": A.tobytes(),
        "floats": (A * 2).tobytes(),
        "doubles": np.array([0.5, 0.25]).tobytes(),
        "half": A.astype(np.float16).tobytes(),
    }
    assert {p.name: p.width for p in found.payloads} == {"raw": 4, "floats": 4, "doubles": 8, "half": 2}


@pytest.mark.parametrize(
    ("data_type", "width"),
    [("INT8", 1), ("UINT8", 1), ("BOOL", 1), ("INT16", 2), ("BFLOAT16", 2), ("INT32", 4), ("INT64", 8), ("INT4", 1)],
)
def test_the_element_width_is_that_of_the_data_type(data_type: str, width: int) -> None:
    tensor = TensorProto(name="t", data_type=getattr(TensorProto, data_type), raw_data=bytes(8))
    (payload,) = scan(model_bytes(graph([], [tensor])), "m").payloads
    assert payload.width == width
    assert payload.data_type == getattr(TensorProto, data_type)


def test_dims_are_those_of_the_tensor_if_its_values_are_all_there() -> None:
    weight = raw("w", A.reshape(2, 3))
    packed = b"\x0a\x02\x02\x03" + weight.SerializeToString()[4:]  # one field of two numbers, as some writers do
    assert TensorProto.FromString(packed) == weight
    short = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2, 4], raw_data=A.tobytes())
    for data, dims in ((packed, (2, 3)), (weight.SerializeToString(), (2, 3)), (short.SerializeToString(), ())):
        main = graph([], [TensorProto(name="w")]).SerializeToString().replace(b"\x2a\x03B\x01w", field(5, data))
        (payload,) = scan(b"\x08\x08" + field(7, main), "m").payloads
        assert payload.dims == dims


def field(number: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def test_values_whose_size_is_no_multiple_of_the_width_are_bytes() -> None:
    tensor = TensorProto(name="odd", data_type=TensorProto.FLOAT, dims=[1], raw_data=b"abcde")
    (payload,) = scan(model_bytes(graph([], [tensor])), "m").payloads
    assert payload.width == 1


def test_tensors_are_found_in_constants_branches_functions_sparse_and_training_parts() -> None:
    constant = helper.make_node("Constant", [], ["c"], value=raw("in_constant", A))
    inner = helper.make_node(
        "If", ["b"], ["y"], then_branch=graph([constant]), else_branch=graph([], [raw("else", A + 1)])
    )
    outer = helper.make_node(
        "If", ["b"], ["y"], then_branch=graph([inner]), else_branch=graph([], [raw("outer", A + 2)])
    )
    many = helper.make_node("Many", [], ["m"], domain="x")
    many.attribute.append(helper.make_attribute("graphs", [graph([], [raw("in_graphs", A + 3)])]))
    many.attribute.append(helper.make_attribute("tensors", [raw("in_tensors", A + 4)]))
    body = helper.make_node("Constant", [], ["y"], value=raw("in_function", A + 5))
    function = helper.make_function("x", "F", [], ["y"], [body], [helper.make_opsetid("", 17)])
    main = graph([outer, many])
    indices = raw("indices", np.arange(6))
    main.sparse_initializer.append(helper.make_sparse_tensor(raw("sparse", A + 6), indices, [100]))
    model = helper.make_model(main, functions=[function])
    model.training_info.add().algorithm.CopyFrom(graph([], [raw("training", A + 7)]))
    data = model.SerializeToString()
    found = scan(data, "m")
    assert values(found, data) == {
        "in_constant": A.tobytes(),
        "else": (A + 1).tobytes(),
        "outer": (A + 2).tobytes(),
        "in_graphs": (A + 3).tobytes(),
        "in_tensors": (A + 4).tobytes(),
        "in_function": (A + 5).tobytes(),
        "sparse": (A + 6).tobytes(),
        "indices": np.arange(6).tobytes(),
        "training": (A + 7).tobytes(),
    }
    assert [p.start for p in found.payloads] == sorted(p.start for p in found.payloads)


def test_text_tensors_stay_where_they_are() -> None:
    tensor = helper.make_tensor("words", TensorProto.STRING, [2], [b"one", b"two"])
    assert scan(model_bytes(graph([], [tensor])), "m") == Weights((), ())


def external(entries: dict[str, str]) -> bytes:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model_bytes(graph([], [tensor]))


def test_external_values_are_reported_with_their_place() -> None:
    (item,) = scan(external({"location": "w.bin", "offset": "4096", "length": "8", "checksum": "x"}), "m").externals
    assert (item.name, item.location, item.offset, item.length, item.width) == ("w", "w.bin", 4096, 8, 4)
    (item,) = scan(external({"location": "w.bin"}), "m").externals
    assert (item.offset, item.length) == (0, None)


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"location": ""},
        {"location": "a", "offset": "-1"},
        {"location": "a", "length": "1e3"},
        {"location": "a", "offset": "٣"},
    ],
)
def test_external_values_without_a_proper_place_are_refused(entries: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="not an ONNX file: tensor 'w'"):
        scan(external(entries), "m")


def test_an_empty_file_and_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for content in (
        b"",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"PK\x03\x04" + bytes(60),
        b"hello world, no model",
        bytes(50),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="not an ONNX file") as caught:
            find_weights(path)
        assert caught.value.exit_code == 3
        assert str(path) in caught.value.message


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        find_weights(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="cannot read"):
        find_weights(tmp_path)


def test_a_message_without_a_graph_or_an_ir_version_is_refused() -> None:
    with pytest.raises(ModelError, match="no graph"):
        scan(onnx.ModelProto(ir_version=8, producer_name="p").SerializeToString(), "m")
    with pytest.raises(ModelError, match="no IR version"):
        scan(onnx.ModelProto(graph=graph([])).SerializeToString(), "m")


def test_every_truncation_is_refused_or_ends_between_two_fields_after_the_graph() -> None:
    data = model_bytes(graph([], [raw("w", A)]), producer_name="somebody")
    # Only what follows the graph, the list of operator sets, can be lost without a trace.
    end = data.index(A.tobytes()) + A.nbytes
    for size in range(end):
        with pytest.raises(ModelError, match=r"truncated|not an ONNX file"):
            scan(data[:size], "m")
    cut_after = [size for size in range(end, len(data)) if is_model(data[:size])]
    assert all(onnx.ModelProto.FromString(data[:size]).HasField("graph") for size in cut_after)


def is_model(data: bytes) -> bool:
    try:
        scan(data, "m")
    except ModelError:
        return False
    return True


def test_nesting_without_end_is_refused_and_not_followed() -> None:
    def wrap(field: int, inner: bytes) -> bytes:
        size = len(inner)
        head = bytearray()
        while size > 127:
            head.append(size & 127 | 128)
            size >>= 7
        return bytes([field << 3 | 2, *head, size]) + inner

    body = b""
    for _ in range(3000):
        body = wrap(1, wrap(5, wrap(6, body)))  # node, attribute, graph
    with pytest.raises(ModelError, match="nested more than 100 deep"):
        scan(b"\x08\x08" + wrap(7, body), "m")


@settings(max_examples=300)
@given(st.binary(max_size=80))
def test_random_bytes_are_scanned_or_refused_and_nothing_else(data: bytes) -> None:
    for start in (
        b"",
        b"\x08\x08\x3a",
        b"\x08\x08\x3a" + bytes([len(data)]),
        b"\x08\x08\x3a" + bytes([len(data) + 2, 42, len(data)]),
    ):
        whole = start + data
        try:
            found = scan(whole, "m")
        except ModelError:
            continue
        for payload in found.payloads:
            assert 0 <= payload.start < payload.end <= len(whole)


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_model_is_scanned_or_refused_and_nothing_else(choice: st.DataObject) -> None:
    data = bytearray(model_bytes(graph([helper.make_node("Constant", [], ["c"], value=raw("c", A))], [raw("w", A)])))
    for _ in range(choice.draw(st.integers(1, 4))):
        data[choice.draw(st.integers(0, len(data) - 1))] = choice.draw(st.integers(0, 255))
    try:
        found = scan(bytes(data), "m")
    except ModelError:
        return
    ends = [p.end for p in found.payloads]
    assert all(end <= p.start for end, p in zip(ends, found.payloads[1:], strict=False))
