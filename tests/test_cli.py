from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import Cli, snapshot

from edgecompress.factorize.sizes import count_parameters
from edgecompress.runtime.tensors import read_tensor

OPTIONS = {
    "inspect": ["--json", "--shape"],
    "compress": [
        *("--out", "--data", "--test-data", "--recipe", "--plan", "--factorize", "--keep", "--rank", "--cluster"),
        *("--bits", "--prune", "--prune-scope", "--target", "--no-calibrate", "--shape", "--force", "--json"),
    ],
    "validate": ["--data", "--min-sqnr-db", "--max-drop", "--json"],
    "pack": ["--out", "--force"],
    "unpack": ["--out", "--force"],
    "targets": ["--json"],
    "bundle": ["--target", "--out", "--runtime", "--runtime-file", "--archive", "--verify", "--force"],
    "bench": ["--device", "--threads", "--runs", "--cores", "--pause-above", "--shape", "--json"],
    "export": ["--input", "--dynamic-batch", "--out", "--force"],
    "demo": ["--out"],
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.mlp(tmp_path / "m.onnx")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def plan_of(out: Path) -> dict[str, dict]:
    return {entry["layer"]: entry for entry in json.loads((out / "plan.json").read_text())["layers"]}


# What it says of itself


@pytest.mark.parametrize("command", OPTIONS)
def test_the_help_of_every_command_names_its_options(cli: Cli, command: str, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = cli(command, "--help")
    assert outcome.code == 0
    assert [option for option in OPTIONS[command] if f"{option} " not in outcome.out] == []


def test_the_program_without_a_command_shows_its_help_and_lists_every_command(cli: Cli) -> None:
    outcome = cli()
    assert outcome.code == 2
    assert outcome.err == ""
    assert all(command in outcome.out for command in OPTIONS)
    assert "Exit codes" in outcome.out


def test_help_and_version_load_nothing_heavy() -> None:
    script = """
import sys
from edgecompress.cli import main
for argument in ("--help", "--version"):
    sys.argv = ["edgecompress", argument]
    try:
        main()
    except SystemExit as left:
        assert left.code == 0
heavy = {"numpy", "onnx", "onnxruntime", "onnx_graphsurgeon", "torch", "tensorly", "PIL"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_package_loads_no_runtime_and_gives_the_public_names() -> None:
    script = """
import sys, edgecompress
heavy = {"onnx", "onnxruntime", "torch", "tensorly"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from edgecompress import *
assert callable(compress) and callable(load) and callable(pack) and callable(unpack)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_while_modules_are_loaded_leaves_no_traceback(tmp_path) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    for start in (["-m", "edgecompress"], ["-c", "from edgecompress.__main__ import main; main()"]):
        done = subprocess.run(
            [sys.executable, *start, "--version"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert (done.returncode, done.stdout) == (130, "")
        assert done.stderr == "interrupted: nothing half-written is left\n"


# Usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "0"], "--bits must be a whole number from 1 to 8, not '0'"),
        (["--bits", "9"], "--bits must be a whole number from 1 to 8, not '9'"),
        (["--bits", "2.5"], "--bits must be a whole number from 1 to 8, not '2.5'"),
        (["--bits", "abc"], "--bits must be a whole number from 1 to 8, not 'abc'"),
        (["--bits", "-1"], "not '-1'"),
        (["--target-size", "1e9"], "--target-size must be a whole number of at least 1, not '1e9'"),
        (["--target-size", "0"], "--target-size must be a whole number of at least 1, not '0'"),
        (["--step", "wide"], "--step must be a number above 0, not 'wide'"),
        (["--average-bits", "nan"], "--average-bits must be a number above 0, not 'nan'"),
        (["--prune", "0.5", "--prune-scope", "model"], "prune_scope must be one of global, layer, not 'model'"),
        (["--factorize", "svd", "--rank", "3", "--keep", "0.5"], "rank and keep exclude each other"),
        (["--factorize", "svd", "--rank", "0"], "--rank must be a whole number of at least 1"),
        (["--factorize", "svd", "--keep", "0"], "--keep must be a share above 0 and at most 1"),
        (["--factorize", "svd", "--keep", "1.5"], "not '1.5'"),
        (["--factorize", "svd", "--keep", "nan"], "not 'nan'"),
        (["--rank", "3"], "rank needs factorize"),
        (["--factorize", "none", "--keep", "0.5"], "needs factorize"),
        (["--factorize", "tucker"], "'tucker'"),
        (["--cluster", "kmean"], "'kmean'"),
        (["--threads", "0"], "--threads must be"),
        (["--shape", "x"], "--shape 'x' is not NAME=DIMS"),
        (["--shape", "x=1,8"], "does not fit"),
        (["--shape", "z=1,16"], "no input 'z'"),
        (["--plan", "p.json", "--bits", "4"], "it excludes --bits"),
        (["--plan", "p.json", "--recipe", "r.toml", "--cluster", "none"], "it excludes --recipe, --cluster"),
        (["--bitz", "4"], "--bitz"),
    ],
)
def test_wrong_options_are_usage_errors_that_name_the_value(refused, model, out, arguments, words) -> None:
    refused(2, words, "compress", model, "-o", out, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compres"], "Did you mean 'compress'"),
        (["bench", "m.onnx", "--device", "locl"], "no device 'locl'"),
        (["bench", "m.onnx", "--runs", "0"], "--runs must be"),
        (["bundle"], "bundle needs OUT and -o DIR"),
        (["bundle", "m.onnx", "-o", "b", "--target", "x86"], "no target 'x86'"),
        (["bundle", "--verify", "b", "-o", "c"], "--verify takes a bundle and nothing else"),
        (["validate", "m.onnx", "m.onnx", "--data", "d.npz", "--max-drop", "nan"], "--max-drop must be"),
        (["export", "a:b", "--input", "1,x", "-o", "e.onnx"], "--input '1,x' is not a shape"),
    ],
)
def test_every_command_refuses_wrong_usage(refused, model, arguments, words) -> None:
    refused(2, words, *arguments)


def test_a_misspelt_value_gets_a_suggestion(refused, model, out) -> None:
    assert "did you mean 'kmeans'" in refused(2, "kmean", "compress", model, "-o", out, "--cluster", "kmean").err
    assert "did you mean 'local'" in refused(2, "locl", "bench", model, "--device", "locl").err


# What the options do


def test_the_defaults_are_five_bits_of_kmeans_and_no_factors(cli: Cli, model, out) -> None:
    assert cli("compress", model, "-o", out).code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("model.ecz", "model.onnx", "plan.json", "report.html", "report.json")
    ]
    for entry in plan_of(out).values():
        assert entry["factorize"] is None
        assert entry["weights"] == {"scheme": "kmeans", "bits": 5, "step": None, "prune": 0.0, "calibrated": False}


def test_factorize_alone_keeps_half_of_the_parameters(cli: Cli, model, out) -> None:
    assert cli("compress", model, "-o", out, "--factorize", "svd", "--cluster", "none").code == 0
    for name, shape in (("w1", (64, 16)), ("w2", (4, 64))):
        rank = plan_of(out)[name]["factorize"]["rank"]
        most = 0.5 * shape[0] * shape[1]
        assert count_parameters("svd", shape, (rank,)) <= most < count_parameters("svd", shape, (rank + 1,))
        assert plan_of(out)[name]["weights"] is None


def test_a_rank_that_saves_nothing_leaves_the_layer_alone_and_says_so(cli: Cli, model, out) -> None:
    arguments = ["--factorize", "svd", "--rank", "4", "--cluster", "none", "--json"]
    outcome = cli("compress", model, "-o", out, *arguments)
    assert outcome.code == 0
    first, second = outcome.json["layers"]
    assert (first["rank"], second["rank"]) == (4, None)
    assert first["parameters_after"] == 4 * (64 + 16) < first["parameters_before"]
    assert second["parameters_after"] == second["parameters_before"] == 256
    assert "rank 4 would not lower its 256 parameters" in second["reason"]


def test_no_calibrate_gives_the_model_that_no_data_gives(cli: Cli, model, out, tmp_path) -> None:
    data = tiny.rows(tmp_path / "d.npz")
    factorize = ["--factorize", "svd", "--keep", "0.6"]
    assert cli("compress", model, "-o", out, "--data", data, "--no-calibrate", *factorize).code == 0
    assert cli("compress", model, "-o", tmp_path / "plain", *factorize).code == 0
    assert cli("compress", model, "-o", tmp_path / "calibrated", "--data", data, *factorize).code == 0
    plain = (tmp_path / "plain" / "model.onnx").read_bytes()
    assert (out / "model.onnx").read_bytes() == plain
    assert (tmp_path / "calibrated" / "model.onnx").read_bytes() != plain
    assert all(entry["factorize"]["calibrated"] for entry in plan_of(tmp_path / "calibrated").values())


def test_an_edited_plan_is_applied_as_it_stands(cli: Cli, model, out, tmp_path) -> None:
    assert cli("compress", model, "-o", out).code == 0
    plan = json.loads((out / "plan.json").read_text())
    plan["layers"][0]["weights"]["bits"] = 2
    plan["layers"][1]["weights"] = None
    (tmp_path / "p.json").write_text(json.dumps(plan))
    outcome = cli("compress", model, "-o", tmp_path / "edited", "--plan", tmp_path / "p.json", "--json")
    assert [row["scheme"] for row in outcome.json["layers"]] == ["kmeans 4", "-"]


def test_shape_sets_what_is_counted_and_run(cli: Cli, tmp_path, out) -> None:
    body = "g (float[N, T, 16] x) => (float[N, T, 64] y) { y = MatMul(x, w) }"
    model = tiny.save(tmp_path / "m.onnx", body, w=tiny.normal(16, 64))
    macs = [
        cli("inspect", model, *shape, "--json").json["layers"][0]["macs"] for shape in ([], ["--shape", "x=2,3,16"])
    ]
    assert macs == [8 * 16 * 64, 2 * 3 * 16 * 64]
    assert cli("compress", model, "-o", out, "--shape", "x=2,3,16").code == 0


# Files that are there already


def test_a_folder_with_something_in_it_is_refused_and_left_as_it_is(refused, model, out) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    refused(9, "the folder is not empty", "compress", model, "-o", out)


def test_force_replaces_its_own_files_and_keeps_all_others(cli: Cli, model, out) -> None:
    (out / "sub").mkdir(parents=True)
    foreign = {"mine.txt": b"mine", "sub": None, "sub/model.ecz": b"mine too"}
    for name, content in foreign.items():
        if content is not None:
            (out / name).write_bytes(content)
    (out / "model.onnx").write_bytes(b"old")
    assert cli("compress", model, "-o", out, "--force").code == 0
    after = snapshot(out)
    assert {name: after.pop(name) for name in foreign} == foreign
    assert sorted(after) == ["model.ecz", "model.onnx", "plan.json", "report.html", "report.json"]
    assert after["model.onnx"] != b"old"


def test_an_empty_folder_needs_no_force(cli: Cli, model, out) -> None:
    out.mkdir()
    assert cli("compress", model, "-o", out).code == 0


def test_the_input_is_never_replaced(refused, tmp_path) -> None:
    model = tiny.mlp(tmp_path / "model.onnx")
    refused(9, "would replace the input", "compress", model, "-o", tmp_path, "--force")
    refused(9, "would replace the input", "pack", model, "-o", model, "--force")


def test_pack_and_unpack_refuse_an_existing_file_without_force(refused, cli: Cli, model, tmp_path) -> None:
    packed = tmp_path / "m.ecz"
    assert cli("pack", model, "-o", packed).code == 0
    refused(9, "the file exists", "pack", model, "-o", packed)
    refused(9, "the file exists", "unpack", packed, "-o", model)
    original = model.read_bytes()
    model.write_bytes(b"something else")
    assert cli("unpack", packed, "-o", model, "--force").code == 0
    assert model.read_bytes() == original


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs a device file")
def test_a_device_is_never_replaced_by_a_file(cli: Cli, model, tmp_path) -> None:
    os.mkfifo(tmp_path / "fifo")
    outcome = cli("pack", model, "-o", tmp_path / "fifo", "--force")
    assert outcome.code == 9
    assert "not a regular file" in outcome.err
    assert (tmp_path / "fifo").is_fifo()


# What goes where


def test_json_is_the_report_alone_and_all_else_goes_to_stderr(process, model, out) -> None:
    done = process("compress", model, "-o", out, "--json")
    assert done.returncode == 0
    assert done.stdout == (out / "report.json").read_text()
    assert "no --data" not in done.stderr  # the report says it already
    human = process("compress", model, "-o", out, "--force")
    assert human.returncode == 0
    assert "smaller" in human.stdout
    assert human.stderr.splitlines()[-1] == f"report: {out / 'report.html'}"
    assert "[W:onnxruntime" not in done.stderr + human.stderr


def test_inspect_names_the_layers_like_the_report_in_the_same_order(cli: Cli, tmp_path, out) -> None:
    body = """g (float[N, 16] x, int64[N] i, bool c) => (float[N, 4] y, float[N, 8] t) {
        t = Gather(table, i)  a = MatMul(x, w1)  h = Relu(a)  b = MatMul(h, small)  s = MatMul(b, codes32)
        codes32 = Cast <to = 1> (codes)  y = Identity(s) }"""
    weights = {"table": tiny.normal(40, 8), "w1": tiny.normal(16, 64), "small": tiny.normal(64, 2)}
    model = tiny.save(tmp_path / "m.onnx", body.replace(", bool c", ""), codes=np.ones((2, 4), np.int8), **weights)
    rows = cli("inspect", model, "--json").json
    assert list(rows) == ["layers"]
    keys = ["name", "op", "shape", "parameters", "macs", "bytes_share", "skip_reason"]
    assert [list(row) for row in rows["layers"]] == [keys] * len(rows["layers"])
    report = cli("compress", model, "-o", out, "--json").json
    shown = [(row["name"], row["op"], row["shape"], row["parameters"]) for row in rows["layers"]]
    assert shown == [(row["name"], row["op"], row["shape"], row["parameters_before"]) for row in report["layers"]]
    assert [row["name"] for row in rows["layers"]][:3] == ["table", "w1", "small"]
    assert sum(row["bytes_share"] for row in rows["layers"]) <= 1.0
    assert rows["layers"][1]["bytes_share"] == pytest.approx(16 * 64 * 4 / (4 * (320 + 1024 + 128) + 8))


def test_validate_prints_before_it_fails(cli: Cli, model, tmp_path) -> None:
    data, other = tiny.rows(tmp_path / "d.npz"), tiny.mlp(tmp_path / "other.onnx", seed=5)
    human = cli("validate", model, other, "--data", data, "--min-sqnr-db", "200")
    assert human.code == 5
    assert "same decision" in human.out
    assert human.err.startswith("error: output 'y': SQNR ")
    strict = cli("validate", model, other, "--data", data, "--max-drop", "0", "--json")
    assert strict.code == 5
    assert list(strict.json) == ["accuracy", "outputs"]
    assert list(strict.json["outputs"]["y"]) == ["sqnr_db", "max_abs"]
    assert cli("validate", model, model, "--data", data, "--min-sqnr-db", "200", "--max-drop", "0").code == 0


def test_a_reader_that_leaves_early_changes_neither_the_work_nor_the_exit_code(process, model, tmp_path) -> None:
    data, other = tiny.rows(tmp_path / "d.npz"), tiny.mlp(tmp_path / "other.onnx", seed=5)
    for extra in ([], ["--json"]):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "wb") as closed:
            arguments = ["validate", model, other, "--data", data, "--min-sqnr-db", "200", *extra]
            done = process(*arguments, stdout=closed)
        assert done.returncode == 5
        assert done.stderr.startswith("error: output 'y'")
        assert "Broken" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_stdout_that_cannot_be_written_is_a_disk_error(process, model) -> None:
    with Path("/dev/full").open("w") as full:
        done = process("inspect", model, "--json", stdout=full)
    assert done.returncode == 9
    assert done.stderr.startswith("error: cannot write to stdout: No space left")


