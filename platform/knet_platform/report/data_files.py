"""The tables for programs: CSV and JSON, at full precision."""

import csv
import dataclasses
import io
import json
from typing import Any

from knet_platform.report.table import Cell, Report, Row, Table


def csv_text(report: Report) -> str:
    """Return one line per table, arm and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = list(_flat(cell_values(_EMPTY)))
    before = ["table", "arm", "baseline", "metric", "heading"]
    after = ["seeds", "status", "gpu_hours", "usd", "missing"]
    writer.writerow([*before, *names, *after])
    for number, table in enumerate(report.tables, start=1):
        for row in table.rows:
            for column, cell in zip(report.columns, row.cells, strict=True):
                lacking = "; ".join(
                    f"{line.seed}: {line.detail}"
                    for line in row.trials
                    if column.metric not in line.metrics
                )
                values = [
                    *(number, row.arm, str(row.is_baseline).lower()),
                    *(column.metric, column.heading, *_flat(cell_values(cell)).values()),
                    *(row.seeds, row.status, row.gpu_hours, row.usd, lacking),
                ]
                writer.writerow(map(_inert, values))
    return out.getvalue()


def json_text(report: Report) -> str:
    """Return everything but the pictures; docs/design/report.md describes the keys."""
    main, *separate = report.tables
    values: dict[str, Any] = {
        "format": 2,
        "sweep": report.sweep,
        "metric": report.columns[0].metric,
        "baseline": report.baseline,
        "arms": _arms(report, main),
        "separate": [{"reason": table.reason, "arms": _arms(report, table)} for table in separate],
        "columns": [dataclasses.asdict(column) for column in report.columns],
    }
    for name in ("title", "axis", "paper_source", "scale", "data", "training", "hardware"):
        values[name] = getattr(report, name)
    values |= {"notes": report.notes, "created": report.created}
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def cell_values(cell: Cell) -> dict[str, Any]:
    """Return a cell as plain values; intervals as [low, high]."""
    ours = cell.difference
    return {
        "n": cell.n,
        "mean": cell.mean,
        "ci95": _interval(cell.mean, cell.ci95),
        "delta": ours and ours.mean,
        "delta_ci95": ours and _interval(ours.mean, ours.ci95),
        "delta_n": ours.n if ours else 0,
        "p": ours and ours.p,
        "paper": cell.paper,
        "delta_paper": cell.delta_paper,
        "paper_delta": cell.paper_difference,
        "delta_of_deltas": cell.delta_of_deltas,
        "trend": cell.trend,
    }


_EMPTY = Cell(n=0, mean=None, ci95=None, difference=None, paper=None, paper_difference=None)


def _arms(report: Report, table: Table) -> dict[str, Any]:
    return {row.arm: _arm(report, row) for row in table.rows}


def _arm(report: Report, row: Row) -> dict[str, Any]:
    return {
        "n": row.cells[0].n,
        "seeds": row.seeds,
        "status": row.status,
        "gpu_hours": row.gpu_hours,
        "usd": row.usd,
        "metrics": {
            column.metric: cell_values(cell)
            for column, cell in zip(report.columns, row.cells, strict=True)
        },
        "trials": [dataclasses.asdict(line) for line in row.trials],
    }


def _interval(mean: float | None, half: float | None) -> list[float] | None:
    return None if mean is None or half is None else [mean - half, mean + half]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return the same with each interval as two values."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name.endswith("ci95"):
            flat[f"{name}_low"], flat[f"{name}_high"] = value or (None, None)
        else:
            flat[name] = value
    return flat


def _inert(value: Any) -> Any:
    """Return text that no spreadsheet takes for a formula; numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value
