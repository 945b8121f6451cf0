"""Codebooks for a layer: k-means, then assignment with feedback, then the best values for that assignment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.cluster.feedback import Elimination, assign
from edgecompress.cluster.forms import Clustered
from edgecompress.cluster.kmeans import boundaries, kmeans
from edgecompress.cluster.refit import refit_codebook

if TYPE_CHECKING:
    from edgecompress.moments import Moments

Array = NDArray[Any]

_ROUNDS = 2


def to_codebook(
    weight: Array, clusters: int, moments: Moments, elimination: Elimination, *, keep: Array | None = None
) -> Clustered:
    """Cluster a canonical weight so that the layer's outputs lose little.

    Plain k-means gives the codebook: what the assignment aims at is spread like the weights themselves, and counting
    some inputs more does not make it better. One more round with the refitted values does, a little; further ones do
    not.

    Args:
        weight: ``(C_out, C_in / groups, *kernel)``, finite.
        clusters: 1 .. 256, at least 2 with ``keep``.
        moments: of the layer's inputs.
        elimination: of the same moments.
        keep: of the weight's shape; where it is false the value is zero, which then is one of the clusters.

    Raises:
        ValueError: ``clusters`` is outside the range, or ``weight`` is empty.
    """
    codebook = _start(weight, clusters, keep)
    for _ in range(_ROUNDS):
        form = _assigned(weight, codebook, elimination, keep)
        form = refit_codebook(weight, form, moments)
        codebook = form.codebook
    return form


def _assigned(weight: Array, codebook: Array, elimination: Elimination, keep: Array | None) -> Clustered:
    """Return the weight in the values of a codebook, those that nothing takes left out."""
    bounds = boundaries(codebook, np.promote_types(codebook.dtype, np.float32))
    values = assign(weight, elimination, lambda wanted: codebook[np.searchsorted(bounds, wanted)], keep)
    used, indices = np.unique(values, return_inverse=True)
    return Clustered(used, indices.reshape(weight.shape).astype(np.uint8))


def _start(weight: Array, clusters: int, keep: Array | None) -> Array:
    """Return the codebook of k-means; with ``keep`` that of what is kept, and zero."""
    if keep is None:
        return kmeans(weight, clusters).codebook
    if clusters < 2:
        raise ValueError(f"clusters must lie in 2 .. 256 where zero is one of them, not {clusters}")
    zero = np.zeros(1, weight.dtype)
    kept = weight[keep]
    return np.union1d(zero, kmeans(kept, clusters - 1).codebook) if kept.size else zero
