"""The forms of the table and the page."""

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from knet_platform.errors import StorageError
from knet_platform.planning import Sweep
from knet_platform.report import Report, build_report, terminal, write_report
from knet_platform.report.render import csv_text, json_text, latex, markdown, number
from knet_platform.storage import Store


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
        console.print(terminal(report), soft_wrap=True)
    return captured.get().splitlines()


def test_the_terminal_table_fits_100_columns_and_marks_the_baseline(report: Report) -> None:
    lines = _printed(report, 100)
    rule = next(index for index, line in enumerate(lines) if line.startswith("──"))
    table = lines[rule - 1 : rule + 5]
    assert max(map(len, table)) <= 100
    (baseline,) = [line for line in table if "(baseline)" in line]
    for text in ("33.0 ± 9.0", "n=3", "34.1", "-1.1"):
        assert text in baseline
    assert any("4/0, 4/1, 4/2: failed: WorkerDied" in line for line in lines)


def test_a_narrow_terminal_and_a_long_name_never_cut_a_number(report: Report) -> None:
    long = dataclasses.replace(report.rows[1], arm="model.adaptive_update=false," * 3)
    wide = dataclasses.replace(report, rows=(report.rows[0], long))
    lines = _printed(wide, 60)
    assert any("33.0 ± 9.0" in line and "-1.1" in line for line in lines)
    assert not any("…" in line for line in lines)
    assert max(len(line) for line in lines if "±" in line and "Student" not in line) <= 100


def test_markdown_rows_have_as_many_cells_as_the_heading(report: Report) -> None:
    rows = [line for line in markdown(report).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 4
    assert len({line.count("|") for line in rows}) == 1
    assert len(set(map(len, rows))) == 1
    assert "n=1 of 3" in rows[2]


def test_latex_is_booktabs_with_everything_escaped(report: Report) -> None:
    text = latex(report)
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count(rf"\{rule}") == 1
    body = text[text.index(r"\toprule") :]
    assert r"$\pm$" in body
    assert r"$\Delta$" in body
    assert "±" not in body
    assert len({line.count("&") for line in body.splitlines() if line.endswith(r"\\")}) == 1


def test_csv_has_one_line_per_arm_and_metric_at_full_precision(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(report))))
    assert len(rows) == 4 * 4
    (row,) = [r for r in rows if r["arm"] == "3" and r["metric"] == "val/AP"]
    assert float(row["mean"]) == pytest.approx(33.0)
    assert (row["baseline"], row["n"], row["seeds"], row["missing"]) == ("true", "3", "3", "")
    assert "WorkerDied" in next(r for r in rows if r["arm"] == "4")["missing"]


def test_json_holds_the_cells_by_metric_and_every_trial(report: Report) -> None:
    values = json.loads(json_text(report))
    assert values["format"] == 1
    row = values["rows"][1]
    assert row["cells"]["val/AP"]["mean"] == pytest.approx(33.0)
    assert row["trials"][0]["metrics"]["val/AP"] == 0.30
    assert row["picture"] == {"seed": 0, "step": 300}


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
        assert source.startswith("data:")
    assert not re.search(r"<script[^>]*\ssrc=", text)
    assert sum(a.get("scope") == "row" for _, a in page.tags) == 4
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) == 2
    assert all(image["alt"] for image in images)
    assert "Plotly.newPlot" in text
    assert "prefers-color-scheme" in text
    assert "killed &lt;by&gt; the kernel" in text
    assert "& &lt;COCO&gt;" not in text


def test_every_file_is_written_and_nothing_else_left(report: Report, tmp_path: Path) -> None:
    written = write_report(report, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"table.md", "table.tex", "table.csv", "report.json", "index.html"}
    assert {path.name for path in written.values()} == names


def test_a_folder_that_cannot_be_written_is_one_line(report: Report, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--out"):
        write_report(report, tmp_path / "file" / "out")
