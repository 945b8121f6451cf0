"""The files of a model and the pieces of them that are coded apart from the skeleton."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from edgecompress.container.wire import External, Payload, find_weights, make_payload
from edgecompress.errors import ModelError
from edgecompress.runtime.layout import is_plain_name

_LARGE_GAP = 1 << 20  # so many bytes outside of tensors are coded by themselves, which bounds the skeleton


@dataclass(frozen=True)
class Source:
    """A file to pack and its payloads by position, which do not overlap. The model's ``name`` is empty."""

    path: Path
    name: str
    size: int
    payloads: tuple[Payload, ...]


def find_sources(model: Path) -> list[Source]:
    """Return the model and its external data files.

    Raises ``ModelError`` where the model is none, or a data file is missing, too short or not beside the model.
    """
    weights = find_weights(model)
    sources = [_source(model, "", weights.payloads)]
    by_name: dict[str, list[External]] = {}
    for external in weights.externals:
        by_name.setdefault(_plain_location(model, external), []).append(external)
    for name, externals in sorted(by_name.items()):
        path = model.parent / name
        sources.append(_source(path, name, _ranges(path, externals)))
    return sources


def _source(path: Path, name: str, payloads: Iterable[Payload]) -> Source:
    """Return a file with its payloads and the large gaps between them."""
    size = path.stat().st_size
    pieces: list[Payload] = []
    at = 0
    for payload in payloads:
        pieces += _gap(at, payload.start)
        pieces.append(payload)
        at = payload.end
    return Source(path, name, size, (*pieces, *_gap(at, size)))


def _gap(start: int, end: int) -> list[Payload]:
    """Return the bytes between two tensors as a payload if they are many."""
    return [Payload("", 0, start, end, 1)] if end - start >= _LARGE_GAP else []


def _plain_location(model: Path, external: External) -> str:
    """Return the file name in the model's folder that an external tensor lies in, and check that it is there."""
    location = external.location
    what = f"{model}: tensor {external.name!r} has its data in {location!r}"
    name = os.path.normpath(location)
    if name.startswith(("/", "..")) or "\\" in name:
        raise ModelError(f"{what}, outside the model's folder", hint="save the model with its data beside it")
    if not is_plain_name(name):
        raise ModelError(
            f"{what}, not a plain file name",
            hint="save the model with its data beside it, in no subfolder, its name without a dot at the start",
        )
    path = model.parent / name
    if not path.exists():
        raise ModelError(f"{what}, which is missing", hint=f"put {name} into the folder of the model")
    folder = model.parent.resolve()
    if path.resolve().parent != folder or not path.is_file():
        raise ModelError(
            f"{what}, which leads out of the model's folder", hint=f"put a copy of {name} beside the model"
        )
    if path.stat().st_size == 0:
        raise ModelError(f"{what}, which is empty", hint="save the model with its tensors without values inside it")
    if path.resolve() == model.resolve():
        raise ModelError(f"{what}, the model itself", hint="save the model again")
    return name


def _ranges(path: Path, externals: list[External]) -> list[Payload]:
    """Return the tensors of an external file by position, without overlaps (tensors may share values)."""
    size = path.stat().st_size
    starts = sorted({external.offset for external in externals} | {size})
    following = dict(pairwise(starts))
    payloads: list[Payload] = []
    at = 0
    for external in sorted(externals, key=lambda e: (e.offset, -(e.length or 0))):
        end = following.get(external.offset, size) if external.length is None else external.offset + external.length
        if max(end, external.offset) > size:
            raise ModelError(
                f"{path}: truncated, tensor {external.name!r} ends at byte {max(end, external.offset)} of {size}",
                hint="copy the file again",
            )
        start = max(external.offset, at)
        if start < end:
            payloads.append(make_payload(external, start, end))
            at = end
    return payloads
