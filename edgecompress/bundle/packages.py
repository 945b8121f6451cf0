"""Python packages cut down to what inference needs: which ones, which files of them, and their licences."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import tempfile
import zipfile
from dataclasses import replace
from fnmatch import fnmatch
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath
from pathlib import Path

import edgecompress
from edgecompress.bundle.manifest import Component
from edgecompress.errors import UsageError
from edgecompress.files import sha256_of

_LICENSE_NAME = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|ThirdPartyNotices|Privacy|AUTHORS)", re.IGNORECASE)
_NEVER = ("*.pyi", "*.pyc", "*.pxd", "*.h", "*.a", "*.lib", "*/py.typed", "*/tests/*", "*/testing/*", "*/conftest.py")
# Parts that no inference imports. Inside numpy only what serves to build or test extensions: an application may well
# want its random numbers or transforms for preprocessing.
_UNUSED = {
    "onnxruntime": ("backend/*", "datasets/*", "quantization/*", "tools/*", "training/*", "transformers/*"),
    "numpy": (
        *("_pyinstaller/*", "distutils/*", "doc/*", "f2py/*", "_core/*_tests.*", "_core/_simd.*"),
        *("_core/include/*", "_core/lib/*", "random/_examples/*", "*/README.rst"),
    ),
}
_C_API = "capi/libonnxruntime.so"


def needed_packages(package: str, imported: frozenset[str]) -> tuple[str, ...]:
    """Return the names of ``package`` and of its requirements that are among the ``imported`` packages.

    A runtime declares more than it needs for inference; what a process that ran the model has imported decides.
    Raises ``UsageError`` when ``package`` is not installed.
    """
    root = distribution_of(package).metadata["Name"]
    declared = _requirements(root)
    providers = importlib.metadata.packages_distributions()
    names = {name for module in imported for name in providers.get(module, ()) if canonical(name) in declared}
    return tuple(sorted(names | {root}))


def copy_wheel(path: Path, code: Path, licenses: Path) -> Component:
    """Unpack a wheel and copy what inference needs of it."""
    with tempfile.TemporaryDirectory() as name:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(name)  # which leaves out what would lead outside
            distribution = next(iter(importlib.metadata.distributions(path=[name])))
        except (OSError, zipfile.BadZipFile, StopIteration) as error:
            raise UsageError(f"{path} is no wheel: {error}", hint="fetch it again") from None
        return replace(copy_distribution(distribution, code, licenses), sha256=sha256_of(path))


def distribution_of(package: str) -> Distribution:
    """Return the installed distribution that holds ``package``; raises ``UsageError`` where there is none."""
    names = importlib.metadata.packages_distributions().get(package)
    if not names:
        raise UsageError(f"the runtime {package!r} is not installed", hint=f"pip install {package}")
    return importlib.metadata.distribution(names[0])


def _requirements(root: str) -> set[str]:
    """Return the canonical names of ``root`` and of all that it requires, directly or not, extras left out."""
    found: set[str] = set()
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if canonical(name) in found:
            continue
        found.add(canonical(name))
        try:
            lines = importlib.metadata.requires(name) or []
        except PackageNotFoundError:  # required on another system only
            continue
        waiting += [match[0] for line in lines if "extra" not in line and (match := re.match(r"[\w.-]+", line))]
    return found


def canonical(name: str) -> str:
    """Return a package's name as its index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def copy_distribution(source: Distribution, code: Path, licenses: Path) -> Component:
    """Copy what inference needs of an installed distribution to ``code`` and its licence texts below ``licenses``.

    Raises ``UsageError`` when the installer left no list of its files.
    """
    name = source.metadata["Name"]
    if not source.files:
        hint = "install it with pip; other installers do not record which files belong to it"
        raise UsageError(f"the files of the installed {name} are not known", hint=hint)
    static = _is_static(source)
    for file in source.files:
        metadata, path = file.parts[0].endswith((".dist-info", ".data")), Path(str(file.locate()))
        if file.parts[0] == ".." or not path.is_file():
            continue
        if _LICENSE_NAME.match(file.name) and file.suffix not in (".py", ".pyc"):
            kept = file.parts[2 if metadata and file.parts[1] == "licenses" else int(metadata) :]
            _copy(path, licenses.joinpath(f"{name}-{source.version}", *kept))
        elif not metadata and _serves_inference(file, static=static):
            _copy(path, code / file)
    tags = re.findall(r"^Tag: (\S+)", source.read_text("WHEEL") or "", re.MULTILINE)
    version = source.version
    return Component(
        name, version, _license(source), "pip", f"pkg:pypi/{canonical(name)}@{version}", tuple(sorted(tags))
    )


def copy_own_code(code: Path) -> None:
    """Copy this package's decoder to ``code``."""
    package = Path(edgecompress.__file__).parent
    ours = [package / "__init__.py", package / "errors.py", *sorted((package / "runtime").glob("*.py"))]
    for path in ours:
        _copy(path, code / "edgecompress" / path.relative_to(package))


def _is_static(source: Distribution) -> bool:
    """Tell whether the runtime's Python module has the runtime linked in and never opens its separate C library."""
    modules = [file for file in source.files or () if "pybind11_state" in file.name and file.suffix == ".so"]
    contents = [Path(str(file.locate())).read_bytes() for file in modules]
    return bool(contents) and not any(b"libonnxruntime.so" in content for content in contents)


def _serves_inference(file: PackagePath, *, static: bool) -> bool:
    text = file.as_posix()
    package, _, inner = text.partition("/")
    if any(fnmatch(text, pattern) for pattern in _NEVER) or file.suffix == ".pth":
        return False
    if package == "onnxruntime" and static and inner.startswith(_C_API):
        return False
    return not any(fnmatch(inner, pattern) for pattern in _UNUSED.get(package, ()))


def _license(source: Distribution) -> str | None:
    metadata = source.metadata
    for key in ("License-Expression", "License"):
        if key in metadata and 0 < len(metadata[key]) < 200:
            return " ".join(str(metadata[key]).split())
    return None


def _copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
