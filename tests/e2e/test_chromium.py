"""Web bundles in a real Chromium: every form of a model, models in turns, what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny import mlp

from edgecompress.bundle import build_bundle
from edgecompress.bundle.fetch import npm_pack
from edgecompress.bundle.program import manifest_digest
from edgecompress.devices import BenchOptions, chromium, open_runner
from edgecompress.devices.web_server import PageServer
from edgecompress.errors import DeviceError, ToleranceError, UsageError
from edgecompress.files import sha256_of
from edgecompress.runtime.tensors import write_tensor
from edgecompress.targets import load_target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(
        not any(map(shutil.which, chromium.PROGRAMS)), reason="there is no Chromium or Chrome on this machine"
    ),
]
WEB = load_target("web")
SAMPLE = {"x": np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)}


@pytest.fixture(scope="session", name="runtime")
def web_runtime() -> Path:
    try:
        return npm_pack(WEB.runtime.package, WEB.runtime.version)
    except UsageError as problem:
        pytest.skip(problem.message)


def test_every_form_of_a_model_gives_the_expected_outputs_and_is_timed_in_turns(tmp_path: Path, runtime: Path) -> None:
    source = mlp(tmp_path / "m.onnx")
    onnx.save(onnx.load(source), tmp_path / "e.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    folders = []
    for index, (form, model) in enumerate([("ecz", "m"), ("ecz", "e"), ("onnx", "m"), ("onnx", "e")]):
        target = dataclasses.replace(WEB, model_form=form)
        folders.append(tmp_path / str(index))
        build_bundle(tmp_path / f"{model}.onnx", folders[-1], target=target, sample=SAMPLE, runtime_file=runtime)
    samples = open_runner("browser://").measure_bundles(folders, options=BenchOptions(runs=12, threads=2))
    assert [len(each.values_ms) for each in samples] == [12] * 4
    facts = samples[0].metadata
    assert (facts["threads"], facts["isolated"], facts["memory_shared"]) == (2, True, True)
    assert facts["onnxruntime"] == WEB.runtime.version
    # the runtime itself is 14 MB of code; its heap starts with 16 MiB
    assert samples[0].peak_rss_bytes > facts["wasm_memory_bytes"] >= 1 << 24


def test_inputs_and_outputs_of_every_type_go_through_the_page(tmp_path: Path, runtime: Path) -> None:
    values = {name: np.array([[1, 0, 100]]).astype(name) for name in ("float16", "float32", "float64", "bool")}
    values |= {name: np.array([[1, 0, 100]], name) for name in ("int8", "uint8", "int16", "int32", "int64", "uint32")}
    values["string"] = np.array([["a", "", "\u00fc"]], object)
    nodes, inputs, outputs = [], [], []
    for name, value in values.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        inputs.append(onnx.helper.make_tensor_value_info(name, kind, [1, 3]))
        outputs.append(onnx.helper.make_tensor_value_info(f"{name}_out", kind, [1, 3]))
        nodes.append(onnx.helper.make_node("Identity", [name], [f"{name}_out"]))
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs)
    model = onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "m.onnx")
    folder = tmp_path / "bundle"
    build_bundle(tmp_path / "m.onnx", folder, target=WEB, sample=values, runtime_file=runtime)
    (samples,) = open_runner("browser://").measure_bundles([folder], options=BenchOptions(runs=3))
    assert samples.metadata["outputs_match"] is True


def test_wrong_outputs_are_found_before_anything_is_timed(tmp_path: Path, runtime: Path) -> None:
    folder = tmp_path / "bundle"
    build_bundle(mlp(tmp_path / "m.onnx"), folder, target=WEB, sample=SAMPLE, runtime_file=runtime)
    replace(folder, "test_data/output_0.pb", write_tensor("y", np.zeros((1, 4), np.float32)))
    with pytest.raises(ToleranceError, match="wrong outputs: 'y' off by"):
        open_runner("browser://").measure_bundles([folder], options=BenchOptions(runs=3))


def replace(folder: Path, path: str, content: bytes) -> None:
    """Put another file into a bundle and make its manifest agree."""
    (folder / path).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path] = {"sha256": sha256_of(folder / path), "size_bytes": len(content)}
    manifest["manifest_sha256"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def test_a_page_whose_process_is_killed_is_a_device_error_at_once(
    tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundle"
    build_bundle(mlp(tmp_path / "m.onnx"), folder, target=WEB, sample=SAMPLE, runtime_file=runtime)
    look, find = chromium._renderers, PageServer.find
    asked: list[str] = []
    killed: list[int] = []

    def note_what_is_asked(server: PageServer, target: str) -> tuple[Path | None, str | None]:
        asked.append(target)
        return find(server, target)

    def kill_once_it_runs(session: int) -> dict[int, int]:
        found = look(session)
        if any(target.endswith(".wasm") for target in asked) and found and not killed:
            killed.append(max(found, key=lambda pid: found[pid]))
            os.kill(killed[0], signal.SIGKILL)
        return found

    monkeypatch.setattr(PageServer, "find", note_what_is_asked)
    monkeypatch.setattr(chromium, "_renderers", kill_once_it_runs)
    with pytest.raises(DeviceError, match="the page's process died"):
        open_runner("browser://").measure_bundles([folder], options=BenchOptions(runs=1_000_000))
    assert killed
