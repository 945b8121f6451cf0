"""The browser device with programs that only pretend to be a browser."""

from __future__ import annotations

import json
import os
import stat
import sys
import textwrap
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import flipped, mlp
from web_samples import SAMPLE, package, web_bundle

from edgecompress.bundle import build_bundle
from edgecompress.devices import BenchOptions, browser, chromium, open_runner
from edgecompress.errors import DeviceError, EdgecompressError, FormatError, ModelError, ToleranceError, UsageError
from edgecompress.targets import load_target

OPTIONS = BenchOptions(runs=3)
ROW = {
    "model": "model.ecz",
    "outputs_match": True,
    "init_ms": 20.0,
    "first_ms": 9.0,
    "warmup_ms": [8.0],
    "values_ms": [5.0, 6.0, 7.0],
    "peak_rss_bytes": None,
}
RESULT = {
    "schema_version": 2,
    "target": "web",
    "threads": 1,
    "results": [ROW],
    "device": {"browser": "Fake 1", "cores": 2, "cpu_model": None, "wasm_memory_bytes": 1 << 24},
    "after": {},
    "notes": [],
}
HEAD = f"#!{sys.executable}\n" + textwrap.dedent(
    """
    import json, os, sys, time, urllib.request
    address = sys.argv[-1]
    def open_page():
        return urllib.request.urlopen(address).geturl()  # follows to the page itself
    def send(result):
        urllib.request.urlopen(address + "result", data=json.dumps(result).encode())
    """
)


@pytest.fixture(name="folder")
def bundle_folder(tmp_path: Path) -> Path:
    return web_bundle(tmp_path, package(tmp_path / "ort.tgz")).path


@pytest.fixture(name="fake")
def fake_browser(tmp_path: Path) -> Callable[[str], str]:
    def make(body: str) -> str:
        program = tmp_path / "fake-browser"
        program.write_text(HEAD + textwrap.dedent(body))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return f"browser://{program}"

    return make


def measure(device: str, *folders: Path, **options: Any) -> Any:
    return open_runner(device).measure_bundles(folders, options=BenchOptions(runs=3, **options))


def test_what_the_page_sends_becomes_samples_with_what_only_the_machine_knows(
    folder: Path, fake: Callable[[str], str]
) -> None:
    (samples,) = measure(fake(f"open_page(); send({RESULT!r}); time.sleep(60)"), folder)
    assert (samples.init_ms, samples.first_ms, samples.values_ms) == (20.0, 9.0, (5.0, 6.0, 7.0))
    assert samples.metadata["browser"] == "Fake 1"
    assert samples.metadata["device"] == "browser://"
    assert samples.metadata["cpu_model"]
    assert not samples.emulated


def test_the_address_tells_the_page_its_options_and_the_other_bundles(
    folder: Path, fake: Callable[[str], str], tmp_path: Path
) -> None:
    build_bundle(mlp(tmp_path / "m.onnx"), tmp_path / "none", target=load_target("web"), sample=SAMPLE, runtime="none")
    seen = tmp_path / "seen"
    both = {**RESULT, "results": [ROW, ROW]}
    body = f"page = open_page(); open({str(seen)!r}, 'w').write(page); send({both!r}); time.sleep(60)"
    assert len(measure(fake(body), folder, tmp_path / "none", threads=2)) == 2
    assert seen.read_text().endswith("/0/index.html?runs=3&threads=2&also=..%2F1%2F&report=..%2Fresult")


def test_without_turns_every_bundle_gets_a_browser_of_its_own(folder: Path, fake: Callable[[str], str]) -> None:
    done: list[tuple[int, int]] = []
    runner = open_runner(fake(f"open_page(); send({RESULT!r}); time.sleep(60)"))
    options = BenchOptions(runs=3, alternate=False)
    samples = runner.measure_bundles([folder, folder], options=options, progress=lambda a, b: done.append((a, b)))
    assert len(samples) == 2
    assert done == [(3, 6), (6, 6)]


@pytest.mark.parametrize(
    ("code", "kind"), [(3, ModelError), (4, FormatError), (5, ToleranceError), (7, DeviceError), (99, DeviceError)]
)
def test_what_the_page_found_wrong_is_the_error_of_its_kind(
    folder: Path, fake: Callable[[str], str], code: int, kind: type[EdgecompressError]
) -> None:
    error = {"message": "wrong outputs: 'y' off by 3", "hint": "do not use it", "exit_code": code}
    with pytest.raises(kind) as raised:
        measure(fake(f"send({ ({'error': error})!r}); time.sleep(60)"), folder)
    assert type(raised.value) is kind
    if code != 99:
        assert raised.value.message.endswith("wrong outputs: 'y' off by 3")
        assert raised.value.hint == "do not use it"


BAD_RESULTS: list[object] = [
    *([], {}, {"error": {}}, {"results": 1, "device": {}}),
    *(
        {**RESULT, "results": [ROW, ROW]},
        {**RESULT, "results": [1]},
        {**RESULT, "notes": "abc"},
        {**RESULT, "notes": None},
    ),
    {"error": {"message": "", "hint": "", "exit_code": 1e999}},
]


