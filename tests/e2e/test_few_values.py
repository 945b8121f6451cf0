"""Grids, budgets, int8, shrinking and self-extraction on the model and the data that ship with the project."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny import DIGITS, DIGITS_MODEL

if TYPE_CHECKING:
    from conftest import Cli

DATA = ("--data", DIGITS, "--json")


def compressed(cli: Cli, out, *options):
    outcome = cli("compress", DIGITS_MODEL, "-o", out, *DATA, *options)
    assert outcome.code == 0, outcome.err
    return outcome.json


def test_a_target_size_is_met_from_below_and_keeps_the_accuracy(cli: Cli, tmp_path) -> None:
    smallest = 15_000
    report = compressed(cli, tmp_path / "out", "--target-size", smallest)
    assert 0.97 * smallest < report["size"]["ecz_bytes"] <= smallest
    assert (tmp_path / "out" / "model.ecz").stat().st_size == report["size"]["ecz_bytes"]
    # 360 digits: three standard errors of a paired difference are about 2 points here
    assert report["accuracy"]["drop_points"] < 2.5
    # the plan says the steps that were found, and gives the same bytes again
    again = cli("compress", DIGITS_MODEL, "-o", tmp_path / "again", *DATA, "--plan", tmp_path / "out" / "plan.json")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "model.ecz").read_bytes() == (tmp_path / "out" / "model.ecz").read_bytes()


def test_a_budget_of_bits_counts_what_is_coded(cli: Cli, tmp_path) -> None:
    report = compressed(cli, tmp_path / "out", "--average-bits", "2.5")
    coded = sum(row["stored_bytes"] for row in report["layers"])
    weights = sum(row["parameters_before"] for row in report["layers"])
    assert 0.97 * 2.5 < coded * 8 / weights <= 2.5


def test_a_budget_out_of_reach_exits_6_and_says_how_small_it_can_get(cli: Cli, tmp_path) -> None:
    outcome = cli("compress", DIGITS_MODEL, "-o", tmp_path / "out", *DATA, "--target-size", 300)
    assert outcome.code == 6
    assert "out of reach: the least that was found is" in outcome.err
    assert not (tmp_path / "out").exists()


def test_feedback_and_graph_order_are_worth_a_lot_at_few_values(cli: Cli, tmp_path) -> None:
    best = compressed(cli, tmp_path / "best", "--bits", "2")
    alone = compressed(cli, tmp_path / "alone", "--bits", "2", "--no-feedback", "--no-asymmetric")
    gain = best["outputs"]["logits"]["sqnr_db"] - alone["outputs"]["logits"]["sqnr_db"]
    assert gain > 2.0  # decibels


def test_int8_runs_on_the_codes_of_the_grid(cli: Cli, tmp_path) -> None:
    report = compressed(cli, tmp_path / "out", "--quantize", "int8", "--step", "0.8")
    assert any("grid" in row["scheme"] and row["scheme"].endswith("int8") for row in report["layers"])
    assert report["accuracy"]["drop_points"] < 2.5
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}
    codes = [onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.name.endswith(".codes")]
    weights = [each for each in codes if each.dtype == np.int8]
    assert weights
    assert all(len(np.unique(each)) < 40 for each in weights)  # still a small alphabet


def test_int8_without_data_is_refused(cli: Cli, tmp_path) -> None:
    outcome = cli("compress", DIGITS_MODEL, "-o", tmp_path / "out", "--quantize", "int8")
    assert outcome.code == 2
    assert "calibration data" in outcome.err


def test_a_shrunk_model_has_fewer_channels_and_says_so(cli: Cli, tmp_path) -> None:
    report = compressed(cli, tmp_path / "out", "--shrink", "0.75", "--cluster", "none")
    shrunk = [row for row in report["layers"] if row["scheme"].startswith("shrunk to")]
    assert shrunk
    assert all(row["parameters_after"] < row["parameters_before"] for row in shrunk)
    assert report["accuracy"]["drop_points"] < 5.0
    refused = cli("compress", DIGITS_MODEL, "-o", tmp_path / "plain", "--shrink", "0.75")
    assert refused.code == 2
    assert "shrink refits layers on calibration data" in refused.err


def test_a_self_extracting_model_gives_the_same_outputs(cli: Cli, tmp_path) -> None:
    compressed(cli, tmp_path / "out", "--bits", "4", "--self-extracting")
    plain, extracting = (tmp_path / "out" / name for name in ("model.onnx", "model_self_extracting.onnx"))
    assert extracting.stat().st_size < plain.stat().st_size
    outputs = []
    for path in (plain, extracting):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name, shape = (
            session.get_inputs()[0].name,
            [size if isinstance(size, int) else 3 for size in session.get_inputs()[0].shape],
        )
        outputs.append(session.run(None, {name: np.random.default_rng(0).normal(size=shape).astype(np.float32)})[0])
    np.testing.assert_array_equal(*outputs)
    original, found = (cli("inspect", path, "--json").json["layers"] for path in (DIGITS_MODEL, extracting))
    assert [row["name"] for row in found] == [row["name"] for row in original]  # nothing of what decodes
    assert {row["skip_reason"] for row in found} == {"a Gather node computes it from constants"}


@pytest.mark.parametrize("share", ["0.3", "0.6"])
def test_pruned_weights_are_zero(cli: Cli, tmp_path, share) -> None:
    compressed(cli, tmp_path / "out", "--cluster", "grid", "--step", "0.5", "--prune", share)
    model = onnx.load(tmp_path / "out" / "model.onnx")
    codes = [onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.name.endswith(".codes")]
    zeros = sum(int(np.count_nonzero(each == 0)) for each in codes)
    assert zeros >= (float(share) - 0.01) * sum(each.size for each in codes)


def test_the_shares_of_zeros_stand_in_the_plan_and_the_scope_may_be_the_layer(cli: Cli, tmp_path) -> None:
    for name, options in (("together", ()), ("alike", ("--prune-scope", "layer"))):
        compressed(cli, tmp_path / name, "--cluster", "grid", "--step", "0.5", "--prune", "0.6", *options)
    shares = {}
    for name in ("together", "alike"):
        layers = json.loads((tmp_path / name / "plan.json").read_text())["layers"]
        shares[name] = {each["weights"]["prune"] for each in layers if each["weights"]}
    assert shares["alike"] == {0.6}
    assert len(shares["together"]) > 1
    assert min(shares["together"]) < 0.6 < max(shares["together"])
