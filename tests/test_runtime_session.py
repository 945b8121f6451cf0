from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgecompress.container import pack
from edgecompress.errors import FormatError, ModelError
from edgecompress.runtime import load, session

SIZE = 64


def clustered_model(*, opset: int = 17, ir_version: int = 8, layers: int = 3) -> onnx.ModelProto:
    """A chain of matrix products whose weights are a codebook and indices."""
    generator = np.random.default_rng(0)
    nodes, initializers = [], []
    for index in range(layers):
        codebook = generator.normal(0, 0.1, 16).astype(np.float32)
        indices = generator.binomial(15, 0.5, (SIZE, SIZE)).astype(np.uint8)
        initializers += [numpy_helper.from_array(codebook, f"c{index}"), numpy_helper.from_array(indices, f"i{index}")]
        nodes += [
            helper.make_node("Cast", [f"i{index}"], [f"k{index}"], to=TensorProto.INT32),
            helper.make_node("Gather", [f"c{index}", f"k{index}"], [f"w{index}"]),
            helper.make_node("MatMul", [f"h{index}", f"w{index}"], [f"h{index + 1}"]),
        ]
    x = helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["n", SIZE])
    y = helper.make_tensor_value_info(f"h{layers}", TensorProto.FLOAT, ["n", SIZE])
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


@pytest.fixture(name="folder")
def folder_with_models(tmp_path: Path) -> Path:
    """m.onnx and m.ecz; x.onnx and x.ecz with external data, which is then taken away."""
    onnx.save(clustered_model(), tmp_path / "m.onnx")
    pack(tmp_path / "m.onnx", tmp_path / "m.ecz")
    beside = tmp_path / "external"
    beside.mkdir()
    onnx.save(clustered_model(), beside / "x.onnx", save_as_external_data=True, location="x.data", size_threshold=0)
    pack(beside / "x.onnx", tmp_path / "x.ecz")
    return tmp_path


def run(opened: onnxruntime.InferenceSession) -> np.ndarray:
    (output,) = opened.run(None, {"h0": np.linspace(-1, 1, 2 * SIZE, dtype=np.float32).reshape(2, SIZE)})
    return np.asarray(output)


def test_all_kinds_of_file_compute_the_same(folder: Path) -> None:
    expected = run(onnxruntime.InferenceSession(str(folder / "m.onnx"), providers=["CPUExecutionProvider"]))
    assert np.abs(expected).max() > 0.01
    for path in ("m.onnx", "m.ecz", "x.ecz", "external/x.onnx"):
        for low_memory in (False, True):
            # Without optimizations the products are computed by another kernel: sums in another order.
            np.testing.assert_allclose(run(load(folder / path, low_memory=low_memory)), expected, rtol=1e-4, atol=1e-6)
        assert (run(load(str(folder / path), threads=1)) == expected).all()


def test_external_data_in_an_ecz_file_is_not_written_anywhere(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    (folder / "external" / "x.data").write_bytes(b"")
    load(folder / "x.ecz")
    assert sorted(folder.rglob("*")) == before


def test_the_content_tells_the_kind_of_file_and_not_the_name(folder: Path) -> None:
    (folder / "m.ecz").rename(folder / "packed.onnx")
    (folder / "m.onnx").rename(folder / "plain.ecz")
    assert (run(load(folder / "packed.onnx")) == run(load(folder / "plain.ecz"))).all()


def test_options_reach_the_runtime(folder: Path) -> None:
    options = load(folder / "m.onnx", threads=3).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.log_severity_level == 4
    options = load(folder / "m.ecz", low_memory=True).get_session_options()
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert options.get_session_config_entry("session.disable_prepacking") == "1"
    assert options.execution_order == onnxruntime.ExecutionOrder.PRIORITY_BASED


def bundle(folder: Path, manifest: object) -> Path:
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    (folder / "manifest.json").write_text(text, "utf-8")
    return folder


def test_a_bundle_is_opened_by_its_manifest(folder: Path) -> None:
    expected = run(load(folder / "m.onnx"))
    assert (run(load(bundle(folder, {"model": "m.ecz"}))) == expected).all()
    assert (run(load(bundle(folder, {"model": "external/x.onnx"}))) == expected).all()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "names no model"),
        ("[" * 100_000, "names no model"),
        ("[]", "names no model"),
        ({}, "names no model"),
        ({"model": 3}, "3 is no file of the bundle"),
        ({"model": "../m.onnx"}, "no file of the bundle"),
        ({"model": "/etc/passwd"}, "no file of the bundle"),
        ({"model": "other.onnx"}, "'other.onnx' is missing"),
    ],
)
def test_a_malformed_bundle_is_refused(folder: Path, manifest: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        load(bundle(folder, manifest))


def test_a_folder_that_is_no_bundle_and_a_missing_file_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"a folder without manifest\.json"):
        load(folder)
    with pytest.raises(ModelError, match="no such file"):
        load(folder / "none.onnx")


def refusal(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(path)
    message = caught.value.message
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "ONNXRuntimeError" not in message
    assert "/onnxruntime" not in message
    assert caught.value.hint
    assert caught.value.__cause__ is None
    return caught.value


def test_an_opset_that_is_too_new_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    onnx.save(clustered_model(opset=99), tmp_path / "m.onnx")
    pack(tmp_path / "m.onnx", tmp_path / "m.ecz")
    for name in ("m.onnx", "m.ecz"):
        assert "opset 99 is newer than onnxruntime" in refusal(tmp_path / name).message
    assert capfd.readouterr() == ("", "")


def test_what_the_runtime_refuses_is_one_clean_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    newer = clustered_model(ir_version=999)
    onnx.save(newer, tmp_path / "ir.onnx")
    assert "Unsupported model IR version: 999" in refusal(tmp_path / "ir.onnx").message
    unknown = clustered_model()
    unknown.graph.node[0].op_type = "Nothing"
    onnx.save(unknown, tmp_path / "op.onnx")
    assert "Nothing" in refusal(tmp_path / "op.onnx").message
    (tmp_path / "text.onnx").write_text("no model")
    assert "rotobuf parsing failed" in refusal(tmp_path / "text.onnx").message
    onnx.save(clustered_model(), tmp_path / "x.onnx", save_as_external_data=True, location="x.data", size_threshold=0)
    (tmp_path / "x.data").unlink()
    assert "x.data" in refusal(tmp_path / "x.onnx").message
    assert capfd.readouterr() == ("", "")


def test_a_damaged_ecz_file_is_a_format_error(folder: Path) -> None:
    damaged = bytearray((folder / "m.ecz").read_bytes())
    damaged[50] ^= 4
    (folder / "m.ecz").write_bytes(damaged)
    with pytest.raises(FormatError, match=r"m\.ecz: malformed .ecz file: checksum"):
        load(folder / "m.ecz")


def test_without_the_runtime_the_hint_says_how_to_install_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelError, match="cannot be imported") as caught:
        load(folder / "m.ecz")
    assert "pip install onnxruntime" in caught.value.hint


def test_a_model_beyond_two_gigabytes_in_one_piece_is_refused_before_it_is_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_MODEL_LIMIT", 1000)
    monkeypatch.setattr(session, "read_pieces", None)
    assert "2 GB" in refusal(folder / "m.ecz").message
