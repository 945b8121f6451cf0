from __future__ import annotations

from pathlib import Path

import pytest

from edgecompress.errors import UsageError
from edgecompress.files import shared_folder
from edgecompress.targets import Target, list_targets, load_target

GOOD = (shared_folder("targets") / "x86_64.toml").read_text()


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_the_shipped_target_says_what_a_bundle_needs() -> None:
    target = load_target("x86_64")
    assert target == Target(
        name="x86_64",
        architecture="x86_64",
        runtime_package="onnxruntime",
        runtime_version="1.31.1",
        providers=("CPUExecutionProvider",),
        threads=1,
        model_form="ecz",
        max_opset=26,
        max_ir_version=13,
        default_device="local",
    )


def test_every_listed_target_loads_under_its_own_name() -> None:
    assert "x86_64" in list_targets()
    for name in list_targets():
        assert load_target(name).name == name


def test_a_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="no target 'x86-64'") as caught:
        load_target("x86-64")
    assert "did you mean 'x86_64'" in caught.value.hint


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace('"ecz"', '"onnx"').replace('name = "x86_64"', 'name = "mine"'))
    assert (load_target(path).name, load_target(str(path)).model_form) == ("mine", "onnx")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("threads", "treads", "unknown key 'treads'"),
        ("max_opset", "max_opsets", "unknown key 'runtime.max_opsets'"),
        ("threads = 1\n", "", "'threads' is missing"),
        ("threads = 1", "threads = 0", "threads = 0 is not a whole number"),
        ("threads = 1", "threads = true", "threads = True is not a whole number"),
        ("threads = 1", 'threads = "1"', "threads = '1' is not a whole number"),
        ('["CPUExecutionProvider"]', "[1]", "not a list of texts"),
        ('["CPUExecutionProvider"]', "[]", "not a list of texts"),
        ('"ecz"', '"ecs"', "model_form = 'ecs' is not known"),
        ('"ecz"', '"ecz', "is not TOML"),
        ("[runtime]", "[runtimes]", "unknown key 'runtimes.package'"),
        ('package = "onnxruntime"', "package = {a = 1}", "runtime.package = {'a': 1} is not a text"),
    ],
)
def test_a_wrong_file_is_refused_with_its_reason(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(UsageError) as caught:
        load_target(write(tmp_path, GOOD.replace(old, new)))
    assert message in caught.value.message
    assert caught.value.hint


def test_a_missing_or_unreadable_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read.*No such file"):
        load_target(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        load_target(_folder(tmp_path / "folder.toml"))
    path = tmp_path / "latin.toml"
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(UsageError, match="is not TOML"):
        load_target(path)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path
