"""Write outputs safely (all or nothing, never over an existing file); find the data that ships with the tool."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgecompress.errors import EdgecompressError, OutputError

_REASONS = {
    errno.ENOSPC: ("no space left on the disk", "free some space or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EACCES: ("permission denied", "choose a folder that you may write to"),
    errno.EPERM: ("operation not permitted", "choose a folder that you may write to"),
    errno.EROFS: ("the file system is read-only", "choose another folder"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another path"),
    errno.EISDIR: ("it is a folder", "name a file"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
}


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn any ``OSError`` raised inside into an ``OutputError`` that names ``path``."""
    try:
        yield
    except OSError as error:
        reason, hint = _REASONS.get(error.errno or 0, (error.strerror or str(error), "check the path and the disk"))
        raise OutputError(f"cannot write {path}: {reason}", hint=hint) from error


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise ``OutputError`` where ``path`` is an existing file or a folder with something in it, unless ``force``."""
    with output_errors(path):
        taken = any(path.iterdir()) if path.is_dir() else path.exists() or path.is_symlink()
    if taken and not force:
        what = "the folder is not empty" if path.is_dir() else "the file exists"
        raise OutputError(f"{path}: {what}", hint="choose another output or add --force to replace what is written")


@contextmanager
def staged_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it into place on success, remove it on any failure.

    Raises ``OutputError`` when ``path`` exists (without ``force``) or cannot be written.
    """
    refuse_existing(path, force=force)
    if path.is_dir():
        raise OutputError(f"{path}: it is a folder", hint="name a file")
    if path.exists() and not path.is_file():  # the rename at the end would put a file in the place of a device
        raise OutputError(f"{path}: it is not a regular file", hint="name a file")
    with output_errors(path), _created_parents(path.parent):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
        staging = Path(name)
        try:
            yield staging
            staging.chmod(0o666 & ~_umask())
            staging.replace(path)
        finally:
            with suppress(OSError):
                staging.unlink(missing_ok=True)


@contextmanager
def staged_folder(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success move its files into ``path``, on any failure remove it.

    With ``force`` the files it holds replace those of the same name; others in ``path`` stay.
    Raises ``OutputError`` as ``staged_file`` does.
    """
    refuse_existing(path, force=force)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path}: it is a file", hint="name a folder")
    existed = path.exists()
    parent = path if existed else path.parent
    with output_errors(path), _created_parents(parent):
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=parent))
        try:
            staging.chmod(0o777 & ~_umask())
            with renamed_in_errors(staging, path):
                yield staging
                if existed:
                    _merge(staging, path)
                else:
                    staging.rename(path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def renamed_in_errors(staging: Path, path: Path) -> Iterator[None]:
    """Let errors raised inside name ``path``, which the user knows, instead of ``staging``, which is gone by then."""
    try:
        yield
    except EdgecompressError as error:
        for name in (staging.absolute(), staging):
            error.message = error.message.replace(str(name), str(path))
        raise


@contextmanager
def _created_parents(folder: Path) -> Iterator[None]:
    """Create ``folder`` and its parents; where the block fails, remove again those of them that are empty."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise


def _merge(source: Path, destination: Path) -> None:
    """Move every file below ``source`` to the same place below ``destination``."""
    for root, _, names in os.walk(source):
        folder = destination / Path(root).relative_to(source)
        folder.mkdir(exist_ok=True)
        for name in names:
            (Path(root) / name).replace(folder / name)


def _umask() -> int:
    """Return the process's umask (it can only be read by setting it)."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shared_folder(name: str) -> Path:
    """Return the folder of the data that ships with the tool: ``targets`` or ``calibration``.

    In a wheel it lies inside the package, in a checkout at the top level.
    """
    package = Path(__file__).parent
    installed = package / "share" / name
    return installed if installed.is_dir() else package.parent / name


def cache_folder() -> Path:
    """Return the folder of the user's cache that is this tool's; it may not exist yet."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(chosen) if Path(chosen).is_absolute() else Path.home() / ".cache"  # as the XDG specification says
    return base / "edgecompress"
