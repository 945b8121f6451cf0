"""The container device with real images: a base from Debian packages, and the image of Dockerfile.arm64 on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from device_samples import RESULT, printing, script_bundle
from machines import MakeBundle, MakeRoot, needs_programs, needs_root
from tiny import flipped

pytestmark = [pytest.mark.container, pytest.mark.slow]

_DOCKERFILE = Path(__file__).parents[2] / "Dockerfile.arm64"
_BASE = "localhost/edgecompress-base:test"


@dataclass(frozen=True)
class Images:
    """Images in a store of their own."""

    environment: dict[str, str]

    def buildah(self, *arguments: str | Path) -> str:
        done = subprocess.run(
            ["buildah", *arguments], env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def build(self, bundle: Path, name: str) -> str:
        """Build the image of Dockerfile.arm64 as its first lines say, with ``bundle`` as the context."""
        given = ("--quiet", "--pull-never", "--arch", "arm64", "--build-arg", f"BASE={_BASE}", "-f", _DOCKERFILE)
        self.buildah("bud", *given, "-t", f"localhost/{name}:test", bundle)
        return f"container://localhost/{name}:test"

    def config(self, name: str) -> dict[str, Any]:
        """Return what an image says of how it is run."""
        shown = json.loads(self.buildah("inspect", "--type", "image", f"localhost/{name}:test"))
        return cast("dict[str, Any]", shown["OCIv1"]["config"])

    def containers(self) -> str:
        return self.buildah("containers", "--quiet")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, make_root: MakeRoot) -> Iterator[Images]:
    needs_programs("buildah")
    needs_root()
    folder = tmp_path_factory.mktemp("store")
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
    )
    own = {"CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"), "BUILDAH_ISOLATION": "chroot"}
    images = Images({**os.environ, **own, "STORAGE_DRIVER": "vfs"})
    root = make_root("arm64")
    container = images.buildah("from", "--arch", "arm64", "scratch")
    subprocess.run(["tar", "-C", root, "--exclude=./dev/*", "-cf", folder / "root.tar", "."], check=True)
    images.buildah("add", "--quiet", container, folder / "root.tar", "/")
    images.buildah("commit", "--quiet", "--rm", container, _BASE)
    yield images
    shutil.rmtree(folder)  # several times the size of the images


@pytest.fixture
def images(store: Images, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Images:
    """Let the device find these images; a docker without a server, as on machines that only have the client."""
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    podman = docker.with_name("podman")
    for program in (docker, podman):
        program.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
        program.chmod(0o755)
    for name, value in {**store.environment, "PATH": f"{docker.parent}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    return store


def test_the_image_runs_its_own_bundle_as_a_user_without_rights(cli, images, make_bundle: MakeBundle) -> None:
    device = images.build(make_bundle("arm64", "native"), "own")
    outcome = cli("bench", "--device", device, "--runs", "3", "--json")
    assert outcome.code == 0, outcome.err
    (row,) = outcome.json["models"]
    assert (row["outputs_match"], row["samples"]) == (True, 3)
    assert (row["emulated"], row["median_ms"]) == (outcome.json["facts"]["machine"] != os.uname().machine, None)
    assert images.containers() == ""
    assert images.config("own")["User"] == "10001:10001"


def test_the_entry_point_of_the_image_takes_options(images, tmp_path) -> None:
    bundle = script_bundle(tmp_path / "b", 'echo "$@"; id -u', architecture="aarch64")
    images.build(bundle, "entry")
    container = images.buildah("from", "--pull-never", "localhost/entry:test")
    said = images.buildah("run", container, "--", *images.config("entry")["Entrypoint"], "--json", "--runs", "7")
    images.buildah("rm", container)
    assert said.split("\n") == ["--json --runs 7", "10001"]


def test_a_bundle_is_put_into_a_container_of_any_image(cli, images, make_bundle: MakeBundle) -> None:
    bundle = make_bundle("arm64", "native")
    outcome = cli("bench", bundle, bundle, "--device", f"container://{_BASE}", "--runs", "2", "--json")
    assert outcome.code == 0, outcome.err
    assert [row["outputs_match"] for row in outcome.json["models"]] == [True, True]
    assert images.containers() == ""


def _fails(cli, images: Images, code: int, words: str, *arguments: str | Path) -> None:
    outcome = cli("bench", *arguments)
    assert outcome.code == code, outcome.err
    assert words in outcome.err
    assert outcome.err.splitlines()[-1].startswith("hint: ")
    assert images.containers() == ""


def test_a_damaged_image_refuses_to_run(cli, images, make_bundle: MakeBundle, tmp_path) -> None:
    bundle = shutil.copytree(make_bundle("arm64", "native"), tmp_path / "copy")
    model = bundle / "model.ecz"
    model.write_bytes(flipped(model.read_bytes(), model.stat().st_size // 2))
    _fails(cli, images, 4, "model.ecz", "--device", images.build(bundle, "damaged"))


def test_faults_of_images_and_bundles_end_with_their_exit_codes(cli, images, tmp_path) -> None:
    wrong = script_bundle(
        tmp_path / "wrong", "echo 'error: wrong outputs: y' >&2; echo 'hint: h' >&2; exit 5", architecture="aarch64"
    )
    device = images.build(wrong, "wrong")
    _fails(cli, images, 5, "its own bundle on container://", "--device", device)
    _fails(cli, images, 5, "wrong outputs", wrong, "--device", f"container://{_BASE}")
    killed = script_bundle(tmp_path / "killed", "kill -9 $$", architecture="aarch64")
    _fails(cli, images, 7, "(signal 9)", killed, "--device", f"container://{_BASE}")
    _fails(cli, images, 7, "buildah cannot start", killed, "--device", "container://localhost/nothing:test")
    other = script_bundle(tmp_path / "other", printing(RESULT), architecture="x86_64")
    _fails(cli, images, 7, "is for x86_64", other, "--device", f"container://{_BASE}")


def test_ctrl_c_removes_the_container(images, tmp_path) -> None:
    bundle = script_bundle(tmp_path / "b", "exec sleep 3217", architecture="aarch64")
    command = [sys.executable, "-m", "edgecompress", "bench", bundle, "--device", f"container://{_BASE}"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if "sleep 3217" in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout:
            break
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert (running.returncode, "Traceback" in said) == (130, False), said
    assert images.containers() == ""
