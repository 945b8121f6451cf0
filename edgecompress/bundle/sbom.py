"""The bill of materials of a bundle: CycloneDX 1.5 as JSON, the same bytes for the same bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import edgecompress
from edgecompress.bundle.manifest import LICENSES, SBOM, TEST_DATA, files_below
from edgecompress.files import sha256_of

if TYPE_CHECKING:
    from edgecompress.bundle.manifest import Component, Job

# An expression of SPDX identifiers: what has spaces but no operator in between is a name.
_EXPRESSION = re.compile(r"[\w.+-]+( (AND|OR|WITH) [\w.+-]+)*")
_TEXTS = (".py", ".txt", ".sh", ".js", ".mjs", ".json", ".html", ".kt", ".kts", ".swift", ".xml", ".md", ".toml")


def write_sbom(job: Job, components: Sequence[Component], model_files: Sequence[str]) -> None:
    """Write what a bundle consists of: the model, the packages and our own part, and every binary file by its digest.

    There is no time and no serial number in it. The digest of a package is that of the archive it was fetched as;
    packages that were installed have none, but the binaries that came out of them do, as all do.
    """
    tool = {"type": "application", "name": "edgecompress", "version": edgecompress.__version__}
    content = {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "tools": {"components": [tool]},
            "component": {
                "type": "application",
                "bom-ref": "bundle",
                "name": f"bundle for {job.target.name}",
                "version": sha256_of(job.folder / job.model)[:16],
            },
        },
        "components": [
            *(_file(job, path, kind="machine-learning-model") for path in model_files),
            _own_part(),
            *(_package(part) for part in components),
            *(_file(job, path, kind="file") for path in files_below(job.folder) if _is_binary(path, model_files)),
        ],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (job.folder / SBOM).write_text(text, encoding="utf-8")


def _is_binary(path: str, model_files: Sequence[str]) -> bool:
    pure = PurePosixPath(path)
    papers = {LICENSES, TEST_DATA}.intersection(pure.parts)
    return not papers and path not in model_files and pure.suffix not in _TEXTS


def _file(job: Job, path: str, *, kind: str) -> dict[str, Any]:
    return {"type": kind, "bom-ref": f"file:{path}", "name": path, "hashes": _hashes(sha256_of(job.folder / path))}


def _own_part() -> dict[str, Any]:
    return {
        "type": "library",
        "bom-ref": "edgecompress",
        "name": "edgecompress",
        "version": edgecompress.__version__,
        "description": "the decoder and the benchmark program",
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }


def _package(part: Component) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "library",
        "bom-ref": part.purl,
        "name": part.name,
        "version": part.version,
        "purl": part.purl,
        "properties": [{"name": "edgecompress:source", "value": part.source}],
    }
    entry["properties"] += [{"name": "edgecompress:tag", "value": tag} for tag in part.tags]
    if part.sha256:
        entry["hashes"] = _hashes(part.sha256)
    if part.license:
        expression = _EXPRESSION.fullmatch(part.license)
        entry["licenses"] = [{"expression": part.license} if expression else {"license": {"name": part.license}}]
    return entry


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]
