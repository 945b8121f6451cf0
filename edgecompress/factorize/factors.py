"""A form and its factors: per group for grouped convolutions, listed in the order in which they are applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.forms import CP, AffineLowRank, InputLowRank, LowRank, Separable, Spectral, Tucker2

Array = NDArray[Any]

ChannelForm = LowRank | InputLowRank | Separable | Tucker2 | CP
"""The forms that a group of a convolution can have."""


@dataclass(frozen=True)
class Grouped:
    """One form per group of a grouped convolution, all of the same kind and ranks.

    ``parts[g]`` stands for the outputs ``g O / G .. (g + 1) O / G`` of the weight ``(O, I / G, *kernel)``.
    """

    parts: tuple[ChannelForm, ...]

    @property
    def parameters(self) -> int:
        """How many values the factors hold."""
        return sum(part.parameters for part in self.parts)

    def macs(self, inputs: Sequence[int], outputs: Sequence[int]) -> int:
        """Return the multiply-accumulates; see ``count_macs``."""
        return sum(part.macs(inputs, outputs) for part in self.parts)

    def to_dense(self) -> Array:
        """Return the weight that the factors stand for, shape ``(O, I / G, *kernel)``, in float64."""
        return np.concatenate([part.to_dense() for part in self.parts])


Form = ChannelForm | AffineLowRank | Spectral | Grouped

_ORDER: dict[type, tuple[str, ...]] = {
    LowRank: ("right", "left"),
    AffineLowRank: ("right", "left"),
    InputLowRank: ("right", "left"),
    Separable: ("vertical", "horizontal"),
    Tucker2: ("in_factor", "core", "out_factor"),
    CP: ("in_factor", "vertical", "horizontal", "out_factor"),
    Spectral: ("coefficients",),
}


def factors(form: Form) -> tuple[Array, ...]:
    """Return the factors of the weight in the order in which they are applied; of groups, joined along axis 0.

    The bias of an ``AffineLowRank`` is not one of them: it is no part of the weight.
    """
    if isinstance(form, Grouped):
        return tuple(np.concatenate(step) for step in zip(*map(factors, form.parts), strict=True))
    return tuple(getattr(form, name) for name in _ORDER[type(form)])


def with_factors(form: Form, arrays: Sequence[Array]) -> Form:
    """Return ``form`` with other ``factors``, of the same shapes and in the same order.

    Raises ``ValueError`` for another number of factors or another shape.
    """
    expected, given = [each.shape for each in factors(form)], [each.shape for each in arrays]
    if expected != given:
        raise ValueError(f"the factors have shapes {expected}, not {given}")
    if isinstance(form, Grouped):
        split = zip(*(np.split(array, len(form.parts)) for array in arrays), strict=True)
        parts = (with_factors(part, own) for part, own in zip(form.parts, split, strict=True))
        return Grouped(cast("tuple[ChannelForm, ...]", tuple(parts)))
    changed: dict[str, Any] = dict(zip(_ORDER[type(form)], arrays, strict=True))
    return replace(form, **changed)