def test_odd_terminals_and_names_do_no_harm(process, tmp_path) -> None:
    model = tiny.mlp(tmp_path / "ü [bold] 模型.onnx")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = process("compress", model, "-o", tmp_path / "ü out", env=environment)
    assert (done.returncode, "internal error" in done.stderr) == (0, False), done.stderr
    assert process("inspect", model, "--json", stdout=None, preexec_fn=lambda: os.close(1)).returncode == 0


# Measuring


def test_bench_takes_all_kinds_of_models(cli: Cli, model, tmp_path) -> None:
    packed = tmp_path / "m.ecz"
    assert cli("pack", model, "-o", packed).code == 0
    alone = cli("bench", packed, "--runs", "3", "--json")
    assert alone.code == 0
    (row,) = alone.json["models"]
    assert (row["model"], row["samples"], row["ratio"]) == (str(packed), 3, 1.0)
    assert row["size_bytes"] == packed.stat().st_size
    both = cli("bench", model, packed, "--runs", "3", "--threads", "2", "--json").json
    first, second = both["models"]
    assert second["ratio"] == pytest.approx(second["median_ms"] / first["median_ms"])
    assert (both["device"], both["facts"]["threads"]) == ("local", 2)
    human = cli("bench", model, "--runs", "3")
    assert human.code == 0
    assert "median" in human.out
    assert "note: only 3 runs" in human.err  # one model needs no name
    assert f"note: {packed}: only 3 runs" in cli("bench", model, packed, "--runs", "3").err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--cores", "0,x"), "--cores"),
        (("--cores", "-1"), "--cores"),
        (("--pause-above", "hot"), "--pause-above"),
        (("--pause-above", "300"), "--pause-above"),
        (("--threads", "0"), "--threads"),
        (("--device", "sshh://pi"), "no device 'sshh://pi'"),
    ],
)
def test_bench_names_the_option_that_is_wrong(refused, given, words) -> None:
    refused(2, words, "bench", tiny.DIGITS_MODEL, *given)


