from __future__ import annotations

import dataclasses
import json
import platform
import sys
import zipfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx.parser
import pytest

from edgecompress.bundle import build_bundle, verify_bundle
from edgecompress.bundle.fetch import missing
from edgecompress.bundle.wheel import fetch_wheels, for_installed
from edgecompress.errors import UsageError
from edgecompress.files import sha256_of
from edgecompress.targets import load_target

if TYPE_CHECKING:
    from edgecompress.bundle import BundleSummary

ARM = load_target("arm64")
X = {"x": np.zeros((2, 2), np.float32)}
TEXT = '<ir_version: 8, opset_import: ["" : 13]> g (float[2, 2] x) => (float[2, 2] y) { y = Relu(x) }'
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"

ORT = {
    "onnxruntime/__init__.py": "",
    "onnxruntime/capi/onnxruntime_pybind11_state.so": "the runtime",
    "onnxruntime/capi/libonnxruntime.so.1.31.1": "the C library, a second time",
    "onnxruntime/capi/x.pyi": "",
    "onnxruntime/tools/t.py": "",
    "onnxruntime/transformers/t.py": "",
    "onnxruntime/LICENSE": "licence of the runtime",
}
NUMPY = {
    "numpy/__init__.py": "",
    "numpy/tests/test_x.py": "",
    "numpy/_core/include/numpy/x.h": "",
    "numpy.libs/libblas.so": "blas",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path


def wheel(folder: Path, name: str, number: str, tag: str, files: Mapping[str, str]) -> Path:
    """Write a wheel as an index has it."""
    info = f"{name}-{number}.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.4\nName: {name}\nVersion: {number}\nLicense-Expression: MIT\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nTag: {tag}\n",
        f"{info}/licenses/LICENSE.txt": f"licence of {name}",
        "../../outside.py": "evil",
    }
    contents = {**files, **metadata}
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{number}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in contents.items():
            archive.writestr(inner, text)
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    wheel(folder, "onnxruntime", "1.31.1", "cp311-cp311-manylinux_2_28_aarch64", ORT)
    wheel(folder, "numpy", "2.9", "cp311-abi3-manylinux_2_27_aarch64.manylinux_2_28_aarch64", NUMPY)
    wheel(folder, "numpy", "1.0", "cp311-cp311-manylinux_2_28_x86_64", NUMPY)  # comes first and is for another machine
    return folder


def refuse(*_: Any) -> Path:
    raise missing("the wheel", "the package registry cannot be reached")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgecompress.bundle.wheel.pip_download", refuse)


def build(model: Path, out: Path, wheels: Path) -> BundleSummary:
    return build_bundle(model, out, target=ARM, sample=X, runtime_file=wheels)


@pytest.mark.usefixtures("offline")
def test_wheels_for_another_machine_make_a_complete_bundle_that_is_not_run(
    model: Path, wheels: Path, tmp_path: Path
) -> None:
    summary = build(model, tmp_path / "b", wheels)
    assert not summary.was_run
    manifest = verify_bundle(tmp_path / "b")
    assert (manifest.architecture, manifest.runtime_form, manifest.entry_point) == ("aarch64", "wheel", "run.py")
    assert manifest.python == {"version": "3.11", "abi": "cpython-311", "machine": "aarch64", "system": "Linux"}
    code = {name for name in manifest.files if name.startswith("lib/") and "edgecompress" not in name}
    assert code == {
        "lib/numpy/__init__.py",
        "lib/numpy.libs/libblas.so",
        "lib/onnxruntime/__init__.py",
        "lib/onnxruntime/capi/onnxruntime_pybind11_state.so",
    }
    assert not list(tmp_path.rglob("outside.py"))


