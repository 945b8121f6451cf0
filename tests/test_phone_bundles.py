"""Modules for Android and iOS: every place of the templates filled, names that fit together, the .ort form beside."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from tiny import mlp, normal, save

from edgecompress.bundle import BundleSummary, build_bundle
from edgecompress.bundle.ort import convert_to_ort, mobile_usability
from edgecompress.bundle.templates import fill
from edgecompress.errors import ModelError, UsageError
from edgecompress.files import sha256_of
from edgecompress.targets import Target, load_target

SAMPLE = {"x": np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)}
ASSETS = {"android": Path("src/main/assets"), "ios": Path("Sources/EdgeModel/Model")}
TARGETS = Path(__file__).parents[1] / "targets"
PHONES = pytest.mark.parametrize("name", ["android", "ios"])


@pytest.fixture(scope="module", name="bundles")
def both_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BundleSummary]:
    folder = tmp_path_factory.mktemp("phones")
    source = mlp(folder / "m.onnx")
    return {name: build_bundle(source, folder / name, target=load_target(name), sample=SAMPLE) for name in ASSETS}


@PHONES
def test_every_place_is_filled_and_every_template_copied(name: str, bundles: dict[str, BundleSummary]) -> None:
    folder = bundles[name].path
    for template in (TARGETS / name).rglob("*"):
        if template.is_file():
            text = (folder / template.relative_to(TARGETS / name)).read_text()
            assert not re.search("@[A-Z]+@", text), template


@PHONES
def test_the_settings_name_the_files_and_their_digests(name: str, bundles: dict[str, BundleSummary]) -> None:
    folder, assets = bundles[name].path, ASSETS[name]
    settings = next(path for path in folder.rglob("Settings.*")).read_text()
    files = sorted(path for path in (folder / assets).rglob("*") if path.is_file())
    assert [path.name for path in files] == ["model.onnx", "input_0.pb", "output_0.pb"]
    for path in files:
        assert f'"{path.relative_to(folder / assets).as_posix()}"' in settings
        assert f'"{sha256_of(path)}"' in settings
    assert "0.001" in settings


@PHONES
def test_the_module_names_the_runtime_of_the_target_and_no_library_is_carried(
    name: str, bundles: dict[str, BundleSummary]
) -> None:
    summary, target = bundles[name], load_target(name)
    build_file = (summary.path / str(summary.manifest.entry_point)).read_text()
    assert target.runtime.package in build_file
    assert f'{target.runtime.version}"' in build_file
    (component,) = summary.components
    assert component.purl.startswith("pkg:")
    assert component.purl.endswith(f"@{target.runtime.version}")
    assert not [path for path in summary.manifest.files if Path(path).suffix in (".so", ".aar", ".zip")]
    # .ort holds the weights uncompressed: it would hide what the model itself takes
    assert summary.manifest.sizes["runtime"].installed_bytes < 40_000


@PHONES
def test_the_ort_form_lies_beside_with_the_operators_of_a_reduced_build(
    name: str, bundles: dict[str, BundleSummary]
) -> None:
    folder = bundles[name].path / "ort"
    config = (folder / "required_operators_and_types.config").read_text()
    assert "MatMul" in config
    assert "#" not in config  # the tool writes the path of a temporary folder there
    assert (folder / "model.ort").read_bytes()[4:8] == b"ORTM"


def test_the_android_sources_have_one_package_and_a_well_formed_manifest(bundles: dict[str, BundleSummary]) -> None:
    folder = bundles["android"].path
    assert ElementTree.parse(folder / "src/main/AndroidManifest.xml").getroot().tag == "manifest"
    sources = list(folder.rglob("*.kt"))
    assert len(sources) == 5
    assert {path.read_text().splitlines()[0] for path in sources} == {"package edgecompress.model"}
    assert {path.parent.relative_to(folder).as_posix().split("/", 2)[2] for path in sources} == {
        "kotlin/edgecompress/model"
    }
    assert 'namespace = "edgecompress.model"' in (folder / "build.gradle.kts").read_text()


@pytest.mark.parametrize("name", ["web", "android", "ios"])
def test_every_language_measures_by_the_same_constants(name: str) -> None:
    """50 ms batches until two in a row are within 5 %, at most a second or 200 runs, ten blocks."""
    where = {"web": "web/measure.js", "android": "android/src/androidTest", "ios": "ios/Tests"}[name]
    path = TARGETS / where
    text = path.read_text() if path.is_file() else "".join(p.read_text() for p in path.rglob("Benchmark.*"))
    found = dict(re.findall(r"(?:const|let)(?: val)? (\w+)\s*=\s*([\d.]+)", text))
    values = {re.sub("_", "", key).lower(): float(value) for key, value in found.items()}
    assert {key: values[key] for key in ("warmupbatchms", "warmuplimitms", "warmuplimitruns", "stable")} == {
        "warmupbatchms": 50,
        "warmuplimitms": 1000,
        "warmuplimitruns": 200,
        "stable": 0.05,
    }
    assert 10.0 in (values.get("blocks"), values.get("mostblocks"))


@pytest.mark.parametrize(
    ("name", "provider", "chosen"),
    [
        ("android", "NnapiExecutionProvider", "Accelerator.NNAPI"),
        ("android", "XnnpackExecutionProvider", "Accelerator.XNNPACK"),
        ("ios", "CoreMLExecutionProvider", "Accelerator.coreML"),
    ],
)
def test_the_execution_provider_of_the_target_is_what_the_module_opens_the_model_with(
    tmp_path: Path, name: str, provider: str, chosen: str
) -> None:
    folder = build_bundle(
        mlp(tmp_path / "m.onnx"), tmp_path / "out", target=with_provider(name, provider), sample=SAMPLE
    ).path
    assert f"= {chosen}\n" in next(path for path in folder.rglob("Settings.*")).read_text()


@PHONES
def test_an_execution_provider_that_the_published_runtime_lacks_is_refused(tmp_path: Path, name: str) -> None:
    target = with_provider(name, "CUDAExecutionProvider")
    with pytest.raises(UsageError, match="CUDAExecutionProvider") as refused:
        build_bundle(mlp(tmp_path / "m.onnx"), tmp_path / "out", target=target, sample=SAMPLE)
    assert "CPUExecutionProvider" in refused.value.hint


def with_provider(name: str, provider: str) -> Target:
    target = load_target(name)
    return dataclasses.replace(target, runtime=dataclasses.replace(target.runtime, providers=(provider,)))


@PHONES
def test_weights_in_another_file_are_refused_because_an_application_cannot_open_them(tmp_path: Path, name: str) -> None:
    model = onnx.load(mlp(tmp_path / "m.onnx"))
    onnx.save(model, tmp_path / "e.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(UsageError, match=r"weights\.bin"):
        build_bundle(tmp_path / "e.onnx", tmp_path / "out", target=load_target(name), sample=SAMPLE)


def test_a_place_that_nobody_fills_is_a_defect_of_the_template(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("@KNOWN@ mail@example.org @UNKNOWN@")
    with pytest.raises(KeyError, match="UNKNOWN"):
        fill(tmp_path / "in", tmp_path / "out", {"KNOWN": "x"})
    fill(tmp_path / "in", tmp_path / "out", {"KNOWN": "x", "UNKNOWN": "y"})
    assert (tmp_path / "out" / "a.txt").read_text() == "x mail@example.org y"


def test_the_conversion_to_ort_of_what_is_no_model_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"cannot be converted to \.ort"):
        convert_to_ort(tmp_path / "m.onnx", tmp_path / "out")


CHAIN = (
    "g (float[{batch}, 4, 8, 8] x) => (float[{batch}, 4] y) "
    "{{ a = Conv<pads=[1,1,1,1]>(x, w)  b = Relu(a)  c = {middle}(b)  d = Conv<pads=[1,1,1,1]>(c, w)"
    "  e = GlobalAveragePool(d)  y = Flatten(e) }}"
)


def test_an_accelerator_takes_what_it_knows_in_as_many_pieces_as_the_rest_leaves(tmp_path: Path) -> None:
    weight = normal(4, 4, 3, 3)
    whole = save(tmp_path / "a.onnx", CHAIN.format(batch=1, middle="Sigmoid"), w=weight)
    cut = save(tmp_path / "b.onnx", CHAIN.format(batch=1, middle="Erf"), w=weight)  # NNAPI and CoreML lack Erf
    one = {row.accelerator: row for row in mobile_usability(whole)}
    two = {row.accelerator: row for row in mobile_usability(cut)}
    assert list(one) == ["NNAPI", "CoreML NeuralNetwork", "CoreML MLProgram", "XNNPACK"]
    assert (one["NNAPI"].nodes, one["NNAPI"].supported, one["NNAPI"].partitions) == (6, 6, 1)
    assert (one["NNAPI"].verdict, one["NNAPI"].unsupported) == ("yes", ())
    assert (two["NNAPI"].nodes, two["NNAPI"].supported, two["NNAPI"].partitions) == (6, 5, 2)
    assert (two["NNAPI"].verdict, two["NNAPI"].unsupported) == ("maybe", ("ai.onnx:Erf",))
    assert (two["XNNPACK"].supported, two["XNNPACK"].partitions) == (3, 2)


def test_open_dimensions_are_judged_as_they_are_and_as_if_they_were_fixed(tmp_path: Path) -> None:
    model = save(tmp_path / "m.onnx", CHAIN.format(batch="N", middle="Sigmoid"), w=normal(4, 4, 3, 3))
    rows = [row for row in mobile_usability(model) if row.accelerator == "NNAPI"]
    assert [(row.shapes_fixed, row.verdict) for row in rows] == [(False, "no"), (True, "yes")]


def test_the_usability_of_what_is_no_model_is_a_model_error(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError):
        mobile_usability(tmp_path / "m.onnx")
