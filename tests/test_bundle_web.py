"""Web bundles from a package of onnxruntime-web that a test made: what goes in, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import mlp
from web_samples import PACKAGE_FILES, SAMPLE, WEB, package, web_bundle

from edgecompress.bundle import build_bundle, verify_bundle
from edgecompress.bundle import web as web_form
from edgecompress.errors import UsageError


def test_a_bundle_has_the_page_its_modules_and_only_the_needed_files_of_the_runtime(tmp_path: Path) -> None:
    summary = web_bundle(tmp_path, package(tmp_path / "ort.tgz"))
    folder, pages = tmp_path / "bundle", Path(__file__).parents[1] / "targets" / "web"
    modules = {path.name for path in pages.glob("*.js")}
    runtime = {"ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"}
    assert {path.name for path in (folder / "lib").iterdir()} == modules | runtime
    assert {"index.html", "model.ecz", "test_data/input_0.pb", "test_data/output_0.pb"} <= set(summary.manifest.files)
    assert summary.manifest.entry_point == "index.html"
    assert not summary.was_run  # no machine runs it without a browser
    (component,) = summary.components
    assert (component.name, component.version, component.license) == ("onnxruntime-web", "9.9.9", "MIT")
    assert component.purl == "pkg:npm/onnxruntime-web@9.9.9"
    texts = {path for path in summary.manifest.files if path.startswith("licenses/onnxruntime-web-9.9.9/")}
    assert {path.rpartition("/")[2] for path in texts} == {"LICENSE", "ThirdPartyNotices.txt"}
    assert verify_bundle(folder).target == "web"


def test_the_page_asks_for_files_that_are_there(tmp_path: Path) -> None:
    web_bundle(tmp_path, package(tmp_path / "ort.tgz"))
    bench = (tmp_path / "bundle" / "lib" / "bench.js").read_text()
    named = [line.split('"')[1] for line in bench.splitlines() if line.startswith(("const RUNTIME", "const WASM"))]
    assert len(named) == 2
    assert all((tmp_path / "bundle" / name).is_file() for name in named)
    page = (tmp_path / "bundle" / "index.html").read_text()
    assert 'src="lib/bench.js"' in page
    assert "http" not in page.replace("http-equiv", "")  # no other server


def test_a_folder_of_an_installed_package_gives_the_same_files_as_its_archive(tmp_path: Path) -> None:
    folder = tmp_path / "node_modules"
    for name, content in PACKAGE_FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    one = web_bundle(tmp_path, package(tmp_path / "ort.tgz"), "one").manifest.files
    two = web_bundle(tmp_path, folder, "two").manifest.files
    # the bill of materials names the archive's own digest
    assert {path for path in one if one[path] != two[path]} <= {"sbom.cdx.json", "SHA256SUMS"}


@pytest.mark.parametrize("missing", ["package.json", "dist/ort-wasm-simd-threaded.wasm"])
def test_a_package_that_lacks_a_file_is_refused_by_its_name(tmp_path: Path, missing: str) -> None:
    with pytest.raises(UsageError, match=f"{missing} is missing in it") as refused:
        web_bundle(tmp_path, package(tmp_path / "ort.tgz", without=missing))
    assert "npm pack" in refused.value.hint
    assert not (tmp_path / "bundle").exists()


def test_a_file_that_is_no_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ort.tgz").write_bytes(b"no archive")
    with pytest.raises(UsageError, match="no package of onnxruntime-web"):
        web_bundle(tmp_path, tmp_path / "ort.tgz")


def test_without_a_file_given_the_version_of_the_target_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(name: str, version: str) -> Path:
        asked.append((name, version))
        return package(tmp_path / "ort.tgz")

    monkeypatch.setattr(web_form, "npm_pack", fetch)
    build_bundle(mlp(tmp_path / "m.onnx"), tmp_path / "bundle", target=WEB, sample=SAMPLE)
    assert asked == [("onnxruntime-web", WEB.runtime.version)]
