"""The factorized forms of a weight. Each multiplies out again: ``to_dense`` is the oracle of tests and reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.cosines import cosines
from edgecompress.factorize.sizes import count_macs

Array = NDArray[Any]


@dataclass(frozen=True)
class LowRank:
    """``W = left @ right`` for a canonical weight ``(O, I, *kernel)``.

    Shapes:
        left: ``(O, rank)``
        right: ``(rank, I, *kernel)``
    """

    left: Array
    right: Array

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return int(self.left.shape[1])

    @property
    def parameters(self) -> int:
        """How many values the factors hold."""
        return int(self.left.size + self.right.size)

    def macs(self, inputs: Sequence[int], outputs: Sequence[int]) -> int:
        """Return the multiply-accumulates; see ``count_macs``."""
        shape = (self.left.shape[0], *self.right.shape[1:])
        return count_macs("svd", shape, (self.rank,), inputs=inputs, outputs=outputs)

    def to_dense(self) -> Array:
        """Return the weight that the factors stand for, shape ``(O, I, *kernel)``, in float64."""
        flat = self.right.reshape(self.rank, -1).astype(np.float64)
        return (self.left.astype(np.float64) @ flat).reshape(self.left.shape[0], *self.right.shape[1:])


@dataclass(frozen=True)
class AffineLowRank:
    """A layer with its bias: ``y = left @ (right @ x + bias)``, so that ``[W b]`` together has the rank.

    Shapes:
        left: ``(O, rank)``
        right: ``(rank, I, *kernel)``
        bias: ``(rank,)``: what the first step adds
    """

    left: Array
    right: Array
    bias: Array

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return int(self.left.shape[1])

    @property
    def parameters(self) -> int:
        """How many values are stored; they stand for the weight and its bias."""
        return int(self.left.size + self.right.size + self.bias.size)

    def macs(self, inputs: Sequence[int], outputs: Sequence[int]) -> int:
        """Return the multiply-accumulates; see ``count_macs``."""
        return LowRank(self.left, self.right).macs(inputs, outputs)

    def to_dense(self) -> Array:
        """Return the weight that the factors stand for, shape ``(O, I, *kernel)``, in float64."""
        return LowRank(self.left, self.right).to_dense()

    def bias_to_dense(self) -> Array:
        """Return the bias of the layer that the form stands for, shape ``(O,)``, in float64."""
        return np.asarray(self.left.astype(np.float64) @ self.bias.astype(np.float64))


@dataclass(frozen=True)
class InputLowRank:
    """``W[o, i, k] = sum_r left[o, r, k] right[r, i]``: channels are mixed first (1 x 1), the kernel comes second.

    Shapes:
        left: ``(O, rank, *kernel)``
        right: ``(rank, I)``
    """

    left: Array
    right: Array

    @property
    def rank(self) -> int:
        """The channels between the two steps."""
        return int(self.right.shape[0])

    @property
    def parameters(self) -> int:
        """How many values the factors hold."""
        return int(self.left.size + self.right.size)

    def macs(self, inputs: Sequence[int], outputs: Sequence[int]) -> int:
        """Return the multiply-accumulates; see ``count_macs``."""
        shape = (self.left.shape[0], self.right.shape[1], *self.left.shape[2:])
        return count_macs("svd_in", shape, (self.rank,), inputs=inputs, outputs=outputs)

    def to_dense(self) -> Array:
        """Return the weight that the factors stand for, shape ``(O, I, *kernel)``, in float64."""
        left, right = self.left.astype(np.float64), self.right.astype(np.float64)
        return np.asarray(np.einsum("or...,ri->oi...", left, right))


@dataclass(frozen=True)
class Separable:
    """``W[o, i, a, b] = sum_r horizontal[o, r, 0, b] vertical[r, i, a, 0]``: ``kh x 1``, then ``1 x kw``.

    Shapes:
        vertical: ``(rank, I, kh, 1)``
        horizontal: ``(O, rank, 1, kw)``
    """

    vertical: Array
    horizontal: Array

    @property
    def rank(self) -> int:
        """The channels between the two steps."""
        return int(self.vertical.shape[0])

    @property
    def parameters(self) -> int:
        """How many values the factors hold."""
        return int(self.vertical.size + self.horizontal.size)

    def macs(self, inputs: Sequence[int], outputs: Sequence[int]) -> int:
        """Return the multiply-accumulates; see ``count_macs``."""
        shape = (self.horizontal.shape[0], *self.vertical.shape[1:3], self.horizontal.shape[3])
        return count_macs("separable", shape, (self.rank,), inputs=inputs, outputs=outputs)

    def to_dense(self) -> Array:
        """Return the weight that the factors stand for, shape ``(O, I, kh, kw)``, in float64."""
        horizontal, vertical = self.horizontal[:, :, 0].astype(np.float64), self.vertical[..., 0].astype(np.float64)
        return np.asarray(np.einsum("orb,ria->oiab", horizontal, vertical, optimize=True))


@dataclass(frozen=True)
class Tucker2:
    """``W[o, i, k] = sum_st out_factor[o, s] core[s, t, k] in_factor[t, i]`` (Kim et al. 2016).

    Runs as 1 x 1, the kernel, 1 x 1.

    Shapes:
        core: ``(rank_out, rank_in, *kernel)``
        out_factor: ``(O, rank_out)``
        in_factor: ``(rank_in, I)``
    """

    core: Array
    out_factor: Array
    in_factor: Array

    @property
    def ranks(self) -> tuple[int, int]:
        """The channels that leave and that enter the core: (out, in)."""
        return int(self.core.shape[0]), int(self.core.shape[1])

    @property
    def parameters(self) -> int:
        """How many values the factors hold."""
        return int(self.core.size + self.out_factor.size + self.in_factor.size)

    def macs(self, inputs: Sequence[int], outputs: Sequence[int]) -> int:
        """Return the multiply-accumulates; see ``count_macs``."""
        shape = (self.out_factor.shape[0], self.in_factor.shape[1], *self.core.shape[2:])
        return count_macs("tucker2", shape, self.ranks, inputs=inputs, outputs=outputs)

    def to_dense(self) -> Array:
        """Return the weight that the factors stand for, shape ``(O, I, *kernel)``, in float64."""
        core, left, right = (part.astype(np.float64) for part in (self.core, self.out_factor, self.in_factor))
        return np.asarray(np.einsum("os,st...,ti->oi...", left, core, right, optimize=True))


@dataclass(frozen=True)
class CP:
    """``W[o, i, a, b] = sum_r out_factor[o, r] vertical[r, a] horizontal[r, b] in_factor[r, i]``.

    Runs as 1 x 1, depthwise ``kh x 1``, depthwise ``1 x kw``, 1 x 1 (Lebedev et al. 2015).

    Shapes:
        in_factor: ``(rank, I)``
        vertical: ``(rank, kh)``
        horizontal: ``(rank, kw)``
        out_factor: ``(O, rank)``
    """

    in_factor: Array
    vertical: Array
    horizontal: Array
    out_factor: Array

    @property
    def rank(self) -> int:
        """How many components are summed."""
        return int(self.in_factor.shape[0])

    @property
    def parameters(self) -> int:
        """How many values the factors hold."""
        return int(self.in_factor.size + self.vertical.size + self.horizontal.size + self.out_factor.size)

    def macs(self, inputs: Sequence[int], outputs: Sequence[int]) -> int:
        """Return the multiply-accumulates; see ``count_macs``."""
        channels = (self.out_factor.shape[0], self.in_factor.shape[1])
        shape = (*channels, self.vertical.shape[1], self.horizontal.shape[1])
        return count_macs("cp", shape, (self.rank,), inputs=inputs, outputs=outputs)

    def to_dense(self) -> Array:
        """Return the weight that the factors stand for, shape ``(O, I, kh, kw)``, in float64."""
        parts = (self.out_factor, self.in_factor, self.vertical, self.horizontal)
        return np.asarray(np.einsum("or,ri,ra,rb->oiab", *(part.astype(np.float64) for part in parts), optimize=True))


@dataclass(frozen=True)
class Spectral:
    """A matrix by its lowest frequencies: ``W = 2 / sqrt(O d) cosines(p, O)^T @ coefficients @ cosines(q, d)``.

    Saves storage, not work: the runtime multiplies by the whole weight.

    Shapes:
        coefficients: ``(p, q)``
        shape: the canonical shape ``(O, I, *kernel)`` that it stands for; ``d = I * prod(kernel)``
    """

    coefficients: Array
    shape: tuple[int, ...]

    @property
    def ranks(self) -> tuple[int, int]:
        """How many frequencies are kept: (of the outputs, of the inputs)."""
        return int(self.coefficients.shape[0]), int(self.coefficients.shape[1])

    @property
    def parameters(self) -> int:
        """How many values are stored."""
        return int(self.coefficients.size)

    @property
    def gain(self) -> float:
        """What the product is multiplied by, so that the coefficients are of the weights' size: float16 needs it."""
        return 2.0 / math.sqrt(math.prod(self.shape))

    def macs(self, inputs: Sequence[int], outputs: Sequence[int]) -> int:
        """Return the multiply-accumulates; see ``count_macs``."""
        return count_macs("spectral", self.shape, self.ranks, inputs=inputs, outputs=outputs)

    def to_dense(self) -> Array:
        """Return the weight that the coefficients stand for, shape ``(O, I, *kernel)``, in float64."""
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        p, q = self.ranks
        flat = cosines(p, rows).T @ (self.gain * self.coefficients.astype(np.float64)) @ cosines(q, columns)
        return np.asarray(flat.reshape(self.shape))