@pytest.mark.usefixtures("offline")
def test_licences_digests_and_tags_of_the_wheels_are_kept(model: Path, wheels: Path, tmp_path: Path) -> None:
    summary = build(model, tmp_path / "b", wheels)
    numpy, runtime = summary.components
    assert (numpy.name, numpy.version, numpy.purl) == ("numpy", "2.9", "pkg:pypi/numpy@2.9")
    assert (runtime.license, runtime.tags) == ("MIT", ("cp311-cp311-manylinux_2_28_aarch64",))
    assert runtime.sha256 == sha256_of(next(wheels.glob("onnxruntime*")))
    texts = {name: (tmp_path / "b" / name).read_text() for name in summary.manifest.files if "licenses/" in name}
    assert texts["licenses/numpy-2.9/LICENSE.txt"] == "licence of numpy"
    assert texts["licenses/onnxruntime-1.31.1/onnxruntime/LICENSE"] == "licence of the runtime"
    bill = json.loads((tmp_path / "b" / "sbom.cdx.json").read_text())
    assert "pkg:pypi/onnxruntime@1.31.1" in {part["bom-ref"] for part in bill["components"]}


@pytest.mark.usefixtures("offline")
def test_a_wheel_that_is_missing_is_named_and_nothing_is_left(model: Path, wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the wheel is missing: the package registry cannot be reached") as caught:
        build_bundle(model, tmp_path / "b", target=ARM, sample=X)
    assert "--runtime-file PATH" in caught.value.hint
    next(wheels.glob("numpy-2*")).unlink()
    with pytest.raises(UsageError, match="the wheel is missing"):
        build(model, tmp_path / "b", wheels)
    for path in wheels.glob("onnxruntime*"):
        path.rename(path.with_name(path.name.replace("cp311-cp311", "cp312-cp312")))
    with pytest.raises(UsageError, match=r"holds no wheel of numpy or onnxruntime for Python 3\.11"):
        build(model, tmp_path / "b", wheels)
    with pytest.raises(UsageError, match="holds no wheel"):
        build(model, tmp_path / "b", tmp_path / "none.whl")
    assert not (tmp_path / "b").exists()


@pytest.mark.usefixtures("offline")
def test_a_file_that_is_no_wheel_is_refused(model: Path, wheels: Path, tmp_path: Path) -> None:
    path = next(wheels.glob("onnxruntime*"))
    path.write_bytes(b"no zip")
    with pytest.raises(UsageError, match=rf"{path.name} is no wheel"):
        build(model, tmp_path / "b", wheels)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("onnxruntime/__init__.py", "")
    with pytest.raises(UsageError, match="is no wheel"):
        build(model, tmp_path / "b", wheels)


def test_the_runtime_has_the_targets_version_and_what_is_not_given_is_fetched(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[str, ...], str]] = []

    def download(requirement: str, platforms: tuple[str, ...], python: str) -> Path:
        asked.append((requirement, platforms, python))
        return wheels / requirement

    monkeypatch.setattr("edgecompress.bundle.wheel.pip_download", download)
    for python, wanted in ((HERE, f"numpy=={version('numpy')}"), ("3.99", "numpy")):
        assert ARM.wheel is not None
        target = dataclasses.replace(ARM, wheel=dataclasses.replace(ARM.wheel, python=python))
        found = fetch_wheels(target, ["numpy", "onnxruntime"], None)
        assert [path.name for path in found] == [wanted, "onnxruntime==1.31.1"]
        assert asked[-1] == ("onnxruntime==1.31.1", ARM.wheel.platforms, python)
    found = fetch_wheels(ARM, ["numpy", "onnxruntime"], next(wheels.glob("onnxruntime*")))
    assert [path.name.split("-")[0].split("=")[0] for path in found] == ["numpy", "onnxruntime"]


@pytest.mark.skipif(sys.platform != "linux", reason="the wheel form is for Linux")
@pytest.mark.usefixtures("offline")
def test_without_a_network_the_installed_runtime_serves_a_target_of_this_machine(model: Path, tmp_path: Path) -> None:
    target = for_installed(load_target("x86_64"))
    assert (target.runtime.version, target.wheel and target.wheel.python) == (version("onnxruntime"), HERE)
    other = dataclasses.replace(target, runtime=dataclasses.replace(target.runtime, version="9.9"))
    if target.architecture != platform.machine():
        pytest.skip("the installed runtime is not that of x86_64")
    summary = build_bundle(model, tmp_path / "b", target=other, sample=X)
    assert summary.was_run
    assert {part.name: part.version for part in summary.components}["onnxruntime"] == version("onnxruntime")
