"""Devices that models are timed on."""

from __future__ import annotations

from edgecompress.devices.base import Runner, open_runner

__all__ = ["Runner", "open_runner"]
