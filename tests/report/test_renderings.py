"""Every rendering shows the same numbers; each form is well-formed by itself."""

from __future__ import annotations

import io
import json
import re
import sys
from fractions import Fraction
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from rich.console import Console

from depthpass.analysis.roofline import assumed
from depthpass.errors import InputError
from depthpass.ir import parse_program
from depthpass.report import Report, build_report
from depthpass.report.brackets import brackets
from depthpass.report.chart import Series, chart_file, line_chart
from depthpass.report.columns import delay_edges, folded
from depthpass.report.numbers import Number, plain, scaled, short
from depthpass.report.tables import compare, sweep
from depthpass.schedule import schedule
from tests.analysis.systems import bridged, parallel_loops
from tests.report.subjects import BAND, band, small, subject

VOID = {"meta", "br", "col", "link", "img"}


class Page(HTMLParser):
    """Collects tags and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.tags if name in (a.get("class") or "").split()]


def wide(text: str) -> Page:
    """A page without the picture for phones."""
    assert text.count('<div class="dp-narrow">') == 1
    return Page(re.sub(r'<div class="dp-narrow">.*?</div>', "", text))


def numbers(report: Report) -> list[Number]:
    return [x for s in report.sections for x in s.numbers]


@pytest.mark.parametrize("make_report", [band, small], ids=["band", "small"])
def test_every_number_has_a_unit(make_report) -> None:
    for x in numbers(make_report()):
        assert x.unit or isinstance(x.value, str), x.key
    assert len({x.key for x in numbers(make_report())}) == len(numbers(make_report()))
    assert make_report().not_counted


def test_plain_text(golden) -> None:
    golden(small().to_text())


def test_the_summary_is_six_numbers_with_ratios() -> None:
    text = str(band(cost=True))
    assert text == repr(band(cost=True)) and len(text.splitlines()) == 10
    assert "turboconn(group=4, preset=llama-1b); n = 155 tokens, 8 rows" in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()[3:9]}
    assert list(rows) == ["depth", "recursions", "parameters", "FLOPs", "KV cache", "time floor"]
    assert rows["depth"][1:4] == ["16", "548", "34.25x"] and rows["recursions"][1:4] == ["1", "39", "39x"]
    assert rows["parameters"][1:6] == ["1.236", "G", "1.243", "G", "1.006x"] and "7,405,320" in rows["parameters"]
    assert rows["KV cache"][2:7] == ["38.75", "MiB", "38.75", "MiB", "1x"] and "--ceilings" in text
    timed = subject().report(BAND, seq_len=155, batch=8, ceilings=assumed("h200"))
    assert re.search(r"time floor +[\d.]+ ms +[\d.]+ ms +[\d.]+x  forward on h200", str(timed))
    assert len(repr(timed).splitlines()) <= 12 and "not counted: ask" in str(band())


@pytest.mark.parametrize(
    ("spec", "passes", "runs"),
    [
        ("{pass: loop, start: 1, end: 3}", "loop(start=1, end=3, times=2)", 2),
        ("{pass: mixture_of_recursions, recursions: 7}", "mixture_of_recursions(recursions=7)", 7),
        ("{pass: parallel_loop}", "parallel_loop(loops=2)", 2),
        ("{pass: skip, start: 3}", "skip(start=3)", 1),
        ("[{pass: repeat, start: 3, end: 5, times: 3}, {pass: turboconn, bridges: [[9, 1]], group: 2}]",
         "repeat(start=3, end=5, times=3), turboconn(bridges=[(9, 1)], group=2)", 3 * 5),
        ("{pass: coconut, latents: 3}", "coconut(latents=3)", 4),
        ("{pass: same_layer_state}", "same_layer_state()", 10),
    ],
)
def test_recursions_are_those_of_the_spec(spec: str, passes: str, runs: int) -> None:
    report = subject().report(spec, seq_len=10, cost=False)
    assert passes in str(report) and report.recursions == runs
    notes = {1: "no block runs twice", 15: "3 visits x ceil(n / chunk)", 4: "the row, then 3 latents", 10: "ceil(n / chunk)"}
    assert report.number("recursions").note == notes.get(runs, f"{runs} visits of a token")


def test_text_says_what_matters() -> None:
    text = band().to_text()
    assert text.startswith(str(band()).rpartition("\n")[0])
    assert re.search(r"serial blocks +14 of 16 block visits", text)
    assert re.search(r"depth +16 \+ 14\*floor\(\(n - 1\)/4\) block visits", text)
    assert re.search(r"depth at n = 155 +548 block visits +\(stock 16, 34.25x\)", text)
    assert "... 33 more tokens, 462 block visits (every 4 tokens)" in text


def test_all_forms_show_every_number() -> None:
    report = band()
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(report.to_rich())
    page = "".join(Page(report.to_html()).words)
    for form in (report.to_text(), console.export_text(), page):
        for x in numbers(report):
            assert x.repeats or (x.label in form and x.figure in form), x.key
        for line in report.not_counted:
            assert line in form
    assert all(x.repeats or plain(x.value) in report.to_markdown() for x in numbers(report))


def test_no_row_repeats_another() -> None:
    """Attention and MLP depth are the depth here, nothing is routed, and slots keep every token."""
    report = band(cost=True)
    repeated = {x.key for x in numbers(report) if x.repeats}
    assert {"depth_attention_at_n", "cache_slots", "cost_flops_decode_deepest_token", "token_steps"} <= repeated
    assert repeated < set(report.to_dict()["numbers"])
    routed = subject().report("{pass: mixture_of_recursions, recursions: 7}", seq_len=64)
    assert not routed.number("cost_flops_decode_deepest_token").repeats
    labels = [x.label for s in report.sections for x in s.shown]
    assert len(set(labels)) == len(labels)


def test_json_has_a_schema_and_plain_values() -> None:
    data = json.loads(band().to_json())
    assert (data["schema"], data["version"], data["model"]) == ("depthpass.report", 1, "LlamaForCausalLM")
    assert data["depth"]["output"] == {
        "formula": "16 + 14*floor((n - 1)/4)", "at_n": 548, "rate": "7/2", "unit": "block visits",
        "rate_unit": "block visits per token", "cycle_ratio": "7/2", "cycle": data["depth"]["output"]["cycle"],
        "proof": data["depth"]["output"]["proof"],
    }
    assert data["depth"]["output"]["proof"][0]["period"] == 4
    assert data["numbers"]["serial_blocks"] | {"note": ""} == {
        "label": "serial blocks", "value": 14, "unit": "block visits", "section": "Schedule", "out_of": 16, "note": "",
    }
    assert data["numbers"]["kv_bytes"]["stock"] == data["numbers"]["kv_bytes"]["value"] == 40_632_320
    assert data["spec"]["passes"][0]["pass"] == "turboconn"
    assert [len(r["visits"]) for r in data["regions"] if r["schedule"] == "serial"] == [14]
    assert parse_program(data["program"]).without_notes() == band().program.without_notes()
    assert sum(len(s["visits"]) for s in data["critical_path"]["segments"]) == 548


def test_markdown_tables_have_equal_columns() -> None:
    rows = [line for line in band().to_markdown().splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {6}
    shown = [x for s in band().sections for x in s.shown]
    assert len([r for r in rows if not r.startswith(("| |", "|--"))]) == len(shown) + 6


def test_html_is_one_file_that_needs_nothing_else() -> None:
    text = band().to_html()
    page = Page(text)
    assert not page.open
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\((?!#)|@import|\bsrc=", text)
    assert not Page(band()._repr_html_()).open


def test_html_picture_shows_region_and_critical_path() -> None:
    """12 tokens, 16 visits, the serial region over columns 1..14, the path of 12 tokens in the warm colour."""
    page = wide(band().to_html())
    assert len(page.of_class("dp-cell")) == 12 * 16
    assert len(page.of_class("dp-hot")) == band().depth_at(12) == 44
    assert len(page.of_class("dp-region")) == 1
    assert len(page.of_class("dp-chunk")) == 2
    assert len(page.of_class("dp-delay")) == 15
    assert "15 delays of 4 tokens, drawn from the first token only" in "".join(page.words)
    region, cells = page.of_class("dp-region")[0], page.of_class("dp-cell")[:16]
    left, width = float(region["x"]), float(region["width"])
    inside = [left < float(c["x"]) < left + width for c in cells]
    assert inside == [False] + [True] * 14 + [False]


def test_phones_get_the_picture_on_its_side() -> None:
    """9 tokens beside one another, 16 visits below one another, words upright, everything inside 390 pixels less the margins."""
    page = Page(re.findall(r'<div class="dp-narrow">(.*?)</div>', band().to_html())[0])
    assert len(page.of_class("dp-cell")) == 9 * 16 and len(page.of_class("dp-hot")) == band().depth_at(9) == 44
    left, top, width, height = map(float, str(page.of_class("dp-picture")[0]["viewbox"]).split())
    assert left == 0 and width <= 362
    flip = "matrix(0 1 1 0 0 0)"
    assert [a["transform"] for tag, a in page.tags if tag == "g"] == [flip]
    words = [a for tag, a in page.tags if tag == "text"]
    assert len(words) == 9 + 16 and all(a["transform"] == flip for a in words)
    # Under both mirrors a word stands at its own x and y.
    assert all(0 <= float(str(a["x"])) <= width and top <= float(str(a["y"])) <= top + height for a in words)
    arrows = {v for _, a in page.tags for v in a.values() if v and "dp-arrow" in v}
    assert arrows == {"dp-arrow-narrow", "url(#dp-arrow-narrow)", "dp-arrowhead"}
    assert "Rows are block visits, columns are 9 tokens." in "".join(page.words)


def test_wide_chunks_get_one_row_each() -> None:
    report = subject().report("{pass: turboconn, preset: llama-1b, group: 64}", seq_len=1000, cost=False)
    page = wide(report.to_html())
    assert len(page.of_class("dp-cell")) == 3 * 16
    assert len(page.of_class("dp-hot")) == report.depth_at(192) == 16 + 2 * 14


def test_a_path_at_a_token_that_is_not_drawn_is_drawn_at_one_that_is() -> None:
    page = wide(subject().report("{pass: pad, tokens: 64}", seq_len=155, cost=False).to_html())
    assert len(page.of_class("dp-hot")) == 16 and "rows are 1 token and 19 pads" in "".join(page.words)
    shares = wide(subject().report("{pass: mixture_of_depths, capacity: 0.125}", seq_len=155, cost=False).to_html())
    assert "12.5%" in shares.words


@pytest.mark.parametrize(("pads", "rows"), [(3, 9), (256, 20)])
def test_pads_are_rows_too(pads: int, rows: int) -> None:
    """Three chunks of 3 tokens, or as many rows as fit; nothing is drawn below the last one."""
    program = bridged(4, [(3, 0, 3 if pads == 3 else 10)], pads=pads)
    report = build_report(program, schedule(program), None, 40, 1)
    page = wide(report.to_html())
    assert len(page.of_class("dp-cell")) == 4 * rows
    height = float(page.of_class("dp-picture")[0]["viewbox"].split()[3])
    drawn = [float(y) for a in page.of_class("dp-critical") for y in re.findall(r" ([\d.]+)(?:C|H|$)", a["d"])]
    assert drawn and max(drawn) < height
    assert f"and {pads} pads" in "".join(page.words)


def test_where_delays_are_drawn() -> None:
    edges = delay_edges(bridged(5, [(3, 1, 2), (4, 0, 2)]))
    assert {(e.source, e.target, e.tokens) for e in edges} == {(3, 2, 2), (4, 1, 2)}
    edges = delay_edges(bridged(5, [(4, 0, 1)], on_input=True))
    assert {(e.source, e.target, e.tokens) for e in edges} == {(4, 0, 1)}
    edges = delay_edges(parallel_loops(2, 3))
    assert {(e.source, e.target) for e in edges} == {(1, 2), (3, 4)}


@pytest.mark.parametrize("width", [60, 120])
def test_a_narrow_terminal_has_remarks_below_their_numbers(width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(small().to_rich())
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    row = next(i for i, line in enumerate(lines) if line.startswith("serial blocks"))
    below = lines[row + 1].strip()
    assert ("on a delay cycle" in lines[row]) is (width == 120) and below.startswith("on a delay cycle") is (width == 60)


def test_deep_programs_fold_the_inside_of_long_stretches() -> None:
    """Every visit has one column; the ends of stretches, loops and bridges keep their own, so that words keep their size."""
    program = bridged(96, [(70, 30, 2)])
    report = build_report(program, schedule(program), None, 40, 1)
    runs = folded(report, set())
    assert [j for run in runs for j in run] == list(range(96)) and len(runs) < 48
    alone = {run[0] for run in runs if len(run) == 1}
    assert {e for edge in delay_edges(program) for e in (edge.source, edge.target)} | {0, 95} <= alone
    page = wide(report.to_html())
    assert float(str(page.of_class("dp-picture")[0]["viewbox"]).split()[2]) <= 1200
    numbers = [tuple(map(int, w.split(".."))) for w in page.words if re.fullmatch(r"\d+\.\.\d+", w)]
    assert numbers == [(run[0], run[-1]) for run in runs if len(run) > 1] and numbers
    looped = "\n".join(["program M blocks=60 width=8", "  %0 = embed", *(
        f"  %{i + 1} = block {b} (%{i}) slot {i}" for i, b in enumerate([*range(50), *range(10, 50), *range(10, 60)])
    ), "  %141 = norm (%140)", "  output %141"])
    report = build_report(parse_program(looped), schedule(parse_program(looped)), None, 40, 1)
    # Every iteration looks like the others.
    labels = [report.program.visits[run[0]]["index"] for run in folded(report, set())]
    assert labels.count(10) == labels.count(49) == 3 and labels.count(12) == 3


def test_networks_on_their_own_stand_in_the_columns_of_their_blocks() -> None:
    """Same-layer states: from every network to itself one token on; the longest path waits in one block and then goes up."""
    report = subject().report("{pass: same_layer_state, start: 3, end: 5}", seq_len=9)
    page, edges = wide(report.to_html()), delay_edges(report.program)
    assert {(e.source, e.target, e.tokens) for e in edges} == {(3, 3, 1), (4, 4, 1)}
    rows = len(page.of_class("dp-cell")) // 16
    assert len(page.of_class("dp-hot")) == report.depth_at(rows) == 16 + rows - 1
    assert len(page.of_class("dp-region")) == 1 and len(page.of_class("dp-word")) == 1  # one number for both delays
    assert "feed-forward networks of 2 of 16 visits, run in chunks of 1 token." in "".join(page.words)
    assert (report.serial_blocks, report.serial_block_calls) == (2, 14 + 2 * 9)
    assert report.cost is not None and report.cost.at("serial block calls", 9, 1) == report.serial_block_calls
    assert "latent 2" in wide(subject().report("{pass: coconut, latents: 2}", seq_len=9, cost=False).to_html()).words


def test_dot_has_every_op_and_marks_delays_and_path() -> None:
    report = band()
    text = report.to_dot()
    nodes = dict(re.findall(r'^ *"([^"]+)" \[label="([^"]*)"', text, re.M))
    assert len(nodes) == len(report.program.ops)
    assert text.count('style="dashed"') == 15
    assert text.count("subgraph cluster") == 1
    bold = set(re.findall(r'^ *"(\w+)" \[label=.*penwidth', text, re.M))
    assert bold == {v for s in report.critical_path for v in s.visits}
    assert text.count("{") == text.count("}")


def test_closed_forms_that_fill_a_screen_are_summed_up() -> None:
    program = bridged(32, [(31, 0, 64), (30, 1, 59)])
    report = build_report(program, schedule(program), None, 300, 1)
    shown = report.number("depth").value
    assert shown.startswith("29/59*n + a bounded remainder") and len(shown) < 160
    assert json.loads(report.to_json())["depth"]["output"]["formula"].startswith("{32 if n <= 59")


def test_comparison() -> None:
    table = compare(subject(), [("stock", None), ("band", BAND)], seq_len=155, cost=False)
    rows = {label: (unit, values) for label, unit, values in table.rows}
    assert rows["depth at n = 155"] == ("block visits", (16, 548))
    assert rows["chunk"] == ("tokens", ("the whole row", 4))
    assert [len(line) for line in table.cells()] == [4] * (len(table.rows) + 1)
    assert json.loads(table.to_json())["columns"] == ["stock", "band"]
    assert "| depth at n = 155 | 16 | 548 | block visits |" in table.to_markdown()
    assert re.search(r"depth at n = 155 +16 +548  block visits", str(table))
    differing = table.diff()
    rows = {row[0]: row[1:] for row in differing.cells()}
    assert rows["depth at n = 155"] == ["16 (1x)", "548 (34.25x)", "block visits"] and "physical blocks" not in rows
    assert rows["new parameters"] == ["0", "7.405 M", "parameters"]
    ratios = {row["label"]: row["ratios"] for row in json.loads(differing.to_json())["rows"]}
    assert ratios["depth at n = 155"] == [1, 34.25] and ratios["chunk"] == [None, None]
    for shown in (table, differing):
        for text in (shown.to_html(), shown._repr_html_()):
            page = Page(text)
            cells = [w.strip() for w in page.words if w.strip()]
            assert not page.open and not {"script", "link", "img"} & {tag for tag, _ in page.tags}
            assert [c for row in shown.cells() for c in row if c] == cells[-sum(bool(c) for row in shown.cells() for c in row):]
    assert table.to_html().startswith("<!doctype html>") and "prefers-color-scheme" in table.to_html()


def test_sweep_over_groups() -> None:
    table = sweep(subject(), BAND, [1, 2, 4, 8, 16], seq_len=155, cost=False)
    rows = {label: values for label, _, values in table.rows}
    assert rows["depth at n = 155"] == tuple(16 + 14 * (154 // g) for g in (1, 2, 4, 8, 16))
    assert rows["recursions"] == tuple(-(-155 // g) for g in (1, 2, 4, 8, 16))
    assert rows["growth"] == tuple(Fraction(14, g) for g in (1, 2, 4, 8, 16))
    svg = table.to_svg()
    assert not Page(svg).open and {"1", "2", "4", "8", "16"} <= {w.strip() for w in Page(svg).words}
    assert "runs through one block" in table._repr_html_() and "..." not in table._repr_html_()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "bytes", "0 bytes"),
        (1023, "bytes", "1,023 bytes"),
        (1024, "bytes", "1 KiB"),
        ((1 << 20) - 1, "bytes", "1 MiB"),
        (3 << 40, "bytes", "3 TiB"),
        (0.000123456, "s", "123.5 us"),
        (0, "s", "0 s"),
        (12.5, "s", "12.5 s"),
        (Fraction(7, 2), "per token", "7/2 per token"),
        (3e12, "FLOP", "3 TFLOP"),
        (999_999, "parameters", "999,999 parameters"),
        (999_999_999, "parameters", "1 G parameters"),
        (-2_500_000, "ops", "-2.5 M ops"),
    ],
)
def test_numbers_in_words(value, unit: str, text: str) -> None:
    assert " ".join(scaled(value, unit)) == text
    assert short(value, unit) == (text if text.endswith("us") else text.removesuffix(unit).strip())


def test_charts_take_the_colours_of_the_page_and_double_where_groups_do() -> None:
    series = [Series("calls", ((1, 900.0), (2, 450.0), (4, 230.0), (8, 120.0))), Series("stock", ((1, 16.0), (8, 16.0)))]
    inline, alone = line_chart(series, "a & b", "y", doubling=True), chart_file(series, "a & b", "y", doubling=True)
    assert not Page(inline).open and not re.search(r"https?:|#0b6bb8|<metadata", inline)
    assert "var(--s0)" in inline and "var(--s1)" in inline and 'aria-label="y against a &amp; b"' in inline
    assert "#0b6bb8" in alone and "var(" not in alone and alone.startswith("<?xml") and "xmlns" in alone
    assert inline == line_chart(series, "a & b", "y", doubling=True)
    words = [w.strip() for w in Page(inline).words if w.strip()]
    assert [w for w in words if w in "1248"] == ["1", "2", "4", "8"] and {"calls", "stock"} <= set(words)
    ticks = [float(x) for x in re.findall(r'id="xtick_\d+">.*?d="M ([\d.]+)', inline, re.S)]
    steps = [b - a for a, b in pairwise(ticks)]
    assert len(ticks) == 4 and max(steps) - min(steps) < 0.1, ticks


def test_a_page_without_matplotlib_says_what_draws_charts(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = small().to_html()
    assert "depthpass[plot]" in page and "dp-chart\"" not in page
    with pytest.raises(InputError, match=r"depthpass\[plot\]"):
        chart_file([Series("a", ((1, 1),))], "x", "y")


def test_brackets_over_repeats() -> None:
    def shown(*blocks: int) -> set[tuple[int, int, int, int]]:
        return {(b.first, b.last, b.times, b.level) for b in brackets(blocks)}

    assert shown(0, 1, 2, 3) == set()
    assert shown(0, 1, 2, 1, 2, 1, 2, 3) == {(1, 6, 3, 0)}
    assert shown(0, 0, 0, 1, 1) == {(0, 2, 3, 0), (3, 4, 2, 0)}
    assert shown(0, 1, 1, 0, 1, 1) == {(0, 5, 2, 1), (1, 2, 2, 0)}
    page = wide(subject().report("{pass: repeat, start: 3, end: 5, times: 3}", seq_len=9, cost=False).to_html())
    assert len(page.of_class("dp-bracket")) == 1 and "x3" in page.words


def test_routed_visits_are_filled_by_their_share() -> None:
    page = wide(subject().report("{pass: mixture_of_depths, capacity: 0.25, blocks: [4]}", seq_len=9, cost=False).to_html())
    hollow, cells = page.of_class("dp-part"), page.of_class("dp-cell")
    assert len(hollow) == 4 and "25%" in page.words
    narrow = [float(c["width"]) for c in cells if float(c["width"]) < 0.5 * float(hollow[0]["width"])]
    assert len(narrow) == 4 and narrow[0] == pytest.approx(0.25 * float(hollow[0]["width"]), abs=0.1)


def test_parallel_loops_show_their_diagonal() -> None:
    """From the end of loop 1 at token t to the start of loop 2 at t + 1, for every token, in a gap."""
    report = subject().report("{pass: parallel_loop, loops: 2}", seq_len=9, cost=False)
    page = wide(report.to_html())
    lines = page.of_class("dp-delay")
    assert len(lines) == 3
    for a in lines:
        x0, y0, x1, y1 = (float(v) for v in re.match(r"M([\d.]+) ([\d.]+)C.* ([\d.]+) ([\d.]+)$", a["d"]).groups())
        assert x1 - x0 > 20 and y1 - y0 == 26
