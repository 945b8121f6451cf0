"""Whatever is wrong with what comes in or with where it goes: one message, one exit code, nothing written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from conftest import Cli, snapshot


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.mlp(tmp_path / "m.onnx")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny.rows(tmp_path / "d.npz")


# Models


@pytest.mark.parametrize(
    "content", [b"", b"hello, world\n", bytes(range(256)) * 20, b"PK\x03\x04" + b"\0" * 100, b"\x08\x08"]
)
def test_a_file_that_is_no_model_is_refused_by_every_command(refused, data, tmp_path, content) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(content)
    good = tiny.mlp(tmp_path / "good.onnx")
    for arguments in (
        ["inspect", bad],
        ["compress", bad, "-o", "o"],
        ["pack", bad, "-o", "o.ecz"],
        ["bench", bad],
        ["bundle", bad, "-o", "b"],
        ["validate", bad, good, "--data", data],
        ["validate", good, bad, "--data", data],
    ):
        refused(3, "not an ONNX file", *arguments)
    refused(4, "not an .ecz file", "unpack", bad, "-o", "o.onnx")


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.7, 0.99, 0.9999])
def test_a_truncated_model_is_refused(refused, tmp_path, share) -> None:
    whole = tiny.DIGITS_MODEL.read_bytes()
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(whole[: int(len(whole) * share)])
    refused(3, str(bad), "compress", bad, "-o", "o")
    refused(3, str(bad), "inspect", bad)
    refused(3, str(bad), "pack", bad, "-o", "o.ecz")


def test_a_path_that_leads_nowhere_or_to_a_folder_is_refused(refused, model, data, tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    for path in ("absent.onnx", "folder", "m.onnx/x.onnx"):
        refused(3, path, "compress", path, "-o", "o")
        refused(3, path, "inspect", path)
        refused(3, path, "pack", path, "-o", "o")
        refused(3, path, "validate", model, path, "--data", data)
        refused(3, path, "bench", path)
        refused(3, path, "bundle", path, "-o", "b")


def test_a_newer_opset_is_refused_by_all_but_pack(refused, cli: Cli, tmp_path) -> None:
    model = tiny.save(tmp_path / "new.onnx", tiny.MLP, opset=99, w1=tiny.normal(16, 64), w2=tiny.normal(64, 4))
    outcome = refused(3, "opset 99 is not supported (allowed: 9 to 26)", "compress", model, "-o", "o")
    assert "edgecompress pack" in outcome.err
    refused(3, "opset 99", "inspect", model)
    assert cli("pack", model, "-o", tmp_path / "p.ecz").code == 0
    assert cli("unpack", tmp_path / "p.ecz", "-o", tmp_path / "back.onnx").code == 0
    assert (tmp_path / "back.onnx").read_bytes() == model.read_bytes()


def external(path: Path, location: str, *, write: bytes | None) -> Path:
    proto = onnx.load(tiny.mlp(path))
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(proto.SerializeToString())
    if write is not None:
        (path.parent / location).write_bytes(write)
    return path


@pytest.mark.parametrize(
    ("location", "write", "words"),
    [
        ("weights.bin", None, "missing"),
        ("weights.bin", b"\0" * 100, "too short"),
        ("../weights.bin", None, "leaves the model's folder"),
        ("/etc/passwd", None, "leaves the model's folder"),
        ("", None, "external data"),
    ],
)
def test_external_data_that_cannot_be_used_is_refused(refused, tmp_path, location, write, words) -> None:
    bad = external(tmp_path / "bad.onnx", location, write=write)
    refused(3, words, "compress", bad, "-o", "o")
    refused(3, words, "inspect", bad)
    refused(3, words, "bench", bad)
    if words != "too short":  # pack stores what is there, whatever it is
        refused(3, "tensor 'w1'", "pack", bad, "-o", "o.ecz")


def test_external_data_reached_by_a_link_out_of_the_folder_is_refused(refused, tmp_path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside.bin").write_bytes(b"\0" * 4096)
    (tmp_path / "inside" / "weights.bin").symlink_to(tmp_path / "outside.bin")
    bad = external(tmp_path / "inside" / "bad.onnx", "weights.bin", write=None)
    refused(3, "leaves the model's folder", "compress", bad, "-o", "o")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(refused, tmp_path, value) -> None:
    weight = tiny.normal(16, 64)
    weight[3, 4] = value
    bad = tiny.save(tmp_path / "bad.onnx", tiny.MLP, w1=weight, w2=tiny.normal(64, 4))
    refused(3, "weight 'w1' holds 1 NaN or Inf", "compress", bad, "-o", "o")
    refused(3, "weight 'w1' holds 1 NaN or Inf", "compress", bad, "-o", "o", "--factorize", "svd")
    refused(3, "weight 'w1' holds 1 NaN or Inf", "compress", bad, "-o", "o", "--cluster", "none")


def test_a_model_that_the_runtime_rejects_is_refused_with_its_reason(refused, tmp_path, data) -> None:
    body = "g (float[N, 16] x) => (float[N, 64] y) { a = MatMul(x, w) y = Wonder(a) }"
    bad = tiny.save(tmp_path / "bad.onnx", body, w=tiny.normal(16, 64))
    good = tiny.save(tmp_path / "good.onnx", body.replace("Wonder", "Relu"), w=tiny.normal(16, 64))
    refused(3, "Wonder", "compress", bad, "-o", "o")
    refused(3, "Wonder", "bench", bad)
    refused(3, "Wonder", "validate", bad, good, "--data", data)
    refused(3, "Wonder", "validate", good, bad, "--data", data)


def test_a_run_that_fails_on_random_inputs_is_one_error_that_names_shape(refused, cli: Cli, tmp_path) -> None:
    body = "g (float[N, T] x) => (float[N, 64] y) { a = Reshape(x, shape) y = MatMul(a, w) }"
    bad = tiny.save(tmp_path / "bad.onnx", body, w=tiny.normal(16, 64), shape=np.array([5, 16], np.int64))
    for name, command in (
        ("bad.onnx", ["compress", bad, "-o", "o"]),
        ("bad.onnx", ["bench", bad]),
        (" b/model.ecz", ["bundle", bad, "-o", "b"]),
    ):
        assert "--shape NAME=DIMS" in refused(3, name, *command).err
    assert cli("compress", bad, "-o", tmp_path / "o", "--shape", "x=10,8").code == 0


def test_integers_are_drawn_below_the_smallest_table_they_reach(cli: Cli, tmp_path) -> None:
    body = """g (int64[N, T] i) => (float[N, T, 8] y) {
        j = Identity(i)  a = Gather(large, i)  b = Gather(tiny3, j)  y = Add(a, b) }"""
    model = tiny.save(tmp_path / "m.onnx", body, large=tiny.normal(500, 8), tiny3=tiny.normal(3, 8))
    outcome = cli("compress", model, "-o", tmp_path / "o", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["outputs"]["y"]["sqnr_db"] > 10


# Containers


def test_a_container_is_refused_after_any_change(refused, digits_out, tmp_path) -> None:
    whole = (digits_out / "model.ecz").read_bytes()
    bad = tmp_path / "bad.ecz"
    positions = {*range(0, 64, 7), *range(0, len(whole), len(whole) // 40), len(whole) - 1}
    for position in sorted(positions):
        bad.write_bytes(tiny.flipped(whole, position, position % 8))
        refused(4, str(bad), "unpack", bad, "-o", "o.onnx")
    for length in (1, 3, 8, 30, 100, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:length])
        refused(4, str(bad), "unpack", bad, "-o", "o.onnx")
    bad.write_bytes(whole + b"\0")
    refused(4, str(bad), "unpack", bad, "-o", "o.onnx")


@pytest.mark.parametrize("share", [0.0002, 0.03, 0.5, 0.999])
def test_a_damaged_container_cannot_be_validated_benched_or_bundled(refused, digits_out, tmp_path, share) -> None:
    whole = (digits_out / "model.ecz").read_bytes()
    bad = tmp_path / "bad.ecz"
    bad.write_bytes(tiny.flipped(whole, int(len(whole) * share)) if share > 0.001 else whole[:1000])
    refused(4, str(bad), "validate", tiny.DIGITS_MODEL, bad, "--data", tiny.DIGITS)
    refused(4, str(bad), "bench", bad)
    refused(4, str(bad), "bundle", bad, "-o", "b")


def test_a_container_is_no_input_of_compress_or_pack(refused, digits_out) -> None:
    packed = digits_out / "model.ecz"
    assert "unpack" in refused(3, "it is an .ecz file", "compress", packed, "-o", "o").err
    assert "unpack" in refused(3, "it is an .ecz file", "pack", packed, "-o", "o").err


def test_a_folder_that_is_no_bundle_is_refused(refused, model, data, tmp_path) -> None:
    (tmp_path / "b").mkdir()
    refused(4, "manifest.json", "bundle", "--verify", "b")
    refused(4, "manifest.json", "bundle", "--verify", "absent")
    (tmp_path / "b" / "manifest.json").write_text('{"model": "../m.onnx"}')
    for arguments in (["bundle", "--verify", "b"], ["bench", "b"], ["validate", model, "b", "--data", data]):
        refused(4, "b", *arguments)


# Data sets


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": np.zeros((20, 16), np.float32)}, "'z'"),
        ({"x": np.zeros((20, 15), np.float32)}, "x"),
        ({"x": np.zeros((20,), np.float32)}, "x"),
        ({"x": np.zeros((20, 16), np.complex64)}, "complex64"),
        ({"x": np.full((20, 16), np.nan, np.float32)}, "x"),
        ({"x": np.zeros((0, 16), np.float32)}, "x"),
        ({"x": np.array([["a"] * 16] * 20)}, "x"),
        ({"x": np.zeros((20, 16), np.float32), "labels": np.zeros(3, np.int64)}, "labels"),
        ({"x": np.array([{}] * 20, dtype=object)}, "x"),
        ({"x": np.zeros((1, 16), np.float32)}, "one row"),
        ({}, ""),
    ],
)
def test_data_that_does_not_fit_is_refused(refused, model, tmp_path, arrays, words) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    assert "bad.npz" in refused(3, words, "compress", model, "-o", "o", "--data", "bad.npz").err
    if words != "one row":
        refused(3, words, "validate", model, model, "--data", "bad.npz")


def test_a_file_that_is_no_data_set_is_refused(refused, model, data, tmp_path) -> None:
    (tmp_path / "bad.npz").write_bytes(data.read_bytes()[:-100])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "bad.toml").write_text("arrays = ")
    (tmp_path / "odd.toml").write_text('arrayz = "d.npz"')
    (tmp_path / "pictures").mkdir()
    for name in ("bad.npz", "text.npz", "bad.toml", "odd.toml", "pictures", "absent.npz", "m.onnx"):
        refused(3, name, "compress", model, "-o", "o", "--data", name)
        refused(3, name, "validate", model, model, "--data", name)
    refused(
        3, "both as the data and as the test data", "compress", model, "-o", "o", "--data", data, "--test-data", data
    )


# Recipes and plans


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        ("bitz = 4", "unknown option 'bitz'", "did you mean 'bits'"),
        ("bits = 9", "from 1 to 8, not 9", ""),
        ('cluster = "kmean"', "'kmean'", "did you mean 'kmeans'"),
        ("[ops.Conf]\nbits = 4", "'Conf'", "did you mean 'Conv'"),
        ("[layers.w11]\nbits = 4", "'w11'", "did you mean 'w1'"),
        ("[layers.w1]\nbit = 4", "unknown option 'bit'", "did you mean 'bits'"),
        ("bits = = 4", "not a TOML file", ""),
        ("layers = 3", "must hold tables", ""),
    ],
)
def test_a_wrong_recipe_is_refused_with_a_suggestion(refused, model, *, tmp_path, text, words, hint) -> None:
    (tmp_path / "r.toml").write_text(text)
    assert hint in refused(2, words, "compress", model, "-o", "o", "--recipe", "r.toml").err


def test_a_wrong_plan_is_refused(refused, cli: Cli, model, tmp_path) -> None:
    assert cli("compress", model, "-o", tmp_path / "first").code == 0
    text = (tmp_path / "first" / "plan.json").read_text()
    for edited, words in (
        (text.replace('"w1"', '"w3"'), "no layer 'w3'"),
        (text.replace('"bits": 5', '"bits": 0', 1), "from 1 to 8, not 0"),
        (text.replace('"bits"', '"bitz"', 1), "unknown key 'bitz'"),
        (text.replace('"kmeans"', '"kmedians"', 1), "'kmedians'"),
        (text[:-20], "not JSON"),
        ("[]", "expected an object"),
        (text.replace('"calibrated": false', '"calibrated": true', 1), "need data"),
    ):
        assert edited != text
        (tmp_path / "p.json").write_text(edited)
        refused(2, words, "compress", model, "-o", "o", "--plan", "p.json")
    (tmp_path / "p.json").write_text(text)
    refused(2, "for another model", "compress", tiny.DIGITS_MODEL, "-o", "o", "--plan", "p.json")


# Places that cannot be written


def test_a_place_that_cannot_be_written_is_refused(refused, model, digits_out) -> None:
    for place in ("m.onnx/o", "/proc/o", "/proc/sys/o", "n" * 300):
        refused(9, place, "compress", model, "-o", place)
        refused(9, place, "pack", model, "-o", place)
        refused(9, place, "unpack", digits_out / "model.ecz", "-o", place)
        refused(9, place, "bundle", model, "-o", place)


def test_a_read_only_file_system_is_refused(refused, model, full_disk) -> None:
    place = full_disk(512)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    refused(9, "read-only", "compress", model, "-o", place / "o")
    refused(9, "read-only", "pack", model, "-o", place / "o.ecz")


@pytest.mark.parametrize("kibibytes", [4, 64, 96, 128, 160])
def test_a_disk_that_fills_up_is_an_error_and_gets_everything_back(refused, full_disk, kibibytes) -> None:
    # model.onnx takes 70 KiB, model.ecz 39, report.json 28, report.html 56: every size bites at another file
    place = full_disk(kibibytes)
    refused(9, "no space left on the disk", "compress", tiny.DIGITS_MODEL, "-o", place / "new" / "out")
    refused(9, "no space left on the disk", "pack", tiny.DIGITS_MODEL, "-o", place / "m.ecz")
    assert list(place.iterdir()) == []


def test_unpacking_onto_a_full_disk_is_an_error(refused, full_disk, digits_out) -> None:
    place = full_disk(64)
    refused(9, "no space left on the disk", "unpack", digits_out / "model.ecz", "-o", place / "m.onnx")
    refused(9, "no space left on the disk", "bundle", digits_out, "-o", place / "b")
    assert list(place.iterdir()) == []


def test_a_full_folder_for_temporary_files_is_an_error_or_is_not_needed(process, full_disk, model, data) -> None:
    place = full_disk(16)
    (place / "filler").write_bytes(b"\0" * 16384)
    done = process("validate", model, model, "--data", data, env={**os.environ, "TMPDIR": str(place)})
    assert done.returncode in (0, 9), done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in place.iterdir()] == ["filler"]


def test_outputs_that_wait_on_a_full_disk_are_an_error(full_disk, tmp_path, monkeypatch) -> None:
    import tempfile

    from edgecompress.errors import OutputError
    from edgecompress.model import read_signature
    from edgecompress.validate import random_rows, validate

    model = tiny.mlp(tmp_path / "m.onnx")
    place = full_disk(64)
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    test = random_rows(read_signature(model)[0], {}, {}, rows=2000)
    with pytest.raises(OutputError, match="no space left"):
        validate(model, model, test, low_memory=True)
    assert list(place.iterdir()) == []


# Interrupted

STAGES = {
    "calibrate": "calibrate",
    "solve": "solve_layers",
    "validate": "validate",
    "report": "to_html",
}
# Whoever started the tests with nohup has told them, and their children, to ignore SIGHUP.
STOP = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
import edgecompress.pipeline as pipeline
import edgecompress.stages as stages
place = stages if "{function}" == "solve_layers" else pipeline
real = place.{function}
def stop(*arguments, **named):
    if "{function}" == "validate":  # with both models loaded
        def wait(*_):
            print("here", flush=True)
            time.sleep(60)
        named["progress"] = wait
        return real(*arguments, **named)
    print("here", flush=True)
    time.sleep(60)
place.{function} = stop
from edgecompress.cli import main
sys.argv = ["edgecompress", *sys.argv[1:]]
main()
"""


