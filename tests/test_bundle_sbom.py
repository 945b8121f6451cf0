from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecompress.bundle.manifest import Component, Job
from edgecompress.bundle.sbom import write_sbom
from edgecompress.files import sha256_of
from edgecompress.targets import load_target

PARTS = (
    Component("numpy", "2.4", "BSD-3-Clause AND MIT", "pip", "pkg:pypi/numpy@2.4", ("cp311", "any"), "ab" * 32),
    Component("libc6", "2.36", "The GNU Library License", "debian", "pkg:deb/debian/libc6@2.36"),
    Component("plain", "1", None, "file", "pkg:generic/plain@1"),
)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    for name in ("model.onnx", "weights.bin", "run.py", "lib/a.so", "lib/a.py", "licenses/x/y", "test_data/input_0.pb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(np.random.default_rng(len(name)).bytes(20))
    return Job(
        folder=tmp_path,
        target=load_target("arm64"),
        source=tmp_path,
        model="model.onnx",
        inputs=("test_data/input_0.pb",),
        outputs=(),
        tolerance=1e-3,
        imported=frozenset(),
    )


def read(job: Job) -> dict[str, Any]:
    write_sbom(job, PARTS, ["model.onnx", "weights.bin"])
    bill: dict[str, Any] = json.loads((job.folder / "sbom.cdx.json").read_text())
    return bill


def test_it_names_the_models_files_the_packages_our_part_and_every_binary(job: Job) -> None:
    bill = read(job)
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.5", 1)
    assert [(part["type"], part["name"]) for part in bill["components"]] == [
        ("machine-learning-model", "model.onnx"),
        ("machine-learning-model", "weights.bin"),
        ("library", "edgecompress"),
        ("library", "numpy"),
        ("library", "libc6"),
        ("library", "plain"),
        ("file", "lib/a.so"),
    ]
    references = [part["bom-ref"] for part in bill["components"]] + [bill["metadata"]["component"]["bom-ref"]]
    assert len(set(references)) == len(references)


def test_files_have_their_digest_and_packages_that_of_their_archive(job: Job) -> None:
    found = {part["name"]: part.get("hashes") for part in read(job)["components"]}
    for name in ("model.onnx", "weights.bin", "lib/a.so"):
        assert found[name] == [{"alg": "SHA-256", "content": sha256_of(job.folder / name)}]
    assert found["numpy"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    assert found["libc6"] is None


def test_packages_have_their_address_source_and_licence(job: Job) -> None:
    numpy, libc, plain = read(job)["components"][3:6]
    assert (numpy["purl"], numpy["version"]) == ("pkg:pypi/numpy@2.4", "2.4")
    assert numpy["licenses"] == [{"expression": "BSD-3-Clause AND MIT"}]
    assert [(entry["name"], entry["value"]) for entry in numpy["properties"]] == [
        ("edgecompress:source", "pip"),
        ("edgecompress:tag", "cp311"),
        ("edgecompress:tag", "any"),
    ]
    assert libc["licenses"] == [{"license": {"name": "The GNU Library License"}}]
    assert "licenses" not in plain


def test_it_has_no_time_and_no_serial_number(job: Job) -> None:
    bill = read(job)
    first = (job.folder / "sbom.cdx.json").read_bytes()
    assert "serialNumber" not in bill
    assert "timestamp" not in bill["metadata"]
    (job.folder / "sbom.cdx.json").unlink()
    read(job)
    assert (job.folder / "sbom.cdx.json").read_bytes() == first
