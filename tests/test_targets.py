from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import DIGITS_MODEL

from edgecompress.errors import UsageError
from edgecompress.files import shared_folder
from edgecompress.targets import NativeForm, Runtime, Target, WheelForm, list_targets, load_target

GOOD = (shared_folder("targets") / "x86_64.toml").read_text()


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_shipped_target_says_what_a_bundle_needs() -> None:
    assert load_target("x86_64") == Target(
        name="x86_64",
        system="linux",
        architecture="x86_64",
        threads=1,
        model_form="ecz",
        rank_alignment=16,
        default_device="local",
        runtime=Runtime(
            form="wheel",
            package="onnxruntime",
            version="1.31.1",
            providers=("CPUExecutionProvider",),
            max_opset=26,
            max_ir_version=13,
        ),
        wheel=WheelForm(python="3.11", platforms=("manylinux_2_28_x86_64", "manylinux_2_27_x86_64")),
        native=NativeForm(
            compiler="x86_64-linux-gnu.2.28",
            loader="ld-linux-x86-64.so.2",
            runtime_from="wheel",
            debian_architecture="amd64",
            debian_suite="bookworm",
            debian_packages=("libc6", "libstdc++6", "libgcc-s1"),
        ),
    )


def test_the_six_targets_have_the_runtime_forms_that_exist_for_them() -> None:
    assert {name: load_target(name).forms for name in list_targets()} == {
        "android": ("gradle", "none"),
        "arm64": ("wheel", "native", "none"),
        "armhf": ("native", "none"),
        "ios": ("swift", "none"),
        "web": ("wasm", "none"),
        "x86_64": ("wheel", "native", "none"),
    }


