from __future__ import annotations

import dataclasses
import io
import json
import math
import typing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_samples import TOOL, minimal, reports, resnet_like
from rich.console import Console

from edgecompress.errors import FormatError, PassError
from edgecompress.latency import LatencySamples
from edgecompress.report import model, strict_json, terminal, text
from edgecompress.report.bench import bench_rows
from edgecompress.report.model import OutputDifference, Report, compression_ratio, from_json, to_json

SCHEMA = Path(__file__).parents[1] / "docs" / "report.schema.json"
HOSTILE = "[red]layer[/red] \x1b[31m\x07\u202e"


TIMES = LatencySamples(init_ms=1.0, first_ms=1.0, warmup_ms=(), values_ms=(1.0,), peak_rss_bytes=1)


def rendered(*tables: object, width: int = 100) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system="truecolor")
    for table in tables:
        console.print(table)
    return stream.getvalue()


# JSON


@settings(max_examples=60, deadline=None, derandomize=True)
@given(reports())
def test_every_report_survives_the_way_through_json(report: Report) -> None:
    assert from_json(to_json(report)) == report


def test_a_realistic_report_survives_the_way_through_json() -> None:
    for report in (resnet_like(), minimal()):
        assert from_json(to_json(report)) == report


def test_the_contract_of_keys_holds() -> None:
    plain = json.loads(to_json(resnet_like()))
    assert plain["schema_version"] == 1
    assert {"original_bytes", "onnx_bytes", "ecz_bytes", "compression_ratio", "waterfall"} <= set(plain["size"])
    assert set(plain["size"]["waterfall"][0]) == {"stage", "bytes"}
    points = {"metric", "original", "compressed", "drop_points", "standard_error_points", "samples"}
    assert points <= set(plain["accuracy"])
    assert set(plain["outputs"]["logits"]) == {"sqnr_db", "max_abs"}
    times = {"init_ms", "first_ms", "median_ms", "p90_ms", "samples", "peak_rss_bytes"}
    assert times <= set(plain["latency"]["original"])
    assert times <= set(plain["latency"]["compressed"])
    assert "ratio" in plain["latency"]
    contract = (
        "name op scheme rank parameters_before parameters_after stored_bytes weight_sqnr_db output_sqnr_db reason"
    )
    assert all(set(contract.split()) <= set(row) for row in plain["layers"])
    assert {"versions", "command", "recipe_hash"} <= set(plain["tool"])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, np.float32("inf")])
def test_a_value_that_is_infinite_or_unknown_becomes_null(value: float) -> None:
    report = replace(minimal(), outputs={"y": OutputDifference(value, 0.0)})
    written = to_json(report)
    assert json.loads(written, parse_constant=pytest.fail)["outputs"]["y"] == {"sqnr_db": None, "max_abs": 0.0}
    assert from_json(written).outputs["y"].sqnr_db is None


@pytest.mark.parametrize("value", [math.inf, math.nan, None, "6.2"])
def test_a_value_that_must_be_known_is_refused_by_name(value: object) -> None:
    report = replace(minimal(), size=replace(minimal().size, compression_ratio=value))
    with pytest.raises(PassError, match=r"report\.size\.compression_ratio"):
        to_json(report)


@pytest.mark.parametrize("value", [1.5, "3", None, math.nan])
def test_a_count_that_is_no_integer_is_refused(value: object) -> None:
    with pytest.raises(PassError, match=r"report\.size\.ecz_bytes"):
        to_json(replace(minimal(), size=replace(minimal().size, ecz_bytes=value)))


def test_numpy_scalars_become_plain_numbers() -> None:
    size = replace(minimal().size, ecz_bytes=np.int64(140), compression_ratio=np.float32(0.5))
    read = from_json(to_json(replace(minimal(), size=size)))
    assert (type(read.size.ecz_bytes), type(read.size.compression_ratio)) == (int, float)


def test_the_text_is_ascii_stable_and_has_one_line_a_list_of_numbers() -> None:
    report = replace(resnet_like(), warnings=("größer",))
    written = to_json(report)
    assert written.isascii()
    assert written == to_json(report)
    assert written.endswith("}\n")
    assert len([line for line in written.splitlines() if '"values_ms"' in line and line.rstrip(",").endswith("]")]) == 2
    assert written.startswith('{\n  "schema_version": 1,\n  "tool": {\n    "command": ')


def test_an_argument_that_is_not_utf8_is_written_readably() -> None:
    report = replace(minimal(), tool=replace(TOOL, command="compress caf\udce9.onnx"))
    assert from_json(to_json(report)).tool.command == r"compress caf\udce9.onnx"


