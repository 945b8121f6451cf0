"""The whole line on the model and the data that ship with the project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tiny import DIGITS, DIGITS_MODEL

import edgecompress
from edgecompress.data import split
from edgecompress.model import read_signature
from edgecompress.report.model import from_json

if TYPE_CHECKING:
    from conftest import Cli

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text())
x86_64 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the bundle copies the x86_64 runtime")


def test_five_bits_shrink_the_model_at_least_six_times_at_a_small_loss(digits_out) -> None:
    report = from_json((digits_out / "report.json").read_text())
    # 32 / 5 = 6.4 by the bits alone; entropy coding gains more than codebooks, graph and biases cost
    assert 6.0 < report.size.compression_ratio < 9.0
    accuracy = report.accuracy
    assert (accuracy.metric, accuracy.samples) == ("top1", 360)
    assert accuracy.original > 98.0
    # three standard errors of a paired difference of 360 images are about 1.2 points
    assert abs(accuracy.drop_points) <= 1.2
    assert accuracy.drop_points == pytest.approx(accuracy.original - accuracy.compressed)
    assert 0 <= accuracy.standard_error_points < 1.0  # 0 where every decision is the same
    assert accuracy.agreement >= 98.0
    assert report.outputs["logits"].sqnr_db > 15.0


def test_calibrated_factors_beat_plain_ones(cli: Cli, tmp_path) -> None:
    arguments = ["--data", DIGITS, "--factorize", "separable", "--cluster", "none", "--json"]
    calibrated = cli("compress", DIGITS_MODEL, "-o", tmp_path / "calibrated", *arguments).json
    plain = cli("compress", DIGITS_MODEL, "-o", tmp_path / "plain", *arguments, "--no-calibrate").json
    ranks = [[row["rank"] for row in report["layers"]] for report in (plain, calibrated)]
    assert ranks[0] == ranks[1]
    gain = calibrated["outputs"]["logits"]["sqnr_db"] - plain["outputs"]["logits"]["sqnr_db"]
    assert gain > 5.0  # decibels; 8.9 were seen
    assert calibrated["accuracy"]["drop_points"] < 1.0  # none was seen; three of the 360 test digits


def test_the_report_has_every_key_of_its_schema_and_of_the_contract(digits_out) -> None:
    report = json.loads((digits_out / "report.json").read_text())
    check(report, SCHEMA, "report")
    assert set(report["size"]) >= {"original_bytes", "onnx_bytes", "ecz_bytes", "compression_ratio", "waterfall"}
    assert {"metric", "original", "compressed", "drop_points", "standard_error_points", "samples"} <= set(
        report["accuracy"]
    )
    for model in ("original", "compressed"):
        timed = {"init_ms", "first_ms", "median_ms", "p90_ms", "samples", "peak_rss_bytes"}
        assert timed <= set(report["latency"][model])
    assert report["latency"]["ratio"] > 0
    row = {"name", "op", "scheme", "rank", "parameters_before", "parameters_after", "stored_bytes", "reason"}
    assert all(row | {"weight_sqnr_db", "output_sqnr_db"} <= set(layer) for layer in report["layers"])
    assert {"versions", "command", "recipe_hash"} <= set(report["tool"])
    assert all({"stage", "bytes"} == set(stage) for stage in report["size"]["waterfall"])


def check(value: object, schema: dict, where: str) -> None:
    """Check a value against the part of JSON Schema that the report's schema uses."""
    if "$ref" in schema:
        schema = {**SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], **schema}
    if "anyOf" in schema:
        if value is None:
            assert {"type": "null"} in schema["anyOf"], where
            return
        schema = next(option for option in schema["anyOf"] if option != {"type": "null"})
        check(value, schema, where)
        return
    if isinstance(value, dict):
        assert set(schema.get("required", [])) <= set(value), where
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            known = properties.get(key, others)
            assert isinstance(known, dict), f"{where}.{key} is not in the schema"
            check(item, known, f"{where}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            check(item, schema["items"], f"{where}[{number}]")
    else:
        kinds = {"integer": int, "number": (int, float), "string": str, "null": type(None), "boolean": bool}
        allowed = schema.get("type", [])
        names = [allowed] if isinstance(allowed, str) else allowed
        assert any(isinstance(value, kinds[name]) for name in names), f"{where} is {value!r}, not {names}"


def test_no_row_calibrates_and_tests() -> None:
    calibration, test = split(DIGITS, None, read_signature(DIGITS_MODEL)[0])
    taken = [part.source.origins(part.index) for part in (calibration, test)]
    assert (len(taken[0]), len(taken[1])) == (1437, 360)
    assert not taken[0] & taken[1]


def test_the_container_gives_the_model_back_byte_for_byte(digits_out, cli: Cli, tmp_path) -> None:
    assert cli("unpack", digits_out / "model.ecz", "-o", tmp_path / "m.onnx").code == 0
    assert (tmp_path / "m.onnx").read_bytes() == (digits_out / "model.onnx").read_bytes()


def test_it_can_be_compressed_again_with_an_edited_plan(digits_out, cli: Cli, tmp_path) -> None:
    plan = json.loads((digits_out / "plan.json").read_text())
    (tmp_path / "same.json").write_text(json.dumps(plan))
    assert (
        cli("compress", DIGITS_MODEL, "-o", tmp_path / "a", "--data", DIGITS, "--plan", tmp_path / "same.json").code
        == 0
    )
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (digits_out / "model.onnx").read_bytes()
    for entry in plan["layers"]:
        if entry["layer"] == "block4.conv.weight":
            entry["weights"]["bits"] = 3
            entry["factorize"] = {"scheme": "svd", "rank": 32, "calibrated": True}
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    arguments = ["--data", DIGITS, "--plan", tmp_path / "edited.json", "--json"]
    edited = cli("compress", DIGITS_MODEL, "-o", tmp_path / "b", *arguments).json
    schemes = {row["name"]: row["scheme"] for row in edited["layers"]}
    assert schemes["block4.conv.weight"] == "svd rank 32, kmeans 8"
    assert schemes["block1.conv.weight"].startswith("kmeans")
    assert edited["size"]["ecz_bytes"] < (digits_out / "model.ecz").stat().st_size


@x86_64
def test_all_three_outputs_compute_the_same_bit_for_bit(digits_out, cli: Cli, tmp_path) -> None:
    bundle = tmp_path / "bundle"
    assert cli("bundle", digits_out, "--target", "x86_64", "-o", bundle).code == 0
    assert cli("bundle", "--verify", bundle).code == 0
    feeds = {"image": split(DIGITS, None, read_signature(DIGITS_MODEL)[0])[1].feeds(0, 64)["image"]}
    script = """
import sys
from pathlib import Path
import numpy as np
bundle = Path(sys.argv[1])
sys.path[:] = [str(bundle / "lib"), *(entry for entry in sys.path if "site-packages" not in entry)]
from edgecompress.runtime import load
import onnxruntime
assert Path(onnxruntime.__file__).is_relative_to(bundle)
np.save(sys.argv[3], load(bundle).run(None, dict(np.load(sys.argv[2])))[0])
"""
    np.savez(tmp_path / "feeds.npz", **feeds)
    command = [
        sys.executable,
        "-I",
        "-B",
        "-c",
        script,
        str(bundle),
        str(tmp_path / "feeds.npz"),
        str(tmp_path / "y.npy"),
    ]
    subprocess.run(command, check=True)
    results = [edgecompress.load(digits_out / name).run(None, feeds)[0] for name in ("model.onnx", "model.ecz")]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], np.load(tmp_path / "y.npy"))
    timed = subprocess.run(
        [sys.executable, "-I", str(bundle / "run.py"), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(timed.stdout)["results"][0]["outputs_match"] is True
    compared = cli("validate", DIGITS_MODEL, bundle, "--data", DIGITS, "--max-drop", "1.2", "--json")
    assert compared.code == 0
    assert compared.json["accuracy"]["samples"] == 360


@x86_64
@pytest.mark.slow
def test_the_demo_can_be_run_again_and_again(process, tmp_path) -> None:
    for _ in range(2):
        done = process("demo", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "edgecompress-demo"
        assert done.stderr.rstrip().endswith(str(folder / "report.html"))
        assert "smaller" in done.stdout
        # another version of the runtime left this behind
        (folder / "bundle" / "lib" / "leftover.py").write_text("")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("bundle", "model.ecz", "model.onnx", "plan.json", "report.html", "report.json")
    ]


def test_a_rank_can_be_chosen_by_energy_or_by_variational_bayes(cli: Cli, tmp_path) -> None:
    arguments = ["--factorize", "svd", "--cluster", "none", "--json"]
    much = cli("compress", DIGITS_MODEL, "-o", tmp_path / "much", *arguments, "--energy", "0.9").json
    less = cli("compress", DIGITS_MODEL, "-o", tmp_path / "less", *arguments, "--energy", "0.5").json
    bayes = cli("compress", DIGITS_MODEL, "-o", tmp_path / "bayes", *arguments, "--evbmf").json
    for more, fewer in zip(much["layers"], less["layers"], strict=True):
        assert fewer["parameters_after"] <= more["parameters_after"] <= more["parameters_before"]
    assert any(row["rank"] for row in less["layers"])
    assert all(row["rank"] or row["reason"] for row in bayes["layers"])
