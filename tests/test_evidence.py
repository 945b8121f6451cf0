from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from edgecompress import evidence
from edgecompress.case import Request
from edgecompress.evidence import latency_of
from edgecompress.latency import LatencySamples
from edgecompress.pipeline import compress
from edgecompress.plan import LayerPlan
from edgecompress.recipe import Recipe, Settings
from edgecompress.report.model import from_json


def report_of(out: Path):
    return from_json((out / "report.json").read_text())


@pytest.mark.parametrize("fixture", ["digits_out", "digits_svd_out"])
def test_the_layers_account_for_the_parameters_and_the_bytes(fixture, request) -> None:
    report = report_of(request.getfixturevalue(fixture))
    assert [row.name for row in report.layers] == [
        *(f"block{number}.conv.weight" for number in (1, 2, 3, 4)),
        *("hidden.weight", "logits.weight"),
    ]
    for row in report.layers:
        assert row.parameters_before == math.prod(row.shape)
        assert (row.parameters_after == row.parameters_before) == (row.rank is None)
    stored = sum(row.stored_bytes for row in report.layers)
    # what is left is the graph and the biases: 242 floats and about 20 nodes
    assert 0.85 * report.size.ecz_bytes < stored < report.size.ecz_bytes
    # never more than 5 bits a value, and per tensor a codebook of 32 floats and 256 bytes of tables
    for row in report.layers:
        tensors = 1 if row.rank is None else 2
        assert row.stored_bytes <= row.parameters_after * 5 / 8 + tensors * (32 * 4 + 256) or "kmeans" not in row.scheme


@pytest.mark.parametrize("fixture", ["digits_out", "digits_svd_out"])
def test_the_waterfall_falls_from_the_original_file_to_the_container(fixture, request) -> None:
    out = request.getfixturevalue(fixture)
    size = report_of(out).size
    stages = [stage.stage for stage in size.waterfall]
    assert stages == ["original", *(["factorize"] if "svd" in fixture else []), "cluster", "encode"]
    bytes_after = [stage.bytes for stage in size.waterfall]
    assert bytes_after == sorted(bytes_after, reverse=True)
    assert bytes_after[0] == size.original_bytes == tiny.DIGITS_MODEL.stat().st_size
    assert bytes_after[-1] == size.ecz_bytes == (out / "model.ecz").stat().st_size
    assert size.onnx_bytes == (out / "model.onnx").stat().st_size
    assert size.compression_ratio == size.original_bytes / size.ecz_bytes


def test_macs_follow_the_parameters_of_the_factors(digits_svd_out) -> None:
    for row in report_of(digits_svd_out).layers:
        assert row.macs_after / row.macs_before == pytest.approx(row.parameters_after / row.parameters_before, rel=1e-3)


def test_the_error_of_a_layer_is_that_of_its_dense_form(tmp_path) -> None:
    model = tiny.mlp(tmp_path / "m.onnx")
    recipe = Recipe(everywhere=Settings(cluster="none"), layers={"w1": Settings(rank=4)})
    report = compress(model, tmp_path / "o", Request(recipe=recipe))
    first, second = report.layers
    values = np.linalg.svd(tiny.normal(16, 64).astype(np.float64), compute_uv=False)
    expected = 10 * math.log10((values**2).sum() / (values[4:] ** 2).sum())
    assert first.weight_sqnr_db == pytest.approx(expected, abs=1e-4)
    assert first.output_sqnr_db is None  # nothing is known of its inputs
    assert (second.scheme, second.weight_sqnr_db, second.output_sqnr_db) == ("-", None, None)
    assert (second.reason, second.parameters_after) == ("not asked for", 256)


