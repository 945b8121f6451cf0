"""Bring models without labels down to a few bits a weight and print what their outputs keep.

    EDGECOMPRESS_BENCH_DATA=FOLDER python benchmarks/outputs.py MODELS_FOLDER [MODEL ..]

The detector is calibrated and tested on pictures, the language model on tokens that it has written itself (half of the
sequences each); the speech denoiser has no data, so that nothing is calibrated and it is tested on random inputs. The
signal to quantization noise is that of the worst output; bytes are those of the whole model.ecz.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime

DATASETS = Path(__file__).parent / "datasets"
BITS = (5, 4, 3, 2)
MODELS = {"detector": "ultraface_rfb_320", "lstm": "dtln_model_1", "llama": "stories260K"}
TOKENS = "stories260K_sampled_32x201.npy"


def data_of(name: str, folder: Path) -> list[str]:
    """Return the options that name a model's data."""
    if name == "detector":
        return ["--data", str(DATASETS / "imagenet_ultraface.toml")]
    if name == "lstm":
        return []
    tokens = np.load(Path(os.environ["EDGECOMPRESS_BENCH_DATA"]) / TOKENS).astype(np.int64)
    parts = dict(zip(("data", "test-data"), np.array_split(tokens, 2), strict=True))
    for part, rows in parts.items():
        np.savez(folder / f"{part}.npz", tokens=rows)
    return [word for part in parts for word in (f"--{part}", str(folder / f"{part}.npz"))]


def nats_per_token(model: Path, tokens: np.ndarray) -> float:
    """Return the mean negative log-likelihood of every token but the first, given those before it."""
    session = onnxruntime.InferenceSession(model)
    logits = session.run(None, {session.get_inputs()[0].name: tokens[:, :-1]})[0].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(-np.take_along_axis(logs, tokens[:, 1:, None], axis=-1).mean())


def row(name: str, model: Path, bits: float, folder: Path) -> str:
    data = data_of(name, folder)
    command = [sys.executable, "-m", "edgecompress", "compress", str(model), "-o", str(folder / "out"), "--force"]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, *data, "--cluster", "grid", "--average-bits", str(bits)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        return f"| {model.stem} | {bits} | {shlex.quote(done.stderr.strip().splitlines()[0])} | | | | |"
    report = json.loads((folder / "out" / "report.json").read_text())
    size = report["size"]
    ratios = [each["sqnr_db"] for each in report["outputs"].values() if each["sqnr_db"] is not None]
    nats = ""
    if name == "llama":
        tokens = np.load(folder / "test-data.npz")["tokens"]
        nats = f"{nats_per_token(model, tokens):.4f} -> {nats_per_token(folder / 'out' / 'model.onnx', tokens):.4f}"
    cells = [
        *(model.stem, str(bits), f"{size['ecz_bytes']:,}", f"x{size['compression_ratio']:.1f}"),
        *(f"{min(ratios):.1f} dB", nats, f"{seconds:.0f}"),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", help="all by default")
    options = parser.parse_args()
    if unknown := [name for name in options.models if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]}; there are {', '.join(MODELS)}")
    print("| model | bits a weight | model.ecz | ratio | SQNR | nats a token | s |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models or MODELS:
        for bits in BITS:
            with tempfile.TemporaryDirectory() as folder:
                print(row(name, options.folder / f"{MODELS[name]}.onnx", bits, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
