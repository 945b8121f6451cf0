"""An Android application's module: Gradle and Kotlin that name the published runtime, the model among the assets."""

from __future__ import annotations

from edgecompress.bundle.manifest import Component, Job, Placed
from edgecompress.bundle.templates import Phone, place_module

_ACCELERATORS = {
    "CPUExecutionProvider": "CPU",
    "XnnpackExecutionProvider": "XNNPACK",
    "NnapiExecutionProvider": "NNAPI",
}
_ANDROID = Phone(templates="android", accelerators=_ACCELERATORS, entry='"{path}" to "{sha256}",')


def place_runtime(job: Job) -> Placed:
    """Put the Gradle module around the placed model, and beside it the ``.ort`` form and its list of operators.

    The runtime is named, not carried: Gradle fetches it. Raises as ``place_module`` does.
    """
    place_module(job, _ANDROID)
    runtime = job.target.runtime
    purl = f"pkg:maven/{runtime.package.replace(':', '/')}@{runtime.version}"
    component = Component(runtime.package, runtime.version, "MIT", "maven", purl)
    return Placed(entry_point="build.gradle.kts", components=(component,))
