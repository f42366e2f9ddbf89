"""Figures of a split, and the number of kernels they suggest."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from knet_core.data.check_report import Finding, SplitStats

_KERNELS = (50, 64, 100, 128, 256, 512)
"""Counts worth training with; beyond the last its multiples."""
_QUANTILE = 0.999


def split_stats(
    objects: Sequence[int],
    crowds: int,
    classes: dict[str, int],
    *,
    checked: int,
    num_kernels: int,
) -> SplitStats:
    """Return the figures of a split.

    Args:
        objects: Of every image, crowds left out.
        crowds: Of all images together.
        classes: Annotations or pixels of each category.
        checked: Images whose pixels were looked at.
        num_kernels: Of the recipe.
    """
    ordered = sorted(objects)
    total = sum(objects)
    return SplitStats(
        images=len(objects),
        checked_images=checked,
        objects=total,
        crowds=crowds,
        crowd_share=crowds / (total + crowds) if crowds else 0.0,
        images_without_objects=objects.count(0),
        classes=classes,
        instances_per_image=dict(sorted(Counter(objects).items())),
        most_instances=max(objects, default=0),
        quantile_instances=ordered[math.ceil(_QUANTILE * len(ordered)) - 1] if ordered else 0,
        images_over_kernels=sum(count > num_kernels for count in objects),
    )


def suggested_kernels(splits: Mapping[str, SplitStats]) -> int | None:
    """Return the count that holds the objects of 99.9 % of the images; None without objects."""
    most = max((split.quantile_instances for split in splits.values()), default=0)
    if not most:
        return None
    largest = _KERNELS[-1]
    beyond = math.ceil(most / largest) * largest
    return next((count for count in _KERNELS if count >= most), beyond)


def crowded_images(
    root: str, splits: Mapping[str, SplitStats], num_kernels: int
) -> Iterator[Finding]:
    """Say in which splits images hold more objects than the network can find."""
    for name, split in splits.items():
        if split.images_over_kernels:
            yield Finding(
                code="too-many-instances",
                file=root,
                id=name,
                message=f"{split.images_over_kernels} of {split.images} images of {name} have "
                f"more than {num_kernels} objects (model.num_kernels), one has "
                f"{split.most_instances}",
            )
