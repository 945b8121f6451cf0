"""Debian packages for another architecture or suite, fetched by apt without touching the system's own state."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from edgecompress.bundle.fetch import cached, missing, refuse_full_disk
from edgecompress.bundle.manifest import Component
from edgecompress.errors import UsageError
from edgecompress.files import sha256_of

_APT_FOLDER = Path("/etc/apt")
_ALIASES = frozenset({"oldstable", "stable", "testing", "unstable", "sid"})
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")  # of the package debian-archive-keyring
_OPTION = re.compile(r"\[([^]]*)\]")
_AR_MAGIC, _AR_HEADER_BYTES = b"!<arch>\n", 60


@dataclass(frozen=True)
class Source:
    """Where packages come from: the mirror, and the file with the keys that its lists are signed by, where known."""

    mirror: str
    keyring: str | None


@dataclass(frozen=True)
class Package:
    """A package that was fetched. ``path`` is the .deb file."""

    name: str
    version: str
    architecture: str
    path: Path

    def component(self) -> Component:
        """Return it as a part of a bundle; its licences are in the text that it brings."""
        place = f"pkg:deb/debian/{self.name}@{quote(self.version)}?arch={self.architecture}"
        return Component(self.name, self.version, None, "debian", place, (self.architecture,), sha256_of(self.path))


def download(names: Sequence[str], *, architecture: str, suite: str) -> tuple[Package, ...]:
    """Return packages of a suite and all that they depend on, from the cache where they were fetched before.

    apt resolves and checks them (signatures and digests), with a configuration and state of its own; the mirror is that
    of the machine's sources. Raises ``UsageError`` where apt, a source or the network is missing, or a package.
    """
    what = f"{', '.join(names)} of Debian {suite} for {architecture}"

    def fetch(folder: Path) -> None:
        if shutil.which("apt-get") is None:
            raise missing(what, "the program apt-get is not installed")
        source = find_source(read_sources(_APT_FOLDER))
        if source is None:
            raise missing(what, f"no source of Debian packages is configured in {_APT_FOLDER}")
        with tempfile.TemporaryDirectory(prefix="edgecompress-") as name:
            state = Path(name)
            environment = _configure(state, source, architecture, suite)
            _apt(("update", "--error-on=any"), environment, what)
            _apt(("install", "--download-only", "--yes", "--no-install-recommends", "--", *names), environment, what)
            for path in sorted((state / "archives").glob("*.deb")):
                shutil.copyfile(path, folder / path.name)

    files = cached(f"debian {suite} {architecture} {' '.join(names)}", fetch)
    return tuple(_package(path) for path in files)


def unpack(package: Package, folder: Path) -> None:
    """Unpack the files of a package to ``folder``; raises ``UsageError`` for what is no package."""
    try:
        with package.path.open("rb") as stream:
            start = _find_data(stream.read())
            stream.seek(start)
            with tarfile.open(fileobj=stream, mode="r:*") as archive:
                archive.extractall(folder, filter="tar")  # nothing gets outside the folder
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UsageError(f"{package.path} cannot be unpacked: {error}", hint="remove it to fetch it again") from None


def _find_data(content: bytes) -> int:
    """Return where the archive of the files begins in a .deb file (which is an archive in the format of ar)."""
    at = len(_AR_MAGIC)
    while content.startswith(_AR_MAGIC) and at + _AR_HEADER_BYTES <= len(content):
        header = content[at : at + _AR_HEADER_BYTES]
        at += _AR_HEADER_BYTES
        if header.startswith(b"data.tar"):
            return at
        size = int(header[48:58])
        at += size + size % 2
    raise ValueError("it is no Debian package")


def _package(path: Path) -> Package:
    """Read name, version and architecture off a file name as apt writes it."""
    name, version, architecture = path.stem.split("_")
    return Package(name, version.replace("%3a", ":"), architecture, path)


# --- the machine's sources ---


def read_sources(folder: Path) -> Iterator[Mapping[str, str]]:
    """Yield the sources configured below ``folder`` (/etc/apt) with lower-case keys, in both forms that apt reads."""
    places = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    for path in places:
        if not path.is_file() or path.suffix not in (".list", ".sources"):
            continue
        lines = [line for line in path.read_text(errors="replace").splitlines() if not line.lstrip().startswith("#")]
        yield from _paragraphs(lines) if path.suffix == ".sources" else map(_one_line, lines)


def _paragraphs(lines: Sequence[str]) -> Iterator[Mapping[str, str]]:
    for block in "\n".join(lines).split("\n\n"):
        fields = (line.partition(":") for line in block.splitlines() if line and not line[0].isspace())
        yield {key.strip().lower(): value.strip() for key, _, value in fields}


def _one_line(line: str) -> Mapping[str, str]:
    found = _OPTION.search(line)
    options = dict(item.partition("=")[::2] for item in found[1].split()) if found else {}
    kind, mirror, suite, *components = [*_OPTION.sub("", line).split(), "", "", ""]
    return {"types": kind, "uris": mirror, "suites": suite, "components": " ".join(components), **options}


def find_source(sources: Iterator[Mapping[str, str]]) -> Source | None:
    """Return the first source with the main part of the system's own release: others are not of the distribution."""
    releases = _ALIASES | {_codename()}
    for source in sources:
        switched_on = source.get("enabled", "yes").lower() not in ("no", "false", "0")
        main = "main" in source.get("components", "").split() and "deb" in source.get("types", "").split()
        if switched_on and main and releases.intersection(source.get("suites", "").split()):
            keyring = source.get("signed-by", "") or (str(_KEYRING) if _KEYRING.is_file() else "")
            return Source(source["uris"].split()[0], keyring or None)
    return None


def _codename() -> str:
    try:
        lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition("=")[2].strip("\"'") for line in lines if line.startswith("VERSION_CODENAME=")), "")


# --- apt ---


def _configure(state: Path, source: Source, architecture: str, suite: str) -> Mapping[str, str]:
    """Write a configuration of apt that keeps all below ``state``; return the environment in which it holds."""
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True)
    (state / "status").touch()  # nothing is installed, so everything that is needed is fetched
    options = f"arch={architecture}" + (f" signed-by={source.keyring}" if source.keyring else "")
    (state / "sources.list").write_text(f"deb [{options}] {source.mirror} {suite} main\n", encoding="utf-8")
    proxies = subprocess.run(["apt-config", "dump", "--no-empty", "Acquire"], capture_output=True, check=False).stdout
    own = {
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state,
        "Dir::Cache::archives": state / "archives",
        "Dir::Etc::sourcelist": state / "sources.list",
        **{f"Dir::Etc::{name}": "/dev/null" for name in ("sourceparts", "main", "parts", "preferencesparts")},
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "root",  # the folder is readable for its owner alone
        "Acquire::Languages": "none",
        "Acquire::Retries": 2,
    }
    lines = [f'{key} "{value}";\n' for key, value in own.items()]
    (state / "apt.conf").write_bytes(proxies + "".join(lines).encode())
    return {**os.environ, "APT_CONFIG": str(state / "apt.conf"), "LC_ALL": "C"}


def _apt(arguments: Sequence[str], environment: Mapping[str, str], what: str) -> None:
    command = ["apt-get", "-q", *arguments]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        refuse_full_disk(text := done.stderr.decode(errors="replace"))
        said = text.splitlines()
        reason = next((line for line in said if line.startswith("E: ")), said[-1] if said else "apt-get failed")
        keys = any("NO_PUBKEY" in line for line in said)
        reason = "its keys are unknown: install debian-archive-keyring" if keys else reason.removeprefix("E: ")
        raise missing(what, reason[:300])
