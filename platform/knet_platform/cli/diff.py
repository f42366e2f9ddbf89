"""`knet diff`: what differs between two runs - recipe, code, data, environment, metrics."""

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from knet_platform.cli.runs import NAMES, RecordedRun, add_sweep_arguments, run_finder
from knet_platform.config import flatten
from knet_platform.metrics import find_metric
from knet_platform.provenance import Provenance

EXAMPLES = f"""\
examples:
  knet diff 1/0 3/0 --sweep sweeps/stages.yaml --scale laptop
  knet diff 3f9c 81d0b2 --json
  knet diff .knet/runs/3f9c0f6b2a7d4e15 3/0 --sweep sweeps/stages.yaml

{NAMES}"""

MEASURED = ("bench/", "sys/", "cost/")
"""Metrics of the machine's speed, which differ between any two runs."""

_DIGEST = re.compile(r"[0-9a-f]{40,64}")
_Pair = tuple[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What differs, by name, as (of the first, of the second); equal things are left out."""

    recipe: dict[str, _Pair]
    """By dotted key."""
    code: dict[str, _Pair]
    """`git_sha`, `patch` (a digest, None without one), `evaluation`, `files.<path>`."""
    data: dict[str, _Pair]
    environment: dict[str, _Pair]
    metrics: dict[str, tuple[float | None, float | None, float | None]]
    """All of them, with the second minus the first."""

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs but what is measured of the machine."""
        same_scores = all(difference == 0 for _, _, difference in self.scores.values())
        return same_scores and not (self.recipe or self.code or self.data or self.environment)

    @property
    def scores(self) -> dict[str, tuple[float | None, float | None, float | None]]:
        """Return the metrics that depend on the training alone."""
        return {k: v for k, v in self.metrics.items() if not k.startswith(MEASURED)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("first", metavar="A", help="a run")
    parser.add_argument("second", metavar="B", help="another")
    add_sweep_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the differences as JSON")


def run(args: argparse.Namespace) -> int:
    """Print what differs."""
    find = run_finder(args)
    first, second = find(args.first), find(args.second)
    comparison = compare(first, second)
    if args.json:
        print(json.dumps({"a": first.name, "b": second.name, **asdict(comparison)}, indent=2))
    else:
        show(comparison, first.name, second.name)
    return 0


def compare(first: RecordedRun, second: RecordedRun) -> Comparison:
    """Compare two runs."""
    a, b = first.provenance, second.provenance
    return Comparison(
        recipe=_differences(a.recipe, b.recipe),
        code=_differences(_code(first), _code(second)),
        data=_differences(
            {"fingerprint": a.data_fingerprint}, {"fingerprint": b.data_fingerprint}
        ),
        environment=_differences(_environment(a), _environment(b)),
        metrics=_metrics(first.metrics(), second.metrics()),
    )


def show(comparison: Comparison, first: str, second: str) -> None:
    """Print a comparison as tables, one for each part that differs."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from knet_platform.cli.output import result_console

    console = result_console()
    if comparison.is_equal:
        scores = len(comparison.scores)
        console.print(
            f"nothing differs between {first} and {second}: recipe, code, data, environment and "
            f"{scores} scores are equal"
        )
        return
    for title in ("recipe", "code", "data", "environment", "metrics"):
        rows = getattr(comparison, title)
        if not rows:
            console.print(f"{title}: equal\n")
            continue
        table = Table(box=box.SIMPLE_HEAD)
        headings = (title, first, second, *(("difference",) if title == "metrics" else ()))
        for heading in headings:
            right = title == "metrics" and heading != title
            table.add_column(Text(heading), justify="right" if right else "left", no_wrap=True)
        for name, values in rows.items():
            cells = _shown_metric(name, values) if title == "metrics" else map(_shown, values)
            table.add_row(Text(name), *map(Text, cells))
        console.print(table)


def _code(run: RecordedRun) -> dict[str, Any]:
    provenance = run.provenance
    return {
        "git_sha": provenance.git_sha,
        "patch": _patch_digest(run.patch()),
        "files": provenance.code_files,
        "evaluation": provenance.evaluation_digest,
    }


def _patch_digest(patch: str) -> str | None:
    """Return the first digits of a digest of what a patch does, whatever repository it is from."""
    body = patch[patch.find("diff --git ") :] if "diff --git " in patch else ""
    lines = [line for line in body.splitlines() if not line.startswith("index ")]
    text = "\n".join(lines).encode(errors="surrogateescape")
    return hashlib.sha256(text).hexdigest()[:12] if lines else None


def _environment(provenance: Provenance) -> dict[str, Any]:
    names = ("packages", "lock_digest", "python", "platform", "accelerator", "workers", "threads")
    return {name: getattr(provenance, name) for name in names}


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, _Pair]:
    a, b = dict(flatten(first)), dict(flatten(second))
    names = [*a, *(name for name in b if name not in a)]
    return {n: (a.get(n), b.get(n)) for n in names if a.get(n) != b.get(n)}


def _metrics(
    first: Mapping[str, float], second: Mapping[str, float]
) -> dict[str, tuple[float | None, float | None, float | None]]:
    names = [*first, *(name for name in second if name not in first)]
    return {
        name: (
            first.get(name),
            second.get(name),
            second[name] - first[name] if name in first and name in second else None,
        )
        for name in names
    }


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value[:12] if _DIGEST.fullmatch(value) else value
    return "-" if value is None else json.dumps(value)


def _shown_metric(name: str, values: tuple[float | None, ...]) -> list[str]:
    info = find_metric(name)
    *both, difference = (
        "-" if value is None else info.show(value) if info else f"{value:.4g}" for value in values
    )
    sign = "+" if (values[-1] or 0) > 0 else ""
    # What rounds to nothing is not nothing.
    if values[-1] and float(difference) == 0:
        difference = f"{values[-1] * (info.scale if info else 1):.1e}"
    return [*both, f"{sign}{difference}"]
