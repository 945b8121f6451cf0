"""An iOS application's module: a Swift package that names the published runtime, the model among its resources."""

from __future__ import annotations

from edgecompress.bundle.manifest import Component, Job, Placed
from edgecompress.bundle.templates import Phone, place_module

_ACCELERATORS = {
    "CPUExecutionProvider": "cpu",
    "XnnpackExecutionProvider": "xnnpack",
    "CoreMLExecutionProvider": "coreML",
}
_IOS = Phone(templates="ios", accelerators=_ACCELERATORS, entry='"{path}": "{sha256}",')


def place_runtime(job: Job) -> Placed:
    """Put the Swift package around the placed model, and beside it the ``.ort`` form and its list of operators.

    The runtime is named, not carried: Xcode fetches it. Raises as ``place_module`` does.
    """
    place_module(job, _IOS)
    runtime = job.target.runtime
    purl = f"pkg:swift/github.com/microsoft/{runtime.package}@{runtime.version}"
    component = Component(runtime.package, runtime.version, "MIT", "swiftpm", purl)
    return Placed(entry_point="Package.swift", components=(component,))
