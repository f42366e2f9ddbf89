"""The report's files, each written whole or not at all."""

import os
from pathlib import Path

from knet_platform.errors import StorageError
from knet_platform.report.data_files import csv_text, json_text
from knet_platform.report.page import html
from knet_platform.report.render import latex, markdown
from knet_platform.report.table import Report

FORMATS = {"md": markdown, "latex": latex, "csv": csv_text, "json": json_text}


def write_report(report: Report, directory: Path) -> dict[str, Path]:
    """Write `table.md`, `table.tex`, `table.csv`, `report.json` and `index.html`.

    Returns:
        The paths by `md`, `latex`, `csv`, `json` and `html`.

    Raises:
        StorageError: The folder cannot be written.
    """
    names = {"md": "table.md", "latex": "table.tex", "csv": "table.csv", "json": "report.json"}
    texts = {name: FORMATS[form](report) for form, name in names.items()}
    texts["index.html"] = html(report)
    for name, text in texts.items():
        _write_atomically(directory / name, text)
    return {form: directory / name for form, name in {**names, "html": "index.html"}.items()}


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot write the report ({error.strerror}); name another folder with --out"
        ) from error
