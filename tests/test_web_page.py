"""The page's own JavaScript in Node: checksums, tensors, the measuring loop; each compared with its Python original."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgecompress.bundle.program import manifest_digest
from edgecompress.runtime import measure
from edgecompress.runtime.tensors import write_tensor

WEB = Path(__file__).parents[1] / "targets" / "web"


@pytest.fixture(name="node")
def node_runner(tmp_path: Path) -> Any:
    """Run a script with the page's modules beside it and return what it prints, as JSON."""
    program = shutil.which("node") or pytest.skip("there is no Node")
    for path in WEB.glob("*.js"):
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "package.json").write_text('{"type": "module"}')

    def run(script: str, **files: bytes) -> Any:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        head = 'import { readFileSync } from "node:fs"; const bytes = (name) => new Uint8Array(readFileSync(name));\n'
        (tmp_path / "main.js").write_text(head + script)
        done = subprocess.run(
            [program, "main.js"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_the_own_sha256_is_that_of_the_standard_at_every_length_around_a_block(node: Any) -> None:
    data = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()
    sizes = [*range(130), 1000]
    found = node(
        'import { digestOf, sha256 } from "./sha256.js"; const data = bytes("data");'
        f"const own = {sizes}.map((size) => Buffer.from(digestOf(data.subarray(3, 3 + size))).toString('hex'));"
        "console.log(JSON.stringify([own, await sha256(data)]));",
        data=data,
    )
    assert found[0] == [hashlib.sha256(data[3 : 3 + size]).hexdigest() for size in sizes]
    assert found[1] == hashlib.sha256(data).hexdigest()


def test_the_digest_of_a_manifest_does_not_depend_on_how_a_language_spells_numbers_and_letters(node: Any) -> None:
    manifest: dict[str, Any] = {
        "b": [1.0, 1e-05, 0.001, -3, 2**53, True, None, [], {}],
        "a": {"ü\u2028": 'quo"te\\ \t ☃', "A": "{[,:]}"},
        "tolerance": 1e-16,
        "files": {"lib/x.js": {"size_bytes": 3, "manifest_sha256": "not the one at the top"}},
    }
    manifest["manifest_sha256"] = manifest_digest(manifest)
    found = node(
        'import { canonical } from "./bundle.js"; import { sha256 } from "./sha256.js";'
        'const text = new TextDecoder().decode(bytes("manifest.json"));'
        "console.log(JSON.stringify(await sha256(new TextEncoder().encode(canonical(text)))));",
        **{"manifest.json": json.dumps(manifest, indent=1).encode()},
    )
    assert found == manifest["manifest_sha256"]


def test_tensors_of_every_type_are_read_as_python_wrote_them(node: Any) -> None:
    arrays = {
        name: np.array([[0, 1, 100]], dtype=name)
        for name in ("uint8", "int8", "uint16", "int16", "int32", "int64", "uint32", "uint64", "float32", "float64")
    }
    arrays |= {"bool": np.array([True, False]), "float16": np.array(1.5, np.float16), "string": np.array(["ä", ""])}
    found = node(
        'import { readTensor } from "./tensor.js"; const found = {};'
        f"for (const name of {list(arrays)}) {{ const t = readTensor(bytes(name));"
        "found[name] = [t.name, t.type, t.dims, [...t.data].map(String)]; }"
        "console.log(JSON.stringify(found));",
        **{name: write_tensor(f"{name}:0", value) for name, value in arrays.items()},
    )
    for name, value in arrays.items():
        flat = value.view(np.uint16) if name == "float16" else value.astype(np.uint8) if name == "bool" else value
        texts = [f"{item:g}" if value.dtype.kind == "f" and name != "float16" else str(item) for item in flat.ravel()]
        assert found[name] == [f"{name}:0", name, list(value.shape), texts]


def test_a_malformed_tensor_is_an_error(node: Any) -> None:
    whole = write_tensor("x", np.arange(6, dtype=np.float32))
    found = node(
        'import { readTensor } from "./tensor.js"; const whole = bytes("whole"); const texts = [];'
        "for (let size = 0; size < whole.length; size++) {"
        "try { readTensor(whole.subarray(0, size)); texts.push('read'); }"
        "catch (error) { texts.push(error.message); } }"
        "console.log(JSON.stringify(texts));",
        whole=whole,
    )
    # cut between two fields the message is whole, but lacks its type or its values
    assert len(found) == len(whole)
    assert all(text.startswith("malformed tensor") for text in found)


def test_blocks_quantiles_and_warm_up_follow_the_rules_of_the_python_loop(node: Any) -> None:
    times = (5 + np.random.default_rng(1).normal(size=400).cumsum() * 0.2).clip(0.5).round(3).tolist()
    firsts = [0.001, 2.0, 7.0, 60.0, 1500.0]
    found = node(
        'import { blockSizes, quantile, warmUp } from "./measure.js"; const found = [];'
        f"const times = {times};"
        f"for (const first of {firsts}) {{ let at = 0;"
        "const timer = async (count) => times.slice(at, (at += count));"
        "found.push((await warmUp(timer, first)).length); }"
        "console.log(JSON.stringify({ warm: found, blocks: [1, 9, 10, 57].map(blockSizes),"
        "quantiles: [0, 0.1, 0.5, 0.9, 1].map((share) => quantile(times.slice(0, 57), share)) }));"
    )
    assert found["blocks"] == [measure._block_sizes(runs) for runs in (1, 9, 10, 57)]
    assert np.allclose(found["quantiles"], np.quantile(times[:57], [0, 0.1, 0.5, 0.9, 1]), rtol=1e-12)

    def warmed(first: float) -> int:
        left = iter(times)
        return len(measure._warm_up(lambda count: [next(left) for _ in range(count)], first))

    assert found["warm"] == [warmed(first) for first in firsts]


def test_models_take_turns_and_the_first_run_after_a_change_is_not_counted(node: Any) -> None:
    found = node(
        'import { measureTimers } from "./measure.js"; const calls = [];'
        "const timer = (name) => async (count) => { calls.push([name, count]); return Array(count).fill(100); };"
        "const progress = []; const rows = await measureTimers([timer('a'), timer('b')], [1000, 1000], 12,"
        "async (done, total) => progress.push([done, total]));"
        "console.log(JSON.stringify({ calls, rows: rows.map((row) => row.values_ms.length), progress }));"
    )
    blocks = [call for call in found["calls"] if call[1] > 1]  # the warm-up of a slow model runs it one by one
    sizes = measure._block_sizes(12)
    assert blocks == [[name, size + 1] for size in sizes for name in "ab"]
    assert found["rows"] == [12, 12]
    assert found["progress"][-1] == [24, 24]


CASES: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "equal": (np.ones(3, np.float32), np.ones(3, np.float32)),
    "within": (np.array([1000, 1.9], np.float32), np.array([1000, 1], np.float32)),
    "outside": (np.array([1000, 2.1], np.float32), np.array([1000, 1], np.float32)),
    "sixteen half steps": (np.array([1.015], np.float16), np.array([1], np.float16)),
    "more half steps": (np.array([1.017], np.float16), np.array([1], np.float16)),
    "same infinities": (np.array([np.inf, np.nan, -np.inf]), np.array([np.inf, np.nan, -np.inf])),
    "other infinity": (np.array([-np.inf]), np.array([np.inf])),
    "nan for a number": (np.array([np.nan]), np.array([1.0])),
    "number for nan": (np.array([1.0]), np.array([np.nan])),
    "zeros": (np.array([-0.0]), np.array([0.0])),
    "integers": (np.array([1, 2]), np.array([1, 3])),
    "texts": (np.array(["a", "c"]), np.array(["a", "b"])),
    "shape": (np.ones((1, 3), np.float32), np.ones(3, np.float32)),
}


def test_outputs_differ_for_the_page_where_they_differ_for_python(node: Any) -> None:
    files = {
        f"{kind}{index}": write_tensor("y", pair[kind == "w"])
        for index, pair in enumerate(CASES.values())
        for kind in "aw"
    }
    found = node(
        'import { readTensor } from "./tensor.js"; import { outputDifferences } from "./measure.js"; const found = [];'
        f"for (let index = 0; index < {len(CASES)}; index++) found.push("
        "outputDifferences({ y: readTensor(bytes(`a${index}`)) }, [readTensor(bytes(`w${index}`))], 0.001).length > 0);"
        "console.log(JSON.stringify(found));",
        **files,
    )
    expected = [bool(measure.output_differences({"y": a}, {"y": w}, relative=0.001)) for a, w in CASES.values()]
    assert dict(zip(CASES, found, strict=True)) == dict(zip(CASES, expected, strict=True))
    assert sum(expected) == 8


def test_browsers_are_told_apart_with_and_without_brands(node: Any) -> None:
    agents = {
        "Edge 120.0.0.0": "Mozilla/5.0 (Windows NT 10.0) Chrome/120.0.0.0 Safari/537.36 Edg/120.0.0.0",
        "Firefox 121.0": "Mozilla/5.0 (X11; Linux x86_64; rv:121.0) Gecko/20100101 Firefox/121.0",
        "Chrome 120.1": "Mozilla/5.0 (iPhone; CPU iPhone OS 17_0) CriOS/120.1 Mobile/15E148 Safari/604.1",
        "Safari 17.2": "Mozilla/5.0 (iPhone; CPU iPhone OS 17_2) Version/17.2 Mobile/15E148 Safari/604.1",
    }
    brands = [{"brand": "Not A;Brand", "version": "8"}, {"brand": "Chromium", "version": "156"}]
    found = node(
        'import { browserIn } from "./facts.js"; const found = '
        f"{json.dumps(list(agents.values()))}.map((agent) => browserIn(undefined, agent));"
        f"const brands = {json.dumps(brands)}; found.push(browserIn(brands, ''));"
        "brands.push({ brand: 'Google Chrome', version: '156' }); found.push(browserIn(brands, ''));"
        "console.log(JSON.stringify(found));"
    )
    assert found == [*agents, "Chromium 156", "Google Chrome 156"]


def test_a_million_runs_do_not_overflow_the_stack(node: Any) -> None:
    found = node(
        'import { measureTimers } from "./measure.js";'
        "const [row] = await measureTimers([async (count) => Array(count).fill(2)], [100], 1e6, async () => {});"
        "console.log(JSON.stringify(row.values_ms.length));"
    )
    assert found == 1_000_000
