from __future__ import annotations

import base64
import hashlib
import html
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_samples import minimal, reports, resnet_like

from edgecompress.report import svg, svg_latency
from edgecompress.report.html import to_html
from edgecompress.report.model import Accuracy, LatencySummary, LayerPlot, Report, StageBytes

VOID = {"meta", "link", "br", "wbr"}
HOSTILE = """</code></title></script><script>alert(1)</script><img src=x onerror="alert(2)">'"&\x00\u202e"""


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps the elements, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is there twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str, css: str = "") -> int:
        return sum(name == tag and css in (found.get("class") or "") for name, found in self.elements)


def lengths(page: Page) -> list[float]:
    """Return every coordinate of the charts."""
    names = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"}
    values = [value for tag, found in page.elements if tag != "meta" for name, value in found.items() if name in names]
    return [float((value or "").removesuffix("%")) for value in values]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(reports())
def test_every_report_has_a_well_formed_page_with_finite_charts(report: Report) -> None:
    page = Page(to_html(report))
    assert page.elements[0][0] == "html"
    assert all(abs(value) < 1e7 for value in lengths(page))
    widths = [found["width"] for tag, found in page.elements if tag in {"rect", "svg"} and "width" in found]
    assert all(0 <= float((width or "").removesuffix("%")) <= 100.001 for width in widths)
    curves = " ".join(found.get("d") or "" for _, found in page.elements)
    assert not re.search("nan|inf", curves)


def test_the_page_asks_for_nothing_from_anywhere() -> None:
    written = to_html(resnet_like())
    page = Page(written)
    for tag, found in page.elements:
        assert "src" not in found, tag
        assert found.get("href") in {None, "data:,"}, tag
        assert tag not in {"iframe", "object", "embed", "img", "use", "image", "base"}
    assert "url(" not in written
    assert "@import" not in written
    assert "http:" not in written
    assert "https:" not in written


def test_the_security_policy_allows_exactly_its_own_style_and_script() -> None:
    written = to_html(resnet_like())
    policy = next(found["content"] for _, found in Page(written).elements if "http-equiv" in found) or ""
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", written, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    # what the policy would block is not in the page
    assert not [
        found for _, found in Page(written).elements if "style" in found or any(n.startswith("on") for n in found)
    ]


def hostile_report() -> Report:
    report = resnet_like()
    row = replace(report.layers[0], name=HOSTILE, op=HOSTILE, scheme=HOSTILE, reason=HOSTILE)
    return replace(
        report,
        tool=replace(report.tool, command=HOSTILE, recipe_hash=HOSTILE, versions={HOSTILE: HOSTILE}),
        model=replace(report.model, name=HOSTILE, sha256=HOSTILE, inputs=(HOSTILE,), outputs=(HOSTILE,)),
        size=replace(report.size, waterfall=(StageBytes(HOSTILE, 3), StageBytes(HOSTILE, 2))),
        accuracy=replace(report.accuracy, metric=HOSTILE, data=HOSTILE),
        outputs={HOSTILE: report.outputs["logits"]},
        latency=replace(report.latency, device=HOSTILE, warnings=(HOSTILE,)),
        layers=(row,),
        plots=(replace(report.plots[0], name=HOSTILE),),
        warnings=(HOSTILE,),
    )


def test_no_text_of_a_report_can_become_markup() -> None:
    written = to_html(hostile_report())
    page, plain = Page(written), Page(to_html(resnet_like()))
    assert page.count("script") == plain.count("script") == 1
    assert page.count("img") == 0
    assert not [found for _, found in page.elements if "onerror" in found]
    assert "\x00" not in written
    assert "\u202e" not in written
    assert "alert(1)" in page.text
    written.encode("utf-8")


def test_a_lone_surrogate_does_not_stop_the_page_from_being_written() -> None:
    report = minimal()
    to_html(replace(report, tool=replace(report.tool, command="compress caf\udce9.onnx"))).encode("utf-8")


