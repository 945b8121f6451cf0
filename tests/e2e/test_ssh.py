"""The ssh device against a real sshd, which runs as an ordinary program on 127.0.0.1, also as an arm64 machine."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from device_samples import script_bundle
from machines import free_port, needs_programs
from tiny import DIGITS_MODEL, flipped

pytestmark = [pytest.mark.ssh, pytest.mark.slow]

_SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")


@dataclass
class Server:
    """A running sshd, and the folder that measurements get on it."""

    folder: Path  # keys, configuration, log
    place: Path  # on the device's side, as this side sees it
    port: int
    address: str
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def left(self) -> list[str]:
        return [path.name for path in self.place.iterdir()]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Start sshd; the user's own configuration names the key and the known hosts, as ~/.ssh/config does."""
    needs_programs("ssh", "ssh-keygen", "sshd")
    running: list[Server] = []

    def start(*, root: Path | None = None, place: Path | None = None) -> Server:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        folder, port = tmp_path / "ssh", free_port()
        folder.mkdir()
        for name in ("host", "user", "other"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        _configure(folder, port, root)
        log = (folder / "log").open("w")
        process = subprocess.Popen([_SSHD or "sshd", "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
        own = place or tmp_path / "device"
        own.mkdir(exist_ok=True)
        on_device = f"/{own.relative_to(root)}" if root else str(own)
        server = Server(folder, own, port, f"ssh://127.0.0.1:{port}{on_device}", process)
        running.append(server)
        _wait_for(lambda: "listening" in server.log)
        return server

    # OpenSSH takes the home folder from the password file, so the program is told where the configuration is.
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh/config "$@"\n')
    (programs / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    yield start
    for server in running:
        server.process.kill()
        server.process.wait()


def _configure(folder: Path, port: int, root: Path | None) -> None:
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        + (f"ChrootDirectory {root}\n" if root else "")
    )
    key = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {key}\n")
    (folder / "config").write_text(
        f"Host *\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n"
        "  GlobalKnownHostsFile /dev/null\n"
    )


def _wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within a minute")


def test_a_bundle_of_wheels_runs_on_a_machine_that_has_only_python(cli, serve, make_bundle, monkeypatch) -> None:
    bundle, server = make_bundle("x86_64", "wheel"), serve()
    if platform.machine() != "x86_64":
        pytest.skip("the bundle is for x86_64")
    monkeypatch.setenv("EDGECOMPRESS_SECRET", "s3cret-of-the-environment")
    outcome = cli("bench", bundle, bundle, "--device", server.address, "--runs", "12", "--threads", "2", "--json")
    assert outcome.code == 0, outcome.err
    first, second = outcome.json["models"]
    for row in (first, second):
        assert (row["outputs_match"], row["samples"], len(row["values_ms"])) == (True, 12, 12)
        assert row["peak_rss_bytes"] > 10_000_000
    assert second["ratio"] == pytest.approx(second["median_ms"] / first["median_ms"])
    facts = outcome.json["facts"]
    assert (facts["machine"], facts["threads"], facts["device"]) == ("x86_64", 2, server.address)
    assert server.left() == []
    assert "s3cret" not in outcome.out + outcome.err
    assert server.log.count("Accepted publickey") == 1  # one connection for everything


def test_a_machine_with_nothing_but_a_shell_runs_the_native_bundle(cli, serve, make_bundle, make_root) -> None:
    bundle, root = make_bundle("arm64", "native"), make_root("arm64")
    server = serve(root=root, place=root / "tmp/here")
    outcome = cli("bench", bundle, "--device", server.address, "--runs", "3", "--json")
    assert outcome.code == 0, outcome.err
    (row,) = outcome.json["models"]
    assert (row["outputs_match"], row["samples"]) == (True, 3)
    assert outcome.json["facts"]["machine"] == "aarch64"
    assert server.left() == []


def test_model_files_become_bundles_of_the_machine_that_the_address_leads_to(cli, serve, make_root, digits_out) -> None:
    root = make_root("arm64")
    server = serve(root=root, place=root / "tmp/here")
    paths = (DIGITS_MODEL, digits_out / "model.ecz")
    outcome = cli("bench", *paths, "--device", server.address, "--runs", "2", "--json")
    if "cannot be had" in outcome.err or "is missing" in outcome.err:
        pytest.skip(outcome.err)
    assert outcome.code == 0, outcome.err
    assert [row["outputs_match"] for row in outcome.json["models"]] == [True, True]
    assert server.left() == []


def _fails(cli, server: Server, bundle: Path, code: int, words: str, *, address: str = "") -> str:
    outcome = cli("bench", bundle, "--device", address or server.address)
    assert outcome.code == code, outcome.err
    assert words in outcome.err
    assert outcome.err.splitlines()[-1].startswith("hint: ")
    assert server.left() == []
    return outcome.err


def test_another_host_key_is_refused_and_named(cli, serve, tmp_path) -> None:
    server, bundle = serve(), script_bundle(tmp_path / "b", "true")
    known = server.folder / "known_hosts"
    key = " ".join((server.folder / "other.pub").read_text().split()[:2])
    known.write_text(f"[127.0.0.1]:{server.port} {key}\n")
    _fails(cli, server, bundle, 7, "its host key is not the one that is known for it")
    known.write_text("")
    _fails(cli, server, bundle, 7, "its host key is not known")
    assert "Accepted" not in server.log


def test_an_unknown_user_key_a_silent_port_and_an_unknown_name_are_told_apart(cli, serve, tmp_path) -> None:
    server, bundle = serve(), script_bundle(tmp_path / "b", "true")
    (server.folder / "user.pub").write_text((server.folder / "other.pub").read_text())
    _fails(cli, server, bundle, 7, "it does not let this user in")
    _fails(cli, server, bundle, 7, "nobody listens there", address=f"ssh://127.0.0.1:{free_port()}")
    _fails(cli, server, bundle, 7, "there is no host of that name", address="ssh://no-such-host.invalid")


def test_a_full_disk_is_an_output_error(cli, serve, tmp_path, full_disk) -> None:
    bundle = script_bundle(tmp_path / "b", "true", payload=5_000_000)
    server = serve(place=full_disk(4096))
    _fails(cli, server, bundle, 9, "4,194,304 bytes left")


def test_a_disk_that_fills_up_unseen_is_an_output_error_too(cli, serve, tmp_path, make_root) -> None:
    root = make_root("amd64")  # df finds no table of mounts there
    if platform.machine() != "x86_64":
        pytest.skip("the root is for x86_64")
    disk = root / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        server = serve(root=root, place=disk)
        _fails(cli, server, script_bundle(tmp_path / "b", "true", payload=5_000_000), 9, "no space left")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_program_that_is_killed_on_the_device_is_a_device_error(serve, tmp_path) -> None:
    server, bundle = serve(), script_bundle(tmp_path / "b", "exec sleep 300")
    running = _start(bundle, server)
    os.kill(_program(server), signal.SIGKILL)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 7
    assert "(signal 9)" in said
    assert server.left() == []


def test_a_device_that_goes_down_in_the_middle_is_a_device_error_that_says_what_may_be_left(serve, tmp_path) -> None:
    server, bundle = serve(), script_bundle(tmp_path / "b", "exec sleep 300")
    running = _start(bundle, server)
    program = _program(server)
    for pid in (server.process.pid, *_children(server.process.pid)):
        os.kill(pid, signal.SIGKILL)
    _, said = running.communicate(timeout=120)
    os.kill(program, signal.SIGKILL)
    assert running.returncode == 7
    assert "the connection was lost" in said
    assert f"{server.place}/edgecompress." in said
    assert "may be left on the device" in said


def test_ctrl_c_ends_the_program_and_removes_the_folder(serve, tmp_path) -> None:
    server, bundle = serve(), script_bundle(tmp_path / "b", "exec sleep 300")
    running = _start(bundle, server)
    program = _program(server)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert (running.returncode, "Traceback" in said) == (130, False)
    assert server.left() == []
    _wait_for(lambda: not Path(f"/proc/{program}/exe").exists())


def test_a_tampered_bundle_never_reaches_the_device(cli, serve, tmp_path) -> None:
    server, bundle = serve(), script_bundle(tmp_path / "b", "true")
    script = bundle / "run.sh"
    script.write_bytes(flipped(script.read_bytes(), 1))
    _fails(cli, server, bundle, 4, "run.sh was altered")
    assert "Connection" not in server.log


def _start(bundle: Path, server: Server) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edgecompress", "bench", bundle, "--device", server.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _program(server: Server) -> int:
    """Wait until the bundle's program runs and return its process id."""
    _wait_for(lambda: any(path.read_text().strip() for path in server.place.glob("*/pid")))
    return int(next(server.place.glob("*/pid")).read_text())


def _children(parent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False)
    children = [int(pid) for pid in found.stdout.split()]
    return children + [pid for child in children for pid in _children(child)]
