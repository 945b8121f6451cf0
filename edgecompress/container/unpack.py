"""Restoring the files of an `.ecz` container."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgecompress.errors import OutputError
from edgecompress.files import output_errors, staged_file
from edgecompress.runtime.decode import read_pieces
from edgecompress.runtime.format import open_ecz, read_container

if TYPE_CHECKING:
    from edgecompress.runtime.layout import Container


def unpack(source: Path, destination: Path, *, force: bool = False) -> None:
    """Write the ONNX file that was packed into ``source`` to ``destination``, its external data files beside it.

    All or nothing: every file is complete before the first one gets its name. Raises ``FormatError`` for a damaged or
    foreign ``source``, ``OutputError`` where a file exists (without ``force``) or cannot be written.
    """
    with open_ecz(source) as handle:
        container = read_container(handle)
        targets = _targets(source, destination, container)
        with ExitStack() as stack:
            # The last one entered is moved first: the model appears when its data is there.
            staged = {name: stack.enter_context(staged_file(path, force=force)) for name, path in targets.items()}
            _write_all(handle, container, staged, destination)


def _targets(source: Path, destination: Path, container: Container) -> dict[str, Path]:
    """Return where each file goes, and refuse files in each other's way."""
    targets = {entry.name: destination.parent / entry.name if entry.name else destination for entry in container.files}
    paths = [path.absolute() for path in targets.values()]
    if len(set(paths)) < len(paths):
        raise OutputError(
            f"{destination}: the model's own data file has this name", hint="choose another name for the output"
        )
    if source.resolve() in {path.resolve() for path in paths}:
        raise OutputError(f"{source}: the output would replace the input", hint="choose another output")
    return targets


def _write_all(handle: BinaryIO, container: Container, staged: dict[str, Path], destination: Path) -> None:
    """Write all pieces to the staged files, one file after the other."""
    pieces = read_pieces(handle, container)
    current = None
    with ExitStack() as stack, output_errors(destination):
        for entry, piece in pieces:
            if entry is not current:
                stack.close()
                out = stack.enter_context(staged[entry.name].open("wb"))
                current = entry
            out.write(piece)
