"""A machine that is reached by the system's ssh program, with the user's own configuration, agent and known hosts."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from edgecompress.bundle.outcome import Finished, clean
from edgecompress.devices.remote import RemoteRunner, Transport
from edgecompress.devices.shell import ShellTransport
from edgecompress.errors import DeviceError, UsageError

# No question is ever asked; a connection that hangs ends within 10 s at the start and 60 s later.
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=15", "ServerAliveCountMax=4", "RequestTTY=no")
_NAME = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")  # never begins like an option

# What ssh says, what it means, what to do. The first that is found counts.
_REASONS = (
    (
        "host identification has changed",
        "its host key is not the one that is known for it",
        "if the machine was set up anew, remove the old key with `ssh-keygen -R HOST` and connect once by hand",
    ),
    (
        "host key verification failed",
        "its host key is not known",
        "connect once by hand and compare the key: ssh HOST",
    ),
    (
        "permission denied",
        "it does not let this user in",
        "load a key into the agent (ssh-add), or name one in ~/.ssh/config",
    ),
    ("connection refused", "nobody listens there", "start sshd on the device, or correct the port"),
    ("could not resolve", "there is no host of that name", "correct the name, or give its address"),
    ("timed out", "it does not answer", "check that it is switched on and in reach"),
    ("no route to host", "it does not answer", "check that it is switched on and in reach"),
)


@dataclass(frozen=True)
class SshAddress:
    """Who, where, and the folder on the device that takes the temporary one; None leaves it to ssh's configuration."""

    host: str
    user: str | None
    port: int | None
    folder: str


def open_device(address: str) -> RemoteRunner:
    """Return the runner of ``[USER@]HOST[:PORT][/FOLDER]``; ``UsageError`` for another form."""
    return RemoteRunner(partial(_connect, parse_address(address), f"ssh://{address}"))


@contextmanager
def _connect(where: SshAddress, name: str) -> Iterator[Transport]:
    """Yield a transport whose commands share one connection: one handshake, one touch of a security key."""
    with TemporaryDirectory(prefix="edgecompress-", dir="/tmp") as folder:  # the path of a socket must be short
        shared = ["-o", "ControlMaster=auto", "-o", f"ControlPath={folder}/ssh", "-o", "ControlPersist=120"]
        try:
            yield ShellTransport(
                name=name,
                command=lambda line: ["ssh", *shared, *arguments(where), f"exec sh -c {shlex.quote(line)}"],
                lost=lambda done: _lost(done, name),
                parent=where.folder,
            )
        finally:
            if Path(folder, "ssh").exists():
                subprocess.run(["ssh", *shared, "-O", "exit", *arguments(where)], capture_output=True, check=False)


def parse_address(address: str) -> SshAddress:
    """Read what stands behind ``ssh://``. A password in it is refused, and never repeated."""
    parts = urlsplit(f"ssh://{address}")
    if parts.password is not None:
        raise UsageError("a password does not belong into the address of a device", hint="use a key and ssh-agent")
    try:
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    user = parts.username
    good = _NAME.fullmatch(host) and (user is None or _NAME.fullmatch(user)) and not parts.query and not parts.fragment
    if not good:
        raise UsageError(
            f"ssh://{address} is not an address", hint="write ssh://USER@HOST:PORT/FOLDER; only HOST is needed"
        )
    return SshAddress(_as_written(address, host), user, port, parts.path.rstrip("/") or "/tmp")


def _as_written(address: str, host: str) -> str:
    """Return the host with its capitals, which names in ssh's configuration may have."""
    place = address.partition("/")[0].rpartition("@")[2]
    start = place.lower().find(host.lower())
    return place[start : start + len(host)]


def arguments(where: SshAddress) -> list[str]:
    """Return ssh's arguments for the machine ``where``; what they leave open is up to the user's configuration."""
    given = [part for option in _OPTIONS for part in ("-o", option)]
    if where.user is not None:
        given += ["-l", where.user]
    if where.port is not None:
        given += ["-p", str(where.port)]
    return [*given, "--", where.host]


def _lost(done: Finished, name: str) -> DeviceError:
    """Return the error for what ssh itself said before it gave up."""
    said = clean(done.stderr)
    for words, reason, hint in _REASONS:
        if words in said.lower():
            return DeviceError(f"{name} cannot be reached: {reason}", hint=hint)
    last = said.splitlines()[-1][:200] if said else "the connection ended without a word"
    return DeviceError(
        f"{name}: the connection was lost: {last}", hint="check the device and the network, then try again"
    )
