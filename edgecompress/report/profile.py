"""What ``profile`` says: one row for each kernel, and how well their sum predicts the model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecompress.costs import Profile


def profile_facts(profile: Profile) -> dict[str, Any]:
    """Return a profile with the keys of ``profile --json``."""
    kernels = [
        {
            **dataclasses.asdict(cost.kernel),
            "each_ms": cost.each_ms,
            "total_ms": cost.each_ms * cost.kernel.count,
            "reused": cost.reused,
        }
        for cost in profile.costs
    ]
    rest = ("call_ms", "predicted_ms", "measured_ms", "left_out", "warnings")
    values = {name: getattr(profile, name) for name in rest}
    ratio = profile.predicted_ms / profile.measured_ms
    return {"kernels": kernels, **values, "ratio": ratio, "table": str(profile.table), "facts": dict(profile.facts)}


def profile_line(profile: Profile) -> str:
    """Return how the sum of the kernels compares with the model."""
    reused = sum(cost.reused for cost in profile.costs)
    ratio = profile.predicted_ms / profile.measured_ms
    return (
        f"predicted {profile.predicted_ms:.3f} ms, measured {profile.measured_ms:.3f} ms ({ratio - 1:+.0%}); "
        f"{len(profile.costs)} kernels, {reused} of them measured before"
    )
