"""The forms of the table and the page."""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from knet_platform.errors import StorageError
from knet_platform.links import write_links
from knet_platform.report import Report, Terminal, build_report, write_report
from knet_platform.report.data_files import csv_text, json_text
from knet_platform.report.page import html
from knet_platform.report.render import latex, markdown, missing, number
from knet_platform.storage import Failure, Store
from knet_platform.sweep import Sweep


@pytest.fixture
def report(sweep: Sweep, store: Store) -> Report:
    return build_report(sweep, store, scale="laptop")


def test_numbers_round_to_their_digits_and_never_print_a_negative_zero() -> None:
    assert number(12.345, 1) == "12.3"
    assert number(-0.04, 1, sign=True) == "+0.0"
    assert number(-9.5, 1, sign=True) == "-9.5"
    assert number(None, 1) == "-"


def _printed(report: Report, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    with console.capture() as captured:
        console.print(Terminal(report), soft_wrap=True)
    return captured.get().splitlines()


def test_the_terminal_table_fits_100_columns_and_marks_the_baseline(report: Report) -> None:
    lines = _printed(report, 100)
    rule = next(index for index, line in enumerate(lines) if line.startswith("──"))
    table = lines[rule - 1 : rule + 5]
    assert max(map(len, table)) <= 100
    (baseline,) = [line for line in table if "(baseline)" in line]
    assert re.search(r"33\.0 ± 9\.0 +3( +-)+ +34\.1( +-)+ .* finished", baseline)
    (one,) = [line for line in table if line.startswith("1 ")]
    assert re.search(r"10\.0 \(one seed\) +1 of 3 +-20\.0 +(- +)?21\.8 +-7\.7 +same sign", one)
    assert any(line.startswith("more columns on the page: Δ paper") for line in lines)
    assert any("missing: 4 (every seed): failed: WorkerDied" in line for line in lines)


def test_a_wide_terminal_shows_every_column(report: Report) -> None:
    lines = _printed(report, 200)
    assert any(
        all(heading in line for heading in (" p ", "Δ paper", "AP50", "FPS")) for line in lines
    )
    assert not any("more columns" in line for line in lines)


def test_a_narrow_terminal_and_a_long_name_never_cut_a_number(report: Report) -> None:
    long = dataclasses.replace(report.rows[1], arm="model.adaptive_update=false," * 3)
    table = dataclasses.replace(report.tables[0], rows=(report.rows[0], long))
    lines = _printed(dataclasses.replace(report, tables=(table,)), 60)
    (line,) = [line for line in lines if "33.0 ± 9.0" in line]
    assert len(line) <= 100
    assert "34.1" in line
    assert not any("…" in line for line in lines)


def test_a_long_list_of_missing_trials_is_told_by_its_start(report: Report) -> None:
    (names,) = [names for names, fate in missing(report) if fate.startswith("not started")]
    assert names == "1/1, 1/2, 5 (every seed)"
    line = report.tables[0].rows[3].trials[0]
    trials = tuple(dataclasses.replace(line, seed=seed) for seed in range(40))
    row = dataclasses.replace(report.tables[0].rows[3], trials=trials, seeds=50)
    table = dataclasses.replace(report.tables[0], rows=(row,))
    ((names, _),) = missing(dataclasses.replace(report, tables=(table,)))
    assert names.startswith("5/0, 5/1, ")
    assert names.endswith(", 5/8, 31 more")


def test_markdown_rows_have_as_many_cells_as_the_heading(report: Report) -> None:
    rows = [line for line in markdown(report).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4
    assert len({line.count("|") for line in rows}) == 1
    assert len(set(map(len, rows))) == 1
    assert "1 of 3" in rows[2]


def test_latex_is_booktabs_with_everything_escaped(report: Report) -> None:
    text = latex(report)
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count(rf"\{rule}") == 1
    body = text[text.index(r"\toprule") :]
    assert r"$\pm$" in body
    assert r"$\Delta$" in body
    assert "±" not in body
    assert len({line.count("&") for line in body.splitlines() if line.endswith(r"\\")}) == 1


@pytest.mark.parametrize(("form", "harmless"), [(markdown, r"\|"), (latex, r"\textbackslash{}|")])
def test_a_heading_cannot_break_out_of_its_cell(
    report: Report, form: Callable[[Report], str], harmless: str
) -> None:
    column = dataclasses.replace(report.columns[0], heading="A\\|P")
    changed = dataclasses.replace(report, columns=(column, *report.columns[1:]))
    assert harmless in form(changed)


def test_a_message_of_many_lines_stays_in_its_comment(sweep: Sweep, store: Store) -> None:
    trial = next(trial for trial in sweep.trials if trial.name == "5/0")
    _fail(store, trial.hash, "first\n\\input{evil}\nlast")
    text = latex(build_report(sweep, store))
    assert "first \\input{evil} last" in text
    assert not any(line.startswith("\\input") for line in text.splitlines())


def test_csv_has_one_line_per_arm_and_metric_at_full_precision(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(report))))
    assert len(rows) == 4 * 4
    (row,) = [r for r in rows if r["arm"] == "3" and r["metric"] == "val/AP"]
    assert float(row["mean"]) == pytest.approx(33.0)
    assert float(row["ci95_high"]) - float(row["mean"]) == pytest.approx(8.957, abs=1e-3)
    assert (row["baseline"], row["n"], row["seeds"], row["missing"]) == ("true", "3", "3", "")
    (one,) = [r for r in rows if r["arm"] == "1" and r["metric"] == "val/AP"]
    assert float(one["delta"]) == pytest.approx(-20.0)
    assert (one["ci95_low"], one["p"], one["trend"]) == ("", "", "same sign")
    assert "WorkerDied" in next(r for r in rows if r["arm"] == "4")["missing"]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t"])
