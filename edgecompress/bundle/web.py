"""The runtime in a browser: onnxruntime-web's WebAssembly, and a page that checks, runs and times the model."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

from edgecompress.bundle.fetch import npm_pack
from edgecompress.bundle.licenses import copy_own_license, copy_runtime_licenses
from edgecompress.bundle.manifest import LICENSES, README, Component, Job, Placed
from edgecompress.bundle.program import CODE_FOLDER
from edgecompress.errors import UsageError
from edgecompress.files import sha256_of, shared_folder

_ENTRY_POINT = "index.html"
_ABOUT = "package.json"
# All that a page needs on every browser with WebAssembly SIMD: the JavaScript in one file, threads included, and the
# CPU build. The package's other files are builds for WebGPU, WebNN and WebGL, and the same JavaScript in other forms.
_RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")


def place_runtime(job: Job) -> Placed:
    """Put the page, the decoder and the needed files of onnxruntime-web into the bundle.

    ``job.runtime_file`` is the package as ``npm pack`` writes it, or the folder of an installed one.
    Raises ``UsageError`` when the package cannot be had or lacks a file.
    """
    runtime = job.target.runtime
    source = job.runtime_file or npm_pack(runtime.package, runtime.version)
    code = job.folder / CODE_FOLDER
    code.mkdir(parents=True, exist_ok=True)
    about = _copy_package(source, code)
    pages = shared_folder("targets") / "web"
    shutil.copyfile(pages / _ENTRY_POINT, job.folder / _ENTRY_POINT)
    for path in sorted(pages.glob("*.js")):
        shutil.copyfile(path, code / path.name)
    name, version = str(about.get("name")), str(about.get("version"))
    copy_own_license(job.folder / LICENSES)
    copy_runtime_licenses(job.folder / LICENSES / f"{name}-{version}")
    component = Component(
        name,
        version,
        about.get("license"),
        "npm",
        f"pkg:npm/{name}@{version}",
        ("wasm32",),
        sha256_of(source) if source.is_file() else None,
    )
    (job.folder / README).write_text(_readme(job, component), encoding="utf-8")
    return Placed(entry_point=_ENTRY_POINT, components=(component,))


def _copy_package(source: Path, code: Path) -> dict[str, str]:
    """Copy the needed files out of a package, a ``.tgz`` or a folder, and return what it says of itself."""
    wanted = {f"dist/{name}": code / name for name in _RUNTIME}
    try:
        found = _read_package(source, {_ABOUT, *wanted})
    except (OSError, tarfile.TarError) as error:
        raise _not_a_package(source, f"it cannot be read ({error})") from None
    for name in (_ABOUT, *wanted):
        if name not in found:
            raise _not_a_package(source, f"{name} is missing in it")
    for name, destination in wanted.items():
        destination.write_bytes(found[name])
    return dict(json.loads(found[_ABOUT]))


def _not_a_package(source: Path, why: str) -> UsageError:
    return UsageError(
        f"{source} is no package of onnxruntime-web: {why}",
        hint="give the file that `npm pack onnxruntime-web` writes, or node_modules/onnxruntime-web",
    )


def _read_package(source: Path, names: set[str]) -> dict[str, bytes]:
    """Return those of ``names`` that a package has, in one pass: it is unpacked as it is read."""
    if source.is_dir():
        return {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
    found = {}
    with tarfile.open(source) as package:
        for member in package:
            stream = package.extractfile(member)  # None for a folder
            if stream and member.name.removeprefix("package/") in names:
                found[member.name.removeprefix("package/")] = stream.read()
    return found


def _readme(job: Job, runtime: Component) -> str:
    return f"""A page that runs and times a model in a browser with {runtime.name} {runtime.version}.

Serve this folder; a page cannot read files of the disk:

  edgecompress bench . --device browser://            time it in a browser of this machine, without a window
  edgecompress bench . --device browser:// --serve    print an address to open in any browser
  python3 -m http.server                              any other server does, too

Threads need a page from https or localhost, and a server that sends these headers:

  Cross-Origin-Opener-Policy: same-origin
  Cross-Origin-Embedder-Policy: require-corp

In a page of your own:

  import * as ort from "./{CODE_FOLDER}/{_RUNTIME[0]}";
{_usage(job.model)}"""


def _usage(model: str) -> str:
    """Return the lines that open the model, indented as in the README."""
    create = "const session = await ort.InferenceSession.create"
    if not model.endswith(".ecz"):
        return f'  {create}("{model}", {{ executionProviders: ["wasm"] }});\n'
    return f"""\
  import {{ decode }} from "./{CODE_FOLDER}/ecz.js";
  const bytes = new Uint8Array(await (await fetch("{model}")).arrayBuffer());
  const [model, ...data] = await decode(bytes);
  {create}(model.data, {{
    executionProviders: ["wasm"],
    externalData: data.map(({{ name, data }}) => ({{ path: name, data }})),
  }});
"""
