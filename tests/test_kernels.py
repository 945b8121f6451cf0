from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny import normal, save

from edgecompress.errors import ModelError
from edgecompress.kernels import Kernel, Probe, empty_probe, find_kernels

X = {"x": normal(1, 16)}
# Two products of one shape, one of another; Tanh keeps them apart, as nothing fuses with it.
CHAIN = """g (float[1, 16] x) => (float[1, 4] y) {
    a = MatMul(x, w1)  b = Tanh(a)  c = MatMul(b, w2)  d = Tanh(c)  y = MatMul(d, w3)
}"""


def chain(path: Path, *, seed: int = 0) -> Path:
    weights = {"w1": normal(16, 16, seed=seed), "w2": normal(16, 16, seed=seed + 1), "w3": normal(16, 4, seed=seed + 2)}
    return save(path, CHAIN, **weights)


def found(path: Path, feeds: dict[str, np.ndarray] = X) -> dict[tuple[str, int], tuple[Kernel, Probe]]:
    """The kernels by operator and count."""
    kernels, left_out = find_kernels(path, feeds, for_this_machine=True)
    assert left_out == ()
    return {(kernel.op, kernel.count): (kernel, probe) for kernel, probe in kernels}


def test_a_kernel_that_occurs_twice_is_found_once(tmp_path: Path) -> None:
    kernels = found(chain(tmp_path / "m.onnx"))
    assert sorted(kernels) == [("MatMul", 1), ("MatMul", 2), ("Tanh", 2)]
    kernel, _ = kernels["MatMul", 2]
    assert kernel.shapes == ((1, 16), (16, 16), (1, 16))
    assert kernel.types == ("float32",)


def test_other_weights_are_the_same_kernel(tmp_path: Path) -> None:
    one, other = found(chain(tmp_path / "one.onnx")), found(chain(tmp_path / "other.onnx", seed=7))
    assert {kernel.signature for kernel, _ in one.values()} == {kernel.signature for kernel, _ in other.values()}


@pytest.mark.parametrize("change", ["starts", "shape", "attribute"])
def test_what_changes_the_work_changes_the_signature(tmp_path: Path, change: str) -> None:
    def signatures(start: int, size: int, axis: int) -> set[str]:
        body = f"""g (float[1, {size}] x) => (float[1, 6] y, float[1, {size}] z)
            {{ y = Slice(x, s, e)  z = Softmax<axis = {axis}>(x) }}"""
        bounds = {"s": np.array([0, start]), "e": np.array([1, start + 6])}
        kernels, _ = find_kernels(
            save(tmp_path / "m.onnx", body, **bounds), {"x": normal(1, size)}, for_this_machine=True
        )
        return {kernel.signature for kernel, _ in kernels}

    changed = {"starts": (3, 16, 1), "shape": (2, 20, 1), "attribute": (2, 16, 0)}[change]
    assert len(signatures(2, 16, 1) & signatures(*changed)) == (0 if change == "shape" else 1)


def test_a_probe_computes_what_the_model_computes(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx")
    _, probe = found(path)["MatMul", 1]
    session = onnxruntime.InferenceSession(probe.proto.SerializeToString(), providers=["CPUExecutionProvider"])
    whole = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, X)[0]
    for output in session.run(None, dict(probe.feeds)):
        np.testing.assert_array_equal(output, whole)  # the last kernel's output is that of the model


def test_copies_in_a_probe_are_not_merged(tmp_path: Path) -> None:
    for _, probe in found(chain(tmp_path / "m.onnx")).values():
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(probe.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert probe.copies == 16
        assert len(onnx.load(tmp_path / "optimized.onnx").graph.node) == 16


def test_a_large_kernel_gets_fewer_copies(tmp_path: Path) -> None:
    body = "g (float[1, 1500] x) => (float[1, 1000] y) { y = MatMul(x, w) }"
    path = save(tmp_path / "m.onnx", body, w=normal(1500, 1000))
    _, probe = found(path, {"x": normal(1, 1500)})["MatMul", 1]
    assert probe.copies == 1


def test_a_node_with_a_graph_in_it_is_named_and_left_out(tmp_path: Path) -> None:
    body = """g (float[1, 16] x, bool c) => (float[1, 16] y) {
        y = If (c) <
            then_branch = t () => (float[1, 16] a) { a = Exp(x) },
            else_branch = e () => (float[1, 16] b) { b = Neg(x) }
        >
    }"""
    feeds = {**X, "c": np.array(True)}
    assert find_kernels(save(tmp_path / "m.onnx", body), feeds, for_this_machine=True) == ([], ("If",))


def test_what_passes_on_sequences_is_named_and_left_out(tmp_path: Path) -> None:
    body = "g (float[1, 16] x) => (float[1, 16] y) { s = SequenceConstruct(x, x)  y = ConcatFromSequence<axis = 0>(s) }"
    body = body.replace("(float[1, 16] y)", "(float[2, 16] y)")
    kernels, left_out = find_kernels(save(tmp_path / "m.onnx", body), X, for_this_machine=True)
    assert (kernels, left_out) == ([], ("ConcatFromSequence", "SequenceConstruct"))


def test_external_data_is_read_from_beside_the_model(tmp_path: Path) -> None:
    plain = found(chain(tmp_path / "m.onnx"))
    model = onnx.load(tmp_path / "m.onnx")
    (tmp_path / "other").mkdir()
    onnx.save(model, tmp_path / "other" / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert set(found(tmp_path / "other" / "m.onnx")) == set(plain)


def test_an_empty_probe_takes_its_inputs() -> None:
    probe = empty_probe(3)
    session = onnxruntime.InferenceSession(probe.proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert len(session.get_inputs()) == 3
    session.run(None, dict(probe.feeds))


def test_a_model_that_the_runtime_refuses_is_a_model_error(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", "g (float[1, 16] x) => (float[1, 16] y) { y = Nonsense(x) }")
    with pytest.raises(ModelError, match="Nonsense"):
        find_kernels(path, X, for_this_machine=True)
