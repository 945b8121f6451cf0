from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny

import edgecompress
from edgecompress import case, pipeline, stages
from edgecompress import validate as validation
from edgecompress.case import Request
from edgecompress.data import split
from edgecompress.errors import ModelError, OutputError, PassError, RecipeError
from edgecompress.model import read_signature
from edgecompress.pipeline import compress
from edgecompress.recipe import Recipe, Settings

FILES = ["model.ecz", "model.onnx", "plan.json", "report.html", "report.json"]


def recipe(**settings: object) -> Recipe:
    return Recipe(everywhere=Settings(**settings))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.mlp(tmp_path / "m.onnx")


def test_the_same_request_gives_the_same_bytes(tmp_path, model) -> None:
    data = tiny.rows(tmp_path / "d.npz", 50)
    request = Request(recipe=recipe(factorize="svd", keep=0.7, bits=4), data=data)
    first, second = tmp_path / "first", tmp_path / "second"
    reports = [compress(model, out, request) for out in (first, second)]
    assert sorted(path.name for path in first.iterdir()) == FILES
    for name in ("model.onnx", "model.ecz", "plan.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert reports[0].layers == reports[1].layers
    assert reports[0].accuracy == reports[1].accuracy
    assert reports[0].outputs == reports[1].outputs


def test_the_files_mean_the_same_model(tmp_path, model) -> None:
    out = tmp_path / "out"
    compress(model, out, Request(recipe=recipe(bits=3)))
    edgecompress.unpack(out / "model.ecz", tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == (out / "model.onnx").read_bytes()
    feeds = {"x": tiny.normal(7, 16, seed=4)}
    results = [edgecompress.load(out / name).run(None, feeds)[0] for name in ("model.onnx", "model.ecz")]
    assert np.array_equal(*results)
    onnx.checker.check_model(out / "model.onnx", full_check=True)


def test_nothing_asked_for_keeps_the_values(tmp_path, model) -> None:
    report = compress(model, tmp_path / "out", Request(recipe=recipe(cluster="none")))
    assert report.outputs["y"].max_abs == 0.0
    assert report.outputs["y"].sqnr_db is None
    assert [stage.stage for stage in report.size.waterfall] == ["original", "encode"]
    assert {row.reason for row in report.layers} == {"not asked for"}


def test_the_model_keeps_what_the_file_says_of_itself(tmp_path, model) -> None:
    proto = onnx.load(model)
    proto.metadata_props.add(key="owner", value="me")
    proto.doc_string, proto.producer_name = "a model", "somebody"
    onnx.save(proto, model)
    compress(model, tmp_path / "out")
    after = onnx.load(tmp_path / "out" / "model.onnx")
    assert [(entry.key, entry.value) for entry in after.metadata_props] == [("owner", "me")]
    assert (after.doc_string, after.producer_name) == ("a model", "somebody")
    assert (after.opset_import[0].version, after.ir_version) == (17, 8)


def test_the_models_file_is_only_read(tmp_path, model) -> None:
    before = model.read_bytes()
    model.chmod(0o400)
    compress(model, tmp_path / "out")
    assert model.read_bytes() == before


def test_the_rows_of_one_data_set_are_divided_between_calibration_and_test(tmp_path, model) -> None:
    data = tiny.rows(tmp_path / "d.npz", 50, labels=np.arange(50) % 4)
    calibration, test = split(data, None, read_signature(model)[0])
    taken = [set(part.source.origins(part.index)) for part in (calibration, test)]
    assert not taken[0] & taken[1]
    report = compress(model, tmp_path / "out", Request(data=data))
    assert report.accuracy.metric == "top1"
    assert report.accuracy.samples == test.rows == 10
    assert "last rows" in report.accuracy.data


def test_a_plan_applies_to_its_model_alone_and_reproduces_its_run(tmp_path, model) -> None:
    data = tiny.rows(tmp_path / "d.npz", 50)
    first = tmp_path / "first"
    compress(model, first, Request(recipe=recipe(factorize="svd", keep=0.6), data=data))
    again = compress(model, tmp_path / "again", Request(plan=first / "plan.json", data=data))
    for name in ("model.onnx", "model.ecz", "plan.json"):
        assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert again.tool.recipe_hash
    with pytest.raises(RecipeError, match="need data"):
        compress(model, tmp_path / "x", Request(plan=first / "plan.json"))
    with pytest.raises(RecipeError, match="another model"):
        compress(tiny.mlp(tmp_path / "o.onnx", seed=8), tmp_path / "x", Request(plan=first / "plan.json", data=data))


def test_a_large_model_is_never_in_memory_twice_and_comes_out_the_same(
    tmp_path, model, own_tempdir, monkeypatch
) -> None:
    compress(model, tmp_path / "small")
    monkeypatch.setattr(case, "LARGE_MODEL_BYTES", 1000)
    opened: list[bool] = []
    together: list[int] = []
    real = validation.Worker

    class Watched(real):
        def __init__(self, path, **options):
            opened.append(options["low_memory"])
            super().__init__(path, **options)

        def __enter__(self):
            together.append(1 + sum(together))
            return super().__enter__()

        def __exit__(self, *details):
            together.append(-1)
            super().__exit__(*details)

    monkeypatch.setattr(validation, "Worker", Watched)
    report = compress(model, tmp_path / "large")
    assert opened == [True, True]
    assert max(together) == 1
    assert report.latency is None
    assert any("too large" in warning for warning in report.warnings)
    assert report.accuracy.samples == 4
    for name in ("model.onnx", "model.ecz", "plan.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "large" / name).read_bytes()
    assert list(own_tempdir.iterdir()) == []


def test_external_data_counts_and_is_taken_in(tmp_path, model) -> None:
    proto = onnx.load(model)
    folder = tmp_path / "external"
    folder.mkdir()
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    report = compress(folder / "m.onnx", tmp_path / "out")
    assert report.size.original_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    compress(model, tmp_path / "inline")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (tmp_path / "inline" / "model.onnx").read_bytes()


def test_a_failure_leaves_the_output_folder_as_it_was(tmp_path, model, monkeypatch) -> None:
    out = tmp_path / "out"
    compress(model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def broken(_: object) -> str:
        raise PassError("no report today", hint="")

    monkeypatch.setattr(pipeline, "to_html", broken)
    with pytest.raises(PassError):
        compress(model, out, Request(force=True, recipe=recipe(bits=2)))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(PassError):
        compress(model, tmp_path / "a" / "b" / "c", Request())
    assert not (tmp_path / "a").exists()


def test_the_output_may_not_be_the_input(tmp_path) -> None:
    model = tiny.mlp(tmp_path / "model.onnx")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="would replace the input"):
        compress(model, tmp_path / "link", Request(force=True))


def test_a_wrong_rewrite_is_our_defect_and_names_the_pass(tmp_path, model, monkeypatch) -> None:
    real = stages.write_values

    def wrong(graph, clusters):
        changes = real(graph, clusters)
        graph.surgeon.nodes[-1].inputs.reverse()
        return changes

    monkeypatch.setattr(stages, "write_values", wrong)
    with pytest.raises((PassError, ModelError), match=r"cluster|refuses"):
        compress(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_long_stage_reports_its_progress(tmp_path, model) -> None:
    from contextlib import contextmanager

    seen: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def step(name):
        yield lambda done, total: seen.setdefault(name, []).append((done, total))

    data = tiny.rows(tmp_path / "d.npz", 30)
    compress(model, tmp_path / "out", Request(data=data, step=step, recipe=recipe(factorize="svd")))
    assert list(seen) == ["calibrate", "compress layers", "encode", "validate", "measure"]
    for calls in seen.values():
        assert all(0 <= done <= total for done, total in calls)
        assert calls[-1][0] == calls[-1][1]


def test_the_plan_says_everything_that_was_decided(tmp_path, model) -> None:
    report = compress(model, tmp_path / "out", Request(recipe=recipe(factorize="svd", rank=4, bits=3)))
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert list(plan) == ["schema_version", "model_sha256", "shrink", "quantize", "layers"]
    assert [(entry["layer"], entry["weights"]) for entry in plan["layers"]] == [
        ("w1", {"scheme": "kmeans", "bits": 3, "step": None, "prune": 0.0, "calibrated": False}),
        ("w2", {"scheme": "kmeans", "bits": 3, "step": None, "prune": 0.0, "calibrated": False}),
    ]
    assert plan["layers"][0]["factorize"]["rank"] == report.layers[0].rank == 4


def test_a_model_with_a_scalar_input_is_compressed_without_data(tmp_path) -> None:
    body = "g (float[N, 16] x, float s) => (float[N, 64] y) { a = MatMul(x, w1)  y = Mul(a, s) }"
    report = compress(tiny.save(tmp_path / "m.onnx", body, w1=tiny.normal(16, 64)), tmp_path / "out")
    assert report.latency is not None
    assert report.outputs["y"].sqnr_db is not None


def test_a_ruined_model_is_named_with_its_worst_layers(tmp_path, model) -> None:
    labels = np.arange(400) % 4
    data = tiny.rows(tmp_path / "d.npz", 400, labels=labels)
    plain = Request(data=data, calibrate=False, recipe=recipe(bits=1, cluster="kmeans"))
    report = compress(model, tmp_path / "out", plain)
    assert any("dB SQNR" in text and "w1" in text for text in report.warnings)
    fine = compress(model, tmp_path / "fine", Request(data=data, recipe=recipe(bits=8)))
    assert not any("SQNR" in text or "points" in text for text in fine.warnings)


def test_a_plan_belongs_to_the_external_data_too(tmp_path) -> None:
    values = tiny.normal(16, 64)
    source = tiny.save(tmp_path / "inline.onnx", tiny.MLP, w1=values, w2=tiny.normal(64, 4))
    external = tmp_path / "m.onnx"
    onnx.save(onnx.load(source), external, save_as_external_data=True, location="w.bin", size_threshold=0)
    compress(external, tmp_path / "out")
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[::-1])
    with pytest.raises(RecipeError, match="made for another model"):
        compress(external, tmp_path / "again", Request(plan=tmp_path / "out" / "plan.json"))


def test_a_layer_that_an_edited_plan_leaves_alone_says_so(tmp_path, model) -> None:
    compress(model, tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    plan["layers"][0]["weights"] = None
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    report = compress(model, tmp_path / "again", Request(plan=tmp_path / "plan.json"))
    assert report.layers[0].reason == "the plan leaves it alone"


def test_paths_may_be_plain_text(tmp_path, model) -> None:
    assert edgecompress.compress(str(model), str(tmp_path / "out")).size.ecz_bytes > 0
