from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from builders import external, if_model, model, names, normal, parse, weight_of
from onnx import helper, numpy_helper

from edgecompress.errors import ModelError, PassError
from edgecompress.graph import constants, replace_nodes
from edgecompress.passes import run as module
from edgecompress.passes.prepare import prepare
from edgecompress.passes.run import Change, is_valid, run_pass

BODY = "g (float[N, 6] x) => (float[N, 5] y) { h = MatMul(x, w)  y = Relu(h) }"
FEEDS = {"x": normal(3, 6)}


def source_of():
    return model(BODY, w=normal(6, 5))


def replacing(values, claimed):
    """Return a pass that writes ``values`` and says that they are ``claimed``."""

    def rewrite(graph):
        constants(graph)["w"].values = values
        return [Change("w", "replaced", dense=lambda: claimed)]

    return rewrite


def test_a_correct_pass_gives_a_new_model_and_leaves_the_old_one():
    source, halved = source_of(), normal(6, 5) / 2
    before = source.proto.SerializeToString()
    result, changes = run_pass(source, "halve", replacing(halved, halved), FEEDS)
    assert [change.layer for change in changes] == ["w"]
    np.testing.assert_array_equal(weight_of(result, "w"), halved)
    assert source.proto.SerializeToString() == before


def test_weights_other_than_those_claimed_are_found_out():
    with pytest.raises(PassError, match="pass 'halve' failed: output 'y' differs") as caught:
        run_pass(source_of(), "halve", replacing(normal(6, 5) / 2, normal(6, 5)), FEEDS)
    assert caught.value.exit_code == 8
    assert "defect of edgecompress" in caught.value.hint


def test_a_small_error_of_one_weight_is_found_out():
    wrong = normal(6, 5)
    wrong[0, 0] += 0.05
    with pytest.raises(PassError, match="differs"):
        run_pass(source_of(), "nudge", replacing(wrong, normal(6, 5)), FEEDS)


def test_a_change_that_nothing_is_claimed_for_must_compute_the_same():
    def rewrite(graph):
        constants(graph)["w"].values = normal(6, 5) * 1.1
        return [Change("w", "silently scaled")]

    with pytest.raises(PassError, match="differs"):
        run_pass(source_of(), "scale", rewrite, FEEDS)


def test_weights_that_become_nan_are_found_out():
    with pytest.raises(PassError, match="differs"):
        run_pass(source_of(), "ruin", replacing(np.full((6, 5), np.nan, np.float32), normal(6, 5)), FEEDS)


def test_an_invalid_graph_is_found_out_without_running_it():
    def rewrite(graph):
        graph.surgeon.nodes[0].inputs.append(gs.Variable("nowhere"))
        return [Change("w", "broken")]

    with pytest.raises(PassError, match="pass 'break' failed: the ONNX checker refuses"):
        run_pass(source_of(), "break", rewrite, None)


def test_a_graph_that_only_the_runtime_refuses_is_the_fault_of_the_pass():
    with pytest.raises(PassError, match="pass 'reshape' failed: the runtime refuses"):
        run_pass(source_of(), "reshape", replacing(normal(7, 5), normal(6, 5)), FEEDS)


def test_an_output_of_another_shape_is_found_out():
    proto = parse("g (float[N, 6] x) => (float[N, M] y) { y = MatMul(x, w) }", w=normal(6, 5))
    with pytest.raises(PassError, match=r"output 'y' is float32 \(3, 1\), not float32 \(3, 5\)"):
        run_pass(model(proto), "shrink", replacing(normal(6, 1), normal(6, 5)), FEEDS)


def test_inputs_and_outputs_must_stay(monkeypatch):
    close = module.close_graph

    def renamed(graph):
        result = close(graph)
        result.proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
        return result

    monkeypatch.setattr(module, "close_graph", renamed)
    with pytest.raises(PassError, match="inputs or outputs of the model changed"):
        run_pass(source_of(), "widen", replacing(normal(6, 5), normal(6, 5)), None)


def test_an_exception_inside_a_pass_names_the_pass():
    def rewrite(graph):
        raise KeyError("lost")

    with pytest.raises(PassError, match="pass 'lose' failed: KeyError: 'lost'"):
        run_pass(source_of(), "lose", rewrite, None)


def test_errors_of_the_model_pass_through():
    def rewrite(graph):
        raise ModelError("NaN in the weights")

    with pytest.raises(ModelError, match="NaN in the weights"):
        run_pass(source_of(), "check", rewrite, None)


