"""An Android device, or any adbd, that is reached by the system's adb program; nothing is installed on it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from edgecompress.bundle.outcome import Finished, clean
from edgecompress.devices.remote import RemoteRunner, Transport
from edgecompress.devices.shell import ShellTransport
from edgecompress.errors import DeviceError, UsageError

_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*|\[[0-9A-Fa-f:]+\]:\d+")  # never begins like an option
_NETWORK = re.compile(r".+:\d+")
_FOLDER = "/data/local/tmp"  # where adb's shell user may write and start programs
_WAIT_S = 30.0
_SEE = "see `adb devices`, then try again"
# What adb says, what it means, what to do. The first that is found counts.
_REASONS = (
    ("offline", "it is offline", "plug it in again, or `adb reconnect`"),
    ("unauthorized", "it does not trust this computer", "allow it on the device's screen"),
    ("more than one", "there is more than one device", "name one as adb://SERIAL; `adb devices` lists them"),
)


def open_device(address: str) -> RemoteRunner:
    """Return the runner of ``SERIAL`` or ``HOST:PORT``, empty for the only device; ``/FOLDER`` may follow."""
    serial, slash, folder = address.partition("/")
    if serial and not _SERIAL.fullmatch(serial):
        hint = "write adb://SERIAL as `adb devices` lists it, adb://HOST:PORT, or adb:// for the only device"
        raise UsageError(f"adb://{address} is not an address", hint=hint)
    return RemoteRunner(partial(_connect, serial, f"{slash}{folder}".rstrip("/") or _FOLDER))


@contextmanager
def _connect(serial: str, folder: str) -> Iterator[Transport]:
    """Check that the device is there and yield its transport; a network address is connected to first."""
    name = f"adb://{serial}"
    chosen = ("-s", serial) if serial else ()
    if _NETWORK.fullmatch(serial) and clean(_adb(*chosen, "get-state").stdout) != "device":
        _adb("disconnect", serial)  # one that went offline is never connected to again by itself
        said = clean(_adb("connect", serial).stdout)  # its exit code differs between versions
        if not said.startswith("connected"):
            raise DeviceError(f"{name} cannot be reached: {_last(said)}", hint=_SEE)
    state = _adb(*chosen, "get-state")
    if clean(state.stdout) != "device":
        raise _unusable(name, f"{clean(state.stdout)}\n{clean(state.stderr)}".strip())
    if "shell_v2" not in clean(_adb(*chosen, "features").stdout).split():
        raise DeviceError(f"{name} does not tell exit codes", hint="it needs Android 7 or newer")
    yield ShellTransport(
        name=name,
        command=lambda line: ["adb", *chosen, "shell", "-T", line],
        lost=lambda done: _lost(done, name),
        parent=folder,
    )


def _adb(*arguments: str) -> Finished:
    """Run one of adb's own commands."""
    try:
        done = subprocess.run(
            ["adb", *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=_WAIT_S, check=False
        )
    except OSError as error:
        raise DeviceError(f"cannot start adb: {error.strerror}", hint="install adb (Android platform tools)") from error
    except subprocess.TimeoutExpired:
        hint = "see `adb devices`; `adb kill-server` starts anew"
        raise DeviceError(f"`adb {arguments[-1]}` did not end within {_WAIT_S:.0f} s", hint=hint) from None
    return Finished(done.returncode, done.stdout, done.stderr)


def _unusable(name: str, said: str) -> DeviceError:
    for words, reason, hint in _REASONS:
        if words in said:
            return DeviceError(f"{name} cannot be used: {reason}", hint=hint)
    return DeviceError(f"{name} cannot be reached: {_last(said)}", hint=_SEE)


def _last(said: str) -> str:
    """Return the last line: before it adb tells of its daemon."""
    return said.splitlines()[-1][-200:] if said else "adb said nothing"


def _lost(done: Finished, name: str) -> DeviceError:
    """Return the error for a command that did not come to its end."""
    said = clean(done.stderr)
    last = said.splitlines()[-1][:200] if said else "the device went away"
    return DeviceError(f"{name}: the connection was lost: {last}", hint=_SEE)
