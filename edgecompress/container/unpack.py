"""Restoring the files of an `.ecz` container."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from edgecompress.container.wire import find_unreferenced
from edgecompress.errors import OutputError
from edgecompress.files import output_errors, refuse_existing, staged_file
from edgecompress.runtime.decode import read_pieces
from edgecompress.runtime.format import open_ecz, read_container
from edgecompress.runtime.meta import malformed

if TYPE_CHECKING:
    from edgecompress.runtime.layout import Container


def unpack(source: Path, destination: Path, *, force: bool = False) -> tuple[Path, ...]:
    """Write the ONNX file that was packed into ``source`` to ``destination``, its external data files beside it.

    Returns the paths that were written, the model first. All or nothing: every file is complete before the first one
    gets its name. Raises ``FormatError`` for a damaged or foreign ``source``, also for one with a file that its model
    does not refer to; ``OutputError`` where a file exists (without ``force``) or cannot be written.
    """
    with open_ecz(source) as handle:
        container = read_container(handle)
        targets = _targets(source, destination, container)
        for path in targets.values():
            refuse_existing(path, force=force)
        with ExitStack() as stack:
            # The last one entered is moved first: the model appears when its data is there.
            for name, pieces in groupby(read_pieces(handle, container), key=lambda item: item[0].name):
                staging = stack.enter_context(staged_file(targets[name], force=force))
                with output_errors(destination), staging.open("wb") as out:
                    out.writelines(piece for _, piece in pieces)
                if not name:
                    _refuse_strangers(staging, set(targets) - {""})
    return tuple(targets.values())


def _refuse_strangers(model: Path, names: set[str]) -> None:
    """Raise ``FormatError`` if the model does not refer to all ``names``: a container may not choose what it writes."""
    missing = find_unreferenced(model, names) if names else set()
    if missing:
        raise malformed(f"the file {min(missing)!r}, which its model does not refer to")


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
