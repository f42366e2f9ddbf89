"""What `check_data` returns: findings under fixed codes, and figures of each split."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from knet_core.data.coco_json import printable

Id = int | str

CHECK_ERRORS = {
    "missing-files": "a split's folder or annotation file is not there",
    "unreadable-annotations": "the annotation file is no JSON of its format, or lacks a list",
    "bad-entry": "an image, category, annotation or segment lacks what it must state",
    "duplicate-id": "two images, categories, annotations or segments of one id",
    "no-images": "a split without images",
    "missing-image": "a listed image is not there",
    "outside-root": "a file name or link that leads out of the data set; it is not read",
    "unreadable-image": "an image that is damaged, cut short or no image",
    "missing-map": "an image without its PNG of segments or classes",
    "map-without-image": "a PNG of classes without its image",
    "unreadable-map": "a PNG of segments or classes that is damaged or of the wrong mode",
    "size-mismatch": "pixels of another size than stated, or a mask of another than its image",
    "unknown-image": "an annotation of an image that is not listed",
    "unknown-category": "a category id that is not listed",
    "empty-mask": "a mask without any pixel or polygon",
    "bad-polygon": "a polygon of fewer than 3 points, of an odd number of values, or not finite",
    "bad-rle": "run lengths that do not add up to their image",
    "out-of-image": "a polygon outside its image, or reaching further out than it is large",
    "unlisted-segment": "a segment id of the PNG that segments_info lacks",
    "absent-segment": "a segment of segments_info without a pixel in the PNG",
    "category-mismatch": "the splits list different categories",
    "leaked-image": "the very same picture in both splits: scores would be too good",
    "refused-by-loader": "anything else for which training would stop",
}
"""Codes of what makes a data set unfit, with their meaning."""
CHECK_WARNINGS = {
    "area-mismatch": "a stated area that differs from the mask's (objects of instance files: by "
    "more than 25 % and 5 pixels; panoptic segments: at all); crowds of instance files are left "
    "out, since COCO's own differ by a third",
    "tiny-mask": "a polygon that covers less than 1 pixel; training drops it",
    "clipped-mask": "a polygon that crosses the border by more than 1 pixel; it is clipped",
    "duplicate-mask": "the same mask twice for one category of an image",
    "overlapping-masks": "two objects of an image with an IoU of 0.8 or more",
    "duplicate-image": "the same picture twice in one split",
    "tiny-image": "a side below 32 pixels; training drops the image",
    "no-annotations": "a file that lists images alone, as of test-dev: to predict, not to score",
    "too-many-instances": "images with more objects than model.num_kernels can find",
}
"""Codes of what is legal but worth a look, with their meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, or looks wrong."""

    code: str
    """A key of `CHECK_ERRORS` or `CHECK_WARNINGS`."""
    file: str
    """The file to look into."""
    id: Id | None
    """Of the image, annotation, category or segment within the file, as the message says."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitStats:
    """Figures of one split. Counts of objects leave crowds and stuff out."""

    images: int
    """Listed ones."""
    checked_images: int
    """Decoded ones; fewer than listed where a sample was asked for."""
    objects: int
    crowds: int
    crowd_share: float
    """Of all annotations of things, from 0 to 1."""
    images_without_objects: int
    classes: dict[str, int]
    """Annotations of each category, crowds left out; of label maps, pixels in checked images."""
    instances_per_image: dict[int, int]
    """Number of images with so many objects."""
    most_instances: int
    quantile_instances: int
    """So many objects or fewer have 99.9 % of the images."""
    images_over_kernels: int
    """Images with more objects than `model.num_kernels`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckStats:
    """Figures of a data set."""

    format: str
    task: str
    root: str
    sample: int | None
    """Images of each split whose pixels and masks were looked at; None: all."""
    num_kernels: int
    suggested_kernels: int | None
    """What holds the objects of 99.9 % of the images; None for semantic segmentation."""
    seconds: float
    images_per_second: float
    splits: dict[str, SplitStats] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Everything that was found, in the order of splits and files."""

    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    stats: CheckStats
    picture: bytes | None = None
    """Up to nine images with their masks, as PNG."""

    def as_json(self) -> dict[str, Any]:
        """Return plain values: errors, warnings and stats."""
        return {
            "errors": [asdict(finding) for finding in self.errors],
            "warnings": [asdict(finding) for finding in self.warnings],
            "stats": asdict(self.stats),
        }


class Notes:
    """Collects findings about one file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: list[Finding] = []

    def add(self, code: str, number: Id | None, message: str, *, file: Path | None = None) -> None:
        """Note one finding about an id of `file`, which is the collector's own if unset."""
        assert code in CHECK_ERRORS or code in CHECK_WARNINGS
        self.found.append(
            Finding(
                code=code,
                file=printable(str(file or self.file)),
                id=number,
                message=printable(message),
            )
        )
