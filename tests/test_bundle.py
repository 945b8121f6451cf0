from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from edgecompress.bundle import BundleSummary, build_bundle, run_program, verify_bundle
from edgecompress.bundle_files import write_arrays
from edgecompress.bundle_run import SCHEMA_VERSION, manifest_digest
from edgecompress.devices.local import run_bundle
from edgecompress.errors import DataError, DeviceError, FormatError, ModelError, OutputError, UsageError
from edgecompress.files import sha256_of
from edgecompress.runtime import load
from edgecompress.targets import load_target

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
    return shutil.copytree(built.folder, tmp_path / "copy", copy_function=os.link)


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
    assert (result["samples"], len(result["values_ms"]), result["outputs_match"]) == (4, 4, True)
    assert verify_bundle(bundle).model == "model.ecz"  # running it has left nothing in it


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


@pytest.mark.parametrize("arguments", [["--runs", "0"], ["--runs", "x"], ["--threads", "-1"], ["--nothing"]])
def test_wrong_options_are_a_usage_error(bundle: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(bundle / "run.py"), *arguments],
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_model_in_it_loads_and_computes_the_same(built: BundleSummary, source: Path) -> None:
    mine = load(built.folder).run(None, X)[0]
    theirs = load(source / "model.onnx").run(None, X)[0]
    np.testing.assert_array_equal(mine, theirs)
    with np.load(built.folder / "expected_output.npz") as expected:
        np.testing.assert_array_equal(expected["a/b:0"], theirs)


def test_it_holds_the_decoder_the_runtime_and_every_licence_and_nothing_for_development(built: BundleSummary) -> None:
    names = set(built.manifest.files)
    assert {"run.py", "README.txt", "model.ecz", "sample_input.npz", "lib/edgecompress/runtime/session.py"} <= names
    assert [part.name for part in built.components] == ["numpy", "onnxruntime"]
    for part in built.components:
        assert any(name.startswith(f"licenses/{part.name}-{part.version}/") for name in names)
    assert any(name.startswith("licenses/edgecompress-") for name in names)
    assert not [name for name in names if name.endswith((".pyi", ".pyc", ".h")) or "/tests/" in name]
    assert not [name for name in names if name.startswith(("lib/onnxruntime/tools/", "lib/onnxruntime/transformers/"))]


def test_the_sizes_add_up_to_what_lies_on_the_disk(built: BundleSummary) -> None:
    sizes = built.sizes
    parts = [sizes["model"], sizes["runtime"], sizes["other"]]
    assert sum(part.installed_bytes for part in parts) == sizes["total"].installed_bytes
    assert sum(part.download_bytes for part in parts) == sizes["total"].download_bytes
    on_disk = sum(path.stat().st_size for path in built.folder.rglob("*") if path.is_file())
    assert sizes["total"].installed_bytes == on_disk - (built.folder / "manifest.json").stat().st_size
    assert sizes["model"].installed_bytes == (built.folder / "model.ecz").stat().st_size
    assert sizes["total"].download_bytes < 0.6 * sizes["total"].installed_bytes


