"""Bundles as one file: a .tar.gz or .zip with the same bytes for the same bundle, and the check of such a file."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, cast

from edgecompress.bundle import program
from edgecompress.bundle.manifest import Manifest, files_below, manifest_of
from edgecompress.bundle.program import MANIFEST, BundleError
from edgecompress.errors import FormatError, UsageError

if TYPE_CHECKING:
    from edgecompress.targets import Target

SUFFIXES = (".tar.gz", ".zip")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time that a zip file can hold
_BLOCK = 1 << 20
_HINT = "copy or build it again"
_UNPACK = "unpack it where nothing else is and verify the folder"
# What is encrypted, or packed in a way that this Python cannot read, is a RuntimeError.
_ZIP_ERRORS = (zipfile.BadZipFile, NotImplementedError, RuntimeError)


def archive_suffix(target: Target) -> str:
    """Return how the archive of a bundle ends: what the systems of its target unpack without further programs."""
    return ".tar.gz" if target.system == "linux" else ".zip"


def archive_path(out: Path, target: Target) -> Path:
    """Return ``out`` with the ending of the target's archives; raises ``UsageError`` for another one, or no name."""
    suffix = archive_suffix(target)
    if out.name in ("", ".."):
        raise UsageError(f"{out} is no name of an archive", hint=f"name a file, such as bundle{suffix}")
    if out.name.endswith(SUFFIXES) and not out.name.endswith(suffix):
        raise UsageError(f"{out}: an archive for {target.name} ends in {suffix}", hint="let -o end so, or in nothing")
    return out if out.name.endswith(suffix) else out.with_name(out.name + suffix)


def write_archive(folder: Path, name: str, destination: Path, suffix: str) -> None:
    """Write all files of a verified bundle, below a folder ``name``, to ``destination``; ``suffix`` says how.

    The manifest comes first, so that a reader knows what to expect. Times, owners and the order of the file system
    leave no trace; of the permissions only whether a file can be run does.
    """
    paths = [MANIFEST, *(path for path in files_below(folder) if path != MANIFEST)]
    with destination.open("wb") as stream:
        if suffix == ".zip":
            _write_zip(folder, name, paths, stream)
        else:
            _write_tar(folder, name, paths, stream)


def _mode(path: Path) -> int:
    return 0o755 if path.stat().st_mode & 0o100 else 0o644


def _write_tar(folder: Path, name: str, paths: list[str], stream: IO[bytes]) -> None:
    # The header of a gzip file holds a time and a name, unless told otherwise.
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=stream, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for path in paths:
            entry = tarfile.TarInfo(f"{name}/{path}")
            entry.size, entry.mode = (folder / path).stat().st_size, _mode(folder / path)
            with (folder / path).open("rb") as content:
                try:
                    archive.addfile(entry, content)
                except ValueError as error:  # a name above 255 bytes, a file above 8 GiB
                    raise UsageError(f"{path} does not fit an archive: {error}", hint="leave --archive out") from None


def _write_zip(folder: Path, name: str, paths: list[str], stream: IO[bytes]) -> None:
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in paths:
            entry = zipfile.ZipInfo(f"{name}/{path}", _EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, (0o100000 | _mode(folder / path)) << 16
            entry.create_system = 3  # Unix: so that the permissions are read
            with (folder / path).open("rb") as content, archive.open(entry, "w", force_zip64=True) as packed:
                while block := content.read(_BLOCK):
                    packed.write(block)


def verify_archive(path: Path) -> Manifest:
    """Check the archive of a bundle completely, without unpacking it anywhere, and return its manifest.

    Beside all that ``verify_bundle`` refuses, raises ``FormatError`` where an entry is anything but a plain file,
    comes twice, is not listed or has another size than the manifest says, and where the manifest is not the first
    entry: so nothing is read that is not expected, and memory is bounded.
    """
    try:
        with path.open("rb") as stream:
            is_zip = stream.read(4) == b"PK\3\4"
            stream.seek(0)
            return _verify(path, _zip_entries(stream) if is_zip else _tar_entries(stream))
    except BundleError as problem:
        raise FormatError(f"{path}: {problem.message}", hint=problem.hint) from None
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, *_ZIP_ERRORS) as error:
        raise FormatError(f"{path} is no archive that can be read: {error}", hint=_HINT) from None


class _Entry(NamedTuple):
    """A plain file in an archive; ``content`` can be read until the next one is taken."""

    name: str
    size: int
    content: IO[bytes]


def _verify(path: Path, entries: Iterator[_Entry]) -> Manifest:
    first = next(entries, None)
    top, _, name = first.name.partition("/") if first else ("", "", "")
    if first is None or name != MANIFEST or not top or top in (".", ".."):
        raise BundleError(f"its first file is not {MANIFEST}", hint=_UNPACK)
    content = program.parse_manifest(first.content.read(min(first.size, program.MANIFEST_LIMIT_BYTES + 1)))
    waiting = dict(content["files"])
    for entry in entries:
        inner = entry.name.removeprefix(f"{top}/")
        listed = waiting.pop(inner, None) if entry.name.startswith(f"{top}/") else None
        if listed is None:
            raise BundleError(f"{entry.name!r:.80} is not in {MANIFEST}, or comes twice", hint=_HINT)
        if entry.size != listed["size_bytes"]:
            raise BundleError(f"{inner} was altered: it has {entry.size} bytes", hint=_HINT)
        if _digest(entry) != listed["sha256"]:
            raise BundleError(f"{inner} was altered: its SHA-256 is not that in {MANIFEST}", hint=_HINT)
    if waiting:
        raise BundleError(f"{min(waiting)} is missing", hint=_HINT)
    return manifest_of(content, path)


def _digest(entry: _Entry) -> str:
    digest, left = hashlib.sha256(), entry.size
    while left and (block := entry.content.read(min(left, _BLOCK))):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def _zip_entries(stream: IO[bytes]) -> Iterator[_Entry]:
    with zipfile.ZipFile(stream) as archive:
        for entry in archive.infolist():
            kind = entry.external_attr >> 28  # of the mode of Unix; 0 where another system wrote it
            if entry.is_dir() or kind not in (0, 0o10):
                raise _not_plain(entry.filename)
            with archive.open(entry) as content:
                yield _Entry(entry.filename, entry.file_size, content)


def _tar_entries(stream: IO[bytes]) -> Iterator[_Entry]:
    """Yield the entries of what ``_write_tar`` wrote: plain headers only, so that none can be of any size."""
    with gzip.GzipFile(fileobj=stream) as unpacked:
        while (block := unpacked.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
            entry = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.size < 0:
                raise _not_plain(entry.name)
            yield _Entry(entry.name, entry.size, cast("IO[bytes]", unpacked))
            unpacked.read(-entry.size % tarfile.BLOCKSIZE)
        # To the end, where the checksum of all that was packed stands. A tar file is filled up with zeros.
        rest = unpacked.read(_BLOCK)
        if rest.strip(b"\0") or unpacked.read(1):
            raise BundleError("something follows its last file", hint=_UNPACK)


def _not_plain(name: str) -> BundleError:
    return BundleError(f"{name!r:.80} is not a plain file", hint=_UNPACK)
