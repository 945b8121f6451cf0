"""The JavaScript decoder, in Node."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ecz_samples import EXAMPLE_MODEL, GOLDEN, GOLDEN_FILES, LONG_EXAMPLE_MODEL, VIOLATIONS, model, spec_example, tensor

from edgecompress.container import pack

SOURCE = Path(__file__).parents[1] / "targets" / "web" / "ecz.js"

SCRIPT = """
import { createHash } from "node:crypto";
import { readFileSync, readdirSync } from "node:fs";
import { decode } from "./ecz.mjs";
const results = {};
for (const path of readdirSync(".").filter((name) => name.endsWith(".ecz"))) {
  try {
    const files = await decode(new Uint8Array(readFileSync(path)));
    results[path] = files.map(({ name, data }) => [name, createHash("sha256").update(data).digest("hex")]);
  } catch (error) {
    results[path] = error.name;
  }
}
console.log(JSON.stringify(results));
"""


@pytest.fixture(scope="session", name="node")
def node_program() -> str:
    node = shutil.which("node") or pytest.skip("there is no Node")
    raw = "new DecompressionStream('deflate-raw')"
    if subprocess.run([node, "-e", raw], capture_output=True, check=False).returncode:
        pytest.skip("this Node has no DecompressionStream for raw DEFLATE")
    return node


def decode_all(node: str, folder: Path, files: dict[str, bytes]) -> dict[str, object]:
    """Decode files; return name and hash of what is in each, or the name of what was thrown."""
    (folder / "ecz.mjs").write_bytes(SOURCE.read_bytes())
    (folder / "main.mjs").write_text(SCRIPT)
    for name, data in files.items():
        (folder / f"{name}.ecz").write_bytes(data)
    done = subprocess.run([node, "main.mjs"], cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return {name.removesuffix(".ecz"): found for name, found in json.loads(done.stdout).items()}


def hashes(*files: bytes, names: tuple[str, ...] = ("", "weights.bin")) -> list[list[str]]:
    return [[name, hashlib.sha256(data).hexdigest()] for name, data in zip(names, files, strict=False)]


def test_golden_files_and_the_example_decode_to_the_same_bytes_as_in_python(tmp_path: Path, node: str) -> None:
    files = {name: (GOLDEN / f"{name}.ecz").read_bytes() for name in GOLDEN_FILES}
    found = decode_all(node, tmp_path, {**files, "example": spec_example(), "long": spec_example(2)})
    expected = {name: hashes(*build()) for name, build in GOLDEN_FILES.items()}
    assert found == {**expected, "example": hashes(EXAMPLE_MODEL), "long": hashes(LONG_EXAMPLE_MODEL)}


def test_tensors_of_many_scales_decode(tmp_path: Path, node: str) -> None:
    generator = np.random.default_rng(0)
    tensors = [
        tensor(f"t{index}", 3, np.rint(generator.laplace(0, scale, size)).clip(-128, 127).astype(np.int8).tobytes())
        for index, (scale, size) in enumerate([(0.05, 9000), (0.3, 20_000), (1, 3000), (5, 50_000), (40, 4000)])
    ]
    tensors.append(tensor("f", 1, generator.normal(size=5000).astype(np.float32).tobytes(), (50, 100)))
    data = model(*tensors)
    (tmp_path / "m.onnx").write_bytes(data)
    pack(tmp_path / "m.onnx", tmp_path / "m.ecz")
    assert decode_all(node, tmp_path, {}) == {"m": hashes(data)}


def test_files_that_break_a_rule_throw_the_error_of_the_decoder(tmp_path: Path, node: str) -> None:
    cases = dict(enumerate(VIOLATIONS))
    found = decode_all(node, tmp_path, {str(number): VIOLATIONS[case][0]() for number, case in cases.items()})
    assert {cases[int(number)]: result for number, result in found.items() if result != "EczError"} == {}
    assert len(found) == len(cases)


def test_every_flipped_bit_and_every_truncation_of_the_examples_throws(tmp_path: Path, node: str) -> None:
    files = {}
    for number in (1, 2):
        whole = spec_example(number)
        files |= {f"cut{number}-{size}": whole[:size] for size in range(len(whole))}
        for bit in range(8 * len(whole)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            files[f"bit{number}-{bit}"] = bytes(damaged)
    found = decode_all(node, tmp_path, files)
    assert set(found.values()) == {"EczError"}
    assert len(found) == len(files)
