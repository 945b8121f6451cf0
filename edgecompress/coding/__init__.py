"""Entropy coding: pure functions on arrays, no files and no models."""

from __future__ import annotations

from edgecompress.coding.bits import pack_bits
from edgecompress.coding.huffman import canonical_codes, encode

__all__ = ["canonical_codes", "encode", "pack_bits"]