def test_a_model_that_the_checker_refuses_from_the_start_is_not_held_against_the_pass():
    proto = parse(BODY, w=normal(6, 5))
    proto.graph.name = ""  # the checker wants a name, the runtime does not
    source = model(proto)
    assert not is_valid(source)
    result, _ = run_pass(source, "halve", replacing(normal(6, 5), normal(6, 5)), FEEDS)
    np.testing.assert_array_equal(weight_of(result, "w"), normal(6, 5))


def test_an_output_that_is_zero_but_for_rounding_is_no_defect():
    body = "g (float[N, 6] x) => (float[N, 5] y) { h = MatMul(x, w)  k = MatMul(x, v)  y = Sub(h, k) }"
    source = model(body, w=normal(6, 5), v=normal(6, 5))

    def rewrite(graph):
        constants(graph)["v"].values = np.nextafter(normal(6, 5), np.float32(10))
        return [Change("v", "rounded")]

    run_pass(source, "round", rewrite, FEEDS)


def test_integers_may_flip():
    body = "g (float[N, 6] x) => (int64[N] y) { h = MatMul(x, w)  y = ArgMax<axis=1, keepdims=0>(h) }"
    run_pass(model(body, w=normal(6, 5)), "flip", replacing(-normal(6, 5), normal(6, 5)), FEEDS)


# large models


@pytest.fixture
def tiny_limit(monkeypatch):
    """Every model is large, and running one is an error."""
    monkeypatch.setattr(module, "CHECK_LIMIT_BYTES", 10)
    monkeypatch.setattr(module, "run_once", lambda *_: pytest.fail("a large model was run"))


LARGE = "g (float[N, 60] x) => (float[N, 50] y) { h = MatMul(x, w)  k = Reshape(h, s)  y = Relu(k) }"


def large(**rest):
    return model(LARGE, w=normal(60, 50), s=np.array([-1, 50]), **rest)


@pytest.mark.usefixtures("tiny_limit")
def test_a_large_model_is_checked_without_its_payloads(monkeypatch):
    checked = []
    monkeypatch.setattr(module.onnx.checker, "check_model", checked.append)
    result, _ = run_pass(large(), "halve", replacing(normal(60, 50), normal(60, 50)), {"x": normal(1, 60)})
    assert len(checked) == 2
    for proto in checked:
        assert [each.name for each in proto.graph.initializer] == ["s"]  # small ones are shapes
        assert [each.name for each in proto.graph.input] == ["x", "w"]
        assert proto.ByteSize() < 1000
    assert names(result, "initializer") == ["w", "s"]


@pytest.mark.usefixtures("tiny_limit")
def test_a_large_model_that_a_pass_broke_is_found_out():
    def rewrite(graph):
        replace_nodes(graph, {id(graph.surgeon.nodes[0]): []})
        return [Change("w", "removed its node")]

    assert is_valid(large())
    with pytest.raises(PassError, match="checker refuses"):
        run_pass(large(), "break", rewrite, None)


def test_external_weights_are_checked_without_their_file(tmp_path):
    proto = parse(LARGE, s=np.array([-1, 50]))
    proto.graph.initializer.append(external(numpy_helper.from_array(normal(60, 50), "w"), "gone.bin"))
    assert is_valid(model(proto, folder=tmp_path))


def test_a_large_old_model_with_its_weights_among_the_inputs_is_valid(monkeypatch):
    monkeypatch.setattr(module, "CHECK_LIMIT_BYTES", 10)
    body = LARGE.replace("x)", "x, float[60, 50] w, int64[2] s)", 1)
    assert is_valid(large() if not body else model(body, ir_version=3, opset=9, w=normal(60, 50), s=np.array([-1, 50])))


def test_external_weights_are_run_from_their_file(tmp_path):
    w = normal(60, 50)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.bin").write_bytes(w.tobytes())
    proto = parse(LARGE, s=np.array([-1, 50]))
    proto.graph.initializer.append(external(numpy_helper.from_array(w, "w"), "sub/d.bin"))
    source = model(proto, folder=tmp_path)
    run_pass(source, "halve", replacing(w / 2, w / 2), {"x": normal(2, 60)})
    with pytest.raises(PassError):
        run_pass(source, "halve", replacing(w / 2, w), {"x": normal(2, 60)})


def test_prepare_on_a_model_with_bodies_passes_all_checks():
    proto = if_model(normal(4, 2), normal(4, 2), outer="k = Constant<value_float=2.0>()  h = Mul(x, k)")
    body = proto.graph.node[-1].attribute[0].g
    body.node[0].CopyFrom(helper.make_node("MatMul", ["h", "w"], ["r"]))
    feeds = {"x": normal(3, 4), "c": np.array(False)}
    result, _ = run_pass(model(proto), "prepare", prepare, feeds)
    assert names(result, "ops") == ["Mul", "If"]
