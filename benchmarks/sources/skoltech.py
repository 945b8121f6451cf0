"""Skoltech's "Compression of Deep Convolutional Neural Networks": Tucker-2 with EVBMF ranks on five networks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.export import export_onnx
from edgecompress.factorize.forms import Tucker2
from edgecompress.factorize.rank import evbmf_rank, ranks_for_share, supported
from edgecompress.factorize.sizes import FormName, count_parameters, fits
from edgecompress.factorize.solve import solve_layer
from edgecompress.graph import open_graph
from edgecompress.inference import run_once
from edgecompress.model import Model, load_model, signature
from edgecompress.orientation import read_weight
from edgecompress.passes.prepare import prepare
from edgecompress.passes.run import run_pass
from sources.cases import MISSING, open_case
from sources.models import factorized, layers_of, sizes_of, with_values, with_weights
from sources.tables import Options, Table

if TYPE_CHECKING:
    from edgecompress.moments import Moments

Array = NDArray[Any]
Ranks = tuple[int, ...]

TITLE = 'Skoltech\'s "Compression of Deep Convolutional Neural Networks"'

NETWORKS = {
    "alexnet": "AlexNet",
    "resnet18": "ResNet-18",
    "vgg16": "VGG-16",
    "shufflenet_v2": "ShuffleNet V2 1x",
    "densenet161": "DenseNet-161",
}
INPUT = (1, 3, 32, 32)
SHARE = 0.5


def formula(shape: tuple[int, ...], ranks: Ranks) -> float:
    """Return the source's compression ratio ``D^2 S T / (S R3 + D^2 R3 R4 + T R4)`` of one layer.

    ``shape`` is ``(T, S, D, D)`` and ``ranks`` are ``(R4, R3)``. For a 1 x 1 layer with one rank the core is left out:
    ``S T / (S R + T R)``.
    """
    outputs, inputs, *kernel = shape
    points = int(np.prod(kernel))
    core = points * ranks[0] * ranks[-1] if len(ranks) == 2 else 0
    return points * inputs * outputs / (inputs * ranks[-1] + core + outputs * ranks[0])


def scheme_of(shape: tuple[int, ...]) -> FormName:
    """Return Tucker-2 for a kernel, and for a 1 x 1 layer, which has none, the SVD that it then comes down to."""
    return "tucker2" if fits("tucker2", shape) else "svd"


def evbmf_ranks(weight: Array) -> Ranks:
    """Return EVBMF's ranks of the unfoldings by outputs and, with a kernel, by inputs; for 0 the full rank."""
    by_output = weight.reshape(weight.shape[0], -1)
    found = (evbmf_rank(by_output) or min(by_output.shape),)
    if scheme_of(weight.shape) == "svd":
        return found
    by_input = np.moveaxis(weight, 1, 0).reshape(weight.shape[1], -1)
    return supported("tucker2", weight.shape, (*found, evbmf_rank(by_input) or min(by_input.shape)))


def plant(weight: Array, ranks: Ranks, generator: np.random.Generator) -> Array:
    """Return a random weight of these ranks and the size of ``weight``, under noise a tenth as large."""
    core = generator.standard_normal((ranks[0], ranks[-1], *weight.shape[2:]))
    if len(ranks) == 1:
        core = np.eye(ranks[0]).reshape(core.shape)
    left, right = (generator.standard_normal((size, core.shape[axis])) for axis, size in enumerate(weight.shape[:2]))
    signal = np.einsum("os,st...,it->oi...", left, core, right, optimize=True)
    noise = 0.1 * generator.standard_normal(weight.shape)
    return np.asarray((signal / signal.std() + noise) * weight.std(), dtype=weight.dtype)


def convolutions(model: Model) -> dict[str, Array]:
    """Return the weights of the ungrouped convolutions by layer, without the first one."""
    graph = open_graph(model)
    _, *layers = layers_of(graph)
    return {layer.name: read_weight(graph, layer) for layer in layers if layer.op == "Conv" and layer.groups == 1}


