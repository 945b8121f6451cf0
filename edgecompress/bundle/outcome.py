"""How a bundle's program ended, and what that means."""

from __future__ import annotations

from dataclasses import dataclass

from edgecompress.errors import (
    DeviceError,
    EdgecompressError,
    FormatError,
    ModelError,
    ToleranceError,
    UsageError,
)

_TEXT_LIMIT = 200
_HINT = "run its program there by hand to see more: see README.txt in the bundle"
_ERRORS = {error.exit_code: error for error in (UsageError, ModelError, FormatError, ToleranceError, DeviceError)}


@dataclass(frozen=True)
class Finished:
    """How a program ended on a device: its exit code (128 + number for a signal) and what it printed."""

    code: int
    stdout: bytes
    stderr: bytes


def failure(done: Finished, subject: str, device: str) -> EdgecompressError:
    """Return the error that the exit code and the last words of a bundle's program stand for.

    ``subject`` names the bundle, ``device`` where it ran.
    """
    said = _said(done.stderr)
    if done.code in _ERRORS and "error" in said:
        return _ERRORS[done.code](f"{subject} on {device}: {said['error']}", hint=said.get("hint", _HINT))
    lines = clean(done.stderr).splitlines()
    how = f"signal {done.code - 128}" if 128 < done.code < 160 else f"exit code {done.code}"
    if done.code == 127:
        how = "a program that it needs is missing there"
    last = f": {lines[-1][:_TEXT_LIMIT]}" if lines else ""
    return DeviceError(
        f"{subject} died on {device} ({how}){last}", hint="check the memory and the log of the device, then try again"
    )


def _said(stderr: bytes) -> dict[str, str]:
    pairs = (line.partition(": ") for line in clean(stderr).splitlines())
    return {kind: text[: 4 * _TEXT_LIMIT] for kind, _, text in pairs if kind in ("error", "hint")}


def clean(printed: bytes) -> str:
    """Return what a device printed as text without control characters, lines kept."""
    lines = printed[-20_000:].decode(errors="replace").splitlines()
    kept = ("".join(letter for letter in line if letter.isprintable()).strip() for line in lines)
    return "\n".join(line for line in kept if line)
