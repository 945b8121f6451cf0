"""The tables of the sources: the published example, the formulas, the recipes, the networks."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from builders import model, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompress.factorize.sizes import count_parameters

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks are in the repository only")


def load(name: str) -> ModuleType:
    """Import a module of the benchmarks, which are scripts beside the package."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module(name)


def test_the_example_has_the_published_singular_values_and_errors():
    linear = load("sources.linear")
    values = np.linalg.svd(linear.EXAMPLE, compute_uv=False)
    assert np.round(values, 2).tolist() == [10.51, 5.06, 2.63]
    # published to four decimals; the forms are exact but for float64 rounding
    assert linear.squared_error(linear.EXAMPLE, 2) == pytest.approx(6.9048, abs=5e-5)
    assert linear.squared_error(linear.EXAMPLE, 1) == pytest.approx(values[1] ** 2 + values[2] ** 2, rel=1e-12)


def test_the_page_in_the_docs_shows_what_the_script_prints():
    linear, tables = load("sources.linear"), load("sources.tables")
    page = (ROOT / "docs" / "seeds.md").read_text()
    assert page.startswith(load("seeds").INTRODUCTION)
    assert tables.markdown(linear.example()) in page
    for picture in ("seeds/iris.svg", "seeds/photo.jpg"):
        assert f"]({picture})" in page
        assert 0 < (ROOT / "docs" / picture).stat().st_size < 150_000


def test_a_photo_at_full_rank_is_the_photo_and_psnr_counts_in_decibels():
    linear = load("sources.linear")
    picture = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    assert np.array_equal(linear.truncated_picture(picture, 6), picture)
    # every value off by one: 20 log10(255)
    assert linear.psnr(picture, picture + 1) == pytest.approx(48.1308, abs=1e-4)


def test_wine_keeps_its_accuracy_at_full_rank_and_has_the_corrected_counts():
    wine = load("sources.wine")
    case = wine.train()
    base = wine.accuracy(case, case.weight, case.bias)
    assert base > 0.9  # published 0.963: a network that is not trained on scaled features stays below 0.7
    assert case.weight.size + case.bias.size + case.out_weight.size + case.out_bias.size == 173
    for moments in (None, case.moments):
        assert wine.low_rank(case, 10, moments)[1] == base
        assert wine.low_rank(case, 2, moments)[0].parameters == 48
        assert wine.shrink(case, 2, moments, logistic=False)[0] == 37


def test_a_hidden_layer_that_is_not_shrunk_keeps_what_the_network_says():
    wine = load("sources.wine")
    case = wine.train()
    # U^T [W b] is a rotation before tanh, so not the same network; but three classes still fit ten turned units
    _, found = wine.shrink(case, 10, case.moments, logistic=True)
    assert found >= wine.accuracy(case, case.weight, case.bias) - 0.05


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 7), st.tuples(st.integers(1, 64), st.integers(1, 64)), st.data())
def test_the_formula_is_the_size_of_the_forms(kernel, channels, data):
    shape = (*channels, kernel, kernel)
    ranks = tuple(data.draw(st.integers(1, size)) for size in channels)
    skoltech = load("sources.skoltech")
    dense = float(np.prod(shape))
    assert skoltech.formula(shape, ranks) == pytest.approx(dense / count_parameters("tucker2", shape, ranks))
    narrow = (*channels, 1, 1)
    mixed = float(np.prod(channels)) / count_parameters("svd", narrow, ranks[:1])
    assert skoltech.formula(narrow, ranks[:1]) == pytest.approx(mixed)


def small_network():
    body = (
        "g (float[1, 3, 32, 32] x) => (float[1, 12, 32, 32] y) {"
        " a = Conv<pads=[1, 1, 1, 1]>(x, w0) b = Relu(a) c = Conv<pads=[1, 1, 1, 1]>(b, w1) d = Relu(c)"
        " e = Conv<group=8, pads=[1, 1, 1, 1]>(d, w2) y = Conv(e, w3) }"
    )
    weights = {
        "w0": normal(16, 3, 3, 3),
        "w1": normal(8, 16, 3, 3),
        "w2": normal(8, 1, 3, 3),
        "w3": normal(12, 8, 1, 1),
    }
    return model(body, **weights)


