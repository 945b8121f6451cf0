"""The bundle of wheels for arm64, in a root with a Python of Debian and the C++ library, under QEMU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tiny import DIGITS_MODEL

from edgecompress.bundle import build_bundle
from edgecompress.errors import UsageError
from edgecompress.model import load_model
from edgecompress.targets import load_target
from edgecompress.validate import random_sample

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.network, pytest.mark.qemu, pytest.mark.slow]


def test_it_runs_with_another_python(make_root: Callable[..., Path], tmp_path: Path) -> None:
    target = load_target("arm64")
    assert target.wheel is not None
    target = replace(target, wheel=replace(target.wheel, python="3.13"))  # that of the root, which is of Debian 13
    try:
        summary = build_bundle(
            DIGITS_MODEL, tmp_path / "bundle", target=target, sample=random_sample(load_model(DIGITS_MODEL), {})
        )
    except UsageError as error:
        pytest.skip(str(error))
    assert not summary.was_run
    root = make_root("arm64", "python3.13-minimal", "libpython3.13-stdlib", "libstdc++6")
    place = root / "wheels"
    shutil.copytree(summary.path, place)
    command = ["chroot", root, "/usr/bin/python3.13", "-I", "-S", "/wheels/run.py", "--runs", "2", "--json"]
    try:
        environment = {**os.environ, "QEMU_CPU": "cortex-a72"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(place)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["results"][0]["outputs_match"] is True
    assert (result["device"]["machine"], result["device"]["python"][:4]) == ("aarch64", "3.13")