def test_a_spreadsheet_takes_no_text_for_a_formula(report: Report, start: str) -> None:
    column = dataclasses.replace(report.columns[0], heading=f"{start}HYPERLINK(1)")
    changed = dataclasses.replace(report, columns=(column, *report.columns[1:]))
    (heading, *_) = [row["heading"] for row in csv.DictReader(io.StringIO(csv_text(changed)))]
    assert heading == f"'{start}HYPERLINK(1)"


def test_json_holds_arms_and_metrics_under_the_fixed_keys(report: Report) -> None:
    values = json.loads(json_text(report))
    assert (values["sweep"], values["metric"], values["baseline"]) == ("stages", "val/AP", "3")
    assert list(values["arms"]) == ["1", "3", "4", "5"]
    three, one = values["arms"]["3"], values["arms"]["1"]
    assert (three["n"], three["status"]) == (3, "finished")
    found = three["metrics"]["val/AP"]
    assert found["mean"] == pytest.approx(33.0)
    assert found["ci95"] == pytest.approx([33.0 - 8.957, 33.0 + 8.957], abs=1e-3)
    assert (found["delta"], found["paper"]) == (None, 34.1)
    found = one["metrics"]["val/AP"]
    assert (found["ci95"], found["delta"]) == (None, pytest.approx(-20.0))
    assert (found["trend"], found["paper_delta"]) == ("same sign", pytest.approx(-12.3))
    assert three["trials"][0]["metrics"]["val/AP"] == 0.30


def test_a_sweep_without_a_finished_trial_has_every_form(sweep: Sweep, tmp_path: Path) -> None:
    report = build_report(sweep, Store(str(tmp_path / "empty")))
    assert "no finished trial yet" in markdown(report)
    assert json.loads(json_text(report))["arms"]["3"]["n"] == 0
    written = write_report(report, tmp_path / "out")
    assert "not started" in written["html"].read_text()
    assert all(path.stat().st_size for path in written.values())


