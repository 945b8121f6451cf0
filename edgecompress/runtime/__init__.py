"""What a target needs to run a model: the `.ecz` reader and the session. Bundles carry this folder as it is."""

from __future__ import annotations

from edgecompress.runtime.session import load

__all__ = ["load"]