@dataclass(frozen=True)
class Result:
    """A factorized network. ``ratios`` has, by layer, the formula's ratio and the one counted on the initializers."""

    before: Model
    after: Model
    ratios: Mapping[str, tuple[float, float]]

    @property
    def difference(self) -> float:
        """The largest difference to the network with the multiplied-out weights, over its largest output."""
        feeds = {signature(self.before.proto)[0][0].name: _pictures()}
        (expected,), (found,) = run_once(self.before, feeds).values(), run_once(self.after, feeds).values()
        return float(np.abs(found - expected).max() / np.abs(expected).max())


def compress(model: Model, ranks: Mapping[str, Ranks], moments: Mapping[str, Moments] | None = None) -> Result:
    """Factorize layers and rewrite the graph, which is checked. ``before`` has the dense oracle's weights."""
    weights = convolutions(model)
    smaller = {
        name: own
        for name, own in ranks.items()
        if count_parameters(scheme_of(weights[name].shape), weights[name].shape, own) < weights[name].size
    }
    forms = {
        name: solve_layer(scheme_of(weights[name].shape), weights[name], own, (moments or {}).get(name))
        for name, own in smaller.items()
    }
    feeds = {signature(model.proto)[0][0].name: _pictures()}
    after, changes = factorized(model, forms, feeds)
    old, new = sizes_of(model), sizes_of(after)
    ratios = {}
    for change in changes:
        form, counted = forms[change.layer], old[change.layer] / sum(new[name] for name in change.tensors)
        own = form.ranks if isinstance(form, Tucker2) else (form.rank,)
        ratios[change.layer] = formula(weights[change.layer].shape, own), counted
    oracle = with_values(model, {change.layer: change.dense() for change in changes if change.dense is not None})
    return Result(oracle, after, ratios)


def _pictures() -> Array:
    return np.random.default_rng(0).standard_normal(INPUT).astype(np.float32)


def open_network(name: str, folder: Path) -> Model:
    """Export a network of ``benchmarks/networks.py`` and fold its normalizations."""
    path = folder / f"{name}.onnx"
    export_onnx(f"networks:{name}", inputs=[INPUT], dynamic_batch=False, destination=path)
    return run_pass(load_model(path), "prepare", prepare, None)[0]