def edited(**changes: object) -> str:
    return json.dumps({**json.loads(to_json(minimal())), **changes})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "strict JSON"),
        ("[1, 2", "strict JSON"),
        ('{"schema_version": NaN}', "strict JSON"),
        ("[" * 100_000, "strict JSON"),
        ("[]", "report must be an object"),
        ("{}", "no 'schema_version'"),
        (edited(schema_version=2), "schema_version is 2"),
        (edited(schema_version="1"), r"report\.schema_version must be an integer"),
        (edited(schema_version=True), r"report\.schema_version must be an integer"),
        (edited(size={}), r"report\.size has no 'original_bytes'"),
        (edited(size=None), r"report\.size must be an object"),
        (edited(layers={}), r"report\.layers must be a list"),
        (edited(layers=[3]), r"report\.layers\[0\] must be an object"),
        (edited(warnings=[1]), r"report\.warnings\[0\] must be a string"),
        (edited(outputs={"y": {"sqnr_db": "x", "max_abs": 0}}), r"report\.outputs\.y\.sqnr_db must be a number"),
        (edited(outputs={"y": {"sqnr_db": 10**400, "max_abs": 0}}), r"sqnr_db is too large"),
        (to_json(minimal()).replace("0.8571428571428571", "1e999"), r"compression_ratio is too large"),
    ],
)
def test_a_malformed_report_is_refused_and_the_place_named(content: str, words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        from_json(content)
    assert caught.value.hint


def test_a_key_of_a_later_version_is_ignored() -> None:
    assert from_json(edited(mood="good")) == minimal()


def test_the_ratio_is_original_over_stored_bytes() -> None:
    assert compression_ratio(600, 100) == 6.0
    with pytest.raises(ValueError, match="positive"):
        compression_ratio(600, 0)


# The schema


def expected_schema(kind: typing.Any) -> dict[str, typing.Any]:
    """Return what the schema must say of a type, but for descriptions."""
    inner = strict_json.optional_of(kind)
    if inner is not None:
        schema = expected_schema(inner)
        return (
            {"anyOf": [schema, {"type": "null"}]} if "$ref" in schema else {**schema, "type": [schema["type"], "null"]}
        )
    if typing.get_origin(kind) is tuple:
        return {"type": "array", "items": expected_schema(typing.get_args(kind)[0])}
    if typing.get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": expected_schema(typing.get_args(kind)[1])}
    if dataclasses.is_dataclass(kind):
        return {"$ref": f"#/$defs/{kind.__name__}"}  # type: ignore[union-attr]
    return {"type": {int: "integer", float: "number", str: "string"}[kind]}


KINDS = [kind for kind in vars(model).values() if dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_schema_and_the_dataclass_agree(kind: type) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert set(schema["$defs"]) == {other.__name__ for other in KINDS} - {"Report"}
    entry = schema if kind is Report else schema["$defs"][kind.__name__]
    types = strict_json.field_types(kind)
    assert entry["type"] == "object"
    assert entry["required"] == list(types) == list(entry["properties"])
    for name, part in types.items():
        said = dict(entry["properties"][name])
        assert said.pop("description").endswith(".")
        assert said.pop("const", model.SCHEMA_VERSION) == model.SCHEMA_VERSION
        assert said == expected_schema(part), name


def test_every_number_of_the_schema_has_a_unit() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    for entry in schema["$defs"].values():
        for name, said in entry["properties"].items():
            numeric = {"number", "integer"} & {*np.atleast_1d(said.get("type", "")), said.get("items", {}).get("type")}
            assert not numeric or name == "opset" or "Unit: " in said["description"], name


# Numbers as text


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (None, "–"),  # noqa: RUF001
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (17_432, "17.4 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (2_155_210, "2.16 MB"),
        (2 * 10**15, "2000 TB"),
        (-1500, "−1.50 kB"),  # noqa: RUF001
    ],
)
def test_bytes_have_three_digits_and_a_decimal_unit(size: int | None, words: str) -> None:
    assert text.format_bytes(size) == words


@settings(derandomize=True)
@given(st.integers(0, 10**14))
def test_a_size_never_reads_a_thousand_of_a_unit_and_is_within_half_a_percent(size: int) -> None:
    number, unit = text.format_bytes(size).split()
    value = float(number) * 1000.0 ** ["B", "kB", "MB", "GB", "TB"].index(unit)
    assert float(number) < 1000
    assert abs(value - size) <= 0.005 * size


def test_a_drop_reads_as_a_change_with_a_sign() -> None:
    assert text.format_change(0.3) == "−0.3"  # noqa: RUF001
    assert text.format_change(-0.25) == "+0.25"
    assert text.format_change(-0.001) == "±0.0"
    assert text.format_change(0.00123, percent=False) == "−0.00123"  # noqa: RUF001


def test_growth_is_not_called_smaller() -> None:
    assert text.format_size_change(6.214) == "6.21× smaller"  # noqa: RUF001
    assert text.format_size_change(0.5) == "2.00× larger"  # noqa: RUF001


def test_an_output_without_difference_reads_identical_and_an_unknown_one_does_not() -> None:
    assert text.format_sqnr(OutputDifference(None, 0.0)) == "identical"
    assert text.format_sqnr(OutputDifference(None, None)) == text.UNKNOWN
    assert text.format_sqnr(OutputDifference(-0.01, 1.0)) == "0.0 dB"


@settings(derandomize=True)
@given(st.text(), st.integers(4, 40))
def test_a_shortened_name_fits_and_keeps_both_ends(name: str, limit: int) -> None:
    short = text.shorten(name, limit)
    assert len(short) == min(len(name), limit)
    assert short[0:1] == name[0:1]
    assert short[-1:] == name[-1:]


# Tables


def test_the_summary_says_size_accuracy_and_latency() -> None:
    shown = rendered(terminal.summary_table(resnet_like()))
    for words in ("12.1× smaller", "91.5 %", "91.2 %", "points ± 0.42", "97.3 %", "0.759×", "19 compressed"):  # noqa: RUF001
        assert words in shown


def test_without_a_metric_the_outputs_judge() -> None:
    report = replace(resnet_like(), accuracy=None)
    assert "output logits" in rendered(terminal.summary_table(report))
    assert "output logits" not in rendered(terminal.summary_table(resnet_like()))


def test_a_layer_left_alone_shows_its_reason() -> None:
    shown = rendered(terminal.layer_table(resnet_like()), width=160)
    assert "left alone (its output is 3.1 dB worse than the tolerance)" in shown
    assert "svd rank 28, kmeans 32" in shown


def test_no_table_lets_a_name_act_on_the_terminal() -> None:
    report = resnet_like()
    row = replace(report.layers[0], name=HOSTILE, scheme=HOSTILE, reason=HOSTILE, op=HOSTILE)
    accuracy = replace(report.accuracy, metric=HOSTILE, drop_points=None)
    inspected = {"name": HOSTILE, "op": "Conv", "shape": [1], "parameters": 1, "macs": 1, "bytes_share": 1.0}
    facts = replace(report.model, name=HOSTILE)
    outputs = {HOSTILE: OutputDifference(1.0, 1.0)}
    hostile = replace(report, layers=(row,), accuracy=accuracy, model=facts, outputs=outputs)
    tables = (
        terminal.summary_table(hostile),
        terminal.layer_table(hostile),
        terminal.bench_table(bench_rows([HOSTILE], [TIMES], [None]), device=HOSTILE, threads=1),
        terminal.validation_table(accuracy, outputs),
        terminal.inspect_table([{**inspected, "skip_reason": HOSTILE}]),
    )
    for table in tables:
        shown = rendered(table, width=400)
        assert "[red]layer[/red]" in shown
        assert not [part for part in ("\x1b[31m", "\x07", "\u202e") if part in shown]


def test_a_bench_fits_a_narrow_terminal_and_shows_instructions_only_where_times_mean_nothing() -> None:
    checked = replace(TIMES, values_ms=(12.345,) * 10, peak_rss_bytes=91_300_000, metadata={"outputs_match": True})
    rows = bench_rows(["model.onnx", "model.ecz"], [checked, checked], [None, None])
    shown = rendered(terminal.bench_table(rows, device="local", threads=1), width=80)
    for words in ("model.ecz", "latency in ms on local, 1 thread, 10 runs", "12.3", "1.00×", "91.3 MB", "right"):  # noqa: RUF001
        assert words in shown
    assert "…" not in shown
    assert "instructions" not in shown
    counted = replace(checked, emulated=True, metadata={"instructions": 75_600_000})
    shown = rendered(terminal.bench_table(bench_rows(["m"], [counted], [None]), device="qemu://a", threads=1))
    assert "75.6 M" in shown
    assert "12.3" not in shown


def test_inspect_rows_may_lack_what_is_unknown() -> None:
    row = {"name": "w", "op": "Gather", "shape": [], "parameters": 0, "macs": None, "bytes_share": 0.0}
    shown = rendered(terminal.inspect_table([{**row, "skip_reason": None}]))
    assert "Gather" in shown
    assert "0 %" in shown


@settings(max_examples=25, deadline=None, derandomize=True)
@given(reports())
def test_every_report_has_its_tables(report: Report) -> None:
    shown = rendered(terminal.summary_table(report), terminal.layer_table(report))
    assert text.format_bytes(report.size.ecz_bytes) in shown
    rendered(terminal.validation_table(report.accuracy, report.outputs))
