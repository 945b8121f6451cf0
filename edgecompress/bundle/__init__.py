"""Bundles: a folder with a model, the runtime and a program, complete for its target; see docs/bundle.md."""

from __future__ import annotations

from edgecompress.bundle.archive import archive_path, archive_suffix, verify_archive
from edgecompress.bundle.build import BundleSummary, build_archive, build_bundle
from edgecompress.bundle.launch import run_program
from edgecompress.bundle.manifest import Component, Job, Manifest, Placed, SizeRow, verify_bundle

__all__ = [
    "BundleSummary",
    "Component",
    "Job",
    "Manifest",
    "Placed",
    "SizeRow",
    "archive_path",
    "archive_suffix",
    "build_archive",
    "build_bundle",
    "run_program",
    "verify_archive",
    "verify_bundle",
]
