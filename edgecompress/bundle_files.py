"""What goes into a bundle: the model, the installed runtime cut down to inference, licences, sample arrays."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import edgecompress
from edgecompress.bundle_run import CODE_FOLDER, MANIFEST
from edgecompress.errors import DataError, ModelError, UsageError

if TYPE_CHECKING:
    from edgecompress.targets import ModelForm

Array = npt.NDArray[Any]

ENTRY_POINT, SAMPLE, EXPECTED, README = "run.py", "sample_input.npz", "expected_output.npz", "README.txt"
LICENSES = "licenses"
OWN_NAMES = frozenset({ENTRY_POINT, SAMPLE, EXPECTED, README, LICENSES, CODE_FOLDER, MANIFEST})

_LICENSE_NAME = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|ThirdPartyNotices|Privacy|AUTHORS)", re.IGNORECASE)
_NEVER = ("*.pyi", "*.pyc", "*.pxd", "*.h", "*.a", "*.lib", "*/py.typed", "*/tests/*", "*/testing/*", "*/conftest.py")
# Parts that no inference imports. Inside numpy only what serves to build or test extensions: an application may well
# want its random numbers or transforms for preprocessing.
_UNUSED = {
    "onnxruntime": ("backend/*", "datasets/*", "quantization/*", "tools/*", "training/*", "transformers/*"),
    "numpy": ("_pyinstaller/*", "distutils/*", "doc/*", "f2py/*", "_core/*_tests.*", "_core/_simd.*"),
}
_C_API = "capi/libonnxruntime.so"


@dataclass(frozen=True)
class Component:
    """A distribution of which a bundle carries parts. ``tags`` say which systems its binaries are for."""

    name: str
    version: str
    license: str | None
    tags: tuple[str, ...]


def find_model(source: Path, form: ModelForm) -> Path:
    """Return the model file to bundle: of a folder the one in the target's form, else the other one."""
    if not source.is_dir():
        if not source.is_file():
            raise ModelError(f"{source}: no such file or folder", hint="name a folder written by compress, or a model")
        return source
    for name in (f"model.{form}", "model.ecz", "model.onnx"):
        if (source / name).is_file():
            return source / name
    raise ModelError(
        f"{source}: no model.ecz or model.onnx in it", hint="name a folder written by compress, or a model"
    )


def place_model(source: Path, folder: Path, form: ModelForm) -> str:
    """Put the model in the wanted form, with its external data, into ``folder`` and return its name there."""
    from edgecompress.container import pack, unpack
    from edgecompress.runtime.format import is_ecz

    destination = folder / f"model.{form}"
    with source.open("rb") as stream:
        packed = is_ecz(stream)
    if packed == (form == "ecz"):
        shutil.copyfile(source, destination)  # never loaded: it may be larger than the memory
        if form == "onnx":
            _place_external_data(source, folder)
    elif packed:
        unpack(source, destination)
    else:
        pack(source, destination)
    return destination.name


def _place_external_data(source: Path, folder: Path) -> None:
    from edgecompress.model import parse_model
    from edgecompress.tensors import all_tensors, external_range, is_external

    tensors = [tensor for tensor in all_tensors(parse_model(source)) if is_external(tensor)]
    for data in sorted({external_range(tensor, source.parent)[0] for tensor in tensors}):
        inner = data.relative_to(source.parent)
        if inner.parts[0] in OWN_NAMES:
            raise ModelError(
                f"{source}: its data file {inner} has a name that the bundle needs", hint="rename the data file"
            )
        place = folder / inner
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(data, place)


def needed_distributions(package: str, imported: frozenset[str]) -> list[Distribution]:
    """Return the distribution of ``package`` and those of its requirements that are among the ``imported`` packages.

    A runtime declares more than it needs for inference; what a process that ran the model has imported decides.
    Raises ``UsageError`` when ``package`` is not installed.
    """
    providers = importlib.metadata.packages_distributions()
    if package not in providers:
        raise UsageError(f"the runtime {package!r} is not installed", hint=f"pip install {package}")
    declared = _requirements(providers[package][0])
    names = {name for module in imported for name in providers.get(module, ()) if _canonical(name) in declared}
    return [importlib.metadata.distribution(name) for name in sorted(names | {providers[package][0]})]


def _requirements(root: str) -> set[str]:
    """Return the canonical names of ``root`` and of all that it requires, directly or not, extras left out."""
    found: set[str] = set()
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if _canonical(name) in found:
            continue
        found.add(_canonical(name))
        try:
            lines = importlib.metadata.requires(name) or []
        except PackageNotFoundError:  # required on another system only
            continue
        waiting += [match[0] for line in lines if "extra" not in line and (match := re.match(r"[\w.-]+", line))]
    return found


def _canonical(name: str) -> str:
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
    return Component(name, source.version, _license(source), tuple(sorted(tags)))


def copy_own_code(code: Path, licenses: Path) -> None:
    """Copy this package's decoder to ``code`` and its licence below ``licenses``."""
    package = Path(__file__).parent
    ours = [package / "__init__.py", package / "errors.py", *sorted((package / "runtime").glob("*.py"))]
    for path in ours:
        _copy(path, code / "edgecompress" / path.relative_to(package))
    installed = [file for file in importlib.metadata.files("edgecompress") or () if file.name == "LICENSE"]
    text = Path(str(installed[0].locate())) if installed else package.parent / "LICENSE"
    _copy(text, licenses / f"edgecompress-{edgecompress.__version__}" / "LICENSE")


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
            return str(metadata[key])
    return None


def _copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an .npz with any names as keys and the same bytes every time; raises ``DataError`` for what is no array.

    Texts are stored with a fixed width, so that reading needs no pickle.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in arrays.items():
            array = np.asarray(value)
            if array.dtype.kind == "O" and all(isinstance(item, str | bytes) for item in array.flat):
                array = array.astype(str)
            if array.dtype.kind == "O":
                raise DataError(
                    f"{name!r} is no tensor", hint="only models with tensors as inputs and outputs are bundled"
                )
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def size_table(folder: Path, paths: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return the bytes of each part on disk and in an archive; the manifest is not counted: the table stands in it."""
    rows = {name: [0, 0] for name in ("model", "runtime", "other", "total")}
    with ThreadPoolExecutor() as pool:
        packed_sizes = pool.map(_deflated_size, [folder / path for path in paths])
    for path, packed in zip(paths, packed_sizes, strict=True):
        top = path.partition("/")[0]
        part = "runtime" if top == CODE_FOLDER else "other" if top in OWN_NAMES else "model"
        for name in (part, "total"):
            rows[name][0] += (folder / path).stat().st_size
            rows[name][1] += packed
    return {name: {"installed_bytes": row[0], "download_bytes": row[1]} for name, row in rows.items()}


def _deflated_size(path: Path) -> int:
    packer, total = zlib.compressobj(6, wbits=-15), 0
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            total += len(packer.compress(block))
    # An archive keeps what does not shrink, such as an .ecz, as it is.
    return min(total + len(packer.flush()), path.stat().st_size)


def files_below(folder: Path) -> Iterable[str]:
    """Return the relative paths, with slashes, of all files below ``folder``, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
