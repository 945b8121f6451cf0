"""Feeds bytes to the Python reader under coverage (needs the package atheris): python tests/fuzz_reader.py CORPUS...

The inputs are those of targets/native/fuzz_ecz.c. Checksums are taken as right, or nothing would get past them.
"""

from __future__ import annotations

import io
import struct
import sys
import types
import zlib

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["edgecompress.runtime"]):
        import edgecompress.runtime.decode
        import edgecompress.runtime.format  # noqa: F401

from edgecompress.errors import FormatError
from edgecompress.runtime import decode, format  # noqa: A004
from edgecompress.runtime.layout import MAGIC, VERSION

_MAX_OUTPUT = 1 << 22
_PARTS = "<HH"


class _Equal:
    """A checksum that is never wrong."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def _trusting_zlib() -> types.SimpleNamespace:
    return types.SimpleNamespace(crc32=lambda *_: _Equal(), decompressobj=zlib.decompressobj, error=zlib.error)


def as_file(data: bytes) -> bytes:
    """Return the `.ecz` file that an input stands for."""
    if len(data) < 3 or data[0] & 1:
        return data[1:]
    size = int.from_bytes(data[1:3], "little")
    payload, meta = data[3 : 3 + size], data[3 + size :][:65535]
    block = b"\1" + struct.pack(_PARTS, len(meta), len(meta) ^ 0xFFFF) + meta
    prefix = struct.pack("<8sIIQII", MAGIC, VERSION, 0, 32 + len(payload), len(block), len(meta))
    return prefix + payload + block


def feed(data: bytes) -> bool:
    """Decode all files, unless they are large, which takes long and shows nothing new; return whether they decode."""
    handle = io.BytesIO(as_file(data))
    try:
        container = format.read_container(handle)
        if sum(entry.length for entry in container.files) <= _MAX_OUTPUT:
            for _ in decode.read_pieces(handle, container):
                pass
    except FormatError:
        return False
    return True


def trust_checksums() -> None:
    """Take all checksums as right from now on."""
    decode.zlib = format.zlib = _trusting_zlib()  # type: ignore[attr-defined,assignment]


if __name__ == "__main__":
    trust_checksums()
    atheris.Setup(sys.argv, feed)
    atheris.Fuzz()
