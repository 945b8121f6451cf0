from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from machines import make_bundle, make_root  # noqa: F401 - fixtures
from tiny import DIGITS, DIGITS_MODEL


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The whole of stdout as strict JSON: NaN and Infinity are no JSON."""

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.out, parse_constant=refuse)


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command line in this process, all of it but the start of the interpreter."""
    from edgecompress.cli import main

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["edgecompress", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + captured.out
        code = ended.value.code
        assert isinstance(code, int)
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run a command line that must fail: with this exit code, these words on stderr, and no file anywhere changed."""
    monkeypatch.chdir(tmp_path)

    def run(code: int, words: str, *arguments: str | Path) -> Outcome:
        before = snapshot(tmp_path)
        outcome = cli(*arguments)
        assert outcome.code == code, outcome.err
        first, *rest = outcome.err.splitlines()
        assert first.startswith("error: ")
        assert words in first
        assert len(rest) == 1, outcome.err
        assert rest[0].startswith("hint: ")
        assert outcome.out == ""
        assert snapshot(tmp_path) == before
        return outcome

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the program as a user does: in a process of its own."""

    def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        command = [sys.executable, "-m", "edgecompress", *map(str, arguments)]
        return subprocess.run(command, text=True, timeout=120, check=False, **options)

    return run


@pytest.fixture(scope="session")
def digits_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that compressing the shipped digit classifier with the defaults and its data gives."""
    return _compressed(tmp_path_factory, "digits")


@pytest.fixture(scope="session")
def digits_svd_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same, factorized too, to 80 % of the parameters."""
    from edgecompress.recipe import Settings

    return _compressed(tmp_path_factory, "digits-svd", Settings(factorize="svd", keep=0.8))


def _compressed(factory: pytest.TempPathFactory, name: str, settings: Any = None) -> Path:
    from edgecompress.case import Request
    from edgecompress.pipeline import compress
    from edgecompress.recipe import Recipe, Settings

    out = factory.mktemp(name) / "out"
    compress(DIGITS_MODEL, out, Request(recipe=Recipe(everywhere=settings or Settings()), data=DIGITS))
    return out


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount file systems of a few KiB."""
    mounted: list[Path] = []

    def mount(kibibytes: int) -> Path:
        place = tmp_path / f"disk-{kibibytes}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"cannot mount a small file system: {error}")
        if done.returncode:
            pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
        mounted.append(place)
        return place

    try:
        yield mount
    finally:
        for place in mounted:
            subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def own_tempdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test, and the processes it starts, an empty folder for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", os.fspath(folder))
    return folder
