"""Models in onnxruntime-web, run by Node: the self-extracting form, and an .ecz file by the JavaScript decoder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from builders import apply, model, normal, run

from edgecompress.container import pack
from edgecompress.passes import self_extracting
from edgecompress.passes.self_extracting import extract_in_graph

pytestmark = [pytest.mark.slow, pytest.mark.network]

VERSION = "1.30.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgecompress-tests" / f"web-{VERSION}"
DECODER = Path(__file__).parents[1] / "targets" / "web" / "ecz.js"
BODY = """g (float[N, 3, 12, 12] x) => (float[N, 10] y) {
    a = Cast<to=6>(conv_indices)  k = Gather(conv_codebook, a)
    c = Conv<pads=[1, 1, 1, 1]>(x, k)  r = Relu(c)  p = GlobalAveragePool(r)  f = Flatten(p)
    b = Cast<to=6>(indices)  w = Gather(codebook, b)  y = MatMul(f, w) }"""

SCRIPT = """
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web";
import { decode } from "./ecz.mjs";
ort.env.wasm.numThreads = 1;
const read = (name) => new Uint8Array(readFileSync(name));
const x = new Float32Array(read("x.bin").buffer);
const models = { plain: read("plain.onnx"), self: read("self.onnx"), ecz: (await decode(read("m.ecz")))[0].data };
const found = {};
for (const [name, data] of Object.entries(models)) {
  const session = await ort.InferenceSession.create(data);
  const { y } = await session.run({ x: new ort.Tensor("float32", x, [2, 3, 12, 12]) });
  found[name] = Buffer.from(y.data.buffer, y.data.byteOffset, y.data.byteLength).toString("hex");
}
console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module", name="modules")
def node_modules() -> Path:
    """The folder that onnxruntime-web is installed in, kept between runs."""
    if shutil.which("node") is None or (npm := shutil.which("npm")) is None:
        pytest.skip("there is no Node with npm")
    if not (CACHE / "node_modules" / "onnxruntime-web" / "package.json").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(CACHE)]
        command = [npm, "install", *options, f"onnxruntime-web@{VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode:
            pytest.skip(f"npm cannot install onnxruntime-web {VERSION}: {done.stderr.strip().splitlines()[:1]}")
    return CACHE / "node_modules"


def bell(*shape: int, seed: int) -> np.ndarray:
    values = np.round(np.random.default_rng(seed).normal(size=shape) * 2.4 + 8)
    return np.clip(values, 0, 15).astype(np.uint8)


def test_all_forms_of_a_model_give_the_same_bits(
    tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_extracting, "_TENSOR_BYTES", -(10**6))  # code every tensor, however small
    source = model(
        BODY,
        opset=17,
        conv_indices=bell(64, 3, 3, 3, seed=0),
        conv_codebook=normal(16),
        indices=bell(64, 10, seed=1),
        codebook=normal(16),
    )
    x = normal(2, 3, 12, 12)
    extracting = apply(source, extract_in_graph, {"x": x})
    (tmp_path / "plain.onnx").write_bytes(source.proto.SerializeToString())
    (tmp_path / "self.onnx").write_bytes(extracting.proto.SerializeToString())
    (tmp_path / "x.bin").write_bytes(x.tobytes())
    pack(tmp_path / "plain.onnx", tmp_path / "m.ecz")
    (tmp_path / "ecz.mjs").write_bytes(DECODER.read_bytes())
    (tmp_path / "main.mjs").write_text(SCRIPT)
    (tmp_path / "node_modules").symlink_to(modules)
    done = subprocess.run(["node", "main.mjs"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["self"] == found["ecz"] == found["plain"]
    left = {tensor.name for tensor in extracting.proto.graph.initializer}
    assert not left & {"indices", "conv_indices"}
    # Another runtime adds in another order: sums of 64 products of size 1 differ in the last digits.
    np.testing.assert_allclose(
        np.frombuffer(bytes.fromhex(found["self"]), np.float32).reshape(2, 10), run(source, x=x)["y"], atol=1e-4
    )
