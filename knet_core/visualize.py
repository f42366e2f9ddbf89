"""Pictures for people: masks over images, and sheets of them."""

import colorsys
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from knet_core.structures import Instances, PanopticMap, Prediction, SemanticMap

Pixels = NDArray[np.uint8]

_SHOWN_SIDE = 320
"""Smaller images are enlarged by a whole factor to at least this, so that captions fit."""
_COLOURS = np.array(
    [
        (230, 60, 60), (60, 130, 240), (255, 190, 40), (50, 180, 90), (170, 90, 220),
        (255, 130, 50), (40, 190, 200), (240, 100, 170), (150, 200, 60), (120, 110, 250),
    ],
    dtype=np.float64,
)  # fmt: skip
_PALE, _STRONG = 0.3, 0.6
"""Saturation of stuff beside things, and of classes among themselves."""
_GOLDEN = 0.618033988749895
"""The golden ratio: its multiples spread evenly over the circle."""


class _Named(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def isthing(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Region:
    """What is drawn in one colour."""

    mask: NDArray[np.bool_]
    """(H0, W0)."""
    colour: NDArray[np.float64]
    """(3,) RGB."""
    caption: str


def draw(image: Pixels, prediction: Prediction, categories: Sequence[_Named]) -> Pixels:
    """Draw what was found in an image, whichever task found it.

    Args:
        image: (H0, W0, 3) RGB.
        prediction: Of the same size; ground truth has scores of 1.
        categories: Classes in the order of labels.

    Returns:
        (k * H0, k * W0, 3) RGB; small images are enlarged k times.
    """
    if isinstance(prediction, Instances):
        return draw_instances(image, prediction, categories)
    if isinstance(prediction, PanopticMap):
        return draw_panoptic(image, prediction, categories)
    return draw_semantic(image, prediction, categories)


def draw_instances(
    image: Pixels,
    instances: Instances,
    categories: Sequence[_Named],
    score_threshold: float = 0.3,
) -> Pixels:
    """Draw every instance of at least this score: tinted mask, outline, class and score.

    Objects too small for their caption go without it.

    Args:
        image: (H0, W0, 3) RGB.
        instances: Masks of the same size as the image; ground truth has scores of 1.
        categories: Classes in the order of labels.
        score_threshold: Least score that is drawn, from 0 to 1.

    Returns:
        (k * H0, k * W0, 3) RGB; small images are enlarged k times.
    """
    kept = np.flatnonzero(instances.scores.detach().cpu().numpy() >= score_threshold)[::-1]
    masks = instances.masks.cpu().numpy()
    regions = [
        _Region(
            mask=masks[number],
            colour=_COLOURS[number % len(_COLOURS)],
            caption=_caption(
                categories[int(instances.labels[number])].name, float(instances.scores[number])
            ),
        )
        for number in kept.tolist()  # the best on top
    ]
    return _draw(image, regions)


def draw_panoptic(
    image: Pixels, panoptic_map: PanopticMap, categories: Sequence[_Named]
) -> Pixels:
    """Draw every segment; things in colours of their own, stuff in its class's pale colour.

    Args:
        image: (H0, W0, 3) RGB.
        panoptic_map: Of the same size; ground truth has scores of 1.
        categories: Classes in the order of labels.

    Returns:
        (k * H0, k * W0, 3) RGB; small images are enlarged k times.
    """
    ids = panoptic_map.ids.cpu().numpy()
    regions = []
    things = 0
    for segment in panoptic_map.segments:
        category = categories[segment.label]
        colour = (
            _COLOURS[things % len(_COLOURS)]
            if category.isthing
            else _class_colour(segment.label, _PALE)
        )
        things += category.isthing
        caption = _caption(category.name, segment.score)
        regions.append(_Region(mask=ids == segment.id, colour=colour, caption=caption))
    return _draw(image, regions)


def draw_semantic(
    image: Pixels, semantic_map: SemanticMap, categories: Sequence[_Named]
) -> Pixels:
    """Draw every class in its colour; pixels without one stay as they are.

    Args:
        image: (H0, W0, 3) RGB.
        semantic_map: Of the same size.
        categories: Classes in the order of labels.

    Returns:
        (k * H0, k * W0, 3) RGB; small images are enlarged k times.
    """
    labels = semantic_map.labels.cpu().numpy()
    present = np.unique(labels[labels < len(categories)]).tolist()
    return _draw(
        image,
        [
            _Region(
                mask=labels == label,
                colour=_class_colour(label, _STRONG),
                caption=categories[label].name,
            )
            for label in present
        ],
    )


def _caption(name: str, score: float) -> str:
    return name if score == 1.0 else f"{name} {score:.2f}"


def _class_colour(label: int, saturation: float) -> NDArray[np.float64]:
    """Return a class's colour (3,): neighbours in the list lie far apart on the colour circle."""
    lightness = (0.95, 0.7, 0.8)[label % 3]
    return 255 * np.array(colorsys.hsv_to_rgb(label * _GOLDEN % 1, saturation, lightness))


def _draw(image: Pixels, regions: Sequence[_Region]) -> Pixels:
    """Tint and outline regions in their order, then write their captions."""
    factor = math.ceil(_SHOWN_SIDE / max(image.shape[:2]))
    canvas = _enlarged(image, factor).astype(np.float64)
    drawn = []
    for region in regions:
        found = ndimage.find_objects(region.mask.astype(np.uint8))
        if not found:
            continue
        rows, columns = (slice(s.start * factor, s.stop * factor) for s in found[0])
        mask = _enlarged(region.mask[found[0]], factor)
        window = canvas[rows, columns]
        window[mask] = 0.55 * window[mask] + 0.45 * region.colour
        window[mask & ~ndimage.binary_erosion(mask, iterations=2)] = region.colour
        drawn.append((mask, (columns.start, rows.start), region))
    picture = Image.fromarray(canvas.astype(np.uint8))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for mask, origin, region in drawn:
        colour = tuple(region.colour.astype(int).tolist())
        _write(pen, font, mask, origin, picture.size, region.caption, colour)
    return np.asarray(picture)


def _enlarged(pixels: NDArray[Any], factor: int) -> NDArray[Any]:
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def contact_sheet(images: Sequence[Pixels], *, columns: int = 2, gap: int = 4) -> bytes:
    """Lay images out row by row on white and return the sheet as PNG.

    Args:
        images: (H, W, 3) RGB each, of any sizes.
        columns: Images in a row; two shows ground truth beside prediction.
        gap: Pixels between images.
    """
    rows = [images[start : start + columns] for start in range(0, len(images), columns)]
    widths = [
        max(row[column].shape[1] for row in rows if column < len(row))
        for column in range(max((len(row) for row in rows), default=0))
    ]
    heights = [max(image.shape[0] for image in row) for row in rows]
    size = (sum(heights) + gap * (len(rows) + 1), sum(widths) + gap * (len(widths) + 1))
    sheet = np.full((*size, 3), 255, dtype=np.uint8)
    y = gap
    for row, height in zip(rows, heights, strict=True):
        x = gap
        for image, width in zip(row, widths, strict=False):
            sheet[y : y + image.shape[0], x : x + image.shape[1]] = image
            x += width + gap
        y += height + gap
    buffer = io.BytesIO()
    # Workers wait for it: at level 6 photographs take three times as long and a twelfth less room.
    Image.fromarray(sheet).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _middle(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Return x and y of the pixel deepest inside, which a centre of mass may miss."""
    depth = ndimage.distance_transform_cdt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(x), int(y)


def _write(
    pen: ImageDraw.ImageDraw,
    font: Any,
    mask: NDArray[np.bool_],
    origin: tuple[int, int],
    size: tuple[int, int],
    caption: str,
    colour: tuple[int, ...],
) -> None:
    """Write a caption on a coloured plate in the middle of a mask that is large enough for it.

    `mask` is a window at `origin` (x, y) of a picture of `size` (width, height).
    """
    width, height = pen.textbbox((0, 0), caption, font=font)[2:]
    if mask.any(axis=0).sum() < 0.8 * width or mask.sum() < 2 * width * height:
        return
    at = _middle(mask)
    x = min(max(origin[0] + at[0] - width / 2, 2), max(size[0] - width - 3, 2))
    y = min(max(origin[1] + at[1] - height / 2, 2), max(size[1] - height - 3, 2))
    pen.rounded_rectangle((x - 2, y - 1, x + width + 2, y + height + 2), 3, fill=colour)
    dark = sum(colour) > 420
    pen.text((x, y), caption, font=font, fill=(0, 0, 0) if dark else (255, 255, 255))
