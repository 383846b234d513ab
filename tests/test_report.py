"""A report says everything, in text, in JSON and on a page that needs nothing else."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace

import pytest

from graphprune.backend import Audit, AuditRow, TensorSpec
from graphprune.cost import Cost
from graphprune.errors import InputError
from graphprune.instruments import PassRecord
from graphprune.measure import Ratio, Timing
from graphprune.notes import Note, Ranking, RankingRow
from graphprune.report import AuditSummary, Latency, Report
from graphprune.report.sections import RANKED, change, count_text, places, sections, size_text
from graphprune.report.text import BAR_WIDTH, bar
from graphprune.target import Target
from graphprune.verify import Certificate

EXACT = Certificate("pass", True, True, 1e-4, 2e-7, 1e-8, math.inf, 1.0, 1)
BEFORE, AFTER = Cost(10, 1_000_000, 4_000_000, 2_000_000_000), Cost(8, 900_000, 3_600_000, 2_000_000_000)


@pytest.fixture
def report() -> Report:
    audit = Audit((
        AuditRow("a", "QLinearConv", "int8", 100),
        AuditRow("b", "QLinearConv", "int8", 50),
        AuditRow("c", "Softmax", "float32", 0, "no int8 kernel"),
    ))  # fmt: skip
    folded = tuple(Note("changed", f"bn{i}", "folded into its convolution") for i in range(5))
    refused = Note("refused", "bn9", "<b>two readers</b>")
    return Report(
        model="Net<script>",
        target=Target("board", "aarch64"),
        backend="onnxruntime",
        pipeline="fold-batch-norm{strict=true}",
        inputs=(TensorSpec("x", ("batch", 3), "float32"),),
        outputs=(TensorSpec("y", ("batch", 2), "float32"), None),
        example_source="inferred: [1, 3] float32",
        original=BEFORE,
        final=AFTER,
        passes=(
            PassRecord("fold-batch-norm{strict=true}", True, (*folded, refused), BEFORE, AFTER, 0.25, EXACT),
            PassRecord("clean-up", False, (), AFTER, AFTER, 0.01, None),
        ),
        certificates={"artifact against original": EXACT},
        audit=AuditSummary.of(audit),
        files={"model.onnx": 3_600_123},
        latency=Latency(reason="built, not measured: target 'board' is aarch64, this host is x86_64"),
        versions={"torch": "2.13.0"},
        notes=("weights are random",),
    )


def test_text_holds_what_matters(report: Report) -> None:
    text = str(report)
    for part in (
        "board (aarch64)", "x: float32[batch, 3]", "10 -> 8", "1.00 M -> 900.00 k", "-10.0 %",
        "exact, relative error 2.0e-07", "refused", "<b>two readers</b>", "bn9", "weights are random",
        "no int8 kernel", "built, not measured: target 'board'", "3.60 MB", "inferred: [1, 3] float32",
    ):  # fmt: skip
        assert part in text, part


def test_text_has_no_control_codes_and_only_ascii(report: Report) -> None:
    text = str(report)
    assert "\x1b" not in text
    assert text.isascii()


def test_notes_with_one_message_share_a_row(report: Report) -> None:
    rows = [line for line in str(report).splitlines() if "folded into its convolution" in line]
    assert len(rows) == 1
    assert "bn0, bn1, bn2 and 2 more" in rows[0]
    assert "bn4" in report.html


def test_a_refusal_is_marked(report: Report) -> None:
    notes = next(s for s in sections(report) if s.title == "notes")
    assert [notes.rows[index][1] for index, _ in notes.tones] == ["refused"]


def test_colour_only_where_a_terminal_can_show_it(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal, log = io.StringIO(), io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    report.print(terminal)
    report.print(log)
    assert "\x1b[" in terminal.getvalue()
    assert log.getvalue() == f"{report}\n"
    monkeypatch.setenv("NO_COLOR", "1")
    plain = io.StringIO()
    monkeypatch.setattr(plain, "isatty", lambda: True)
    report.print(plain)
    assert not re.search(r"\x1b\[[\d;]*3\dm", plain.getvalue())


def test_json_is_finite_and_complete(report: Report) -> None:
    values = json.loads(report.json, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert values["certificates"]["artifact against original"]["sqnr"] is None
    assert values["passes"][0]["notes"][-1]["kind"] == "refused"
    assert len(values["passes"][0]["notes"]) == 6
    assert values["audit"]["operators"][0] == {
        "operator": "QLinearConv", "precision": "int8", "count": 2, "macs": 150,
    }  # fmt: skip
    assert values["outputs"][1] == "None"
    assert values["latency"]["artifact"] is None
    assert values["seconds"] == [0.25, 0.01]


def test_metrics_do_not_depend_on_the_clock(report: Report) -> None:
    slower = replace(report, passes=tuple(replace(p, seconds=9.0) for p in report.passes), latency=Latency())
    assert slower.metrics() == report.metrics()
    assert slower.measurements() != report.measurements()


def test_the_page_is_self_contained_and_escaped(report: Report) -> None:
    page = report.html
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;two readers" in page
    assert not re.search(r"(src|href|url\(|@import|https?:)", page)


def test_latency_with_numbers(report: Report) -> None:
    eager, artifact = Timing(2.0, 1.9, 2.2, 20, 2, (2.0,) * 20), Timing(1.0, 0.9, 1.1, 20, 2, (1.0,) * 20)
    measured = replace(
        report, latency=Latency(eager, artifact, Ratio(2.0, 1.9, 2.1), threads=2, host="x86_64 with 2 cores")
    )
    text = str(measured)
    assert "1.000 ms" in text
    assert "0.900 to 1.100 ms" in text
    assert "2.00 (1.90 to 2.10)" in text
    assert "threads: 2, on x86_64 with 2 cores" in text
    assert set(measured.to_json()["latency"]["artifact"]) == {
        "median_ms", "low_ms", "high_ms", "rounds", "threads",
    }  # fmt: skip


def test_a_failed_certificate_is_an_error_row(report: Report) -> None:
    failed = replace(EXACT, passed=False, reason="output 0 is off")
    section = next(
        s for s in sections(replace(report, certificates={"end": failed})) if s.title == "certificates"
    )
    assert section.tone(0) == "error"
    assert section.rows[0][1] == "FAILED: output 0 is off"


def test_a_change_that_was_not_verified_is_marked(report: Report) -> None:
    unproved = replace(report, passes=(replace(report.passes[0], certificate=None),))
    section = next(s for s in sections(unproved) if s.title == "passes")
    assert section.rows[0][5] == "not verified"
    assert section.tone(0) == "warning"


def with_ranking(report: Report, *rows: RankingRow) -> Report:
    ranking = Ranking("operators, each alone", "SQNR, dB", rows, "a bar is an <error>")
    return replace(report, passes=(replace(report.passes[0], rankings=(ranking,)), *report.passes[1:]))


ROWS = (
    RankingRow("conv<1>", 12.345, 1.0, "stays in float", chosen=True),
    RankingRow("[bold]conv[/]", 18.4, 0.5),
    RankingRow("head", math.inf, 0.0),
)


def test_a_ranking_on_the_page_has_bars_of_its_shares(report: Report) -> None:
    page = with_ranking(report, *ROWS).html
    table = page.partition("operators, each alone")[2].partition("</table>")[0]
    assert re.findall(r'style="width: ([\d.]+)%"', table) == ["100.0", "50.0", "0.0"]
    assert table.count("<tr") == 1 + len(ROWS)
    first = table.partition("<tbody>")[2].partition("</tr>")[0]
    assert 'class="warning"' in first
    assert "conv&lt;1&gt;" in first
    assert table.count('class="warning"') == 1
    assert "a bar is an &lt;error&gt;" in page
    assert "<div style" not in report.html
    assert "operators, each alone" not in with_ranking(report).html


def test_a_ranking_in_text_has_bars_of_its_shares(report: Report) -> None:
    text = str(with_ranking(report, *ROWS))
    assert text.isascii()
    lines = {line.split()[1]: line for line in text.splitlines() if re.match(r" *[123]  ", line)}
    assert "12.3" in lines["conv<1>"]
    assert "inf" in lines["head"]
    assert [lines[row.name].count("#") for row in ROWS] == [BAR_WIDTH, BAR_WIDTH // 2, 0]
    assert "a bar is an <error>" in text


def test_bars_are_blocks_on_a_terminal_that_can_show_them(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with_ranking(report, *ROWS).print(terminal)
    text = terminal.getvalue()
    assert bar(1.0, blocks=True) == "█" * BAR_WIDTH in text
    assert text.count("█") == BAR_WIDTH + BAR_WIDTH // 2
    assert "#" not in text


def test_text_shortens_a_ranking_but_no_row_that_was_chosen(report: Report) -> None:
    rows = [RankingRow(f"op{i}", float(i), 1 / (i + 1)) for i in range(RANKED + 10)]
    rows[-1] = replace(rows[-1], chosen=True)
    long = with_ranking(report, *rows)
    short, full = (
        next(s for s in sections(long, full=full) if "each alone" in s.title) for full in (False, True)
    )
    assert [row[1] for row in short.rows] == [*(f"op{i}" for i in range(RANKED)), rows[-1].name]
    assert short.rows[-1][0] == str(len(rows))
    assert short.tone(RANKED) == "warning"
    assert "9 more" in short.caption
    assert len(short.bars) == len(short.rows)
    assert [row[1] for row in full.rows] == [row.name for row in rows]
    assert "more" not in full.caption


def test_a_ranking_in_json(report: Report) -> None:
    values = json.loads(with_ranking(report, *ROWS).json)["passes"]
    (ranking,) = values[0]["rankings"]
    assert ranking["unit"] == "SQNR, dB"
    assert [row["value"] for row in ranking["rows"]] == [12.345, 18.4, None]
    assert ranking["rows"][0]["chosen"] is True
    assert values[1]["rankings"] == []


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_bar_longer_than_the_longest(share: float) -> None:
    with pytest.raises(InputError, match="share of 'conv' is the length of a bar"):
        RankingRow("conv", 1.0, share)


def test_words_for_numbers() -> None:
    assert [count_text(n) for n in (0, 999, 1_000, 25_557_032, 4_089_184_256)] == [
        "0", "999", "1.00 k", "25.56 M", "4.09 G",
    ]  # fmt: skip
    assert [size_text(n) for n in (12, 1_500)] == ["12 B", "1.50 kB"]
    assert [change(4, 4), change(4, 2), change(0, 2)] == ["", "-50.0 %", "new"]
    assert places(["", "a"], full=False) == "a"
