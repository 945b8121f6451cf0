"""Bundles with the C library: compiled, gathered and started without a network; other machines: e2e/test_qemu.py."""

from __future__ import annotations

import importlib.util
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import DIGITS_MODEL

from edgecompress.bundle import build_bundle, debian, native, verify_bundle
from edgecompress.bundle.compiler import bench_program, find_compiler
from edgecompress.bundle.debian import Package, Source, download, find_source, read_sources, unpack
from edgecompress.bundle.elf import read_elf
from edgecompress.bundle.launch import run_program
from edgecompress.bundle.manifest import Job
from edgecompress.bundle.ort import opens_ort_alone
from edgecompress.errors import UsageError
from edgecompress.files import cache_folder
from edgecompress.model import load_model
from edgecompress.targets import Target, load_target
from edgecompress.validate import random_sample

# --- headers of programs ---


def test_a_program_says_its_machine_and_what_it_needs() -> None:
    found = read_elf(Path(sys.executable))
    assert found.machine == platform.machine()
    if readelf := shutil.which("readelf"):
        said = subprocess.run([readelf, "-d", sys.executable], capture_output=True, text=True, check=True).stdout
        assert list(found.needed) == [
            line.split("[")[1].rstrip("]") for line in said.splitlines() if "(NEEDED)" in line
        ]


def test_what_is_cut_short_or_no_program_is_refused(tmp_path: Path) -> None:
    whole = Path(sys.executable).read_bytes()
    place = tmp_path / "program"
    for content in (b"", b"#!/bin/sh\n" * 20, *(whole[:length] for length in (4, 20, 63, 64, 100, 200, 500))):
        place.write_bytes(content)
        with pytest.raises(UsageError, match="no library for Linux"):
            read_elf(place)


# --- Debian packages ---

STANZAS = """# comment
Types: deb deb-src
URIs: http://mirror.test/debian
Suites: stable stable-updates
Components: main contrib
Signed-By: /usr/share/keyrings/some.gpg

Types: deb
URIs: http://mirror.test/security
Suites: stable-security
Components: main
"""
LINES = """# deb http://off.test/debian stable main
deb-src http://source.test/debian stable main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian stable main non-free
"""


@pytest.mark.parametrize(
    ("name", "text", "source"),
    [
        ("sources.list.d/a.sources", STANZAS, Source("http://mirror.test/debian", "/usr/share/keyrings/some.gpg")),
        ("sources.list.d/a.sources", STANZAS.replace("Types", "Enabled: no\nTypes"), None),
        ("sources.list.d/a.sources", STANZAS.replace("Suites: stable s", "Suites: product s"), None),
        ("sources.list", LINES, Source("http://mirror.test/debian", "/k.gpg")),
        ("sources.list.d/b.list", "deb http://other.test/tools tools-stable main\n", None),
        ("sources.list.d/b.disabled", LINES, None),
    ],
)
def test_the_mirror_is_that_of_the_systems_own_release(
    tmp_path: Path, name: str, text: str, source: Source | None
) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / name).write_text(text)
    assert find_source(read_sources(tmp_path)) == source


