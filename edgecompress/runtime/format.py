"""Reading and checking prefix and meta block of an `.ecz` file (container/SPEC.md).

Whatever the bytes, the result is a ``Container`` whose numbers agree with each other, or a ``FormatError``.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from edgecompress.errors import FormatError, ModelError
from edgecompress.runtime.layout import CRC_OFFSET, MAGIC, PREFIX, VERSION, Container, meta_limit
from edgecompress.runtime.meta import malformed, parse_meta


def is_ecz(handle: BinaryIO) -> bool:
    """Return whether the file starts like an `.ecz` file; the position is restored."""
    position = handle.tell()
    start = handle.read(len(MAGIC))
    handle.seek(position)
    return start == MAGIC


@contextmanager
def open_ecz(path: Path) -> Iterator[BinaryIO]:
    """Open ``path``; put its name before the message of any ``FormatError`` raised inside.

    Raises ``ModelError`` where the file cannot be read or memory ends.
    """
    try:
        handle = path.open("rb")
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from None
    with handle:
        try:
            yield handle
        except FormatError as error:
            raise FormatError(f"{path}: {error.message}", hint=error.hint) from None
        except MemoryError:
            raise ModelError(f"{path}: not enough memory to decode it", hint="use a machine with more memory") from None


def read_container(handle: BinaryIO) -> Container:
    """Read and check everything but the payload streams of the open file. Raises ``FormatError``."""
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    prefix = handle.read(PREFIX.size)
    if not prefix.startswith(MAGIC):
        kind = "it is empty" if not prefix else "it does not start with the .ecz signature"
        raise FormatError(f"not an .ecz file: {kind}", hint="make one with: edgecompress pack MODEL.onnx -o MODEL.ecz")
    if len(prefix) < PREFIX.size:
        raise malformed(f"truncated, {size} bytes are less than the prefix")
    _, version, crc, offset, stored, raw = PREFIX.unpack(prefix)
    if version != VERSION:
        raise FormatError(
            f"the .ecz format version {version} is not known, this reader knows {VERSION}", hint="update edgecompress"
        )
    if offset < PREFIX.size or offset + stored != size:
        raise malformed(f"truncated or extended, {offset + stored} bytes are announced and {size} are there")
    if raw > meta_limit(stored, size):
        raise malformed(f"the meta block claims {raw} bytes")
    handle.seek(offset)
    meta = handle.read(stored)
    if zlib.crc32(meta, zlib.crc32(prefix[:CRC_OFFSET] + bytes(4) + prefix[CRC_OFFSET + 4 :])) != crc:
        raise malformed("checksum mismatch in the meta block")
    return parse_meta(inflate(meta, raw), payload_end=offset, file_bytes=size)


def inflate(data: bytes | memoryview, length: int) -> bytes:
    """Return exactly ``length`` bytes of a raw DEFLATE stream that uses up ``data``; never allocates more."""
    engine = zlib.decompressobj(-15)
    try:
        out = engine.decompress(data, length + 1)
    except zlib.error:
        raise malformed("broken DEFLATE data") from None
    if len(out) != length or not engine.eof or engine.unused_data or engine.unconsumed_tail:
        raise malformed("DEFLATE data of another length than announced")
    return out