def _fail(store: Store, trial_hash: str, message: str) -> None:
    failure = Failure(
        cause="crash", kind="Died", message=message, action="stopped", attempt=1, step=0
    )
    store.trial(trial_hash).write_failure(failure)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_loads_nothing_and_its_table_is_marked_up(report: Report, tmp_path: Path) -> None:
    written = write_report(report, tmp_path / "out")
    text = written["html"].read_text()
    page = _Page()
    page.feed(re.sub(r"<script.*?</script>", "", text, flags=re.S))
    for _, attributes in page.tags:
        source = attributes.get("src") or attributes.get("href") or "data:"
        assert source.startswith(("data:", "#"))
    assert not re.search(r"<script[^>]*\ssrc=", text)
    headings = sum(attributes.get("scope") == "row" for _, attributes in page.tags)
    assert headings == 4 + 4 + 4 * 3  # the table, what the arms differ in, every trial
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) == 2  # arms 1 and 3: one readable evaluation
    assert all(image["alt"] for image in images)
    drawn = [a for _, a in page.tags if a.get("role") == "img"]
    assert len(drawn) == 2 * 2  # ground truth and the update chosen
    assert all(picture["aria-label"] for picture in drawn)
    # Every heading that sorts names a column of its own, and every cell of a row has a value.
    columns = [int(a["data-column"] or "") for _, a in page.tags if a.get("aria-sort") == "none"]
    cells = sum(tag in ("th", "td") and "data-value" in a for tag, a in page.tags)
    assert sorted(columns) == list(range(len(columns)))
    assert cells == 4 * len(columns)
    assert "Plotly.newPlot" in text
    assert "prefers-color-scheme" in text
    assert "killed &lt;by&gt; the kernel" in text
    assert "4c &amp; &lt;COCO&gt; val2017" in text


def test_names_and_messages_cannot_add_markup_to_the_page(sweep: Sweep, store: Store) -> None:
    evil = "\"><script>alert(1)</script>'"
    trial = next(trial for trial in sweep.trials if trial.name == "5/0")
    _fail(store, trial.hash, evil)
    report = build_report(sweep, store)
    rows = tuple(
        dataclasses.replace(
            row,
            arm=row.arm + evil,
            trials=tuple(dataclasses.replace(line, arm=line.arm + evil) for line in row.trials),
        )
        for row in report.rows
    )
    sheets = tuple(dataclasses.replace(sheet, arm=evil) for sheet in report.sheets)
    columns = tuple(dataclasses.replace(column, heading=evil) for column in report.columns)
    table = dataclasses.replace(report.tables[0], rows=rows, reason=evil)
    text = html(
        dataclasses.replace(
            report, title=evil, axis=evil, columns=columns, tables=(table,), sheets=sheets
        )
    )
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_page_tells_what_went_wrong_and_what_to_do(sweep: Sweep, store: Store) -> None:
    trial = next(trial for trial in sweep.trials if trial.name == "3/1")
    folder = store.trial(trial.hash)
    failure = Failure(
        cause="non_finite",
        kind="NonFiniteError",
        message="loss is NaN",
        action="retried from step 120",
        attempt=1,
        step=120,
    )
    folder.write_failure(failure, final=False)
    folder.write_bytes("failures/nonfinite_121.pt", b"dump")
    text = html(build_report(sweep, store))
    triage = text[text.index('id="triage"') :]
    for told in (
        "3/1 <span",
        "non finite",
        "retried from step 120",
        "NonFiniteError: loss is NaN",
        f"{folder.uri}/failures/nonfinite_121.pt",
        "knet data check",
        "4/0 <span",
    ):
        assert told in triage
    assert "0001.json" not in triage


def test_the_page_shows_what_the_arms_differ_in(report: Report) -> None:
    assert report.differences.keys == ("model.stages",)
    assert report.differences.values == {"1": ("1",), "3": ("3",), "4": ("4",), "5": ("5",)}


