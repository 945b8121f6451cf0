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


def features(form: ChannelForm | AffineLowRank) -> Array:
    """Return the map ``(m, d)`` from a flattened patch to what enters the last factor, seen as ``(O, m)``; float64."""
    *others, last = factors(form)
    first = others[0].reshape(len(others[0]), -1).astype(np.float64)
    match form:
        case Tucker2(core, _, in_factor):
            wide = np.einsum("stk,ti->sik", core.reshape(*core.shape[:2], -1), in_factor, dtype=np.float64)
            return np.asarray(wide.reshape(len(core), -1))
        case CP(in_factor, vertical, horizontal, _):
            wide = np.einsum("ri,ra,rb->riab", in_factor, vertical, horizontal, dtype=np.float64)
            return np.asarray(wide.reshape(len(wide), -1))
        case _:  # the last factor has the rest of the kernel, which passes through the first
            points = last[0, 0].size
            passed = np.einsum("rp,bc->rbpc", first, np.eye(points))
            return np.asarray(passed.reshape(len(first) * points, -1))


def first_columns(form: ChannelForm | AffineLowRank, moment: Array) -> Array:
    """Return the mean moment ``(P, P)`` of what enters the first factor, seen as ``(rank, P)``, of a ``(d, d)`` one."""
    first = factors(form)[0]
    columns = first.size // len(first)
    points = len(moment) // columns
    blocks = moment.reshape(columns, points, columns, points)
    return np.asarray(np.einsum("pbqb->pq", blocks) / points)