def test_the_page_says_what_the_report_says() -> None:
    report = resnet_like()
    words = Page(to_html(report)).text
    expected = ("12.1× smaller", "−0.3 ± 0.42 points", "91.5 % → 91.2 %", "0.759× of the original", "24.3 dB")  # noqa: RUF001
    for part in (*expected, report.tool.command, report.tool.recipe_hash, report.model.sha256, "onnxruntime 1.31.1"):
        assert part in words
    assert "its output is 3.1 dB worse than the tolerance" in words
    assert "19 of 20 layers compressed" in words
    assert "Read with care" not in words


def test_every_layer_is_a_row_in_the_order_of_the_model() -> None:
    report = resnet_like(10, prefix="/a/very/long/path/that/names/everything/twice/and/then/some/layer")
    rows = re.findall(r'<th scope="row" data-v="([^"]*)"', to_html(report))
    assert [html.unescape(name) for name in rows] == [row.name for row in report.layers]
    assert len(rows) == 62


def test_the_sums_below_the_layers_and_the_rest_make_the_file() -> None:
    report = resnet_like()
    words = Page(to_html(report)).text
    assert "all layers 268,336 → 132,416 86.0 kB 2.6 the rest: graph, biases, tables 3.90 kB" in words


def test_a_layer_of_unknown_size_is_counted_with_the_rest() -> None:
    report = resnet_like()
    layers = (replace(report.layers[0], stored_bytes=None), *report.layers[1:])
    words = Page(to_html(replace(report, layers=layers))).text
    assert "85.7 kB the rest: graph, biases, tables, layers without a size above 4.23 kB" in words


def test_the_same_report_gives_the_same_bytes() -> None:
    assert to_html(resnet_like()) == to_html(resnet_like())


def test_all_warnings_are_shown_and_those_of_the_timing_too() -> None:
    report = resnet_like()
    noisy = replace(report, warnings=("no labels",), latency=replace(report.latency, warnings=("not idle",)))
    words = Page(to_html(noisy)).text
    assert "Read with care no labels not idle" in words


def test_what_was_not_measured_has_no_section_and_says_so() -> None:
    words = Page(to_html(minimal())).text
    assert "not measured: no data set was given" in words
    assert "1.17× larger" in words  # noqa: RUF001
    for title in ("Latency Milliseconds", "Spectra", "Weights of", "Outputs How", "Where the bytes"):
        assert title not in words


def test_without_labels_the_agreement_heads_the_page() -> None:
    accuracy = Accuracy("agreement", None, None, None, None, 64, 98.4, "64 random inputs")
    words = Page(to_html(replace(resnet_like(), accuracy=accuracy))).text
    assert "Agreement 98.4 %" in words
    assert "points" not in words


@pytest.mark.parametrize(("drop", "said"), [(0.8, True), (0.9, False), (-0.8, True)])
def test_the_page_tells_a_drop_from_noise(drop: float, said: bool) -> None:
    accuracy = replace(resnet_like().accuracy, drop_points=drop, standard_error_points=0.42)
    words = Page(to_html(replace(resnet_like(), accuracy=accuracy))).text
    assert ("within two standard errors of no change" in words) is said


# Charts


def bars(picture: str, css: str) -> list[tuple[float, float]]:
    """Return the start and width, in percent, of the bars of one class that can be seen."""
    found = [attributes for tag, attributes in Page(picture).elements if tag == "rect" and attributes["class"] == css]
    places = [(float(bar["x"][:-1]), float(bar["width"][:-1])) for bar in found]  # type: ignore[index]
    return [place for place in places if place[1] > 0]


def test_the_waterfall_shows_what_is_left_beside_what_went() -> None:
    picture = svg.waterfall([StageBytes("original", 200), StageBytes("svd", 100), StageBytes("ecz", 150)])
    assert bars(picture, "neutral") == [(0, 100)]
    assert bars(picture, "solid") == [(0, 50), (0, 50)]
    assert bars(picture, "ghost") == [(50, 50)]
    assert bars(picture, "more") == [(50, 25)]


def test_a_waterfall_of_nothing_is_drawn() -> None:
    Page(svg.waterfall([StageBytes("original", 0), StageBytes("svd", 0)]))
    Page(svg.waterfall([]))


