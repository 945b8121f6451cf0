"""Chromium or Chrome on this machine: started without a window and with a new profile, watched, and ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgecompress.bundle.outcome import clean
from edgecompress.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from edgecompress.devices.web_server import PageServer

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
    "--disable-extensions",
    "--disable-features=SpareRendererForSitePerProcess",  # so that there is one process for pages: ours
)
_OPEN_LIMIT_S = 60.0
_RUN_LIMIT_S = 1800.0
_NO_PAGE = (b"--top-chrome-webui", b"--extension-process")  # processes that draw the browser itself
_POLL_S = 0.2
_POLLS_WITHOUT_A_PAGE = 5
_LOOK = "open the page with --serve to see more"


def find_program() -> str:
    """Return the browser's program; raises ``DeviceError`` when none is installed."""
    for name in PROGRAMS:
        if found := shutil.which(name):
            return found
    raise DeviceError(
        "there is no Chromium or Chrome on this machine",
        hint="install chromium, name one with browser:///path/of/chrome, or use --serve and open the page yourself",
    )


@contextmanager
def running(program: str, address: str, cores: Sequence[int]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a browser with a profile of its own and without the user's environment; end it and remove the profile.

    ``cores`` pins all its processes. A ``DeviceError`` raised inside gets the browser's last words.
    """
    with TemporaryDirectory(prefix="edgecompress-browser-", ignore_cleanup_errors=True) as name:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
        pinned = _pinned(cores)
        log = Path(name) / "stderr"
        with log.open("wb") as stderr:
            try:
                process = subprocess.Popen(
                    [*pinned, program, *_FLAGS, *root, f"--user-data-dir={name}/profile", address],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env={"HOME": name, "TMPDIR": name, "PATH": os.environ.get("PATH", os.defpath)},
                    start_new_session=True,
                )
            except OSError as error:
                reason = error.strerror or str(error)
                raise DeviceError(f"{program} cannot be started: {reason}", hint="install it again") from error
        try:
            yield process
        except DeviceError as error:
            last = clean(log.read_bytes()).splitlines()[-1:]
            said = "".join(f": {line[:200]}" for line in last)
            raise DeviceError(error.message + said, hint=error.hint) from None
        finally:
            _end(process)


def _pinned(cores: Sequence[int]) -> list[str]:
    """Return what goes before a command to keep it on ``cores``; raises ``UsageError`` for cores that are not there."""
    if not cores:
        return []
    allowed = sorted(os.sched_getaffinity(0))
    if not set(cores) <= set(allowed):
        hint = f"this machine lends the cores {', '.join(map(str, allowed))}"
        raise UsageError(f"cannot run on the cores {', '.join(map(str, cores))}", hint=hint)
    if shutil.which("taskset") is None:
        hint = "install util-linux, or leave --cores away"
        raise DeviceError("a browser is kept on its cores by taskset, which is not installed", hint=hint)
    return ["taskset", "--cpu-list", ",".join(map(str, cores))]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a browser with all its processes, and wait until they are gone."""
    for _ in range(50):
        left = _processes(process.pid)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        if not left:
            break
        time.sleep(0.1)
    process.wait()


def wait_for_result(server: PageServer, process: subprocess.Popen[bytes], program: str) -> tuple[bytes, int]:
    """Return what the page sent and the most memory that its process held; ``DeviceError`` when nothing comes."""
    start, peak, without = time.monotonic(), 0, 0
    while True:
        sent = server.wait(_POLL_S)
        memory = _renderers(process.pid)
        peak = max([peak, *memory.values()])
        if sent is not None:
            return sent, peak
        waited = time.monotonic() - start
        if process.poll() is not None:
            raise DeviceError(f"{program} ended (exit code {process.returncode}) without a result", hint=_LOOK)
        # For a moment there may be none: the headers of the page make the browser open it in a new process.
        without = 0 if memory or not peak else without + 1
        if server.opened.is_set() and without > _POLLS_WITHOUT_A_PAGE:
            raise DeviceError(f"the page's process died in {program}", hint="the model may need more memory; " + _LOOK)
        if waited > (_RUN_LIMIT_S if server.opened.is_set() else _OPEN_LIMIT_S):
            what = "has no result" if server.opened.is_set() else "did not open the page"
            raise DeviceError(f"{program} {what} after {waited:.0f} s", hint="take fewer --runs; " + _LOOK)


def _processes(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            state, _, _, owner = status.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(owner) == session and state not in "ZX":
                found.append(int(status.parent.name))
    return found


def _renderers(session: int) -> dict[int, int]:
    """Return the processes of a session that run pages, with the most memory that each has held so far."""
    found = {}
    for pid in _processes(session):
        with suppress(OSError, ValueError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"--type=renderer" in command and not any(part in command for part in _NO_PAGE):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                found[pid] = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    return found