def test_the_same_input_gives_the_same_bundle_and_force_replaces_it(
    built: BundleSummary, source: Path, bundle: Path
) -> None:
    (bundle / "keep.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        build_bundle(source, bundle, target=ECZ, sample=X)
    build_bundle(source, bundle, target=ECZ, sample=X, force=True)
    assert (bundle / "manifest.json").read_bytes() == (built.folder / "manifest.json").read_bytes()
    assert (bundle / "keep.txt").read_text() == "mine"
    verify_bundle(bundle)


def test_force_does_not_merge_into_another_runtime(source: Path, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "old.py").write_text("")
    with pytest.raises(OutputError, match=r"lib holds 1 files of another bundle, e\.g\. old\.py"):
        build_bundle(source, tmp_path, target=ECZ, sample=X, force=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["lib", "old.py"]


def test_external_data_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgecompress.bundle_files._deflated_size", lambda _: 1)  # takes two seconds, tested above
    model = save_model(tmp_path / "big.onnx", external="weights.bin")
    summary = build_bundle(model, tmp_path / "bundle", target=ONNX, sample=X)
    assert {"model.onnx", "weights.bin"} <= set(summary.manifest.files)
    assert summary.sizes["model"].installed_bytes == model.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    assert run_bundle(summary.folder, runs=3).values_ms


def test_a_failure_leaves_nothing(source: Path, tmp_path: Path) -> None:
    attempts: list[tuple[type[Exception], dict[str, Any]]] = [
        (ModelError, {"sample": {"wrong": X["x"]}}),
        (ModelError, {"source": tmp_path / "none"}),
        (ModelError, {"source": tmp_path}),
        (UsageError, {"target": dataclasses.replace(ECZ, architecture="aarch64")}),
        (UsageError, {"target": dataclasses.replace(ECZ, runtime_package="no_such_runtime")}),
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
    samples = run_bundle(built.folder, threads=2, runs=5)
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
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(bundle / "run.py")], env={}, capture_output=True, text=True, check=False
    )
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
        (lambda m: m.update(schema_version=SCHEMA_VERSION + 1), "schema_version 2 is not supported"),
        (lambda m: m.update(schema_version=True), "schema_version True"),
        (lambda m: m.pop("schema_version"), "schema_version None"),
        (lambda m: m.update(files=[]), "'files' is not an object"),
        (lambda m: m.pop("target"), "'target' is not a text"),
        (lambda m: m.update(providers=None), "'providers' is not a list"),
        (lambda m: m.update(tolerance=-1), "'tolerance' is not a positive number"),
        (lambda m: m.update(threads="1"), "'threads' is not a positive number"),
        (lambda m: m.update(model="other.onnx"), "model 'other.onnx' is not among the files"),
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
        (lambda m: m["files"].update({"\ud800": GOOD}), "is missing"),
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


def test_any_change_of_the_manifest_itself_is_noticed(bundle: Path) -> None:
    edit(bundle, lambda manifest: manifest.update(target="another"), sign=False)
    with pytest.raises(FormatError, match="does not match its own SHA-256"):
        verify_bundle(bundle)


def test_wrong_outputs_are_a_device_error(bundle: Path) -> None:
    with np.load(bundle / "expected_output.npz") as stored:
        wrong = {name: value * np.float32(1.01) for name, value in stored.items()}
    (bundle / "expected_output.npz").unlink()
    write_arrays(bundle / "expected_output.npz", wrong)
    relist(bundle, "expected_output.npz")
    with pytest.raises(DeviceError, match="wrong outputs: 'a/b:0' off by"):
        run_bundle(bundle, runs=1)


def test_outputs_that_differ_by_rounding_are_accepted(bundle: Path) -> None:
    with np.load(bundle / "expected_output.npz") as stored:
        close = {name: value * np.float32(1.00001) for name, value in stored.items()}
    (bundle / "expected_output.npz").unlink()
    write_arrays(bundle / "expected_output.npz", close)
    relist(bundle, "expected_output.npz")
    assert run_bundle(bundle, runs=1).values_ms


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("raise ValueError('odd')", "ValueError: odd"),
        ("print('[]')", "printed no result"),
        ("print('{}')", "no result that can be read"),
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
        run_program(bundle, runs=1)
    assert "Python 2.7" in caught.value.hint


def test_arrays_of_any_name_and_kind_are_stored_the_same_way_every_time(tmp_path: Path) -> None:
    arrays = {"file": np.zeros((0, 2)), "/a:b": np.array(3), "t": np.array(["x", "yy"], object)}
    write_arrays(tmp_path / "one.npz", arrays)
    write_arrays(tmp_path / "two.npz", arrays)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz", allow_pickle=False) as stored:
        assert set(stored) == set(arrays)
        assert all(np.array_equal(stored[name], value.astype(stored[name].dtype)) for name, value in arrays.items())
    with pytest.raises(DataError, match="'m' is no tensor"):
        write_arrays(tmp_path / "three.npz", {"m": np.array([{"a": 1}], object)})


def test_a_model_newer_than_the_target_loads_is_refused(source: Path, tmp_path: Path) -> None:
    old = dataclasses.replace(ECZ, max_opset=9)
    with pytest.raises(UsageError, match="is newer than x86_64 loads"):
        build_bundle(source, tmp_path / "b", target=old, sample={})
    assert not (tmp_path / "b").exists()
