"""torch modules become ONNX files; what cannot is refused with a next step."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgecompress.errors import ModelError, OutputError, UsageError
from edgecompress.export import export_onnx
from edgecompress.model import read_signature

needs_torch = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "onnxscript")),
    reason='torch and onnxscript are not installed: pip install "edgecompress[export]"',
)

MODULE = """
import torch
from torch import nn

class Sum(nn.Module):
    def forward(self, a, b):
        return a + 2 * b

class Branch(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x

def cnn():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(block, nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

def number():
    return 3

def broken():
    raise RuntimeError("no\\nweights")

not_a_function = 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "models_of_" + "".join(each if each.isalnum() else "_" for each in tmp_path.name)
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


@pytest.mark.parametrize("factory", ["", "model", "package.module:", ":factory", "a b:c", "module:f()"])
def test_a_malformed_factory_is_a_usage_error_even_without_torch(tmp_path, factory):
    with pytest.raises(UsageError, match="not package") as caught:
        export_onnx(factory, inputs=[(1, 3)], dynamic_batch=False, destination=tmp_path / "m.onnx")
    assert "torchvision" in caught.value.hint


@pytest.mark.parametrize("inputs", [[], [(1, 0)], [(1, -3)]])
def test_input_shapes_must_be_positive(tmp_path, inputs):
    with pytest.raises(UsageError) as caught:
        export_onnx("m:f", inputs=inputs, dynamic_batch=False, destination=tmp_path / "m.onnx")
    assert "--input 1,3,32,32" in caught.value.hint


def test_an_existing_file_is_refused_before_anything_is_imported(tmp_path):
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        export_onnx("no_such:f", inputs=[(1, 3)], dynamic_batch=False, destination=tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "mine"


@pytest.mark.parametrize("missing", ["torch", "onnxscript"])
def test_without_torch_the_hint_says_what_to_install(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "torch", None if missing == "torch" else object())
    monkeypatch.setitem(sys.modules, "onnxscript", None if missing == "onnxscript" else object())
    with pytest.raises(ModelError, match=missing) as caught:
        export_onnx("module:factory", inputs=[(1, 3)], dynamic_batch=False, destination=tmp_path / "m.onnx")
    assert caught.value.hint == 'pip install "edgecompress[export]"'
    assert list(tmp_path.iterdir()) == []


@needs_torch
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_cnn_computes_the_same_after_export(models, tmp_path, dynamic):
    import torch

    path = tmp_path / "m.onnx"
    export_onnx(f"{models}:cnn", inputs=[(1, 3, 8, 8)], dynamic_batch=dynamic, destination=path)
    (spec,), _ = read_signature(path)
    assert spec.shape == (None if dynamic else 1, 3, 8, 8)
    values = np.random.default_rng(0).standard_normal((5 if dynamic else 1, 3, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = sys.modules[models].cnn().eval()(torch.from_numpy(values)).numpy()
    # sums of 27 float32 products in another order
    np.testing.assert_allclose(session.run(None, {spec.name: values})[0], expected, atol=1e-5)
    assert list(tmp_path.glob("*.onnx*")) == [path]
    assert not list(tmp_path.glob(".*partial*"))


@needs_torch
def test_the_file_holds_no_paths_of_the_machine_it_was_made_on(models, tmp_path):
    export_onnx(f"{models}:cnn", inputs=[(1, 3, 8, 8)], dynamic_batch=True, destination=tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    assert str(tmp_path).encode() not in content
    assert b"site-packages" not in content
    assert {entry.domain: entry.version for entry in onnx.load(tmp_path / "m.onnx").opset_import}[""] == 18


@needs_torch
def test_weights_above_the_limit_lie_beside_the_file(models, tmp_path, monkeypatch):
    monkeypatch.setattr("edgecompress.export.INLINE_LIMIT_BYTES", 100)
    path = tmp_path / "out" / "m.onnx"
    export_onnx(f"{models}:cnn", inputs=[(1, 3, 8, 8)], dynamic_batch=True, destination=path)
    assert sorted(each.name for each in path.parent.iterdir()) == ["m.onnx", "m.onnx.data"]
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@needs_torch
def test_every_argument_has_its_shape(models, tmp_path):
    path = tmp_path / "m.onnx"
    export_onnx(f"{models}:Sum", inputs=[(1, 4), (1, 4)], dynamic_batch=True, destination=path)
    assert [(spec.name, spec.shape) for spec in read_signature(path)[0]] == [("a", (None, 4)), ("b", (None, 4))]


@needs_torch
@pytest.mark.parametrize(
    "case",
    [
        ("cnm", UsageError, "has no 'cnm'", "did you mean 'cnn'"),
        ("not_a_function", UsageError, "cannot be called", "name a function"),
        ("number", UsageError, "returned int, not a torch.nn.Module", "builds the model"),
        ("broken", ModelError, "failed: RuntimeError: no weights", "without arguments"),
        ("Branch", ModelError, "torch cannot export this module", "--input"),
        ("Sum", ModelError, "torch cannot export this module", "--input"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(models, tmp_path, capfd, case):
    factory, error, message, hint = case
    with pytest.raises(error) as caught:
        export_onnx(f"{models}:{factory}", inputs=[(1, 4)], dynamic_batch=True, destination=tmp_path / "m.onnx")
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert not [each for each in tmp_path.iterdir() if "onnx" in each.name]
    assert capfd.readouterr().out == ""


@needs_torch
def test_a_module_that_is_not_there_names_where_it_was_looked_for(models, tmp_path):
    with pytest.raises(UsageError, match="cannot import no_such_module_at_all") as caught:
        export_onnx("no_such_module_at_all:f", inputs=[(1, 4)], dynamic_batch=False, destination=tmp_path / "m.onnx")
    assert str(tmp_path) in caught.value.hint
