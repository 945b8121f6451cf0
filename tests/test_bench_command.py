"""What ``bench`` takes, what it refuses, and on which device it measures when nobody says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx.parser
import pytest
from device_samples import RESULT, printing, script_bundle

from edgecompress import device_commands
from edgecompress.bundle import verify_bundle
from edgecompress.devices.local import LocalRunner

if TYPE_CHECKING:
    from conftest import Cli

Refused = Callable[..., Any]


def model(path: Path, inputs: str = "float[N, 4] x", op: str = "Relu") -> Path:
    name = inputs.rpartition(" ")[2]
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({inputs}) => (float[N, 4] y) {{ y = {op}({name}) }}'
    path.parent.mkdir(exist_ok=True)
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_bundles_and_model_files_are_not_mixed(refused: Refused, tmp_path: Path) -> None:
    bundle, plain = script_bundle(tmp_path / "b", printing(RESULT)), model(tmp_path / "m.onnx")
    for given in ((bundle, plain), (plain, bundle)):
        refused(2, f"{bundle} is a bundle, and others are model files", "bench", *given)


def test_a_bundle_takes_no_shape(refused: Refused, tmp_path: Path) -> None:
    bundle = script_bundle(tmp_path / "b", printing(RESULT))
    refused(2, "--shape is for model files", "bench", bundle, "--shape", "x=1,4")


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ("float[N, 4] z", "z float32 ?,4"),
        ("double[N, 4] x", "x float64 ?,4"),
        ("float[N, 5] x", "x float32 ?,5"),
        ("float[4] x", "x float32 4"),
    ],
)
def test_models_with_other_inputs_are_refused_by_the_names_of_these(
    refused: Refused, tmp_path: Path, inputs: str, said: str
) -> None:
    one, other = model(tmp_path / "one.onnx"), model(tmp_path / "other.onnx", inputs)
    refused(2, f"different inputs: x float32 ?,4 in {one}, {said} in {other}", "bench", one, other)


def test_a_free_dimension_fits_a_fixed_one(cli: Cli, tmp_path: Path) -> None:
    one, other = model(tmp_path / "one.onnx"), model(tmp_path / "other.onnx", "float[1, 4] x")
    assert cli("bench", one, other, "--runs", "2").code == 0


def test_of_a_folder_that_compress_wrote_the_model_is_measured(cli: Cli, tmp_path: Path) -> None:
    made = model(tmp_path / "out" / "model.onnx")
    (row,) = cli("bench", made.parent, "--runs", "2", "--json").json["models"]
    assert (row["model"], row["size_bytes"]) == (str(made), made.stat().st_size)


@pytest.mark.parametrize("name", ["b.tar.gz", "b.zip"])
def test_an_archive_has_to_be_unpacked_first(refused: Refused, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert "unpack it first" in refused(2, "is the archive of a bundle", "bench", tmp_path / name).err


@pytest.mark.parametrize("command", ["bench", "profile"])
def test_there_is_one_limit_of_threads(refused: Refused, tmp_path: Path, command: str) -> None:
    refused(2, "--threads must be a whole number from 1 to 1024", command, tmp_path / "m.onnx", "--threads", "1025")


def test_a_bundle_that_does_not_run_here_goes_to_the_device_of_its_own_target(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Refused
) -> None:
    bundle = script_bundle(tmp_path / "b", printing(RESULT), architecture="sparc")
    board = replace(verify_bundle(bundle), target="my-board", default_device="gopher://")
    monkeypatch.setattr(device_commands, "run_verify", lambda _: board)
    refused(2, "no device 'gopher://'", "bench", bundle)


@pytest.mark.parametrize("device", ["browser:///bin/sh", "ssh://stranger", "container://image"])
def test_a_bundle_does_not_choose_what_is_started_or_connected_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Refused, device: str
) -> None:
    bundle = script_bundle(tmp_path / "b", printing(RESULT), architecture="sparc")
    foreign = replace(verify_bundle(bundle), default_device=device)
    monkeypatch.setattr(device_commands, "run_verify", lambda _: foreign)
    refused(2, f"the bundle would be measured on {device}", "bench", bundle)


def test_that_the_machine_was_busy_is_said_once(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = LocalRunner.measure
    loads = iter((3e6, 4e6))  # each model's process asks for itself

    def busy(self: LocalRunner, *given: Any, **options: Any) -> Any:
        found = real(self, *given, **options)
        return [replace(each, metadata={**each.metadata, "load_average": next(loads)}) for each in found]

    monkeypatch.setattr(LocalRunner, "measure", busy)
    one, other = model(tmp_path / "one.onnx"), model(tmp_path / "other.onnx", op="Sigmoid")
    said = cli("bench", one, other, "--runs", "2")
    assert said.err.count("the machine was busy") == 1
    assert said.err.count("only 2 runs") == 2
