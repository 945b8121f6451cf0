from __future__ import annotations

import gzip
import io
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from edgecompress.bundle import build_archive, build_bundle, verify_archive
from edgecompress.bundle.archive import archive_path, archive_suffix, write_archive
from edgecompress.errors import FormatError, ModelError, OutputError, UsageError
from edgecompress.targets import list_targets, load_target

TARGET = load_target("x86_64")
X = {"x": np.zeros((2, 2), np.float32)}
TEXT = '<ir_version: 8, opset_import: ["" : 13]> g (float[2, 2] x) => (float[2, 2] y) { y = Relu(x) }'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without a runtime, with one file that can be run."""
    path = tmp_path_factory.mktemp("bundles") / "b"
    build_bundle(model, path, target=TARGET, sample=X, runtime="none")
    (path / "README.txt").chmod(0o755)
    return path


@pytest.fixture(params=[".tar.gz", ".zip"])
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def archive(folder: Path, tmp_path: Path, suffix: str) -> Path:
    path = tmp_path / f"b{suffix}"
    write_archive(folder, "b", path, suffix)
    return path


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_unpacks_to_the_same_files_with_the_programs_of_any_system(archive: Path, folder: Path, suffix: str) -> None:
    place = archive.parent / "out"
    place.mkdir()
    command = ["tar", "-xzf", archive, "-C", place] if suffix == ".tar.gz" else ["unzip", "-q", archive, "-d", place]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    subprocess.run(command, check=True)
    assert content_of(place / "b") == content_of(folder)
    assert [path.name for path in (place / "b").iterdir() if path.is_file() and path.stat().st_mode & 0o111] == [
        "README.txt"
    ]


def test_an_intact_archive_is_accepted_and_nothing_is_unpacked(archive: Path, folder: Path) -> None:
    assert verify_archive(archive).model == "model.ecz"
    assert list(archive.parent.iterdir()) == [archive]


def test_the_same_bundle_gives_the_same_bytes(model: Path, tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / "one" / f"b{suffix}", tmp_path / "two" / f"b{suffix}"]
    for path in paths:
        summary = build_archive(model, path, target=TARGET, sample=X, runtime="none")
        assert summary.path == path
        assert [other.name for other in path.parent.iterdir()] == [path.name]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert verify_archive(paths[0]).runtime_form == "none"


def test_a_failure_leaves_nothing_and_an_existing_file_stays(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    with pytest.raises(UsageError, match=r"b\.rar is no name of an archive"):
        build_archive(model, tmp_path / "b.rar", target=TARGET, sample=X, runtime="none")
    with pytest.raises(UsageError, match="no name of an archive"):
        build_archive(model, tmp_path / ".zip", target=TARGET, sample=X, runtime="none")
    with pytest.raises(ModelError) as caught:
        build_archive(model, path, target=TARGET, sample={"wrong": X["x"]}, runtime="none")
    assert caught.value.message.startswith(f"{path}/model.ecz: ")  # the name that the user knows
    assert list(tmp_path.iterdir()) == []
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        build_archive(model, path, target=TARGET, sample=X, runtime="none")
    assert path.read_text() == "mine"


def test_a_full_disk_is_an_output_error_and_leaves_nothing(
    tmp_path: Path, full_disk: Callable[[int], Path], suffix: str
) -> None:
    proto = onnx.parser.parse_model(TEXT.replace("Relu(x)", "Add(x, w)").replace("2, 2", "90, 90"))
    weight = np.random.default_rng(0).random((90, 90), np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "large.onnx")  # 32 KB that do not shrink
    for kibibytes in (16, 160):  # too small for the folder; for the archive beside it
        place = full_disk(kibibytes)
        with pytest.raises(OutputError, match="no space left on the disk") as caught:
            build_archive(
                tmp_path / "large.onnx",
                place / f"b{suffix}",
                target=TARGET,
                sample={"x": np.zeros((90, 90), np.float32)},
                runtime="none",
            )
        assert f"b{suffix}" in caught.value.message
        assert list(place.iterdir()) == []


def test_linux_gets_tar_and_the_others_zip() -> None:
    found = {name: archive_suffix(load_target(name)) for name in list_targets()}
    assert {name for name, suffix in found.items() if suffix == ".tar.gz"} == {"arm64", "armhf", "x86_64"}


def test_the_name_of_an_archive_ends_as_its_target_needs_it() -> None:
    linux, web = load_target("arm64"), load_target("web")
    assert archive_path(Path("a/b"), linux) == archive_path(Path("a/b.tar.gz"), linux) == Path("a/b.tar.gz")
    assert archive_path(Path("b.v2"), web) == Path("b.v2.zip")
    for out, target in (("b.zip", linux), ("b.tar.gz", web)):
        with pytest.raises(UsageError, match=f"an archive for {target.name} ends in"):
            archive_path(Path(out), target)
    for out in (".", "..", "/", "a/.."):
        with pytest.raises(UsageError, match="no name of an archive"):
            archive_path(Path(out), linux)


Files = list[tuple[str, bytes]]


def pack(path: Path, files: Files) -> Path:
    """Write an archive with these entries in this order, whatever they are."""
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files:
                archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    else:
        with tarfile.open(path, "w:gz", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in files:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def entries(folder: Path) -> Files:
    files = [(f"b/{name}", content) for name, content in content_of(folder).items()]
    return sorted(files, key=lambda file: (file[0] != "b/manifest.json", file[0]))


def flip(files: Files) -> Files:
    name, content = files[1]
    return [files[0], (name, bytes([content[0] ^ 1]) + content[1:]), *files[2:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files[1:], r"first file is not manifest\.json"),
        (lambda files: files[1:] + files[:1], r"first file is not manifest\.json"),
        (lambda files: [("manifest.json", files[0][1]), *files[1:]], r"first file is not manifest\.json"),
        (lambda files: [("../manifest.json", files[0][1])], r"first file is not manifest\.json"),
        (lambda files: [("/manifest.json", files[0][1])], r"first file is not manifest\.json"),
        (lambda _: [("b/manifest.json", b"{}")], "schema_version"),
        (lambda _: [("b/manifest.json", b" " * 16_000_001)], "larger than any"),
        (lambda files: files[:-1], "is missing"),
        (lambda files: [*files, files[-1]], "comes twice"),
        (lambda files: [*files, files[0]], "comes twice"),
        (lambda files: [*files, ("b/more", b"")], "'b/more' is not in manifest.json"),
        (lambda files: [*files, ("b/../../evil", b"")], "evil' is not in manifest.json"),
        (lambda files: [*files, ("/etc/evil", b"")], "evil' is not in manifest.json"),
        (lambda files: [*files, ("c/README.txt", b"")], "'c/README.txt' is not in manifest.json"),
        (flip, "its SHA-256 is not that"),
        (lambda files: [*files[:-1], (files[-1][0], files[-1][1] + b"x")], "was altered: it has"),
        (lambda _: [], "first file is not|no archive that can be read"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_archive_is_refused(
    folder: Path, tmp_path: Path, suffix: str, change: Callable[[Files], Files], message: str
) -> None:
    path = pack(tmp_path / f"b{suffix}", change(entries(folder)))
    with pytest.raises(FormatError, match=message) as caught:
        verify_archive(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_a_tar_entry_that_is_no_file_is_refused(folder: Path, tmp_path: Path, kind: bytes) -> None:
    path = pack(tmp_path / "b.tar.gz", entries(folder)[:1])
    entry = tarfile.TarInfo("b/README.txt")
    entry.type, entry.linkname = kind, "../../evil"
    data = gzip.decompress(path.read_bytes()).rstrip(b"\0")
    padded = data + bytes(-len(data) % 512)
    path.write_bytes(gzip.compress(padded + entry.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)))
    with pytest.raises(FormatError, match="is not a plain file"):
        verify_archive(path)


def test_a_tar_entry_of_a_negative_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    # A read of -1 bytes would take all there is.
    header = bytearray(tarfile.TarInfo("b/manifest.json").tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"\xff" * 12  # -1 in base 256
    header[148:156] = b"%06o\0 " % (sum(header[:148] + header[156:]) + 8 * 32)
    assert tarfile.TarInfo.frombuf(bytes(header), "utf-8", "strict").size == -1
    path = tmp_path / "b.tar.gz"
    path.write_bytes(gzip.compress(bytes(header) + b"{}" * 5000))
    with pytest.raises(FormatError, match="is not a plain file"):
        verify_archive(path)


def test_a_stream_of_gzip_is_read_to_its_checksum(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    write_archive(folder, "b", path, ".tar.gz")
    whole = path.read_bytes()
    verify_archive(path)
    for cut in range(1, 9):
        path.write_bytes(whole[:-cut])
        with pytest.raises(FormatError):
            verify_archive(path)
    for at in range(-8, 0):  # the checksum and the size
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[len(whole) + at + 1 :])
        with pytest.raises(FormatError):
            verify_archive(path)
    inner = gzip.decompress(whole)
    for rest in (b"x", bytes(2 << 20)):  # what is hidden behind the end, and what fills memory
        path.write_bytes(gzip.compress(inner + rest))
        with pytest.raises(FormatError, match="something follows its last file"):
            verify_archive(path)


def test_headers_of_unbounded_size_are_never_read(folder: Path, tmp_path: Path) -> None:
    long = tarfile.TarInfo("b/" + 300 * "x")
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / "b.tar.gz"
        path.write_bytes(gzip.compress(long.tobuf(form) + bytes(1024)))
        with pytest.raises(FormatError, match="is not a plain file"):
            verify_archive(path)


def test_a_zip_entry_that_is_a_link_or_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    for name, mode in (("b/README.txt", 0o120777), ("b/lib/", 0o40755)):
        path = pack(tmp_path / "b.zip", entries(folder)[:1])
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(entry, "../../evil")
        with pytest.raises(FormatError, match="is not a plain file"):
            verify_archive(path)


def test_every_truncation_and_other_files_are_refused(archive: Path) -> None:
    whole = archive.read_bytes()
    for size in [*range(0, len(whole) - 30, 97), len(whole) // 2]:  # 30: what is after the last file's data
        archive.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            verify_archive(archive)
    for content in (b"", b"PK\3\4", gzip.compress(b"x" * 600), gzip.compress(bytes(1024)), b"\x1f\x8b"):
        archive.write_bytes(content)
        with pytest.raises(FormatError):
            verify_archive(archive)
    with pytest.raises(FormatError):
        verify_archive(archive.parent / "none")


def test_a_flipped_bit_is_noticed(archive: Path) -> None:
    whole = archive.read_bytes()
    manifest = verify_archive(archive)
    for at in range(0, len(whole), 41):
        archive.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            found = verify_archive(archive)
        except FormatError:
            continue
        assert found == manifest  # in a time, a mode, padding: nothing that is listed changed


def test_the_command_line_writes_and_verifies_archives(model: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    arguments = ["bundle", model, "-o", tmp_path / "b", "--runtime", "none", "--archive"]
    done = cli(*arguments, "--json")
    assert done.code == 0
    path = tmp_path / "b.tar.gz"
    assert {key: done.json[key] for key in ("bundle", "target", "runtime", "was_run", "archive_bytes")} == {
        "bundle": str(path),
        "target": "x86_64",
        "runtime": "none",
        "was_run": False,
        "archive_bytes": path.stat().st_size,
    }
    assert cli("bundle", "--verify", path, "--json").json["ok"] is True
    assert cli(*arguments).code == 9  # it exists
    assert "archive: " in cli(*arguments, "--force").err
    assert cli("bundle", model, "-o", tmp_path / "w.zip", "--target", "web", "--runtime", "none", "--archive").code == 0
    assert cli("bundle", "--verify", tmp_path / "w.zip").err.startswith("ok: 6 files, target web, runtime none")
    for out in (".", "z.zip"):
        done = cli("bundle", model, "-o", out, "--runtime", "none", "--archive")
        assert (done.code, done.err.startswith("error: ")) == (2, True)
    assert "bench OTHER_BUNDLE" in cli("bundle", model, "-o", tmp_path / "n", "--runtime", "none").err
    path.write_bytes(path.read_bytes()[:-50])
    done = cli("bundle", "--verify", path)
    assert (done.code, done.out) == (4, "")
