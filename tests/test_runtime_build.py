from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny import DIGITS_MODEL, mlp

from edgecompress.errors import DeviceError, ModelError, UsageError
from edgecompress.runtime_build import build_command, build_runtime, runtime_needs
from edgecompress.targets import list_targets, load_target

if TYPE_CHECKING:
    from conftest import Cli, Outcome

ARM64 = load_target("arm64")

# What stands for the runtime's build: it takes the arguments, prints progress, and leaves a library.
SCRIPT = """
import pathlib, sys
options = dict(argument.lstrip("-").partition("=")[::2] for argument in sys.argv[1:])
config = pathlib.Path(options["include_ops_by_config"]).read_text()
assert "MatMul" in config, config
print("[1/2] Building a.o")
if {failure!r}:
    sys.exit("a.cc:1: error: " + {failure!r})
print("[2/2] Linking", flush=True)
place = pathlib.Path(options["build_dir"]) / "MinSizeRel"
place.mkdir(parents=True)
(place / "libonnxruntime.so.1.21.0").write_bytes(b"library")
(place / "libonnxruntime.so").symlink_to("libonnxruntime.so.1.21.0")
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(failure: str = "", version: str = "1.21.0\n") -> Path:
        script = tmp_path / "tree" / "tools" / "ci_build" / "build.py"
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(SCRIPT.format(failure=failure))
        (tmp_path / "tree" / "VERSION_NUMBER").write_text(version)
        return tmp_path / "tree"

    return make


def test_a_model_needs_its_operators_and_no_more(tmp_path: Path) -> None:
    needs = runtime_needs(mlp(tmp_path / "m.onnx"))
    assert {(entry.domain, entry.names) for entry in needs.operators} == {
        ("ai.onnx", ("MatMul",)),
        ("ai.onnx", ("Relu",)),
    }
    assert needs.ort_bytes > 64 * 20 * 4  # the weights are in it
    assert {row.accelerator for row in needs.usability} == {
        "NNAPI",
        "CoreML NeuralNetwork",
        "CoreML MLProgram",
        "XNNPACK",
    }


def test_types_with_braces_and_commas_are_no_operators(digits_out: Path) -> None:
    names = [name for entry in runtime_needs(digits_out).operators for name in entry.names]
    assert names
    assert all(name.isidentifier() for name in names)


def test_a_container_is_unpacked_first(digits_out: Path) -> None:
    assert runtime_needs(digits_out / "model.ecz").config == runtime_needs(digits_out).config


def test_every_target_has_a_command() -> None:
    commands = {
        name: build_command(Path("tree"), Path("ops.config"), Path("build"), load_target(name))
        for name in list_targets()
    }
    assert all("--include_ops_by_config=ops.config" in command for command in commands.values())
    assert "--arm64" in commands["arm64"]
    assert "--arm" in commands["armhf"]
    assert "--android" in commands["android"]
    assert "--ios" in commands["ios"]
    assert "--build_wasm" in commands["web"]
    assert len({tuple(command) for command in commands.values()}) == len(commands)


def test_a_build_is_made_once_for_the_same_operators(tmp_path: Path, tree: Callable[..., Path]) -> None:
    steps: list[tuple[int, int]] = []
    model = mlp(tmp_path / "m.onnx")
    built = build_runtime(model, tmp_path / "a", tree=tree(), target=ARM64, progress=lambda *step: steps.append(step))
    assert built.library.read_bytes() == b"library"
    assert built.model.is_file()
    assert (built.version, built.cached) == ("1.21.0", False)
    assert steps == [(1, 2), (2, 2)]
    failing = tree("it must not run again")
    again = build_runtime(mlp(tmp_path / "n.onnx", seed=4), tmp_path / "b", tree=failing, target=ARM64)
    assert again.cached
    assert again.library.read_bytes() == b"library"
    for other in ({"defines": ["A=B"]}, {"target": load_target("armhf")}):
        with pytest.raises(DeviceError, match="it must not run again"):
            build_runtime(model, tmp_path / "c", **{"tree": failing, "target": ARM64, **other})  # type: ignore[arg-type]


def test_a_failed_build_says_where_its_log_is_and_leaves_no_library(tmp_path: Path, tree: Callable[..., Path]) -> None:
    with pytest.raises(DeviceError, match=r"a\.cc:1: error: no such header") as caught:
        build_runtime(mlp(tmp_path / "m.onnx"), tmp_path / "out", tree=tree("no such header"), target=ARM64)
    log = Path(caught.value.hint.split()[1].rstrip(";"))
    assert "[1/2] Building" in log.read_text()
    assert "--arm64" in shlex.split(log.read_text().splitlines()[0])
    assert not (tmp_path / "out" / "libonnxruntime.so").exists()


def test_what_the_build_has_started_ends_with_it(tmp_path: Path, tree: Callable[..., Path]) -> None:
    source = tree()
    script = source / "tools" / "ci_build" / "build.py"
    started = tmp_path / "started"
    script.write_text(
        "import pathlib, subprocess, sys, time\n"
        'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])\n'
        f"pathlib.Path({str(started)!r}).write_text(str(child.pid))\n"
        'print("[1/2] Building", flush=True)\n'
        "time.sleep(600)\n"
    )

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_runtime(mlp(tmp_path / "m.onnx"), tmp_path / "out", tree=source, target=ARM64, progress=stop)
    status = Path("/proc") / started.read_text() / "stat"
    for _ in range(100):
        if not status.exists() or status.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the build's own process still runs")
    assert not (tmp_path / "out").exists()


def test_the_runtimes_tools_report_to_nobody(cli: Cli, digits_out: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgecompress", "runtime-config", digits_out, "-o", tmp_path / "out"]
    rest = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(command, env={**rest, "XDG_CACHE_HOME": str(tmp_path / "cache")}, check=False)
    assert done.returncode == 0
    assert not (tmp_path / "cache" / "Microsoft").exists()


def test_an_output_that_is_there_is_not_replaced_unasked(
    refused: Callable[..., Outcome], tree: Callable[..., Path], tmp_path: Path, digits_out: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    refused(9, "not empty", "runtime-config", digits_out, "-o", "out")
    refused(9, "not empty", "runtime-build", digits_out, "--source", tree(), "--target", "arm64", "-o", "out")


def test_a_folder_that_is_no_source_tree_is_refused(tmp_path: Path, tree: Callable[..., Path]) -> None:
    for source in (tmp_path, tree(version="../../x"), tmp_path / "none"):
        with pytest.raises(UsageError, match="is not a source tree of ONNX Runtime"):
            build_runtime(mlp(tmp_path / "m.onnx"), tmp_path / "out", tree=source, target=ARM64)


def test_what_the_runtimes_tool_refuses_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError):
        runtime_needs(tmp_path / "m.onnx")


def test_the_command_prints_operators_accelerators_and_the_build(cli: Cli, digits_out: Path, tmp_path: Path) -> None:
    outcome = cli("runtime-config", digits_out, "-o", tmp_path / "small")
    assert outcome.code == 0
    assert "XNNPACK" in outcome.out
    assert "tools/ci_build/build.py" in outcome.err
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        "model.ort",
        "required_operators_and_types.config",
    }
    facts = cli("runtime-config", digits_out, "--target", "web", "--json").json
    assert "--build_wasm" in facts["command"]


def test_a_phones_runtime_is_not_built_here(refused: Callable[..., Outcome], tree: Callable[..., Path]) -> None:
    source = tree()
    refused(2, "not for android", "runtime-build", DIGITS_MODEL, "--source", source, "--target", "android", "-o", "out")
