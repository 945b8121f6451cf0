"""Files for the tests of the three decoders: models written byte by byte, the example of SPEC.md, forged containers."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edgecompress import container

GOLDEN = Path(__file__).parent / "golden"
SPEC = Path(container.__file__).with_name("SPEC.md")
PREFIX = struct.Struct("<8sIIQII")


def deflate(data: bytes) -> bytes:
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    return engine.compress(data) + engine.flush()


# --- models, written byte by byte so that they never change ---


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def chunk(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def tensor(name: str, data_type: int, data: bytes, dims: tuple[int, ...] = ()) -> bytes:
    sizes = b"".join(number(1, size) for size in dims or (len(data),))
    return sizes + number(2, data_type) + chunk(8, name.encode()) + chunk(9, data)


def external_tensor(name: str, data_type: int, location: str, offset: int, length: int) -> bytes:
    entries = {"location": location, "offset": str(offset), "length": str(length)}
    pairs = b"".join(chunk(13, chunk(1, k.encode()) + chunk(2, v.encode())) for k, v in entries.items())
    return number(2, data_type) + chunk(8, name.encode()) + pairs + number(14, 1)


def model(*tensors: bytes, tail: bytes = b"") -> bytes:
    return number(1, 8) + chunk(7, b"".join(chunk(5, item) for item in tensors) + tail) + chunk(8, number(2, 17))


def sequence(size: int) -> np.ndarray:
    """A fixed pseudo-random sequence, uint32, from a linear congruence, so that no library can change it."""
    state = 12345
    out = np.empty(size, np.uint32)
    for index in range(size):
        state = (1664525 * state + 1013904223) % 2**32
        out[index] = state >> 8
    return out


def golden_model() -> tuple[bytes, bytes]:
    """A model with every mode, copies, classes, several lanes, and an external file with bytes between its tensors."""
    noise = sequence(6000)
    floats = ((noise[:520].astype(np.float64) / 2**24 - 0.5) ** 3).astype("<f4").tobytes()
    codes = (np.minimum.reduce([noise[0:4800:2], noise[1:4800:2]]) >> 18).astype(np.uint8).tobytes()
    trits = ((noise[:2100] % 19 == 0).astype(np.int8) - (noise[:2100] % 23 == 0)).astype(np.int8).tobytes()
    # A layer whose rows and columns differ in scale, in steps of a grid.
    spread = 1.5 ** (np.arange(24)[:, np.newaxis] % 5) * 1.3 ** (np.arange(20) % 4)
    bell = (noise[:4320].astype(np.float64) + np.roll(noise[:4320], 1) + np.roll(noise[:4320], 2)) / 2**24 - 1.5
    grid = np.rint(bell.reshape(24, 20, 9) * spread[:, :, np.newaxis] * 0.8).astype(np.int8).tobytes()
    steps = (
        np.where(noise[:4320] % 37 == 0, noise[:4320] >> 16, np.rint(bell).astype(np.int64)).astype(np.uint8).tobytes()
    )
    matrix = np.frombuffer(codes, np.uint8).reshape(40, 60)
    small = [tensor(f"s{i}", 1, floats[80 * i : 80 * i + 80]) for i in range(12)]
    data = b"head" + codes + b"between" + trits + b"tail"
    externals = [
        external_tensor("codes", 2, "weights.bin", 4, len(codes)),
        external_tensor("trits", 3, "weights.bin", 11 + len(codes), len(trits)),
    ]
    inline = [
        tensor("f", 1, floats),
        tensor("zeros", 7, bytes(4096)),
        tensor("noise", 2, noise[:2100].astype(np.uint8).tobytes()),
        tensor("grid", 3, grid, (24, 20, 3, 3)),
        tensor("matrix", 2, codes, (40, 60)),
        tensor("transposed", 2, matrix.T.tobytes(), (60, 40)),
        tensor("equal", 3, grid),
        tensor("steps", 3, steps),
        tensor("wide", 2, (noise >> 19).astype(np.uint8).tobytes()),
    ]
    return model(*inline, *small, *externals), data


def runs_model() -> tuple[bytes]:
    """A model of long phrases: few values beside many zeros, of which some are rare, or none; several lanes."""
    noise = sequence(30_000)
    sparse = np.where(noise % 50 == 0, (noise >> 9) % 5, 0).astype(np.uint8)
    bits = (noise % 61 == 0).astype(np.uint8)
    mixed = np.where(noise % 19 == 0, np.where(noise % 7 == 0, noise >> 12, 1 + (noise >> 10) % 2), 0).astype(np.uint8)
    inline = [
        tensor("sparse", 2, sparse.tobytes()),
        tensor("bits", 9, bits.tobytes()),
        tensor("mixed", 2, mixed.tobytes()),
    ]
    return (model(*inline),)


GOLDEN_FILES: dict[str, Callable[[], tuple[bytes, ...]]] = {
    "modes": golden_model,
    "rare": golden_model,
    "runs": runs_model,
}


# --- the examples and the checks of SPEC.md ---


def spec_example(number: int = 1) -> bytes:
    """The file of the first or the second example."""
    text = SPEC.read_text("utf-8").split("## Example")[number]
    lines = re.findall(r"^((?:[0-9a-f]{2} )*[0-9a-f]{2})  ", text, re.MULTILINE)
    return bytes.fromhex("".join(lines))


EXAMPLE_META = bytes.fromhex(
    "8008 01 41030101 110901 01 0801 0101 000205 182552a1 01 00 0c e7200f6f 01 020800 08083a00"
)
EXAMPLE_PAYLOAD = bytes.fromhex("7804")
EXAMPLE_MODEL = bytes.fromhex("0808 4141424143414142 3a00")
LONG_EXAMPLE_MODEL = bytes([8, 8, *[0] * 35, 1, *[0] * 16, 0x3A, 0])


def forge(meta: bytes, payload: bytes = EXAMPLE_PAYLOAD, *, block: bytes | None = None, **fields: int) -> bytes:
    """An `.ecz` file with right checksums of prefix and meta block, whatever is in it."""
    stored = b"\x01" + struct.pack("<HH", len(meta), len(meta) ^ 0xFFFF) + meta if block is None else block
    values = {"version": 2, "offset": 32 + len(payload), "stored": len(stored), "raw": len(meta), **fields}
    numbers = values["version"], 0, values["offset"], values["stored"], values["raw"]
    prefix = bytearray(PREFIX.pack(b"\x89ECZ\r\n\x1a\n", *numbers))
    prefix[12:16] = struct.pack("<I", zlib.crc32(stored, zlib.crc32(prefix)))
    return bytes(prefix) + payload + stored


def meta(old: str = "", new: str = "") -> bytes:
    """The example's meta block with one place changed; the old bytes must be there once."""
    was, becomes = bytes.fromhex(old), bytes.fromhex(new)
    assert not was or EXAMPLE_META.count(was) == 1
    return EXAMPLE_META.replace(was, becomes) if was else EXAMPLE_META