def children_of(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == pid:
            found.add(int(stat.parent.name))
    return found


@pytest.fixture
def stopped_in(model, data, own_tempdir, tmp_path) -> Iterator:
    """Start compress, stop in a stage, and give the process and the children it has by then."""
    started: list[subprocess.Popen] = []

    def start(stage: str) -> tuple[subprocess.Popen, set[int]]:
        arguments = ["compress", str(model), "-o", str(tmp_path / "new" / "out"), "--data", str(data)]
        process = subprocess.Popen(
            [sys.executable, "-c", STOP.format(function=STAGES[stage]), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        return process, children_of(process.pid)

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("calibrate", signal.SIGINT),
        ("solve", signal.SIGTERM),
        ("validate", signal.SIGINT),
        ("validate", signal.SIGTERM),
        ("report", signal.SIGHUP),
    ],
)
def test_an_interrupted_run_leaves_no_file_and_no_process(stopped_in, stage, number, own_tempdir, tmp_path) -> None:
    before = snapshot(tmp_path)
    process, children = stopped_in(stage)
    assert len(children) == (2 if stage == "validate" else 0)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted: nothing half-written is left\n"
    assert snapshot(tmp_path) == before
    deadline = time.monotonic() + 5
    while children and time.monotonic() < deadline:
        children = {pid for pid in children if Path(f"/proc/{pid}").exists()}
        time.sleep(0.02)
    assert not children


def test_a_killed_run_leaves_no_process_behind(stopped_in) -> None:
    process, children = stopped_in("validate")
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while children and time.monotonic() < deadline:
        children = {pid for pid in children if Path(f"/proc/{pid}").exists()}
        time.sleep(0.02)
    assert not children
