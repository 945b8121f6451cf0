"""Fetch what a bundle needs of others with the programs that are made for it, and keep it in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from edgecompress.errors import OutputError, UsageError
from edgecompress.files import cache_folder, output_errors, sha256_of

_HINT = "connect to the network, or give it with --runtime-file PATH"
_SUMS = "SHA256SUMS"
_UNREACHABLE = re.compile(
    r"NewConnectionError|Name or service not known|Temporary failure in name resolution|ENOTFOUND|EAI_AGAIN"
    r"|ECONNREFUSED|ENETUNREACH|Network is unreachable|Connection refused|ProxyError|timed out",
    re.IGNORECASE,
)
_FULL = re.compile(r"No space left on device|enough free space|NoSpaceLeft|ENOSPC|quota exceeded", re.IGNORECASE)


def missing(file: str, why: str) -> UsageError:
    """Return the error for something that could not be fetched."""
    return UsageError(f"{file} is missing: {why}", hint=_HINT)


def refuse_full_disk(said: str) -> None:
    """Raise ``OutputError`` where a program that fills the cache says that the disk is full."""
    if _FULL.search(said):
        hint = "free some space, or let XDG_CACHE_HOME and TMPDIR name folders with more"
        raise OutputError(f"cannot write below {cache_folder()}: no space left on the disk", hint=hint)


def cached(key: str, fetch: Callable[[Path], None]) -> tuple[Path, ...]:
    """Return the files that ``fetch(folder)`` writes, from the cache where they are known under ``key``.

    Every file is compared with the SHA-256 that it had when it came; where one differs, all are fetched again.
    Raises what ``fetch`` raises, ``OutputError`` where the cache cannot be written, and leaves nothing incomplete.
    """
    folder = cache_folder() / "packages" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if (known := _intact(folder)) is not None:
        return known
    with output_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            fetch(staging)
            lines = [f"{sha256_of(path)}  {path.name}\n" for path in sorted(staging.iterdir())]
            (staging / _SUMS).write_text("".join(lines), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            try:
                staging.rename(folder)
            except OSError:
                if _intact(folder) is None:  # else another process was faster: its files are used
                    raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    files = _intact(folder)
    if files is None:
        raise missing(key, f"{folder} holds something else")
    return files


def _intact(folder: Path) -> tuple[Path, ...] | None:
    """Return the files of a cache folder, or None unless all are what they were."""
    try:
        lines = (folder / _SUMS).read_text(encoding="utf-8").splitlines()
        known = {folder / name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        return tuple(known) if all(sha256_of(path) == digest for path, digest in known.items()) else None
    except (OSError, ValueError):
        return None


def pip_download(requirement: str, platforms: Sequence[str], python: str) -> Path:
    """Return the wheel of a package (not of what it requires) for a version of CPython on any of ``platforms``.

    Raises ``UsageError`` naming the wheel where pip or the network is missing, or there is no such wheel.
    """
    what = f"the wheel of {requirement} for Python {python} on {platforms[0]}"

    def fetch(folder: Path) -> None:
        if importlib.util.find_spec("pip") is None:
            raise missing(what, "this Python has no pip")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        command += [f"--platform={platform}" for platform in platforms]
        _run([*command, "--retries=2", "--timeout=15", f"--dest={folder}", requirement], what)

    return cached(f"pip {python} {','.join(platforms)} {requirement}", fetch)[0]


def npm_pack(name: str, version: str) -> Path:
    """Return a package as ``npm pack`` writes it, a .tgz file; raises ``UsageError`` as ``pip_download`` does."""
    what = f"the npm package {name} {version}"

    def fetch(folder: Path) -> None:
        program = shutil.which("npm")
        if program is None:
            raise missing(what, "the program npm is not installed")
        options = ["--update-notifier=false", "--fetch-retries=1", f"--pack-destination={folder}"]
        _run([program, "pack", *options, f"{name}@{version}"], what)

    return cached(f"npm {name} {version}", fetch)[0]


def _run(command: Sequence[str], what: str) -> None:
    """Run a program that downloads; raises ``UsageError`` with its last complaint, ``OutputError`` on a full disk."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, cwd=os.sep)
    if not done.returncode:
        return
    said = done.stderr.decode(errors="replace")
    refuse_full_disk(said)
    if _UNREACHABLE.search(said):
        raise missing(what, "the package registry cannot be reached")
    complaints = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()
    reason = " ".join((complaints[-1] if complaints else f"exit code {done.returncode}").split())
    raise missing(what, reason[:300])
