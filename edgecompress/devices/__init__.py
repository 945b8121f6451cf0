"""Devices that models are timed on."""

from __future__ import annotations

from edgecompress.devices.base import BenchOptions, Runner, open_runner

__all__ = ["BenchOptions", "Runner", "open_runner"]