def crc(data: bytes) -> str:
    return zlib.crc32(data).to_bytes(4, "little").hex()


def raw_meta(payload: bytes, plane: str) -> bytes:
    """The meta block of one file that is one stream of 8 elements of 1 byte."""
    rest = f"01 00 08 {crc(EXAMPLE_MODEL[2:10])} 01 000800"
    return bytes.fromhex(f"8008 00 01 0801 {plane} {crc(payload)} {rest}")


def long_meta(old: str, new: str) -> bytes:
    """The meta block of the second example with one place changed."""
    block = spec_example(2)[-37:]
    was = bytes.fromhex(old)
    assert block.count(was) == 1
    return block.replace(was, bytes.fromhex(new))


TABLE = "41030101 110901"
PLANE = "0801 0101 000205 182552a1"


def example(old: str, new: str) -> Callable[[], bytes]:
    return lambda: forge(meta(old, new))


def many_blocks() -> bytes:
    """40,960 streams with a block for each of seven classes."""
    count = 40_960
    plane = bytes.fromhex("0107 0107 00") + bytes(range(8, 15)) + 7 * bytes.fromhex("0001")
    stream = bytes.fromhex("0701") + plane + bytes(4)
    block = bytes.fromhex("8008 01 000200 0101") + varint(count) + count * stream
    return forge(block, bytes(7 * count), block=deflate(block))