def test_the_output_error_is_measured_on_what_flows_in(tmp_path) -> None:
    model = tiny.mlp(tmp_path / "m.onnx")
    data = tiny.rows(tmp_path / "d.npz", 100)
    recipe = Recipe(layers={"w2": Settings(cluster="none")}, everywhere=Settings(bits=2))
    report = compress(model, tmp_path / "o", Request(recipe=recipe, data=data))
    import edgecompress

    feeds = tiny.normal(100, 16, seed=9)[:80].astype(np.float64)
    session = edgecompress.load(tmp_path / "o" / "model.ecz")
    assert session.get_inputs()[0].name == "x"
    import onnx

    final = onnx.load(tmp_path / "o" / "model.onnx")
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in final.graph.initializer}
    dense = tensors["w1.codebook"][tensors["w1.indices"]]
    exact = feeds @ tiny.normal(16, 64)
    error = feeds @ dense.reshape(16, 64) - exact
    expected = 10 * math.log10((exact**2).sum() / (error**2).sum())
    assert report.layers[0].output_sqnr_db == pytest.approx(expected, abs=0.01)


def test_skipped_weights_are_rows_too(tmp_path) -> None:
    body = """g (float[N, 16] x) => (float[N, 2] y) {
        a = MatMul(x, w) b = MatMul(a, f) f = Cast <to = 1> (codes) y = Identity(b) }"""
    codes = np.ones((64, 2), np.int8)
    model = tiny.save(tmp_path / "m.onnx", body, w=tiny.normal(16, 64), codes=codes)
    rows = compress(model, tmp_path / "o").layers
    assert [row.op for row in rows] == ["MatMul", "MatMul"]
    assert (rows[0].scheme[:6], rows[1].scheme) == ("kmeans", "-")
    assert rows[1].reason
    assert rows[1].parameters_before == rows[1].parameters_after


def test_a_weight_that_two_nodes_share_is_one_row(tmp_path) -> None:
    body = "g (float[N, 64] x) => (float[N, 64] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w) }"
    model = tiny.save(tmp_path / "m.onnx", body, w=tiny.normal(64, 64))
    (row,) = compress(model, tmp_path / "o").layers
    assert (row.parameters_before, row.parameters_after, row.macs_before) == (4096, 4096, 2 * 4096)


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("40 values are too few for a grid", None),
        ("too deep; 40 values are too few for a grid", "too deep"),
        ("too deep", "too deep"),
        (None, None),
    ],
)
def test_a_layer_in_int8_is_not_said_to_have_too_few_values(reason, shown) -> None:
    plan = LayerPlan(layer="w", factorize=None, weights=None, reason=reason)
    outcome = SimpleNamespace(
        parts={"w": ("w",)}, plan=SimpleNamespace(quantize="int8"), int8=frozenset({"w"}), kept_float={}
    )
    assert evidence._reason(plan, outcome) == shown
    left = SimpleNamespace(**{**vars(outcome), "int8": frozenset(), "kept_float": {"w": "slow"}})
    assert evidence._reason(plan, left) == (f"{reason}; not in int8: slow" if reason else "not in int8: slow")


def test_the_latency_ratio_is_compressed_over_original() -> None:
    def samples(median: float) -> LatencySamples:
        return LatencySamples(
            init_ms=1.0, first_ms=1.0, warmup_ms=(), values_ms=(median,) * 9, peak_rss_bytes=1, metadata={}
        )

    found = latency_of(samples(4.0), samples(3.0), device="local", threads=1)
    assert (found.ratio, found.original.median_ms, found.compressed.median_ms) == (0.75, 4.0, 3.0)


def test_the_plots_belong_to_the_biggest_layers(digits_out) -> None:
    report = json.loads((digits_out / "report.json").read_text())
    sizes = {row["name"]: row["parameters_before"] for row in report["layers"]}
    plotted = [plot["name"] for plot in report["plots"]]
    assert plotted == sorted(sizes, key=lambda name: -sizes[name])[:6]
    for plot in report["plots"]:
        assert sum(plot["histogram_counts"]) == sizes[plot["name"]]
        assert len(plot["histogram_edges"]) == len(plot["histogram_counts"]) + 1
        assert plot["singular_values"] == sorted(plot["singular_values"], reverse=True)
        assert plot["codebook"] == sorted(plot["codebook"])
        assert 2 <= len(plot["codebook"]) <= 32