def test_bench_of_nothing_is_a_usage_error(refused) -> None:
    refused(2, "nothing to measure", "bench")


def test_bench_never_holds_two_large_models(cli: Cli, model, monkeypatch) -> None:
    from edgecompress import device_commands

    seen = []
    monkeypatch.setattr(device_commands, "LARGE_MODEL_BYTES", 100)
    from edgecompress.devices.local import LocalRunner

    real = LocalRunner.measure
    monkeypatch.setattr(
        LocalRunner, "measure", lambda self, *a, **k: seen.append(k["options"].alternate) or real(self, *a, **k)
    )
    assert cli("bench", model, model, "--runs", "2").code == 0
    assert seen == [False]


def test_a_demo_does_not_replace_files_that_are_not_its_own(cli, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.onnx").write_text("x")
    outcome = cli("demo", "-o", tmp_path / "mine")
    assert outcome.code == 9
    assert (tmp_path / "mine" / "model.onnx").read_text() == "x"


def test_inspect_shows_what_the_model_takes_and_gives(cli, tmp_path) -> None:
    shown = cli("inspect", tiny.mlp(tmp_path / "m.onnx")).out
    assert "input  x float32 (N, 16)" in shown
    assert "output y float32 (N, 4)" in shown


def test_the_sample_of_a_bundle_can_be_real(cli: Cli, tmp_path: Path) -> None:
    given = np.arange(80, dtype=np.float32).reshape(5, 16)
    np.savez(tmp_path / "x.npz", x=given)
    model = tiny.mlp(tmp_path / "m.onnx")
    outcome = cli("bundle", model, "-o", tmp_path / "b", "--runtime", "none", "--data", tmp_path / "x.npz")
    assert outcome.code == 0
    _, sample = read_tensor((tmp_path / "b" / "test_data" / "input_0.pb").read_bytes())
    np.testing.assert_array_equal(sample, given[:1])