def test_every_listed_target_loads_under_its_own_name() -> None:
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
        ("threads = 1\n", "", "threads is missing"),
        ("threads = 1", "threads = 0", "threads = 0 is not a whole number"),
        ("threads = 1", "threads = true", "threads = True is not a whole number"),
        ("threads = 1", 'threads = "1"', "threads = '1' is not a whole number"),
        ('["CPUExecutionProvider"]', "[1]", "not a list of texts"),
        ('["CPUExecutionProvider"]', "[]", "not a list of texts"),
        ('"ecz"', '"ecs"', "model_form = 'ecs' is not known"),
        ('"ecz"', "[1]", "model_form = [1] is not known"),
        ('"linux"', '"windows"', "system = 'windows' is not known"),
        ('form = "wheel"', 'form = "gem"', "runtime.form = 'gem' is not known"),
        ('"ecz"', '"ecz', "is not TOML"),
        ("[runtime]", "[runtimes]", "unknown key 'runtimes'"),
        ("[wheel]\npython", "[wheel]\npythons", "unknown key 'wheel.pythons'"),
        ('python = "3.11"\n', "", "wheel.python is missing"),
        ("threads = 1", "threads = 1025", "threads = 1025 is not a whole number from 1 to 1024"),
        ('name = "x86_64"', 'name = "../x"', "name = '../x' cannot be"),
        ('name = "x86_64"', 'name = "a\\u001bb"', r"name = 'a\x1bb' cannot be"),
        ('name = "x86_64"', 'name = "-x"', "name = '-x' cannot be"),
        ('"local"', '"ftp://x"', "default_device = 'ftp://x' cannot be"),
        ('"local"', '"ssh://-oProxyCommand=x"', "default_device = 'ssh://-oProxyCommand=x' cannot be"),
        ('"local"', '"ssh://a b"', "default_device = 'ssh://a b' cannot be"),
        ('"onnxruntime"', '"--index-url=x"', "runtime.package = '--index-url=x' cannot be"),
        ('"onnxruntime"', '"x; y"', "runtime.package = 'x; y' cannot be"),
        ('"1.31.1"', '"1.31.1 x"', "runtime.version = '1.31.1 x' cannot be"),
        ('"CPUExecutionProvider"', '"CPU\\n"', r"runtime.providers = 'CPU\n' cannot be"),
        ('python = "3.11"', 'python = "3.11;x"', "wheel.python = '3.11;x' cannot be"),
        ('"manylinux_2_27_x86_64"', '"many linux"', "wheel.platforms = 'many linux' cannot be"),
        ('"x86_64-linux-gnu.2.28"', '"-o x"', "native.compiler = '-o x' cannot be"),
        ('"ld-linux-x86-64.so.2"', '"../sh"', "native.loader = '../sh' cannot be"),
        ('"ld-linux-x86-64.so.2"', '"ld; x"', "native.loader = 'ld; x' cannot be"),
        ('"amd64"', '"amd64]"', "native.debian_architecture = 'amd64]' cannot be"),
        ('"bookworm"', '"book worm"', "native.debian_suite = 'book worm' cannot be"),
        ('"libc6"', '"-oDPkg::Pre-Invoke::=x"', "native.debian_packages = '-oDPkg::Pre-Invoke::=x' cannot be"),
        ('"libc6"', '"libc6=1"', "native.debian_packages = 'libc6=1' cannot be"),
        ('architecture = "x86_64"', 'architecture = "wasm32"', "linux has no architecture 'wasm32'"),
        ('form = "wheel"', 'form = "gradle"', "linux has no runtime form 'gradle'"),
        ('"linux"', '"web"', "web has no architecture 'x86_64'"),
        ('package = "onnxruntime"', "package = {a = 1}", "runtime.package = {'a': 1} is not a text"),
    ],
)
def test_a_wrong_file_is_refused_with_its_reason(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(UsageError) as caught:
        load_target(write(tmp_path, GOOD.replace(old, new)))
    assert message in caught.value.message
    assert caught.value.hint


def test_a_table_that_the_system_has_no_use_for_is_refused(tmp_path: Path) -> None:
    web = GOOD.replace('"linux"', '"web"').replace('architecture = "x86_64"', 'architecture = "wasm32"')
    with pytest.raises(UsageError, match="web has no runtime form 'wheel'"):
        load_target(write(tmp_path, web.replace('form = "wheel"', 'form = "wasm"')))


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


def test_the_table_of_the_default_form_is_needed_and_no_other(tmp_path: Path) -> None:
    without = GOOD[: GOOD.index("[wheel]")]
    with pytest.raises(UsageError, match=r"the table \[wheel\] is missing"):
        load_target(write(tmp_path, without))
    web = without.replace('form = "wheel"', 'form = "wasm"')
    web = web.replace('"linux"', '"web"').replace('architecture = "x86_64"', 'architecture = "wasm32"')
    target = load_target(write(tmp_path, web))
    assert (target.wheel, target.native, target.forms) == (None, None, ("wasm", "none"))
    for text in ("native = 3\n" + GOOD[: GOOD.index("[native]")], "wheel = []\n" + without):
        with pytest.raises(UsageError, match="is not a table"):
            load_target(write(tmp_path, text))
    with pytest.raises(UsageError, match=r"\[runtime\] is missing"):
        load_target(write(tmp_path, GOOD[: GOOD.index("[runtime]")]))


def test_the_command_lists_them_all(cli: Callable[..., Any]) -> None:
    found = cli("targets", "--json").json["targets"]
    assert [target["name"] for target in found] == list(list_targets())
    arm = next(target for target in found if target["name"] == "arm64")
    assert (arm["runtime"]["form"], arm["wheel"]["python"], arm["rank_alignment"]) == ("wheel", "3.11", 4)
    table = cli("targets").out
    for name in list_targets():
        assert f" {name} " in table


def test_compress_aligns_ranks_to_the_target(cli: Callable[..., Any], tmp_path: Path) -> None:
    own = write(tmp_path, GOOD.replace("rank_alignment = 16", "rank_alignment = 3"))
    found = {}
    for name, target in (("none", []), ("own", ["--target", own])):
        arguments = ["--factorize", "svd", "--keep", "0.6", "--cluster", "none", *target]
        assert cli("compress", DIGITS_MODEL, "-o", tmp_path / name, *arguments).code == 0
        layers = json.loads((tmp_path / name / "plan.json").read_text())["layers"]
        found[name] = [layer["factorize"]["rank"] for layer in layers if layer["factorize"]]
    assert found["own"] == [max(rank // 3, 1) * 3 for rank in found["none"]] != found["none"]
    done = cli("compress", DIGITS_MODEL, "-o", tmp_path / "p", "--plan", tmp_path / "none/plan.json", "--target", own)
    assert (done.code, "it excludes --target" in done.err) == (2, True)
    assert cli("compress", DIGITS_MODEL, "-o", tmp_path / "p", "--target", "arm65").code == 2