def deb(path: Path, files: dict[str, bytes]) -> Package:
    """Write a package as dpkg would."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar.gz": b"odd", "data.tar.xz": data.getvalue()}
    content = b"!<arch>\n"
    for name, part in parts.items():
        content += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(part):<10}`\n".encode() + part + b"\n" * (len(part) % 2)
        )
    path.write_bytes(content)
    return Package("a", "1", "arm64", path)


def test_a_package_is_unpacked_and_one_that_leads_outside_is_not(tmp_path: Path) -> None:
    unpack(deb(tmp_path / "a.deb", {"./usr/lib/liba.so.1": b"library"}), tmp_path / "root")
    assert (tmp_path / "root/usr/lib/liba.so.1").read_bytes() == b"library"
    with pytest.raises(UsageError, match="cannot be unpacked"):
        unpack(deb(tmp_path / "b.deb", {"../outside": b"x"}), tmp_path / "root")
    assert not (tmp_path / "outside").exists()
    (tmp_path / "c.deb").write_bytes(b"!<arch>\nno package")
    with pytest.raises(UsageError, match="no Debian package"):
        unpack(Package("c", "1", "arm64", tmp_path / "c.deb"), tmp_path / "root")


def test_without_apt_the_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UsageError, match="libc6 of Debian bookworm for arm64 is missing: the program apt-get"
    ) as caught:
        download(("libc6",), architecture="arm64", suite="bookworm")
    assert "--runtime-file" in caught.value.hint
    assert not list(tmp_path.rglob("*.deb"))


def test_no_name_of_a_package_is_an_option_of_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(debian, "find_source", lambda _: Source("mirror", None))
    monkeypatch.setattr(debian, "_configure", lambda *_: {})
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(debian, "_apt", lambda arguments, *_: asked.append(arguments))
    download(("-odd", "libc6"), architecture="arm64", suite="bookworm")
    assert asked[-1][-3:] == ("--", "-odd", "libc6")


# --- compiling ---


@pytest.fixture(scope="session", name="own")
def own_target() -> Target:
    target = load_target("x86_64")
    if platform.machine() != target.architecture or platform.libc_ver()[0] != "glibc":
        pytest.skip("needs an x86-64 Linux with glibc")
    assert target.native is not None
    try:
        find_compiler(target.native.compiler)
    except UsageError as error:
        pytest.skip(str(error))
    return target


@pytest.mark.slow
def test_the_same_sources_give_the_same_program(own: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own.native is not None
    programs, zig = [], cache_folder() / "zig"  # its own cache, of the C library above all, takes long to make
    zig.mkdir(parents=True, exist_ok=True)
    for name in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        (tmp_path / name / "edgecompress").mkdir(parents=True)
        (tmp_path / name / "edgecompress" / "zig").symlink_to(zig)
        programs.append(bench_program(own.native.compiler).read_bytes())
    assert programs[0] == programs[1]
    assert str(tmp_path).encode() not in programs[0]


def test_without_a_compiler_the_extra_that_brings_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="no C compiler for aarch64-linux-gnu") as caught:
        find_compiler("aarch64-linux-gnu.2.28")
    assert "edgecompress[native]" in caught.value.hint


# --- bundles ---


@pytest.fixture(scope="session", name="libraries")
def folder_of_libraries(tmp_path_factory: pytest.TempPathFactory, own: Target) -> Path:
    """All libraries that the runtime needs, as this machine has them: what --runtime-file takes without a network."""
    package = importlib.util.find_spec("onnxruntime")
    places = list(package.submodule_search_locations or ()) if package else []
    runtime = [path for place in places for path in Path(place).glob("capi/libonnxruntime.so*")]
    folder = tmp_path_factory.mktemp("libraries")
    system = [Path("/lib64"), Path("/lib/x86_64-linux-gnu"), Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64")]
    assert own.native is not None
    waiting = [*runtime, own.native.loader]
    while waiting:
        name = waiting.pop()
        found = name if isinstance(name, Path) else next((p / name for p in system if (p / name).exists()), None)
        if found is None or not runtime:
            pytest.skip(f"not found on this machine: {name if runtime else 'libonnxruntime.so'}")
        if not (folder / found.name).exists():
            (folder / found.name).symlink_to(found)
            waiting += read_elf(found).needed
    return folder


def build(folder: Path, target: Target, runtime_file: Path) -> Path:
    sample = random_sample(load_model(DIGITS_MODEL), {})
    build_bundle(DIGITS_MODEL, folder, target=target, sample=sample, runtime="native", runtime_file=runtime_file)
    return folder


@pytest.fixture(scope="session", name="native_bundle")
def bundle_for_this_machine(tmp_path_factory: pytest.TempPathFactory, own: Target, libraries: Path) -> Path:
    return build(tmp_path_factory.mktemp("native") / "bundle", own, libraries)


@pytest.mark.slow
def test_a_bundle_is_complete_and_runs_in_an_empty_environment(native_bundle: Path) -> None:
    manifest = verify_bundle(native_bundle)
    assert (manifest.entry_point, manifest.runtime_form, manifest.python) == ("run.sh", "native", None)
    assert manifest.runtime["onnxruntime"]["source"] == "file"
    result = run_program(native_bundle, ["--runs", "2"])
    assert result["results"][0]["outputs_match"] is True
    placed = {path.name for path in (native_bundle / "lib").iterdir()}
    needed = {name for path in (native_bundle / "lib").iterdir() for name in read_elf(path).needed}
    assert needed <= placed, "nothing is taken from the system"
    for text in ("edgecompress-*/LICENSE", "onnxruntime-*/LICENSE", "onnxruntime-*/ThirdPartyNotices.txt"):
        assert list((native_bundle / "licenses").glob(text)), text


def test_the_script_enters_its_own_folder_and_starts_the_loader_whatever_its_name(tmp_path: Path) -> None:
    job = Job(
        folder=tmp_path,
        target=load_target("x86_64"),
        source=tmp_path,
        model="model.ecz",
        inputs=(),
        outputs=("o.pb",),
        tolerance=1e-3,
        imported=frozenset(),
    )
    for place in ("right/b", "wrong/b"):
        (tmp_path / place / "lib").mkdir(parents=True)
        (tmp_path / place / "SHA256SUMS").touch()
        loader = tmp_path / place / "lib" / "ld;x y"
        loader.write_text("#!/bin/sh\npwd\n")
        loader.chmod(0o755)
    (tmp_path / "right/b/run.sh").write_text(native._script(job, "ld;x y"))
    environment = {"PATH": os.environ["PATH"], "CDPATH": str(tmp_path / "wrong")}
    command = ["/bin/sh", "b/run.sh"]
    done = subprocess.run(command, cwd=tmp_path / "right", env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'right/b'}\n", "")


def tools(folder: Path, *names: str) -> str:
    """Return a PATH with these programs alone."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).symlink_to(shutil.which(name) or pytest.skip(f"{name} is not installed"))
    return str(folder)


