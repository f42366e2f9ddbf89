"""Pictures for people: masks over images, and sheets of them."""

import io
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from knet_core.structures import Instances

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


class _Named(Protocol):
    @property
    def name(self) -> str: ...


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
        categories: Names in the order of labels.
        score_threshold: Least score that is drawn, from 0 to 1.

    Returns:
        (k * H0, k * W0, 3) RGB; small images are enlarged k times.
    """
    factor = math.ceil(_SHOWN_SIDE / max(image.shape[:2]))
    kept = np.flatnonzero(instances.scores.detach().cpu().numpy() >= score_threshold)[::-1]
    canvas = image.repeat(factor, axis=0).repeat(factor, axis=1).astype(np.float64)
    masks = instances.masks.cpu().numpy()
    captions = []
    for number in kept.tolist():  # the best on top
        mask = masks[number].repeat(factor, axis=0).repeat(factor, axis=1)
        if not mask.any():
            continue
        colour = _COLOURS[number % len(_COLOURS)]
        canvas[mask] = 0.55 * canvas[mask] + 0.45 * colour
        canvas[mask & ~ndimage.binary_erosion(mask, iterations=2)] = colour
        score = float(instances.scores[number])
        name = categories[int(instances.labels[number])].name
        caption = name if score == 1.0 else f"{name} {score:.2f}"
        captions.append((mask, caption, tuple(colour.astype(int).tolist())))
    picture = Image.fromarray(canvas.astype(np.uint8))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for mask, caption, colour in captions:
        _write(pen, font, mask, caption, colour)
    return np.asarray(picture)


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
    Image.fromarray(sheet).save(buffer, format="PNG", optimize=True)
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
    caption: str,
    colour: tuple[int, ...],
) -> None:
    """Write a caption on a coloured plate in the middle of a mask that is large enough for it."""
    width, height = pen.textbbox((0, 0), caption, font=font)[2:]
    if mask.any(axis=0).sum() < 0.8 * width or mask.sum() < 2 * width * height:
        return
    at = _middle(mask)
    x = min(max(at[0] - width / 2, 2), max(mask.shape[1] - width - 3, 2))
    y = min(max(at[1] - height / 2, 2), max(mask.shape[0] - height - 3, 2))
    pen.rounded_rectangle((x - 2, y - 1, x + width + 2, y + height + 2), 3, fill=colour)
    dark = sum(colour) > 420
    pen.text((x, y), caption, font=font, fill=(0, 0, 0) if dark else (255, 255, 255))