def test_smaller_micro_batches_are_flagged(sweep: Sweep, store: Store) -> None:
    trial = next(trial for trial in sweep.trials if trial.name == "3/1")
    found = store.trial(trial.hash).result()
    assert found is not None
    store.trial(trial.hash).write_result(dataclasses.replace(found, micro_batch=2))
    report = build_report(sweep, store)
    assert "flagged: 3/1: out of memory, so trained with micro-batches of 2" in markdown(report)
    assert "smaller micro-batch" in html(report)


def test_a_metric_that_an_arm_lacks_is_named(sweep: Sweep, store: Store) -> None:
    trial = next(trial for trial in sweep.trials if trial.name == "3/1")
    found = store.trial(trial.hash).result()
    assert found is not None
    metrics = {name: value for name, value in found.metrics.items() if name != "bench/fps"}
    store.trial(trial.hash).write_result(dataclasses.replace(found, metrics=metrics))
    report = build_report(sweep, store)
    assert ("3/1", "finished without FPS") in missing(report)
    assert "missing: 3/1: finished without FPS" in markdown(report)
    assert "3/1: no value: finished without FPS" in html(report)
    rows = csv.DictReader(io.StringIO(csv_text(report)))
    told = {row["metric"]: row["missing"] for row in rows if row["arm"] == "3"}
    assert told == {
        **dict.fromkeys(("val/AP", "val/AP50", "val/AP75"), ""),
        "bench/fps": "1: finished at step 300",
    }


def test_the_page_leads_to_the_tracking_server(sweep: Sweep, store: Store) -> None:
    write_links(store, sweep.name, {"<its> run": "http://127.0.0.1:5000/#/runs/1?a=1&b=2"})
    assert '<a href="http://127.0.0.1:5000/#/runs/1?a=1&amp;b=2">&lt;its&gt; run</a>' in html(
        build_report(sweep, store)
    )


def test_elastic_trials_are_flagged_with_the_workers_that_they_had(
    sweep: Sweep, store: Store
) -> None:
    trial = next(trial for trial in sweep.trials if trial.name == "3/1")
    found = store.trial(trial.hash).result()
    assert found is not None
    elastic = dataclasses.replace(found, workers=8, earlier_workers=(4, 2))
    store.trial(trial.hash).write_result(elastic)
    report = build_report(sweep, store)
    assert (
        "flagged: 3/1: elastic, trained with 4, then 2, then 8 workers (the same images per step)"
    ) in markdown(report)
    assert f"4, then 2, then 8 workers on {found.device}" in report.hardware
    page = html(report)
    assert page.count('<span class="badge warn">elastic</span>') == 1


def test_rows_that_stand_apart_do_so_in_every_form(report: Report, tmp_path: Path) -> None:
    first = report.tables[0]
    apart = dataclasses.replace(first, rows=first.rows[:1], reason="other data (1, not 2)")
    split = dataclasses.replace(first, rows=first.rows[1:])
    changed = dataclasses.replace(report, tables=(split, apart))
    assert "\n#### other data (1, not 2)\n\n| stages " in markdown(changed)
    assert latex(changed).count(r"\begin{tabular}") == 2
    assert "% other data (1, not 2)" in latex(changed)
    assert any(line == "other data (1, not 2)" for line in _printed(changed, 100))
    rows = csv.DictReader(io.StringIO(csv_text(changed)))
    assert {(row["table"], row["arm"]) for row in rows} == {
        ("1", "3"),
        ("1", "4"),
        ("1", "5"),
        ("2", "1"),
    }
    values = json.loads(json_text(changed))
    assert "1" not in values["arms"]
    (separate,) = values["separate"]
    assert (separate["reason"], list(separate["arms"])) == ("other data (1, not 2)", ["1"])
    assert "Apart: other data (1, not 2)" in html(changed)


def test_every_file_is_written_and_nothing_else_left(report: Report, tmp_path: Path) -> None:
    written = write_report(report, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"table.md", "table.tex", "table.csv", "report.json", "index.html"}
    assert {path.name for path in written.values()} == names


def test_a_folder_that_cannot_be_written_is_one_line(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--out"):
        write_report(report, tmp_path / "file" / "out")
