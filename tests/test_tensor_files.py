from __future__ import annotations

import contextlib
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompress.errors import DataError, FormatError
from edgecompress.runtime.tensors import read_tensor, write_tensor

KINDS = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "c8", "c16"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
ARRAYS = st.sampled_from(KINDS).flatmap(lambda kind: hnp.arrays(np.dtype(kind), SHAPES))


@given(ARRAYS, st.text(min_size=1, max_size=9))
def test_the_onnx_package_reads_what_is_written_and_it_is_what_that_writes(
    array: np.ndarray[Any, Any], name: str
) -> None:
    written = write_tensor(name, array)
    proto = onnx.TensorProto.FromString(written)
    assert proto.name == name
    theirs = onnx.numpy_helper.to_array(proto)
    assert (theirs.dtype, theirs.shape, theirs.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert onnx.numpy_helper.from_array(array, name).SerializeToString(deterministic=True) == written


@given(ARRAYS, st.text(min_size=1, max_size=9))
def test_what_the_onnx_package_writes_is_read(array: np.ndarray[Any, Any], name: str) -> None:
    found_name, found = read_tensor(onnx.numpy_helper.from_array(array, name).SerializeToString())
    assert found_name == name
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_texts_are_stored_as_texts() -> None:
    array = np.array([["a", ""], ["\u00fc", "four"]], object)
    for value in (array, array.astype(str)):
        written = write_tensor("t", value)
        assert onnx.numpy_helper.to_array(onnx.TensorProto.FromString(written)).astype(str).tolist() == array.tolist()
        name, found = read_tensor(written)
        assert (name, found.dtype, found.tolist()) == ("t", object, array.tolist())
    assert write_tensor("t", np.array([b"x"], object)) == write_tensor("t", np.array(["x"]))


def test_any_byte_order_and_stride_is_stored_little_endian_and_dense() -> None:
    array = np.arange(12, dtype=">i4").reshape(3, 4)[:, ::2]
    assert write_tensor("x", array) == write_tensor("x", array.astype("<i4").copy())


def test_packed_sizes_are_read_too() -> None:
    proto = write_tensor("x", np.zeros((2, 3), np.uint8))
    assert proto[:4] == b"\x08\x02\x08\x03"
    assert read_tensor(b"\x0a\x02\x02\x03" + proto[4:])[1].shape == (2, 3)


@pytest.mark.parametrize("value", [np.array([{"a": 1}], object), np.array(["2020-01-01"], "M8[D]"), np.zeros(2, "V3")])
def test_what_is_no_tensor_is_refused(value: np.ndarray[Any, Any]) -> None:
    with pytest.raises(DataError, match="'m' is no tensor"):
        write_tensor("m", value)


WHOLE = write_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (WHOLE[:-1], "cut short"),
        (WHOLE[:-25], "not a tensor file"),
        (WHOLE + WHOLE[:2], "6 values instead of 12"),
        (WHOLE[2:], "6 values instead of 3"),
        (b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01" + WHOLE, "out of range"),
        (b"\x08" + b"\xff" * 11, "too long"),
        (b"\x08", "not a tensor file"),
        (WHOLE[:4] + b"\x10\x10" + WHOLE[6:], "data type 16"),
        (WHOLE + b"\x22\x04\0\0\0\0", "field 4 is not supported"),
        (b"\x13", "wire type 3"),
        (b"", "data type 0"),
        (WHOLE + b"\x42\x01\xff", "not a tensor file"),
    ],
)
def test_a_malformed_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_tensor(data)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for text in (data, WHOLE[:8] + data):
        with contextlib.suppress(FormatError):
            read_tensor(text)