VIOLATIONS: dict[str, tuple[Callable[[], bytes], str]] = {
    "1 another version": (lambda: forge(meta(), version=1), "version 1"),
    "2 meta offset in the prefix": (lambda: forge(meta(), offset=31, stored=45), "truncated or extended"),
    "2 meta raw length beyond the ratio": (lambda: forge(meta(), raw=1032 * 42 + 1), "claims"),
    "2 meta raw length beyond 2^26 of a small file": (
        lambda: forge(b"", block=bytes(2**17), raw=2**26 + 1),
        "claims",
    ),
    "2 meta raw length beyond 2^28": (lambda: forge(b"", block=bytes(2**19), raw=2**28 + 1), "claims"),
    "4 meta raw length too small": (lambda: forge(meta(), raw=36), "another length"),
    "4 meta raw length too large": (lambda: forge(meta(), raw=38), "another length"),
    "4 meta is no DEFLATE": (lambda: forge(meta(), block=b"\xff" * 36), "broken DEFLATE"),
    "5 lanes of 63 phrases": (example("8008 01 41", "3f 01 41"), "63 phrases a lane"),
    "5 lanes of 4097 phrases": (example("8008 01 41", "8120 01 41"), "4097 phrases a lane"),
    "5 a number of ten bytes": (lambda: forge(bytes.fromhex("80808080808080808001")), "63 bits"),
    "5 a block that ends in a number": (lambda: forge(bytes.fromhex("80")), "ends too early"),
    "5 a block that ends in a table": (lambda: forge(EXAMPLE_META[:9]), "ends too early"),
    "5 more than 2^10 tables": (lambda: forge(bytes.fromhex("8008 8108"), b""), "1025 tables, at most"),
    "5 more than 2^18 streams": (lambda: forge(bytes.fromhex("8008 00 818010"), b""), "262145 streams, at most"),
    "5 more than 2^12 files": (lambda: forge(bytes.fromhex("8008 00 00 8120"), b""), "4097 files, at most 4096"),
    "5 more than 2^18 segments and streams": (
        example("01 020800", "808010 020800"),
        "262144 more segments, at most 262142",
    ),
    "5 more than 2^18 streams and blocks": (many_blocks, "more than 262144 streams and blocks"),
    "6 a base of 256": (example(TABLE, "8002030101 110901"), "from 256 on"),
    "6 an alphabet of one": (example(TABLE, "41010101 11"), "alphabet of 1"),
    "6 an alphabet of 257": (example(TABLE, "4181020101 110901"), "alphabet of 257"),
    "6 no common value": (example(TABLE, "41030112 110901"), "1 splits of 3 values by 0"),
    "6 common values from level 0 on": (example(TABLE, "41030100 110901"), "1 splits of 3 values by 0"),
    "6 more splits than phrases": (example(TABLE, "41030811 110901"), "8 splits of 3 values by 1"),
    "6 a level of 129": (example(TABLE, "41030101 810901"), "levels out of range"),
    "6 a table of one value": (example(TABLE, "41030101 110000"), "levels out of range"),
    "6 more splits than long phrases": (example(TABLE, "41034091 02110901"), "64 splits of 3 values by 1"),
    "6 a common level of 512": (example(TABLE, "41030181 04110901"), "1 splits of 3 values by 0"),
    "6 more than 256 phrases": (example(TABLE, "41037f01 110901"), "127 splits of 3 values by 3"),
    "7 elements of 3 bytes": (example(PLANE, "0803 0101 000205 182552a1"), "8 elements of 3 bytes"),
    "7 a stream of nothing": (example(PLANE, "0001 0101 000205 182552a1"), "0 elements"),
    "7 a stream above 2^26 bytes": (example(PLANE, "8180802001 0101"), "elements of 1 bytes"),
    "7 a copy of itself": (example(PLANE, "0800 0001"), "a copy of stream 0 with 8"),
    "7 a copy of another count": (example("01" + PLANE, "02" + PLANE + "0700 0001"), "a copy of stream 0 with 7"),
    "7 a copy in 3 rows": (example("01" + PLANE, "02" + PLANE + "0800 0003"), "in 3 rows"),
    "7 a copy in no rows": (example("01" + PLANE, "02" + PLANE + "0800 0000"), "in 0 rows"),
    "7 a copy of a copy": (example("01" + PLANE, "03" + PLANE + "0800 0001 0800 0101"), "a copy of stream 1"),
    "8 an unknown mode": (example("0101 000205", "0302 000205"), "mode 3"),
    "8 a raw plane of another length": (lambda: forge(raw_meta(b"1234567", "0007"), b"1234567"), "mode 0 with 7"),
    "8 DEFLATE beyond the ratio": (
        example("01 41030101 110901 01 0801 0101 000205", "00 01 890801 0201"),
        "mode 2",
    ),
    "8 no class": (example("0101 000205", "0100 000205"), "0 classes"),
    "8 nine classes": (example("0101 000205", "0109 000205"), "9 classes"),
    "8 three rows of eight values": (example("0101 000205", "0102 0301 080808 08 000205"), "3 rows and 1 columns"),
    "8 no rows": (example("0101 000205", "0102 0001 000205"), "0 rows and 1 columns"),
    "8 more rows than values": (example("0101 000205", "0102 8080808080808080010800"), "rows and 8 columns"),
    "8 a row level of 16": (example("0101 000205", "0102 0101 10 08 000205"), "out of range"),
    "8 a column level of 16": (example("0101 000205", "0102 0101 08 10 000205"), "out of range"),
    "8 a table that is not there": (example("0101 000205", "0101 010205"), "table 1 of 1"),
    "8 more phrases than values": (example("0101 000205", "0101 000209"), "8 values in 9 phrases"),
    "8 more phrases than bits": (example("0101 000205", "0101 000005"), "in 5 phrases and 0 bytes"),
    "8 too few long phrases": (
        lambda: forge(long_meta("34 01 0101 000305", "8102 01 0101 000304")),
        "257 values in 4 phrases",
    ),
    "8 too few phrases": (example("0101 000205", "0101 000200"), "8 values in 0 phrases"),
    "9 streams longer than the payload": (lambda: forge(meta(), b"\x78"), "reach into the meta"),
    "9 streams shorter than the payload": (lambda: forge(meta(), b"\x78\x04\x00"), "between the streams"),
    "10 a model with a name": (example("01 00 0c", "01 0161 0c"), "the file name 'a'"),
    "10 no model": (lambda: forge(bytes.fromhex("8008 00 00 00"), b""), "no model"),
    "10 two models": (lambda: forge(bytes.fromhex("8008 00 00 02" + "00 00 00000000 00" * 2), b""), "the file name ''"),
    "10 an empty data file": (
        lambda: forge(bytes.fromhex("8008 00 00 02 00 00 00000000 00 0161 00 00000000 00"), b""),
        "the file 'a' is empty",
    ),
    "11 a stream that is not there": (example("01 020800", "01 020801"), "of stream 1"),
    "11 more bytes than the stream has": (example("01 020800", "01 020900"), "9 bytes of stream 0"),
    "11 a segment of nothing": (example("01 020800", "01 020000"), "0 bytes of stream 0"),
    "11 segments beyond the file": (example("01 020800", "01 050800"), "beyond the end"),
    "12 payload left over": (example("01 020800", "01 020700"), "no file uses"),
    "12 more bytes than the file can hold": (
        example("0c e7200f6f 01 020800", "ffffffff7f e7200f6f 01 020800"),
        "can hold at most",
    ),
    "12 skeleton too short": (lambda: forge(EXAMPLE_META[:-1]), "skeleton"),
    "12 skeleton too long": (lambda: forge(EXAMPLE_META + b"\0"), "skeleton"),
    "13 a stream that does not match": (lambda: forge(meta(), b"\x78\x05"), "checksum mismatch in a payload"),
    "14 DEFLATE of another length": (
        lambda: forge(raw_meta(deflate(b"123456789"), "020b"), deflate(b"123456789")),
        "another length",
    ),
    "14 DEFLATE with bytes behind": (
        lambda: forge(raw_meta(deflate(b"12345678") + b"\0", "020b"), deflate(b"12345678") + b"\0"),
        "another length",
    ),
    "15 bits set after the last code": (
        lambda: forge(meta("182552a1", crc(b"\x78\x0c")), b"\x78\x0c"),
        "longer or shorter than its code",
    ),
    "15 a byte after the last code": (
        lambda: forge(meta("000205 182552a1", "000305" + crc(b"\x78\x04\x00")), b"\x78\x04\x00"),
        "longer or shorter than its code",
    ),
    "15 codes cut off": (
        lambda: forge(meta("000205 182552a1", "000105" + crc(b"\x78")), b"\x78"),
        "longer or shorter than its code",
    ),
    "15 values beyond the last phrase": (
        lambda: forge(meta("000205 182552a1", "000204" + crc(b"\x78\0")), b"\x78\0"),
        "another number of values",
    ),
    "15 too few values": (
        lambda: forge(meta("000205 182552a1", "000205" + crc(b"\x54\x01")), b"\x54\x01"),
        "another number of values",
    ),
    "15 a phrase too many": (
        lambda: forge(meta("000205 182552a1", "000205" + crc(b"\0\0")), b"\0\0"),
        "another number of values|longer or shorter",
    ),
    "16 a file that does not match": (example("e7200f6f", "e7200f6e"), "checksum mismatch in a decoded"),
}


def with_files(main: bytes, others: dict[str, bytes]) -> bytes:
    """An `.ecz` file without streams, of any files."""
    block = bytes.fromhex("8008 00 00") + varint(1 + len(others))
    for name, data in {"": main, **others}.items():
        block += chunk(0, name.encode())[1:] + varint(len(data)) + bytes.fromhex(crc(data)) + b"\0"
    return forge(block + main + b"".join(others.values()), b"")