Change = Callable[[Path], object]
CHANGES: dict[str, Change] = {
    "model.ecz": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "lib/libstdc++.so.6": lambda path: path.open("ab").write(b"x"),
    "test_data/output_0.pb": lambda path: path.unlink(),
    "lib/glibc-hwcaps/x86-64-v3/libm.so.6": lambda path: (path.parent.mkdir(parents=True), path.write_bytes(b"x")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("programs", [("dirname", "grep", "sha256sum"), ("dirname", "grep")], ids=["summed", "alone"])
def test_a_bundle_that_was_altered_does_not_run(
    tmp_path: Path, native_bundle: Path, name: str, programs: tuple[str, ...]
) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(native_bundle, copy, copy_function=os.link)
    if (copy / name).exists():
        shutil.copyfile(native_bundle / name, tmp_path / "changed")
        (copy / name).unlink()
        shutil.move(tmp_path / "changed", copy / name)
    CHANGES[name](copy / name)
    path = tools(tmp_path / "tools", *programs)
    command = ["/bin/sh", "run.sh", "--runs", "1"]
    done = subprocess.run(command, cwd=copy, env={"PATH": path}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert (done.stderr.startswith("error: "), name in done.stderr) == (True, True)


@pytest.mark.slow
def test_what_a_bundle_lacks_or_cannot_use_is_named(tmp_path: Path, own: Target, libraries: Path) -> None:
    few = tmp_path / "few"
    shutil.copytree(libraries, few, symlinks=True)
    (few / "libstdc++.so.6").unlink()
    with pytest.raises(UsageError, match=r"libstdc\+\+\.so\.6, which libonnxruntime\.so\.1 needs, is missing"):
        build(tmp_path / "a", own, few)
    arm = bytearray((libraries / "libstdc++.so.6").read_bytes())
    arm[18:20] = (183).to_bytes(2, "little")
    (few / "libstdc++.so.6").write_bytes(arm)
    with pytest.raises(UsageError, match=r"libstdc\+\+\.so\.6 is for aarch64"):
        build(tmp_path / "b", own, few)
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="holds no libonnxruntime"):
        build(tmp_path / "c", own, tmp_path / "none")
    assert not list(tmp_path.glob("[abc]"))


def test_a_reduced_runtime_is_known_by_what_it_says_of_onnx_files(tmp_path: Path) -> None:
    library = tmp_path / "libonnxruntime.so"
    library.write_bytes(b"\x7fELF..ONNX format model is not supported in this build.\0")
    assert opens_ort_alone(library)
    assert opens_ort_alone(tmp_path)
    library.write_bytes(b"\x7fELF..Load model from file\0")
    assert not opens_ort_alone(library)
    assert not opens_ort_alone(tmp_path / "none")
