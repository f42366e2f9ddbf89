"""Compares the splits of a data set."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from knet_core.data.check_report import Finding, Id
from knet_core.data.source import Category

Picture = tuple[str, bytes | None, Id, str]
"""Split, digest of the pixels, id and file of an image; no digest where it cannot be decoded."""


def compare_pictures(pictures: Iterable[Picture]) -> Iterator[Finding]:
    """Find the same picture in both splits or twice in one."""
    seen: dict[bytes, tuple[str, Id, str]] = {}
    for split, content, number, file in pictures:
        if content is None:
            continue
        if content not in seen:
            seen[content] = split, number, file
            continue
        other, twin, twin_file = seen[content]
        yield Finding(
            code="duplicate-image" if other == split else "leaked-image",
            file=file,
            id=number,
            message=f"image {number} of {split} has the pixels of image {twin} of {other}, "
            f"{twin_file}",
        )


def compare_categories(
    file: Path, one: Sequence[Category], other: Sequence[Category]
) -> Iterator[Finding]:
    """Find the ids that not both splits have with one name and kind.

    Args:
        file: To look into.
        one: Of a split.
        other: Of the other split.
    """
    for number in sorted({category.id for category in set(one) ^ set(other)}):
        yield Finding(
            code="category-mismatch",
            file=str(file),
            id=number,
            message=f"category id {number} differs between the splits, or only one has it",
        )
