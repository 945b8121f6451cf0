from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.parser
import pytest

from edgecompress.artifacts import open_artifact
from edgecompress.bundle import BundleSummary, build_bundle, run_program, verify_bundle
from edgecompress.bundle.program import MAX_THREADS, SCHEMA_VERSION, manifest_digest
from edgecompress.devices import BenchOptions, open_runner
from edgecompress.errors import DeviceError, FormatError, ModelError, OutputError, ToleranceError, UsageError
from edgecompress.files import sha256_of
from edgecompress.runtime import load
from edgecompress.runtime.tensors import read_tensor, write_tensor
from edgecompress.targets import MAX_NUMBER, load_target
from edgecompress.validate import random_sample

if TYPE_CHECKING:
    from edgecompress.latency import LatencySamples

ONNX = dataclasses.replace(load_target("x86_64"), model_form="onnx")
ECZ = load_target("x86_64")
X = {"x": np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)}
TEXT = '<ir_version: 8, opset_import: ["" : 13]> g (float[N, 8] x) => (float[N, 8] "a/b:0") { "a/b:0" = MatMul(x, w) }'

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the bundle copies the x86_64 runtime")


def save_model(path: Path, *, external: str | None = None, seed: int = 0) -> Path:
    text = TEXT.replace('"a/b:0"', "y")
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(seed).normal(size=(8, 8)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model.graph.node[0].output[0] = model.graph.output[0].name = "a/b:0"
    options = {"save_as_external_data": True, "location": external, "size_threshold": 0} if external else {}
    onnx.save(model, path, **options)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as ``compress`` writes, with the one form that it cannot lack."""
    folder = tmp_path_factory.mktemp("out")
    save_model(folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> BundleSummary:
    return build_bundle(source, tmp_path_factory.mktemp("bundles") / "built", target=ECZ, sample=X)


@pytest.fixture
def bundle(built: BundleSummary, tmp_path: Path) -> Path:
    """A copy that a test may damage; it shares its files with the original, so replace them, never write into them."""
    return shutil.copytree(built.path, tmp_path / "copy", copy_function=os.link)


def run_bundle(folder: Path, **options: Any) -> LatencySamples:
    return open_runner("local").measure_bundles([folder], options=BenchOptions(**options))[0]


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def edit(bundle: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Change the manifest; with ``sign`` its own checksum is made to fit again, as an attacker would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    if sign:
        manifest["manifest_sha256"] = manifest_digest(manifest)
    replace(bundle / "manifest.json", json.dumps(manifest).encode())


def relist(bundle: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed."""
    entry = {"sha256": sha256_of(bundle / name), "size_bytes": (bundle / name).stat().st_size}
    edit(bundle, lambda manifest: manifest["files"].update({name: entry}))


def test_it_runs_elsewhere_in_an_empty_environment(bundle: Path) -> None:
    command = [sys.executable, "-I", "-S", str(bundle / "run.py")]
    table = subprocess.run([*command, "--runs", "3"], env={}, cwd="/", capture_output=True, text=True, check=False)
    assert (table.returncode, table.stderr) == (0, "")
    assert "median" in table.stdout
    told = subprocess.run([*command, "--runs", "4", "--json"], env={}, capture_output=True, text=True, check=True)
    result = json.loads(told.stdout)
    assert (result["results"][0]["samples"], len(result["results"][0]["values_ms"])) == (4, 4)
    assert verify_bundle(bundle).model == "model.ecz"  # running it has left nothing in it


def run(bundle: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", str(bundle / "run.py"), *map(str, arguments)]
    return subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, check=False)


def test_it_times_the_model_of_another_bundle_too_after_checking_that(
    bundle: Path, source: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    build_bundle(save_model(tmp_path / "other.onnx", seed=1), other, target=ECZ, sample=X, runtime="none")
    core = str(min(os.sched_getaffinity(0)))
    done = run(bundle, "--also", other, "--runs", "3", "--cores", core, "--pause-above", "500", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert set(result) == {"schema_version", "target", "threads", "results", "device", "after", "notes"}
    assert [len(model["values_ms"]) for model in result["results"]] == [3, 3]
    assert result["results"][0]["peak_rss_bytes"] == result["results"][1]["peak_rss_bytes"]
    assert (result["device"]["memory_shared"], result["device"]["cores"]) == (True, 1)
    assert set(result["after"]) == {"frequency_mhz", "temperature_c"}
    table = run(bundle, "--also", other, "--also", other, "--runs", "1").stdout
    assert table.count("median") == 3
    replace(other / "model.ecz", (other / "model.ecz").read_bytes()[:-1])
    done = run(bundle, "--also", other)
    assert done.returncode == 4
    assert done.stderr.startswith("error: model.ecz was altered")


def test_wrong_outputs_of_either_model_end_it_before_anything_is_timed(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build_bundle(save_model(tmp_path / "other.onnx"), other, target=ECZ, sample=X, runtime="none")
    scale_expected(other, 1.01)
    done = run(bundle, "--also", other)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("error: wrong outputs: 'a/b:0' off by")


def test_cores_that_do_not_exist_are_an_error_of_the_machine(bundle: Path) -> None:
    done = run(bundle, "--cores", "1023")
    assert done.returncode == 7
    assert done.stderr.startswith("error: cannot run on the cores [1023]")
    assert "\nhint: this process may use the cores" in done.stderr


def test_a_tensor_file_that_is_none_is_a_damaged_bundle(bundle: Path) -> None:
    replace(bundle / "test_data" / "input_0.pb", b"no tensor")
    relist(bundle, "test_data/input_0.pb")
    done = run(bundle)
    assert done.returncode == 4
    assert done.stderr.startswith("error: test_data/input_0.pb: not a tensor file")


def test_sha256sum_checks_it_too(built: BundleSummary) -> None:
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=built.path, check=True)
    listed = {line.split("  ", 1)[1] for line in (built.path / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(built.manifest.files) - {"SHA256SUMS"}


def test_a_bundle_without_a_runtime_is_the_model_its_data_and_papers(source: Path, tmp_path: Path) -> None:
    for name in ("x86_64", "armhf", "web"):
        summary = build_bundle(source, tmp_path / name, target=load_target(name), sample=X, runtime="none")
        assert (summary.manifest.entry_point, summary.manifest.python, summary.was_run) == (None, None, False)
        assert set(summary.manifest.files) == {
            *("README.txt", "SHA256SUMS", "model.ecz", "sbom.cdx.json"),
            *("test_data/input_0.pb", "test_data/output_0.pb"),
        }
        with pytest.raises(UsageError, match="has no program that runs here"):
            run_program(tmp_path / name, [])
        assert "edgecompress bench OTHER ." in (tmp_path / name / "README.txt").read_text()


def test_a_module_for_phones_does_not_run_and_says_what_does(source: Path, tmp_path: Path) -> None:
    for name in ("android", "ios"):
        build_bundle(source, tmp_path / name, target=load_target(name), sample=X)
        with pytest.raises(UsageError, match="has no program that runs here") as caught:
            run_program(tmp_path / name, [])
        assert "--target arm64 --runtime native" in caught.value.hint


def test_a_runtime_that_the_target_does_not_have_is_refused_with_those_it_has(source: Path, tmp_path: Path) -> None:
    for name, wanted, allowed in (
        ("armhf", "wheel", "native, none"),
        ("web", "native", "wasm, none"),
        ("x86_64", "wasm", "wheel, native, none"),
    ):
        with pytest.raises(UsageError, match=f"no runtime '{wanted}' for {name}") as caught:
            build_bundle(source, tmp_path / "b", target=load_target(name), sample=X, runtime=wanted)
        assert caught.value.hint == f"allowed: {allowed}"
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("form", ["onnx", "self_extracting", "ort"])
def test_every_form_of_the_model_computes_the_same(source: Path, tmp_path: Path, form: Any) -> None:
    target = dataclasses.replace(ECZ, model_form=form)
    summary = build_bundle(source, tmp_path / "b", target=target, sample=X, runtime="none")
    assert summary.manifest.model == ("model.ort" if form == "ort" else "model.onnx")
    found = load(summary.path).run(None, X)[0]
    np.testing.assert_allclose(found, load(source / "model.onnx").run(None, X)[0], rtol=1e-6)


def test_a_model_with_few_values_extracts_itself(digits_out: Path, tmp_path: Path) -> None:
    target = dataclasses.replace(ECZ, model_form="self_extracting")
    sample = random_sample(open_artifact(digits_out / "model.ecz"), {})
    summary = build_bundle(digits_out, tmp_path / "b", target=target, sample=sample, runtime="none")
    assert (summary.path / "model.onnx").stat().st_size < 0.8 * (digits_out / "model.onnx").stat().st_size
    found, wanted = (load(path).run(None, sample)[0] for path in (summary.path, digits_out / "model.onnx"))
    np.testing.assert_array_equal(found, wanted)


def test_all_that_it_imports_lies_inside(bundle: Path) -> None:
    code = f"""
import runpy, sys
sys.argv = ["run.py", "--runs", "1"]
try:
    runpy.run_path({str(bundle / "run.py")!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
print([m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None)], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], env={}, capture_output=True, text=True, check=True)
    loaded = [Path(name) for name in eval(done.stderr)]
    outside = [path for path in loaded if "site-packages" in path.parts and "_distutils_hack" not in path.parts]
    assert outside == []
    assert any(path.is_relative_to(bundle / "lib" / "onnxruntime") for path in loaded)


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--runs", "0"], ["--runs", "x"], ["--threads", "-1"], ["--threads", "1025"], ["--nothing"]),
        *(["--cores", "a"], ["--cores", "0,"], ["--pause-above", "hot"], ["--also"]),
    ],
)
def test_wrong_options_are_a_usage_error(bundle: Path, arguments: list[str]) -> None:
    done = run(bundle, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_model_in_it_loads_and_computes_the_same(built: BundleSummary, source: Path) -> None:
    mine = load(built.path).run(None, X)[0]
    theirs = load(source / "model.onnx").run(None, X)[0]
    np.testing.assert_array_equal(mine, theirs)
    assert built.manifest.outputs == ("test_data/output_0.pb",)
    name, expected = read_tensor((built.path / "test_data" / "output_0.pb").read_bytes())
    assert name == "a/b:0"
    np.testing.assert_array_equal(expected, theirs)


def test_it_holds_the_decoder_the_runtime_and_every_licence_and_nothing_for_development(built: BundleSummary) -> None:
    names = set(built.manifest.files)
    assert {"run.py", "README.txt", "model.ecz", "test_data/input_0.pb", "lib/edgecompress/runtime/session.py"} <= names
    assert [part.name for part in built.components] == ["numpy", "onnxruntime"]
    for part in built.components:
        assert any(name.startswith(f"licenses/{part.name}-{part.version}/") for name in names)
    assert any(name.startswith("licenses/edgecompress-") for name in names)
    assert not [name for name in names if name.endswith((".pyi", ".pyc", ".h")) or "/tests/" in name]
    assert not [name for name in names if name.startswith(("lib/onnxruntime/tools/", "lib/onnxruntime/transformers/"))]


def test_the_sizes_add_up_to_what_lies_on_the_disk(built: BundleSummary) -> None:
    sizes = built.manifest.sizes
    parts = [sizes["model"], sizes["runtime"], sizes["other"]]
    assert sum(part.installed_bytes for part in parts) == sizes["total"].installed_bytes
    assert sum(part.download_bytes for part in parts) == sizes["total"].download_bytes
    on_disk = sum(path.stat().st_size for path in built.path.rglob("*") if path.is_file())
    assert sizes["total"].installed_bytes == on_disk - (built.path / "manifest.json").stat().st_size
    assert sizes["model"].installed_bytes == (built.path / "model.ecz").stat().st_size
    assert sizes["total"].download_bytes < 0.6 * sizes["total"].installed_bytes


def test_the_same_input_gives_the_same_bundle_and_force_replaces_it(
    built: BundleSummary, source: Path, bundle: Path
) -> None:
    (bundle / "keep.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        build_bundle(source, bundle, target=ECZ, sample=X)
    build_bundle(source, bundle, target=ECZ, sample=X, force=True)
    assert (bundle / "manifest.json").read_bytes() == (built.path / "manifest.json").read_bytes()
    assert (bundle / "keep.txt").read_text() == "mine"
    verify_bundle(bundle)


def test_force_does_not_merge_into_another_runtime(source: Path, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "old.py").write_text("")
    with pytest.raises(OutputError, match=r"lib holds 1 files of another bundle, e\.g\. old\.py"):
        build_bundle(source, tmp_path, target=ECZ, sample=X, force=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["lib", "old.py"]


def test_external_data_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgecompress.bundle.manifest._deflated_size", lambda _: 1)  # takes two seconds, tested above
    model = save_model(tmp_path / "big.onnx", external="weights.bin")
    summary = build_bundle(model, tmp_path / "bundle", target=ONNX, sample=X)
    assert {"model.onnx", "weights.bin"} <= set(summary.manifest.files)
    assert (
        summary.manifest.sizes["model"].installed_bytes
        == model.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    )
    assert run_bundle(summary.path, runs=3).values_ms


def test_a_failure_leaves_nothing(source: Path, tmp_path: Path) -> None:
    attempts: list[tuple[type[Exception], dict[str, Any]]] = [
        (ModelError, {"sample": {"wrong": X["x"]}}),
        (ModelError, {"source": tmp_path / "none"}),
        (ModelError, {"source": tmp_path}),
        (
            UsageError,
            {"target": dataclasses.replace(ECZ, runtime=dataclasses.replace(ECZ.runtime, package="no_such_runtime"))},
        ),
    ]
    for kind, changes in attempts:
        arguments: dict[str, Any] = {"source": source, "target": ECZ, "sample": X, **changes}
        with pytest.raises(kind) as caught:
            build_bundle(arguments.pop("source"), tmp_path / "new" / "bundle", **arguments)
        assert caught.value.hint  # type: ignore[attr-defined]
        assert not [path for path in tmp_path.rglob("*") if path.name != "new"]


def test_external_data_may_not_take_a_name_of_the_bundle(tmp_path: Path) -> None:
    model = save_model(tmp_path / "big.onnx", external="run.py")
    with pytest.raises(ModelError, match=r"run\.py has a name that the bundle needs"):
        build_bundle(model, tmp_path / "bundle", target=ONNX, sample=X)


def test_an_intact_bundle_is_measured(built: BundleSummary) -> None:
    samples = run_bundle(built.path, threads=2, runs=5)
    assert len(samples.values_ms) == 5
    assert samples.init_ms > 0
    assert samples.peak_rss_bytes > 10_000_000
    assert not samples.emulated
    assert samples.metadata["threads"] == 2


def damage_bytes(bundle: Path) -> None:
    path = bundle / "lib" / "numpy" / "version.py"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    replace(path, bytes(content))


def shorten(bundle: Path) -> None:
    replace(bundle / "model.ecz", (bundle / "model.ecz").read_bytes()[:-1])


def link_file(bundle: Path) -> None:
    target = bundle.parent / "elsewhere"
    target.write_bytes((bundle / "README.txt").read_bytes())
    (bundle / "README.txt").unlink()
    (bundle / "README.txt").symlink_to(target)


def link_folder(bundle: Path) -> None:
    (bundle / "licenses").rename(bundle.parent / "licenses")
    (bundle / "licenses").symlink_to(bundle.parent / "licenses")


def add_folder_link(bundle: Path) -> None:
    (bundle / "lib" / "more").symlink_to(bundle.parent)


def put_fifo(bundle: Path) -> None:
    (bundle / "README.txt").unlink()
    os.mkfifo(bundle / "README.txt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_bytes, r"lib/numpy/version\.py was altered: its SHA-256"),
        (shorten, r"model\.ecz was altered: it has"),
        (lambda bundle: (bundle / "README.txt").unlink(), r"README\.txt is missing"),
        (lambda bundle: (bundle / "manifest.json").unlink(), r"manifest\.json cannot be read"),
        (link_file, r"README\.txt is not a plain file"),
        (put_fifo, r"README\.txt is not a plain file"),
        (link_folder, "licenses is not a folder"),
        (add_folder_link, r"lib/more is not in manifest\.json"),
        (lambda bundle: (bundle / "lib" / "json.py").write_text("bad"), r"lib/json\.py is not in manifest\.json"),
        (lambda bundle: replace(bundle / "manifest.json", b"[1"), "is not JSON"),
        (lambda bundle: replace(bundle / "manifest.json", b"[" * 100_000), "is not JSON"),
        (lambda bundle: replace(bundle / "manifest.json", b"\xff\xfe\xfd"), "is not JSON"),
        (lambda bundle: replace(bundle / "manifest.json", b"[]"), "is not a JSON object"),
    ],
)
def test_a_damaged_bundle_is_refused_and_never_run(
    bundle: Path, damage: Callable[[Path], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(bundle)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a damaged bundle was run"))
    with pytest.raises(FormatError, match=message) as caught:
        run_bundle(bundle, runs=1)
    assert str(bundle) in caught.value.message
    assert caught.value.hint


def test_its_own_program_refuses_it_too(bundle: Path) -> None:
    damage_bytes(bundle)
    done = run(bundle)
    assert done.returncode == 4
    assert done.stderr.startswith("error: lib/numpy/version.py was altered")


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none", Path(__file__)):
        with pytest.raises(FormatError, match="cannot be read"):
            verify_bundle(folder)


GOOD = {"sha256": "0" * 64, "size_bytes": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=SCHEMA_VERSION + 1), "schema_version 3 is not supported"),
        (lambda m: m.update(schema_version=True), "schema_version True"),
        (lambda m: m.pop("schema_version"), "schema_version None"),
        (lambda m: m.update(files=[]), "'files' is not an object"),
        (lambda m: m.pop("target"), "'target' is not a text"),
        (lambda m: m.update(providers=None), "'providers' is not a list"),
        (lambda m: m.update(tolerance=-1), "'tolerance' is not a positive number"),
        (lambda m: m.update(threads="1"), "'threads' is not a whole number from 1 to 1024"),
        (lambda m: m.update(threads=1.5), "'threads' is not a whole number"),
        (lambda m: m.update(threads=1025), "'threads' is not a whole number"),
        (lambda m: m.update(target="x\x9b31m"), r"'x\x9b31m' holds characters that cannot be printed"),
        (lambda m: m["tool"].update(more=[{"a\x1b": 1}]), r"'a\x1b' holds characters"),
        (lambda m: m["files"].update({"a\x9b": GOOD}), "is not a path inside"),
        (lambda m: m.pop("default_device"), "'default_device' is not a text"),
        (lambda m: m.update(default_device="ssh://-oProxyCommand=x"), "'default_device' is not a device"),
        (lambda m: m.update(default_device="ftp://x"), "'default_device' is not a device"),
        (lambda m: m.update(entry_point="README.txt"), "'wheel' is not started by 'README.txt'"),
        (lambda m: m.update(entry_point=None), "'wheel' is not started by None"),
        (lambda m: m.update(runtime_form="native"), "'native' is not started by 'run.py'"),
        (lambda m: m.update(runtime_form="none"), "'none' is not started by 'run.py'"),
        (lambda m: m.update(runtime_form="gem"), "'gem' is not started by"),
        (lambda m: m.update(python=None), "'python' does not go with"),
        (lambda m: m.pop("python"), "'python' does not go with"),
        (lambda m: m.pop("entry_point"), "'wheel' is not started by None"),
        (lambda m: m.update(runtime_form="none", entry_point=None), "'python' does not go with"),
        (lambda m: m["python"].update(version="3.11; touch evil"), "'python' has no version"),
        (lambda m: m["python"].update(version="3"), "'python' has no version"),
        (lambda m: m["python"].update(version=3.11), "'python' has no version"),
        (lambda m: m["python"].update(abi="$(x)"), "'python' has no abi"),
        (lambda m: m["python"].pop("machine"), "'python' has no machine"),
        (lambda m: m["python"].update(system=None), "'python' has no system"),
        (lambda m: m["sizes"]["model"].update(installed_bytes="1"), "'sizes' is malformed"),
        (lambda m: m.update(model="other.onnx"), "'other.onnx' is not among the files"),
        (lambda m: m.update(entry_point="other.py"), "'other.py' is not among the files"),
        (lambda m: m.update(outputs=["../y"]), "'../y' is not among the files"),
        (lambda m: m.update(inputs=[3]), "'inputs' is not a list of texts"),
        (lambda m: m.update(python="3.11"), "'python' is not an object"),
        (lambda m: m["files"].update({"../evil": GOOD}), "is not a path inside"),
        (lambda m: m["files"].update({"lib/../../evil": GOOD}), "is not a path inside"),
        (lambda m: m["files"].update({"/etc/passwd": GOOD}), "is not a path inside"),
        (lambda m: m["files"].update({"": GOOD}), "is not a path inside"),
        (lambda m: m["files"].update({"lib//x": GOOD}), "is not a path inside"),
        (lambda m: m["files"].update({"a\\b": GOOD}), "is not a path inside"),
        (lambda m: m["files"].update({"C:x": GOOD}), "is not a path inside"),
        (lambda m: m["files"].update({"a\0b": GOOD}), "is not a path inside"),
        (lambda m: m["files"].update({"manifest.json": GOOD}), "is not a path inside"),
        (lambda m: m["files"].update({"more.txt": GOOD}), "more.txt is missing"),
        (lambda m: m["files"].update({"\ud800": GOOD}), "is not a path inside"),
        (lambda m: m["files"].update({"lib": GOOD}), "lib is not a plain file"),
        (lambda m: m["files"].update({"README.txt/x": GOOD}), "README.txt is not a folder"),
        (lambda m: m["files"]["run.py"].update(sha256="zz"), "'run.py' has no SHA-256"),
        (lambda m: m["files"]["run.py"].update(size_bytes=-1), "'run.py' has no size"),
        (lambda m: m["files"].update({"run.py": None}), "'run.py' has no SHA-256"),
        (lambda m: m["files"].pop("lib/numpy/version.py"), "lib/numpy/version.py is not in manifest.json"),
        (lambda m: m.update(sizes={"model": 3}), "'sizes' is malformed"),
    ],
)
def test_a_hostile_manifest_is_refused(bundle: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(bundle, change)
    with pytest.raises(FormatError) as caught:
        verify_bundle(bundle)
    assert message in caught.value.message


def test_a_program_that_the_manifest_does_not_name_is_never_run(source: Path, bundle: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    build_bundle(source, bare, target=ECZ, sample=X, runtime="none")
    for name in ("run.py", "run.sh"):
        (bare / name).write_text("touch evil" if name == "run.sh" else "open('evil', 'w')")
    with pytest.raises(UsageError, match="has no program that runs here") as caught:
        run_program(bare, [])
    assert "bench OTHER" in caught.value.hint
    replace(bundle / "run.py", b"open('evil', 'w')")
    (bundle / "run.sh").write_text('echo \'{"started": "run.sh"}\'\n')

    def make_native(manifest: dict[str, Any]) -> None:
        manifest.update(runtime_form="native", entry_point="run.sh", python=None)
        manifest["files"].pop("run.py")

    edit(bundle, make_native, sign=False)
    relist(bundle, "run.sh")
    verify_bundle(bundle)
    assert run_program(bundle, []) == {"started": "run.sh"}
    assert not list(tmp_path.rglob("evil"))


def test_an_unlisted_file_is_named_without_what_a_terminal_obeys(bundle: Path) -> None:
    (bundle / "lib" / "a\x1b[31m").write_text("")
    with pytest.raises(FormatError, match=r"'lib/a\\x1b\[31m' is not in manifest\.json"):
        verify_bundle(bundle)


def test_the_limit_of_threads_is_that_of_targets() -> None:
    assert MAX_THREADS == MAX_NUMBER


def test_the_device_of_the_target_stands_in_the_manifest(source: Path, tmp_path: Path) -> None:
    target = dataclasses.replace(ECZ, name="mine", default_device="ssh://me@there:2222")
    found = build_bundle(source, tmp_path / "b", target=target, sample=X, runtime="none").manifest
    assert found.default_device == "ssh://me@there:2222"


def test_a_runtime_file_for_a_bundle_that_carries_none_is_refused(source: Path, tmp_path: Path) -> None:
    for target, form in (("x86_64", "none"), ("android", "gradle"), ("ios", "swift")):
        with pytest.raises(UsageError, match=f"the runtime '{form}' carries no runtime") as caught:
            build_bundle(
                *(source, tmp_path / "b"), target=load_target(target), sample=X, runtime=form, runtime_file=source
            )
        assert "wheel, native, wasm" in caught.value.hint
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["w:0.bin", "w\\0.bin", "w\x1b.bin"])
def test_external_data_with_a_name_that_no_bundle_can_hold_is_refused(tmp_path: Path, name: str) -> None:
    model = save_model(tmp_path / "big.onnx", external=name)
    with pytest.raises(ModelError, match="has a name that not every system can have") as caught:
        build_bundle(model, tmp_path / "bundle", target=ONNX, sample=X, runtime="none")
    assert "rename the data file" in caught.value.hint
    assert caught.value.message.isprintable()


def test_any_change_of_the_manifest_itself_is_noticed(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.update(target="another"), sign=False)
    with pytest.raises(FormatError, match="does not match its own SHA-256"):
        verify_bundle(bundle)


def scale_expected(bundle: Path, factor: float) -> None:
    path = bundle / "test_data" / "output_0.pb"
    name, value = read_tensor(path.read_bytes())
    replace(path, write_tensor(name, value * np.float32(factor)))
    relist(bundle, "test_data/output_0.pb")


def test_wrong_outputs_are_an_error_of_their_own(bundle: Path) -> None:
    scale_expected(bundle, 1.01)
    with pytest.raises(ToleranceError, match="wrong outputs: 'a/b:0' off by"):
        run_bundle(bundle, runs=1)


def test_outputs_that_differ_by_rounding_are_accepted(bundle: Path) -> None:
    scale_expected(bundle, 1.00001)
    assert run_bundle(bundle, runs=1).values_ms


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("raise ValueError('odd')", "ValueError: odd"),
        ("print('[]')", "printed no result"),
        ("print('{}')", "no result on local that can be read"),
        ("print('hello')", "printed no result"),
    ],
)
def test_a_program_that_dies_or_babbles_is_a_device_error(bundle: Path, program: str, message: str) -> None:
    replace(bundle / "run.py", program.encode())
    relist(bundle, "run.py")
    with pytest.raises(DeviceError, match=message) as caught:
        run_bundle(bundle, runs=1)
    assert caught.value.hint


def test_a_bundle_for_another_python_says_so(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest["python"].update(abi="cpython-27", version="2.7"))
    with pytest.raises(DeviceError, match="this bundle is for abi 'cpython-27'") as caught:
        run_program(bundle, ["--runs", "1"])
    assert "Python 2.7" in caught.value.hint


def test_a_model_newer_than_the_target_loads_is_refused(source: Path, tmp_path: Path) -> None:
    old = dataclasses.replace(ECZ, runtime=dataclasses.replace(ECZ.runtime, max_opset=9))
    with pytest.raises(UsageError, match="is newer than x86_64 loads"):
        build_bundle(source, tmp_path / "b", target=old, sample={})
    assert not (tmp_path / "b").exists()


def test_armhf_has_an_older_runtime_and_says_what_it_does_not_load(tmp_path: Path) -> None:
    for header, message in (
        ('8, opset_import: ["" : 23]', "opset 23"),
        ('11, opset_import: ["" : 13]', "IR version 11"),
    ):
        path = tmp_path / "new.onnx"
        text = f"<ir_version: {header}> g (float[2] x) => (float[2] y) {{ y = Relu(x) }}"
        onnx.save(onnx.parser.parse_model(text), path)
        with pytest.raises(UsageError, match=f"{message} is newer than armhf loads"):
            build_bundle(path, tmp_path / "b", target=load_target("armhf"), sample={}, runtime="none")
