"""What a program or shared library says of itself (ELF, little-endian): its machine and the libraries that it needs."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from edgecompress.errors import UsageError

_MACHINES = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64"}
_LOAD, _DYNAMIC = 1, 2  # kinds of segments
_NULL, _NEEDED, _STRINGS = 0, 1, 5  # tags of the dynamic section


@dataclass(frozen=True)
class Elf:
    """``machine`` is as ``uname -m`` says it; ``needed`` are the names of the libraries that the loader looks for."""

    machine: str
    needed: tuple[str, ...]


def read_elf(path: Path) -> Elf:
    """Read the headers of a program or library; raises ``UsageError`` for a file that is none."""
    try:
        return _read(path.read_bytes())
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise UsageError(f"{path} is no library for Linux: {error}", hint="give a shared library (.so)") from None


def _read(data: bytes) -> Elf:
    if data[:4] != b"\x7fELF" or data[5] != 1 or data[4] not in (1, 2):
        raise ValueError("it is no little-endian ELF file")
    wide = data[4] == 2
    machine = struct.unpack_from("<H", data, 18)[0]
    start = struct.unpack_from("<Q" if wide else "<I", data, 32 if wide else 28)[0]
    size, count = struct.unpack_from("<HH", data, 54 if wide else 42)
    segments = [_segment(data, start + index * size, wide=wide) for index in range(count)]
    entries = [entry for kind, *place in segments if kind == _DYNAMIC for entry in _dynamic(data, *place, wide=wide)]
    tables = [value for tag, value in entries if tag == _STRINGS]
    names = [value for tag, value in entries if tag == _NEEDED]
    texts = _offset(segments, tables[0]) if names else 0
    needed = tuple(data[texts + name : data.index(b"\0", texts + name)].decode() for name in names)
    return Elf(_MACHINES.get(machine, f"machine {machine}"), needed)


def _segment(data: bytes, at: int, *, wide: bool) -> tuple[int, int, int, int]:
    """Return kind, place in the file, address and size of a segment."""
    if wide:
        kind, _, offset, address, _, size = struct.unpack_from("<IIQQQQ", data, at)
    else:
        kind, offset, address, _, size = struct.unpack_from("<IIIII", data, at)
    return kind, offset, address, size


def _dynamic(data: bytes, offset: int, _address: int, size: int, *, wide: bool) -> list[tuple[int, int]]:
    layout = "<qQ" if wide else "<iI"
    step, found = struct.calcsize(layout), []
    for at in range(offset, offset + size - step + 1, step):
        tag, value = struct.unpack_from(layout, data, at)
        if tag == _NULL:
            break
        found.append((tag, value))
    return found


def _offset(segments: list[tuple[int, int, int, int]], wanted: int) -> int:
    """Return where in the file lies what is loaded to an address."""
    for kind, offset, address, size in segments:
        if kind == _LOAD and address <= wanted < address + size:
            return offset + wanted - address
    raise ValueError("its names are not in it")
