"""What the tests of real devices share: a small root of another machine, bundles, and the reasons to skip a test."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import DIGITS_MODEL

from edgecompress.bundle import build_bundle
from edgecompress.bundle.debian import download, unpack
from edgecompress.errors import UsageError
from edgecompress.model import load_model
from edgecompress.targets import load_target
from edgecompress.validate import random_sample

_MERGED = ("bin", "sbin", "lib", "lib64")
# ONNX Runtime stops when it finds the processor of the machine that emulates.
_CPUINFO = """processor\t: 0
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3
"""

MakeRoot = Callable[..., Path]
MakeBundle = Callable[..., Path]


def needs_programs(*names: str) -> None:
    """Skip the test unless these programs are installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if missing := [name for name in names if shutil.which(name, path=path) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")


def needs_root() -> None:
    """Skip the test unless it may change roots and mount."""
    if os.geteuid():
        pytest.skip("needs root (chroot, device nodes, name spaces)")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def make_root() -> Iterator[MakeRoot]:
    """Make the root of a Debian machine with a static shell and the packages asked for, a few MB, once for each."""
    made: dict[tuple[str, ...], Path] = {}

    def make(architecture: str, *packages: str, suite: str = "trixie") -> Path:
        needs_root()
        key = (architecture, suite, *packages)
        if key in made:
            return made[key]
        root = Path(tempfile.mkdtemp(prefix="edgecompress-root-", dir="/var/lib"))  # sshd wants no shared folder above
        made[key] = root
        root.chmod(0o755)
        try:
            for package in download(("busybox-static", *packages), architecture=architecture, suite=suite):
                unpack(package, root)
        except UsageError as error:
            shutil.rmtree(made.pop(key))
            pytest.skip(str(error))
        _complete(root)
        works = subprocess.run(["chroot", root, "/bin/sh", "-c", "uname -m"], capture_output=True, check=False)
        if works.returncode:
            pytest.skip(f"this machine runs no {architecture} programs: install qemu-user-static and binfmt-support")
        return root

    yield make
    for root in made.values():
        shutil.rmtree(root)


def _complete(root: Path) -> None:
    """Add what the packages leave to an installer: links, the shell's commands, a user, devices, a processor."""
    for name in _MERGED:
        (root / "usr" / name).mkdir(exist_ok=True)
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    commands = subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=False).stdout.split()
    for name in commands or ("sh", "tar", "mktemp", "uname", "df", "rm", "mkdir", "cat", "env", "chmod", "dirname"):
        if not (root / "usr/bin" / name).exists():
            (root / "usr/bin" / name).symlink_to("busybox")
    for name in ("tmp", "proc", "dev", "data/local/tmp", "etc"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    shell = root / pwd.getpwuid(0).pw_shell.lstrip("/")  # sshd starts the one that the user has outside
    if not shell.exists():
        shell.write_text('#!/bin/sh\nexec /bin/sh "$@"\n')
        shell.chmod(0o755)
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\n")
    (root / "proc/cpuinfo").write_text(_CPUINFO)
    for name in ("possible", "present", "online"):
        place = root / "sys/devices/system/cpu" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("0\n")
    for name, minor in (("null", 3), ("urandom", 9)):
        os.mknod(root / "dev" / name, 0o20666, os.makedev(1, minor))
        (root / "dev" / name).chmod(0o666)


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """Build the bundle of the shipped digit classifier, once for each target and runtime."""
    made: dict[tuple[str, str], Path] = {}

    def make(target: str, runtime: str) -> Path:
        if (target, runtime) not in made:
            folder = tmp_path_factory.mktemp(f"{target}-{runtime}") / "bundle"
            sample = random_sample(load_model(DIGITS_MODEL), {})
            try:
                build_bundle(DIGITS_MODEL, folder, target=load_target(target), sample=sample, runtime=runtime)
            except UsageError as error:
                pytest.skip(f"the bundle cannot be built here: {error}")
            made[target, runtime] = folder
        return made[target, runtime]

    return make
