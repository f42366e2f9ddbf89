"""`knet data check`: everything that is wrong with a data set, before any GPU is paid for."""

import argparse
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from knet_core import CHECK_ERRORS, CHECK_WARNINGS, DataError
from knet_platform.errors import UsageError
from knet_platform.staging import staged

if TYPE_CHECKING:
    from rich.console import Console

    from knet_core import CheckReport, Finding

_SHOWN = 5
"""Findings of one code that the terminal shows; `--json` and `--html` hold all."""


def _codes(codes: dict[str, str]) -> str:
    return "\n".join(
        textwrap.fill(f"  {code:22}  {meaning}", 98, subsequent_indent=26 * " ")
        for code, meaning in codes.items()
    )


EXAMPLES = f"""\
errors (exit code 5):
{_codes(CHECK_ERRORS)}

warnings (exit code 0):
{_codes(CHECK_WARNINGS)}

examples:
  knet data check sweeps/data/coco.yaml --sample 200
  knet data check sweeps/data/coco_panoptic.yaml data.root=/data/coco --html check.html
  knet data check sweeps/data/balloon.yaml model.num_kernels=50 --picture masks.png --json"""


def add_check(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the action's arguments."""
    check = actions.add_parser(
        "check",
        help="find everything that is wrong with a data set",
        description="Find everything that is wrong with a data set: files, sizes, ids, masks, "
        "pictures in both splits. Reads all of it, never stopping at a fault.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("data", type=Path, metavar="DATA", help="a file of sweeps/data")
    check.add_argument(
        "overrides", nargs="*", metavar="k=v", help="data.* or model.num_kernels of this check"
    )
    check.add_argument(
        "--task",
        choices=("instance", "panoptic", "semantic"),
        help="what it is for (default: the first that the format serves)",
    )
    check.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="a quick look: decode N random images of a split, and compare those alone",
    )
    check.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at")
    check.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the masks of nine images, as PNG"
    )
    check.add_argument("--json", action="store_true", help="print errors, warnings and stats")


def run_check(args: argparse.Namespace) -> int:
    """Check, print what was found, and return 5 if anything makes the set unfit.

    Raises:
        UsageError: An option cannot be met.
    """
    from knet_core import check_data
    from knet_platform.cli.output import progress_bar
    from knet_platform.config import override_layers, resolve

    if args.sample is not None and args.sample < 1:
        raise UsageError(f"--sample: {args.sample} images; expected at least 1")
    for option, path in (("--html", args.html), ("--picture", args.picture)):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{option}: no folder {path.parent}; make it, or name another file")
    for item in args.overrides:
        if not item.startswith(("data.", "model.num_kernels=")):
            raise UsageError(
                f"{item}: says nothing of a data set; expected data.* or model.num_kernels, and "
                f"--task for the task"
            )
    recipe = resolve(override_layers([f"data={args.data}", *args.overrides]))
    with staged(recipe.data, verify=True), progress_bar("checking") as advance:
        report = check_data(
            recipe.data,
            task=args.task,
            num_kernels=recipe.model.num_kernels,
            sample=args.sample,
            picture=args.html is not None or args.picture is not None,
            progress=advance,
        )
    if args.picture is not None and report.picture is not None:
        args.picture.write_bytes(report.picture)
    if args.html is not None:
        from knet_platform.report.data_page import html

        args.html.write_text(html(report, title=str(args.data)), encoding="utf-8")
    if args.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        _show(args.data, report)
        if args.picture is not None and report.picture is None:
            print("no picture: no image is without findings")
    return DataError.exit_code if report.errors else 0


def _show(data: Path, report: "CheckReport") -> None:
    from rich.text import Text

    from knet_platform.cli.output import result_console

    console = result_console()
    stats = report.stats
    console.print(Text(f"{data}: {stats.format} for {stats.task}, {stats.root}", style="bold"))
    if stats.format == "shapes":
        console.print("rendered while training: nothing on disk to check")
        return
    _show_splits(console, report)
    _show_classes(console, report)
    _show_findings(console, "error", "red", report.errors)
    _show_findings(console, "warning", "yellow", report.warnings)
    part = "" if stats.sample is None else f" (a sample of {stats.sample} a split)"
    console.print(
        f"{len(report.errors)} errors, {len(report.warnings)} warnings in {stats.seconds:.1f} s, "
        f"{stats.images_per_second:.0f} images/s{part}"
    )


def _show_splits(console: "Console", report: "CheckReport") -> None:
    from rich import box
    from rich.table import Table

    stats = report.stats
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in stats.splits:
        table.add_column(name, justify="right")
    splits = list(stats.splits.values())
    table.add_row("images", *(f"{split.images}" for split in splits))
    table.add_row("looked at", *(f"{split.checked_images}" for split in splits))
    if stats.task != "semantic":
        table.add_row("objects", *(f"{split.objects}" for split in splits))
        table.add_row("crowd share", *(f"{100 * split.crowd_share:.1f} %" for split in splits))
        table.add_row("images without", *(f"{split.images_without_objects}" for split in splits))
        table.add_row("most an image", *(f"{split.most_instances}" for split in splits))
        table.add_row("99.9 % have at most", *(f"{s.quantile_instances}" for s in splits))
        over = f"over {stats.num_kernels} kernels"
        table.add_row(over, *(f"{split.images_over_kernels}" for split in splits))
    console.print(table)
    if stats.suggested_kernels is not None:
        console.print(
            f"suggested model.num_kernels: {stats.suggested_kernels} (set: {stats.num_kernels})\n"
        )


def _show_classes(console: "Console", report: "CheckReport") -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    splits = report.stats.splits
    totals: Counter[str] = Counter()
    for split in splits.values():
        totals.update(split.classes)
    if not totals.total():
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("class")
    for name in splits:
        table.add_column(name, justify="right")
    rows = totals.most_common()
    for name, _ in rows[:10]:
        table.add_row(Text(name), *(f"{split.classes.get(name, 0)}" for split in splits.values()))
    console.print(table)
    absent = [name for name, total in rows if not total]
    hidden = len(rows) - 10
    if hidden > 0:
        console.print(
            f"and {hidden} more; {len(absent)} of all {len(rows)} classes are in no image\n"
        )


def _show_findings(
    console: "Console", kind: str, style: str, findings: Sequence["Finding"]
) -> None:
    from rich.text import Text

    shown: Counter[str] = Counter()
    times = Counter(finding.code for finding in findings)
    for finding in sorted(findings, key=lambda found: list(times).index(found.code)):
        if shown[finding.code] == 0:
            console.print(Text(f"{kind} {finding.code}: {times[finding.code]}", style=style))
        shown[finding.code] += 1
        if shown[finding.code] <= _SHOWN:
            console.print(Text(f"  {finding.file}: {finding.message}"))
        elif shown[finding.code] == _SHOWN + 1:
            console.print(Text(f"  and {times[finding.code] - _SHOWN} more; --json lists all"))
