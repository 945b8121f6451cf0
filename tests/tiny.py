"""Small models written as ONNX text, for the tests of the whole line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser

DIGITS = Path(__file__).parents[1] / "calibration" / "digits"
DIGITS_MODEL = DIGITS / "digits_cnn.onnx"

MLP = "g (float[N, 16] x) => (float[N, 4] y) { a = MatMul(x, w1)  h = Relu(a)  y = MatMul(h, w2) }"


def save(path: Path, body: str, *, opset: int = 17, **weights: np.ndarray) -> Path:
    """Write a model; the keywords are its initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {body}')
    for name, values in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    path.write_bytes(model.SerializeToString())
    return path


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mlp(path: Path, *, seed: int = 0) -> Path:
    """Two layers, 16 -> 64 -> 4: large enough that codebooks of up to 32 values pay off in both."""
    return save(path, MLP, w1=normal(16, 64, seed=seed), w2=normal(64, 4, seed=seed + 1))


def rows(path: Path, count: int = 20, **more: np.ndarray) -> Path:
    """Write a data set for ``mlp``."""
    np.savez(path, x=normal(count, 16, seed=9), **more)
    return path


def flipped(data: bytes, position: int, bit: int = 0) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)