def test_the_spectrum_marks_the_rank_where_the_kept_values_end() -> None:
    picture = svg.spectrum(LayerPlot("w", singular_values=(8.0, 4.0, 2.0, 1.0), rank=1), 1)
    page = Page(picture)
    marks = [found["x1"] for tag, found in page.elements if tag == "line" and found["class"] == "mark"]
    assert marks == ["25%"]
    assert "rank 1" in page.text
    assert page.count("path", "kept") == page.count("path", "cut") == 2


def test_a_spectrum_kept_whole_has_no_mark() -> None:
    page = Page(svg.spectrum(LayerPlot("w", singular_values=(8.0, 4.0)), 1))
    assert page.count("line", "mark") == page.count("path", "cut") == 0


@pytest.mark.parametrize(("lowest", "powers"), [(1.0, 1), (0.5, 1), (0.05, 2), (1e-3, 3), (1e-12, 4), (0.0, 1)])
def test_all_spectra_share_the_powers_of_ten_that_the_widest_needs(lowest: float, powers: int) -> None:
    plots = [LayerPlot("a", singular_values=(1.0, 0.9)), LayerPlot("b", singular_values=(3.0, 3.0 * lowest))]
    assert svg.decades(plots) == powers


def test_the_histogram_has_a_tick_for_each_different_entry_of_the_codebook() -> None:
    plot = LayerPlot("w", histogram_edges=(-1.0, 0.0, 1.0), histogram_counts=(1, 3), codebook=(-0.5, 0.5, 0.5, 2.0))
    page = Page(svg.histogram(plot))
    (rug,) = [found["d"] for tag, found in page.elements if tag == "path" and found["class"] == "rug"]
    assert rug == "M16.667 0V100M50 0V100M100 0V100"  # the axis reaches from -1 to the entry at 2


def test_the_whisker_stands_left_of_no_change_when_it_got_worse() -> None:
    def point(drop: float) -> float:
        circles = [found["cx"] for tag, found in Page(svg.interval(drop, 0.4)).elements if tag == "circle"]
        return float(str(circles[0]).removesuffix("%"))

    assert point(0.3) < 50 < point(-0.3)
    assert point(0.0) == 50


@settings(derandomize=True)
@given(st.floats(0, 1e6), st.floats(1e-6, 1e6), st.integers(3, 9))
def test_ticks_are_few_inside_the_axis_and_evenly_apart(low: float, span: float, most: int) -> None:
    high = low + span
    ticks = svg_latency.axis_ticks(low, high, most)
    assert len(ticks) <= most
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in ticks) or span < 1e-9 * high
    if low == 0:
        assert len(ticks) >= 2


def timing(values: tuple[float, ...], median: float, p90: float) -> LatencySummary:
    return LatencySummary(1.0, 1.0, median, p90, len(values), None, values)


def test_each_run_is_a_dot_and_stragglers_are_counted_instead() -> None:
    usual = tuple(3.0 + 0.01 * index for index in range(20))
    page = Page(svg_latency.strips([("original", timing((*usual, 9.0), 3.1, 3.18))]))
    assert page.count("circle") == 20
    assert "1 slower, up to 9.00 ms" in page.text


def test_thousands_of_runs_share_dots() -> None:
    values = tuple(3.0 + 0.0001 * index for index in range(3000))
    page = Page(svg_latency.strips([("original", timing(values, 3.15, 3.27))]))
    assert page.count("circle") <= 600
    assert svg_latency.dots_per_run(3000) == 5


def test_nearly_equal_times_are_not_stretched_over_the_whole_axis() -> None:
    page = Page(svg_latency.strips([("original", timing((3.0, 3.03), 3.0, 3.03))]))
    places = [float(str(found["cx"]).removesuffix("%")) for tag, found in page.elements if tag == "circle"]
    assert 8 < max(places) - min(places) < 12


def test_a_long_name_is_cut_in_the_middle_and_whole_on_hover() -> None:
    name = "/backbone/" + "block/" * 30 + "conv1.weight"
    page = Page(svg.name_markup(name))
    assert page.elements[0][1]["title"] == name
    assert "".join(page.words).endswith("conv1.weight")
    assert len("".join(page.words)) == 44
