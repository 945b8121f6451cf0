"""The adb device against a real adbd: the system's adb, a daemon of its own, both alone in a network name space."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from device_samples import script_bundle
from machines import MakeRoot, free_port, needs_programs, needs_root
from tiny import flipped

from edgecompress.targets import load_target

pytestmark = [pytest.mark.adb, pytest.mark.slow]

_PORT = 7001
_ADBD = "/usr/lib/android-sdk/platform-tools/adbd"


@dataclass
class Phone:
    """A running adbd in a root of its own; ``place`` is where it takes files."""

    address: str
    root: Path
    daemon: subprocess.Popen[bytes]

    @property
    def place(self) -> Path:
        return self.root / "data/local/tmp"

    def left(self) -> list[str]:
        return [path.name for path in self.place.iterdir()]


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """Give adb a network of its own: adbd listens on every address, and lets everybody in."""
    needs_programs("adb", "unshare", "nsenter", "ip")
    needs_root()
    alone = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "ip link set lo up && echo up && exec sleep 3600"], stdout=-1
    )
    assert alone.stdout is not None
    if alone.stdout.readline() != b"up\n":
        pytest.skip("this machine makes no network name spaces")
    inside = ("nsenter", "-t", str(alone.pid), "-n")
    programs = tmp_path / "bin"
    programs.mkdir()
    start = f"HOME={tmp_path} exec {' '.join(inside)}"  # adb keeps its key at home
    (programs / "adb").write_text(f'#!/bin/sh\n{start} {shutil.which("adb")} "$@"\n')
    (programs / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
    yield inside
    subprocess.run(["adb", "kill-server"], capture_output=True, check=False)
    alone.kill()
    alone.wait()


@pytest.fixture
def phone(network: tuple[str, ...], make_root: MakeRoot) -> Iterator[Callable[[str], Phone]]:
    running: list[Phone] = []

    def start(architecture: str) -> Phone:
        if architecture == "amd64" and platform.machine() != "x86_64":
            pytest.skip("the daemon is for x86_64")
        root = make_root(architecture, "adbd")
        command = [*network, "env", f"ADBD_PORT={_PORT}", "chroot", root, _ADBD]
        daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        running.append(Phone(f"adb://127.0.0.1:{_PORT}", root, daemon))
        _wait_for(lambda: _listens(network))
        return running[-1]

    yield start
    for each in running:
        each.daemon.kill()
        each.daemon.wait()


def _listens(network: tuple[str, ...]) -> bool:
    table = subprocess.run(
        [*network, "cat", "/proc/net/tcp", "/proc/net/tcp6"], capture_output=True, text=True, check=True
    )
    return f":{_PORT:04X} " in table.stdout


def _wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within a minute")


@pytest.mark.parametrize(("architecture", "target"), [("amd64", "x86_64"), ("arm64", "arm64")])
def test_a_native_bundle_is_pushed_and_measured(cli, phone, make_bundle, architecture, target) -> None:
    device, bundle = phone(architecture), make_bundle(target, "native")
    outcome = cli("bench", bundle, bundle, "--device", device.address, "--runs", "3", "--json")
    assert outcome.code == 0, outcome.err
    assert [(row["outputs_match"], row["samples"]) for row in outcome.json["models"]] == [(True, 3)] * 2
    assert outcome.json["facts"]["machine"] == load_target(target).architecture
    assert outcome.json["facts"]["device"] == device.address
    assert device.left() == []


def test_a_daemon_that_dies_in_the_middle_is_a_device_error(phone, tmp_path) -> None:
    device, bundle = phone("amd64"), script_bundle(tmp_path / "b", "exec sleep 300", architecture="x86_64")
    running = _start(bundle, device)
    program = _program(device)
    device.daemon.kill()
    _, said = running.communicate(timeout=120)
    with suppress(ProcessLookupError):
        os.kill(program, signal.SIGKILL)
    (left,) = device.left()
    shutil.rmtree(device.place / left)
    assert running.returncode == 7, said
    assert "the connection was lost" in said
    assert f"/data/local/tmp/{left} may be left on the device" in said


def test_a_program_that_is_killed_on_the_device_is_a_device_error(phone, tmp_path) -> None:
    device, bundle = phone("amd64"), script_bundle(tmp_path / "b", "exec sleep 300", architecture="x86_64")
    running = _start(bundle, device)
    os.kill(_program(device), signal.SIGKILL)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 7, said
    assert "(signal 9)" in said
    assert device.left() == []


def test_ctrl_c_ends_the_program_and_removes_the_folder(phone, tmp_path) -> None:
    device, bundle = phone("amd64"), script_bundle(tmp_path / "b", "exec sleep 300", architecture="x86_64")
    running = _start(bundle, device)
    program = _program(device)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert (running.returncode, "Traceback" in said) == (130, False)
    assert device.left() == []
    _wait_for(lambda: not Path(f"/proc/{program}/exe").exists())


def _fails(cli, address: str, bundle: Path, code: int, words: str) -> None:
    outcome = cli("bench", bundle, "--device", address)
    assert outcome.code == code, outcome.err
    assert words in outcome.err
    assert outcome.err.splitlines()[-1].startswith("hint: ")


def test_a_device_that_went_offline_is_a_device_error_and_is_connected_to_again_when_it_is_back(
    cli, phone, network, tmp_path
) -> None:
    device = phone("amd64")
    bundle = script_bundle(tmp_path / "b", "exit 3", architecture="x86_64")
    _fails(cli, device.address, bundle, 7, "died on")  # it is there
    device.daemon.kill()
    device.daemon.wait()
    _wait_for(lambda: b"offline" in subprocess.run(["adb", "devices"], capture_output=True, check=True).stdout)
    _fails(cli, device.address, bundle, 7, "cannot be reached: failed to connect")
    command = [*network, "env", f"ADBD_PORT={_PORT}", "chroot", device.root, _ADBD]
    device.daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for(lambda: _listens(network))
    _fails(cli, device.address, bundle, 7, "died on")


def test_a_port_where_nobody_listens_and_a_serial_that_nobody_has(cli, network, tmp_path) -> None:
    bundle = script_bundle(tmp_path / "b", "true")
    _fails(cli, "adb://127.0.0.1:1", bundle, 7, "Connection refused")
    _fails(cli, "adb://0123456789ABCDEF", bundle, 7, "not found")
    _fails(cli, "adb://", bundle, 7, "no devices")


def test_a_full_device_is_an_output_error(cli, phone, tmp_path) -> None:
    device = phone("amd64")
    disk = device.root / "data/local/tmp/small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        bundle = script_bundle(tmp_path / "b", "true", architecture="x86_64", payload=5_000_000)
        _fails(cli, f"{device.address}/data/local/tmp/small", bundle, 9, "no space left")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_tampered_bundle_is_refused_without_asking_for_the_device(cli, network, tmp_path) -> None:
    bundle = script_bundle(tmp_path / "b", "true")
    (bundle / "run.sh").write_bytes(flipped((bundle / "run.sh").read_bytes(), 1))
    _fails(cli, "adb://127.0.0.1:1", bundle, 4, "run.sh was altered")


def _start(bundle: Path, device: Phone) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgecompress", "bench", bundle, "--device", device.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _program(device: Phone) -> int:
    """Wait until the bundle's program runs and return its process id."""
    _wait_for(lambda: any(path.read_text().strip() for path in device.place.glob("*/pid")))
    return int(next(device.place.glob("*/pid")).read_text())