def sections(options: Options) -> Iterator[Table]:
    """Yield what EVBMF finds, what the rewritten networks hold, and a network that was trained."""
    found, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, title in NETWORKS.items():
            model = open_network(name, Path(folder))
            generator = np.random.default_rng(0)
            weights = convolutions(model)
            hidden = {name: tuple(size // 4 for size in _limits(weight)) for name, weight in weights.items()}
            planted = with_weights(model, {name: plant(weights[name], hidden[name], generator) for name in weights})
            drawn, again = _evbmf(model), _evbmf(planted)
            found.append(_found_row(title, weights, drawn, (hidden, again)))
            half = {each: ranks_for_share(scheme_of(w.shape), w.shape, SHARE) for each, w in weights.items()}
            rows.append(_row(f"{title}, random, EVBMF", model, drawn))
            rows.append(_row(f"{title}, random, half of each layer", model, half))
            rows.append(_row(f"{title}, planted, EVBMF", planted, again))
    yield Table(_FOUND, tuple(found), "Ranks by EVBMF", _FOUND_BEFORE)
    yield Table(_ROWS, tuple(rows), "Parameters, multiplications and numerics", _ROWS_BEFORE)
    yield trained(options)


_FOUND = ("network", "unfoldings", "published", "low rank in random weights", "planted rank", "why they differ")
_FOUND_BEFORE = (
    "Unfoldings of the ungrouped convolutions but the first: two of a kernel, one of a 1 x 1 layer, which has no core. "
    "In weights drawn at random there is nothing to find: EVBMF says 0, which keeps the full rank. So a second copy of "
    "each network has random weights of a quarter of each rank under noise of a tenth, for EVBMF to find these ranks."
)
_ROWS = (
    "network, weights, ranks", "layers", "published: formula", "ours: counted", "parameters", "MACs",
    "largest relative difference", "accuracy",
)  # fmt: skip
_ROWS_BEFORE = (
    "Tucker-2 of the kernels, SVD of the 1 x 1 layers; depthwise and dense layers stay, and so does what would not get "
    "smaller. *Formula* is the ratio of the factorized layers by D^2 S T / (S R3 + D^2 R3 R4 + T R4), without the core "
    "for 1 x 1; *counted* the ratio of their initializers in the rewritten graph. *Parameters* are all initializers. "
    "The difference is between the rewritten graph and the original with the multiplied-out weights, over the largest "
    "output. The networks are not trained here, so there is no accuracy to show."
)


def _limits(weight: Array) -> Ranks:
    return weight.shape[:2] if scheme_of(weight.shape) == "tucker2" else (min(weight.shape[:2]),)


def _evbmf(model: Model) -> dict[str, Ranks]:
    return {name: evbmf_ranks(weight) for name, weight in convolutions(model).items()}


def _found_row(
    title: str,
    weights: Mapping[str, Array],
    drawn: Mapping[str, Ranks],
    planted: tuple[Mapping[str, Ranks], Mapping[str, Ranks]],
) -> tuple[str, ...]:
    hidden, again = planted
    unfoldings = sum(len(ranks) for ranks in drawn.values())
    low = sum(rank < limit for name in drawn for rank, limit in zip(drawn[name], _limits(weights[name]), strict=True))
    right = sum(rank == wanted for name in again for rank, wanted in zip(again[name], hidden[name], strict=True))
    reason = "the source's weights are trained, these are not"
    cells = (f"found in {low}", f"found exactly in {right} of {unfoldings}")
    return (title, str(unfoldings), "ranks of trained weights", *cells, reason)


def _row(label: str, model: Model, ranks: Mapping[str, Ranks]) -> tuple[str, ...]:
    total, macs = sum(sizes_of(model).values()), _macs(model)
    result = compress(model, ranks)
    number = f"{len(result.ratios)} of {len(ranks)}"
    if not result.ratios:
        return (label, number, "", "", f"{total / 1e6:.2f} M", f"{macs / 1e6:.0f} M", "", "not trained here")
    sizes = sizes_of(model)
    cells = []
    for which in (0, 1):
        left = sum(sizes[name] / ratios[which] for name, ratios in result.ratios.items())
        cells.append(f"{sum(sizes[name] for name in result.ratios) / left:.6f}")
    if not all(np.isclose(*each, rtol=1e-12) for each in result.ratios.values()):
        cells[1] += " (layers DIFFER)"
    left, work = sum(sizes_of(result.after).values()), _macs(result.after)
    cells.append(f"{total / 1e6:.2f} to {left / 1e6:.2f} M")
    cells.append(f"{macs / 1e6:.0f} to {work / 1e6:.0f} M")
    return (label, number, *cells, f"{result.difference:.1e}", "not trained here")


def _macs(model: Model) -> int:
    return sum(layer.macs or 0 for layer in layers_of(open_graph(model)))


def trained(options: Options) -> Table:
    """Show the recipe on a network that was trained, which the benchmark data has."""
    title = "A trained network: ResNet-20"
    if options.data is None:
        return Table(("note",), ((MISSING,),), title)
    case = open_case(options.data, "resnet20_cifar10", "cifar10")
    weights = convolutions(case.model)
    half = {each: ranks_for_share(scheme_of(w.shape), w.shape, SHARE) for each, w in weights.items()}
    rows = [("unchanged", "91.5", case.measure(case.model), "", "")]
    for label, ranks, published, reason in (
        ("EVBMF", _evbmf(case.model), "", "a rank to retrain from: too low where nothing is retrained"),
        ("half of each layer", half, "15.3", "probably another split of the two ranks; both are near chance"),
    ):
        plain, calibrated = (compress(case.model, ranks, known) for known in (None, case.moments))
        scores = [case.measure(result.after) for result in (plain, calibrated)]
        share = sum(sizes_of(plain.after).values()) / sum(sizes_of(case.model).values())
        what = f"Tucker-2, {label}: {len(plain.ratios)} of {len(ranks)} layers, {share:.0%} of the parameters"
        rows.append((what, published, *scores, reason))
    before = (
        f"Accuracy in % on {case.test.rows:,} test images, nothing retrained, calibrated on {case.calibration.rows:,} "
        "training images without labels. Published: the field's recipe on these weights."
    )
    return Table(
        ("what", "published", "ours, plain", "ours, calibrated", "why they differ"), tuple(rows), title, before
    )