@pytest.mark.parametrize("sent", BAD_RESULTS)
def test_a_result_of_another_form_is_a_device_error(folder: Path, fake: Callable[[str], str], sent: object) -> None:
    sent = repr(sent).replace("inf", "1e999")
    with pytest.raises(DeviceError, match=r"no result .*that can be read"):
        measure(fake(f"send({sent}); time.sleep(60)"), folder, pause_above=70.0)


@pytest.mark.parametrize("sent", [{**RESULT, "results": [1]}, {**RESULT, "device": []}])
def test_a_bad_result_from_elsewhere_is_a_device_error_too(folder: Path, sent: object) -> None:
    def answer(address: str) -> None:
        urllib.request.urlopen(address + "result", data=json.dumps(sent).encode()).close()

    with pytest.raises(DeviceError, match="no result that can be read"):
        browser.serve([folder], options=OPTIONS, say=answer)


def test_cores_of_a_browser_are_checked_before_it_starts(
    folder: Path, fake: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, core = fake("sys.exit(1)"), min(os.sched_getaffinity(0))
    with pytest.raises(UsageError, match="cannot run on the cores 1023") as caught:
        measure(device, folder, cores=(1023,))
    assert "lends the cores" in caught.value.hint
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(DeviceError, match="taskset, which is not installed"):
        measure(device, folder, cores=(core,))


def test_a_page_opened_elsewhere_cannot_be_pinned(folder: Path) -> None:
    with pytest.raises(UsageError, match="can neither choose its cores"):
        browser.serve([folder], options=BenchOptions(cores=(0,)), say=print)


def test_a_browser_that_ends_early_is_a_device_error_with_its_last_words(
    folder: Path, fake: Callable[[str], str]
) -> None:
    with pytest.raises(DeviceError, match=r"ended \(exit code 3\) without a result: no display") as raised:
        measure(fake("print('starting', 'no display', sep='\\n', file=sys.stderr); sys.exit(3)"), folder)
    assert "--serve" in raised.value.hint


def test_a_browser_that_never_opens_the_page_is_ended_with_its_children_and_its_profile(
    folder: Path, fake: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chromium, "_OPEN_LIMIT_S", 2.0)
    seen = tmp_path / "seen"
    body = f"""
    child = os.fork()
    if child:
        open({str(seen)!r}, "w").write(f"{{os.getpid()}} {{child}} {{os.environ['HOME']}}")
    time.sleep(600)
    """
    with pytest.raises(DeviceError, match="did not open the page after 2 s"):
        measure(fake(body), folder)
    parent, child, home = seen.read_text().split()
    assert not running(int(parent))
    assert not running(int(child))
    assert not Path(home).exists()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_browser_gets_nothing_of_the_users_environment(
    folder: Path, fake: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TOKEN", "hunter2")
    body = f"result = {RESULT!r}; result['notes'] = sorted(os.environ); send(result); time.sleep(60)"
    (samples,) = measure(fake(body), folder)
    assert set(samples.metadata["notes"]) <= {"HOME", "PATH", "TMPDIR", "LC_CTYPE"}  # Python itself sets the last one


def test_a_damaged_bundle_is_refused_before_a_browser_starts(
    folder: Path, fake: Callable[[str], str], tmp_path: Path
) -> None:
    page = folder / "index.html"
    page.write_bytes(flipped(page.read_bytes(), 100))
    with pytest.raises(FormatError, match=r"index\.html was altered"):
        measure(fake(f"open({str(tmp_path / 'started')!r}, 'w')"), folder)
    assert not (tmp_path / "started").exists()


def test_a_bundle_of_another_target_is_refused_as_the_first(folder: Path, tmp_path: Path) -> None:
    build_bundle(mlp(tmp_path / "m.onnx"), tmp_path / "none", target=load_target("web"), sample=SAMPLE, runtime="none")
    with pytest.raises(UsageError, match="no browser runs"):
        measure("browser://", tmp_path / "none", folder)
    with pytest.raises(UsageError, match="nothing to measure"):
        measure("browser://")


def test_an_unknown_program_and_a_machine_without_a_browser_are_told_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="'/no/such/chrome' is not a program"):
        open_runner("browser:///no/such/chrome")
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(DeviceError, match="no Chromium or Chrome"):
        measure("browser://", folder)


def test_a_page_opened_elsewhere_sends_its_result_to_serve(folder: Path) -> None:
    said: list[str] = []
    found: list[Any] = []
    waiting = threading.Thread(
        target=lambda: found.extend(browser.serve([folder], options=OPTIONS, say=lambda text: put(said, text)))
    )
    waiting.start()
    ARRIVED.wait(10)
    with urllib.request.urlopen(said[0]) as page:
        assert b"How fast this browser" in page.read()
    urllib.request.urlopen(said[0] + "result", data=json.dumps(RESULT).encode()).close()
    waiting.join(10)
    assert said[0].startswith("http://127.0.0.1:")
    assert len(said) == 1
    assert found[0].values_ms == (5.0, 6.0, 7.0)
    assert found[0].peak_rss_bytes == 1 << 24  # what WebAssembly has taken: no page knows its process


def test_the_command_serves_bundles_only_and_to_browsers_only(
    refused: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    refused(2, "--serve takes web bundles", "bench", tmp_path / "m.onnx", "--serve")
    refused(2, "--serve takes web bundles", "bench", folder, "--serve", "--device", "local")


ARRIVED = threading.Event()


def put(said: list[str], text: str) -> None:
    said.append(text)
    ARRIVED.set()
