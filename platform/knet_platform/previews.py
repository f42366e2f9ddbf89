"""Pictures small enough for a page of many, made once where the picture is drawn.

A page of fifty arms would else fetch and decode hundreds of megabytes each time it is written.
"""

import io
import math

from PIL import Image

PIXELS = 400_000
"""Most of one preview: four COCO images beside their truth are still told apart."""
_QUALITY = 65


def preview(picture: bytes) -> bytes:
    """Return a picture of any format as WebP of at most `PIXELS` pixels.

    Raises:
        OSError: The picture is damaged, or none.
    """
    image = Image.open(io.BytesIO(picture))
    factor = min(1.0, math.sqrt(PIXELS / (image.width * image.height)))
    size = max(1, int(image.width * factor)), max(1, int(image.height * factor))
    buffer = io.BytesIO()
    small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    small.save(buffer, "WEBP", quality=_QUALITY)
    return buffer.getvalue()