def test_the_formula_holds_on_the_initializers_of_a_rewritten_graph():
    skoltech = load("sources.skoltech")
    network = small_network()
    assert set(skoltech.convolutions(network)) == {"w1", "w3"}  # neither the first nor the depthwise one
    result = skoltech.compress(network, {"w1": (4, 5), "w3": (3,)})
    counted = {"w1": 8 * 16 * 9 / (16 * 5 + 9 * 5 * 4 + 8 * 4), "w3": 12 * 8 / (3 * (12 + 8))}
    assert {name: pair[0] for name, pair in result.ratios.items()} == pytest.approx(counted)
    assert {name: pair[1] for name, pair in result.ratios.items()} == pytest.approx(counted)
    # sums of at most 144 float32 products in another order, three layers deep
    assert 0 < result.difference < 1e-5


def test_factors_that_would_not_be_smaller_are_left_out():
    result = load("sources.skoltech").compress(small_network(), {"w1": (8, 16), "w3": (8,)})
    assert result.ratios == {}


@pytest.mark.parametrize(("shape", "ranks"), [((32, 24, 3, 3), (8, 6)), ((40, 32, 1, 1), (8,))])
def test_planted_ranks_are_found_and_noise_has_the_full_rank(shape, ranks):
    skoltech = load("sources.skoltech")
    noise = normal(*shape)
    assert skoltech.evbmf_ranks(noise) == (shape[:2] if len(ranks) == 2 else (32,))
    planted = skoltech.plant(noise, ranks, np.random.default_rng(1))
    assert skoltech.evbmf_ranks(planted) == ranks
    # the same size of values, and the noise of a tenth on top of it: sqrt(1.01)
    assert planted.std() == pytest.approx(noise.std() * np.sqrt(1.01), rel=0.05)


@pytest.mark.parametrize("largest", [True, False])
def test_frequency_truncation_keeps_as_many_real_values_as_asked(largest):
    truncate = load("sources.mnist").fft_truncated
    weight = np.random.default_rng(0).standard_normal((12, 30))
    np.testing.assert_allclose(truncate(weight, 1.0, largest=largest), weight, atol=1e-12)
    kept = np.abs(np.fft.fft2(truncate(weight, 0.3, largest=largest))) > 1e-9
    # the last pair, or the last four of one distance, come together
    assert 0.3 * weight.size - 1 <= kept.sum() <= 0.3 * weight.size + 3


def test_the_largest_frequencies_are_the_nearest_and_the_lowest_hold_the_mean():
    truncate = load("sources.mnist").fft_truncated
    weight = np.random.default_rng(0).standard_normal((12, 30))
    large, low = (truncate(weight, 0.2, largest=largest) for largest in (True, False))
    assert np.sum((weight - large) ** 2) < np.sum((weight - low) ** 2)
    assert low.mean() == pytest.approx(weight.mean(), abs=1e-12)


@pytest.mark.parametrize("source", ["mnist", "skoltech"])
def test_without_the_data_a_note_takes_the_place_of_a_table(source):
    tables = load("sources.tables")
    module = load(f"sources.{source}")
    table = next(module.sections(tables.Options())) if source == "mnist" else module.trained(tables.Options())
    assert "EDGECOMPRESS_BENCH_DATA" in tables.markdown(table)


def test_a_row_of_another_length_than_the_headers_is_refused():
    tables = load("sources.tables")
    assert tables.markdown(tables.Table(("a", "b"), (("1", "2"),), "T", "x", "y")).splitlines() == [
        *("### T", "", "x", "", "| a | b |", "|---|---|", "| 1 | 2 |", "", "y"),
    ]
    with pytest.raises(ValueError, match="1 cells, not 2"):
        tables.markdown(tables.Table(("a", "b"), (("1",),)))


def test_an_unknown_source_is_refused_with_those_there_are():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "seeds.py", "wines"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "linear, wine, mnist, skoltech" in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed")
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # weights and biases: five convolutions, then 4,096 - 1,024 - 1,024 - 10
        ("alexnet", 7_296 + 614_656 + 885_120 + 1_327_488 + 884_992 + 4_195_328 + 1_049_600 + 10_250),
        ("vgg16", 14_714_688 + 2 * 262_656 + 5_130),  # the convolutions as for large pictures, 512 - 512 - 512 - 10
        ("resnet18", 11_689_512 - 9_408 + 1_728 - 513_000 + 5_130),  # that for large pictures; 3 x 3 stem, 10 classes
        ("shufflenet_v2", 2_278_604 - 1_025_000 + 10_250),  # its stem is 3 x 3 already
        # 3 x 3 stem without normalization, 10 classes
        ("densenet161", 28_681_000 - 14_112 + 2_592 - 192 - 2_209_000 + 22_090),
    ],
)
def test_the_networks_have_the_sizes_of_the_papers(name, parameters):
    import torch

    network = getattr(load("networks"), name)()
    assert sum(each.numel() for each in network.parameters()) == parameters
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
