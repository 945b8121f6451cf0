from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgecompress.bundle import fetch
from edgecompress.bundle.fetch import cached, npm_pack, pip_download
from edgecompress.errors import OutputError, UsageError
from edgecompress.files import cache_folder

ARM = ("manylinux_2_28_aarch64",)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgecompress"


class Fetcher:
    """Writes two files, and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "b  x.whl").write_bytes(b"two")
        (folder / "a.whl").write_bytes(b"one")


def test_what_was_fetched_once_is_kept(own_cache: Path) -> None:
    fetcher = Fetcher()
    first, again = cached("key", fetcher), cached("key", fetcher)
    assert first == again
    assert [path.read_bytes() for path in first] == [b"one", b"two"]
    assert all(path.is_relative_to(own_cache) for path in first)
    assert fetcher.calls == 1
    cached("another key", fetcher)
    assert fetcher.calls == 2


def test_what_was_altered_or_lost_in_the_cache_is_fetched_again() -> None:
    fetcher = Fetcher()
    path = cached("key", fetcher)[0]
    path.write_bytes(b"bad")
    assert cached("key", fetcher)[0].read_bytes() == b"one"
    path.unlink()
    assert cached("key", fetcher)[0].read_bytes() == b"one"
    (path.parent / "SHA256SUMS").write_text("nonsense")
    assert cached("key", fetcher)[0].read_bytes() == b"one"
    assert fetcher.calls == 4


def test_a_failure_leaves_nothing_in_the_cache(own_cache: Path) -> None:
    def fail(folder: Path) -> None:
        Fetcher()(folder)
        raise UsageError("no", hint="")

    with pytest.raises(UsageError):
        cached("key", fail)
    assert list((own_cache / "packages").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OutputError, match="cache"):
        cached("key", Fetcher())


def test_a_full_disk_is_an_output_error_and_no_matter_of_the_network(
    full_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for said in ("ERROR: [Errno 28] No space left on device", "npm error code ENOSPC"):
        with pytest.raises(OutputError, match="no space left on the disk") as caught:
            fetch._run([sys.executable, "-c", f"import sys; sys.exit({said!r})"], "it")
        assert "network" not in caught.value.hint
    monkeypatch.setenv("XDG_CACHE_HOME", str(full_disk(16)))
    with pytest.raises(OutputError, match="no space left on the disk"):
        cached("key", lambda folder: (folder / "a").write_bytes(bytes(100_000)) and None)


def test_the_cache_lies_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache" / "edgecompress"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):  # the XDG specification: ignored unless absolute
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / "home" / ".cache" / "edgecompress"


def test_without_pip_or_npm_the_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(
        UsageError, match=r"onnxruntime==1\.31\.1 for Python 3\.11 on manylinux_2_28_aarch64 is missing: .*no pip"
    ) as caught:
        pip_download("onnxruntime==1.31.1", ARM, "3.11")
    assert "--runtime-file PATH" in caught.value.hint
    with pytest.raises(
        UsageError, match=r"the npm package onnxruntime-web 1\.30\.0 is missing: .*npm is not installed"
    ):
        npm_pack("onnxruntime-web", "1.30.0")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("WARNING: NewConnectionError(...)\\nERROR: No matching distribution", "cannot be reached"),
        ("npm error code EAI_AGAIN", "cannot be reached"),
        (
            "WARNING: x\\nERROR: No matching distribution found for y\\nlast",
            "ERROR: No matching distribution found for y",
        ),
        ("odd", "odd"),
        ("", "exit code 3"),
    ],
)
def test_the_reason_of_a_failed_download_is_told(said: str, reason: str) -> None:
    script = f"import sys; sys.stderr.write('{said}'); sys.exit(3)"
    with pytest.raises(UsageError, match=f"^it is missing: .*{reason}$"):
        fetch._run([sys.executable, "-c", script], "it")


def test_pip_is_asked_for_the_target_and_not_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], what: str) -> None:
        asked.append(command)
        folder = next(word.removeprefix("--dest=") for word in command if word.startswith("--dest="))
        (Path(folder) / "x.whl").touch()

    monkeypatch.setattr(fetch, "_run", run)
    assert pip_download("x==1", (*ARM, "linux_aarch64"), "3.12").name == "x.whl"
    assert {"--no-deps", "--only-binary=:all:", "--python-version", "3.12", "x==1"} <= set(asked[0])
    assert {"--platform=manylinux_2_28_aarch64", "--platform=linux_aarch64"} <= set(asked[0])


def test_an_index_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/", "EXTRA_INDEX_URL": "", "FIND_LINKS": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(UsageError, match="the package registry cannot be reached"):
        pip_download("no-such-package-of-ours==1", ARM, "3.11")
