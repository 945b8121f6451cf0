"""Entropy coding: pure functions on arrays, no files and no models."""

from __future__ import annotations

from edgecompress.coding.bits import pack_bits
from edgecompress.coding.huffman import MAX_LENGTH, canonical_codes, code_lengths, encode

__all__ = ["MAX_LENGTH", "canonical_codes", "code_lengths", "encode", "pack_bits"]
