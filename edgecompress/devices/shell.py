"""A transport over anything that runs a line of POSIX shell on a device and feeds it a stream."""

from __future__ import annotations

import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from edgecompress.bundle.outcome import Finished, clean
from edgecompress.errors import DeviceError, EdgecompressError, OutputError

_SHORT_S = 60.0
_BLOCK_BYTES = 4096  # a file takes whole blocks
_PREFIX = "edgecompress."
_SPACE = re.compile(r"^\S.*?\s+\d+\s+\d+\s+(\d+)\s+\d+%", re.MULTILINE)  # a line of `df -Pk`: the free KiB
_FULL = ("no space left", "disk quota exceeded", "enospc")
_MORE_SPACE = "free some space there, or give a folder on another disk, as in ssh://HOST/FOLDER"
_GRACE_S = 5.0
_END = "edgecompress-ended-with-"
_MARK = re.compile(rb"edgecompress-ended-with-(\d{1,3})\r?\n")  # some programs add words of their own behind it


@dataclass(frozen=True)
class ShellTransport:
    """A ``Transport`` that needs sh, tar, mktemp, rm and uname on the device.

    ``command`` returns the local command that runs a line of shell there. Every line ends by printing a mark: without
    it the device or the way to it was lost, whatever the exit code (that of ``adb shell`` is 0 when the device goes),
    and ``lost`` returns the error for it. The temporary folder is made in ``parent``. ``environment`` is added to that
    of the program that is run.
    """

    name: str
    command: Callable[[str], Sequence[str]]
    lost: Callable[[Finished], EdgecompressError]
    parent: str = "/tmp"
    emulated: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def machine(self) -> str:
        """See ``Transport.machine``."""
        return clean(self._must("uname -m", "is not a system with a POSIX shell").stdout)

    def new_folder(self) -> str:
        """See ``Transport.new_folder``."""
        line = f"umask 077 && mktemp -d {shlex.quote(f'{self.parent}/{_PREFIX}XXXXXX')}"
        done = self._call(line, timeout_s=_SHORT_S)
        folder = clean(done.stdout)
        if done.code or not folder.startswith(f"{self.parent}/{_PREFIX}") or "\n" in folder:
            raise self._write_error(done, f"cannot make a folder in {self.parent} on {self.name}")
        return folder

    def push(self, files: Mapping[str, Path], remote: str) -> None:
        """See ``Transport.push``."""
        needed = sum(path.stat().st_size // _BLOCK_BYTES + 2 for path in files.values()) * _BLOCK_BYTES
        line = f"umask 022 && mkdir -p {shlex.quote(remote)} && cd {shlex.quote(remote)}"
        done = self._call(f"{line} && df -Pk .", timeout_s=_SHORT_S)  # a device without df finds out while it writes
        free = _SPACE.search(clean(done.stdout))
        if free and int(free[1]) * 1024 < needed:
            raise OutputError(
                f"{self.name} has {int(free[1]) * 1024:,} bytes left in {self.parent}, the bundle takes {needed:,}",
                hint=_MORE_SPACE,
            )
        done = self._call(f"{line} && tar -xof -", send=lambda stream: _write_tar(files, stream))
        if done.code:
            raise self._write_error(done, f"cannot copy the bundle to {self.name}")

    def run(self, argv: Sequence[str], *, folder: str, timeout_s: float | None = None) -> Finished:
        """See ``Transport.run``.

        The process id is kept beside ``folder`` while it runs, so that ``remove`` can end what a lost connection left.
        """
        given = ["env", *(f"{name}={value}" for name, value in self.environment.items())] if self.environment else []
        start = f"cd {shlex.quote(folder)} || exit 126; {shlex.join([*given, *argv])} </dev/null & p=$!"
        note = "{ echo $p >../pid; } 2>/dev/null; wait $p; c=$?; rm -f ../pid; exit $c"
        return self._call(f"{start}; {note}", timeout_s=timeout_s)

    def remove(self, remote: str) -> None:
        """See ``Transport.remove``."""
        if not remote.startswith(f"{self.parent}/{_PREFIX}"):
            raise ValueError(f"{remote} is not a folder that was made here")
        place = shlex.quote(remote)
        self._must(f"test -s {place}/pid && kill -9 $(cat {place}/pid) 2>/dev/null; rm -rf {place}", "cannot clean up")

    def _must(self, line: str, complaint: str) -> Finished:
        done = self._call(line, timeout_s=_SHORT_S)
        if done.code:
            raise DeviceError(f"{self.name} {complaint}{_last(done)}", hint="check the device")
        return done

    def _write_error(self, done: Finished, what: str) -> EdgecompressError:
        if any(word in clean(done.stderr).lower() for word in _FULL):
            return OutputError(f"{what}: no space left", hint=_MORE_SPACE)
        hint = "the device needs tar and mktemp, and a folder that its user may write to"
        return OutputError(f"{what}{_last(done)}", hint=hint)

    def _call(
        self, line: str, *, send: Callable[[IO[bytes]], None] | None = None, timeout_s: float | None = None
    ) -> Finished:
        """Run a line of shell on the device; raises ``DeviceError`` when the way there fails or time runs out."""
        command = self.command(f"({line}); c=$?; echo {_END}$c >&2; exit $c")
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with _process(command, stdin=subprocess.PIPE if send else subprocess.DEVNULL, stdout=out, stderr=err) as (
                process
            ):
                if send is not None and process.stdin is not None:
                    with suppress(BrokenPipeError):  # how it ended says more
                        send(process.stdin)
                        process.stdin.close()
                try:
                    code = process.wait(timeout_s)
                except subprocess.TimeoutExpired:
                    message = f"{self.name} did not answer within {timeout_s:.0f} s"
                    raise DeviceError(message, hint="check the device and the connection") from None
            out.seek(0)
            err.seek(0)
            done = Finished(code if code >= 0 else 128 - code, out.read(), err.read())
        ends = list(_MARK.finditer(done.stderr))
        if not ends:
            raise self.lost(done)
        return Finished(int(ends[-1][1]), done.stdout, done.stderr[: ends[-1].start()])


@contextmanager
def _process(command: Sequence[str], **streams: int | IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program that Ctrl-C in the terminal does not reach; it has ended when the block is left."""
    try:
        process = subprocess.Popen(command, start_new_session=True, **streams)  # type: ignore[call-overload]
    except OSError as error:
        raise DeviceError(f"cannot start {command[0]}: {error.strerror}", hint=f"install {command[0]}") from error
    try:
        yield process
    finally:
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.close()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _write_tar(files: Mapping[str, Path], stream: IO[bytes]) -> None:
    """Write files as a tar stream, owned by whoever unpacks it."""
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        for name, path in files.items():
            entry, status = tarfile.TarInfo(name), path.stat()
            entry.size, entry.mode = status.st_size, 0o755 if status.st_mode & 0o100 else 0o644
            with path.open("rb") as source:
                archive.addfile(entry, source)


def _last(done: Finished) -> str:
    lines = clean(done.stderr).splitlines()
    return f": {lines[-1][:300]}" if lines else ""
