"""Images that a COCO file lists, decoded when asked for; what both of COCO's formats share."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from knet_core.data.images import check_size, read_image
from knet_core.data.paths import SplitFiles
from knet_core.data.source import ImageRecord


class ImageList(Protocol):
    """The part of an index that tells of images."""

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """(N,) ids."""

    @property
    def file_names(self) -> tuple[str, ...]:
        """N paths below the image folder."""

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(N, 2) stated height and width."""


class ListedImages:
    """A part of a `Source`: the images of an index that a split keeps."""

    _files: SplitFiles
    _index: ImageList
    _kept: NDArray[np.int64]
    """Positions in the index."""

    def __len__(self) -> int:
        return len(self._kept)

    def record(self, index: int) -> ImageRecord:
        """Return id, file name and stated size of one image."""
        image = int(self._kept[index])
        height, width = self._index.sizes[image].tolist()
        return ImageRecord(
            id=int(self._index.image_ids[image]),
            file_name=self._index.file_names[image],
            height=height,
            width=width,
        )

    def sizes(self) -> NDArray[np.int32]:
        """Return the stated height and width of all images (N, 2)."""
        return self._index.sizes[self._kept]

    def image(self, index: int) -> NDArray[np.uint8]:
        """Decode one image, (H0, W0, 3) RGB.

        Raises:
            DataError: The file is damaged or its size is not the stated one.
        """
        record = self.record(index)
        path = self._files.images / record.file_name
        pixels = read_image(path)
        check_size(path, pixels, record, self._files.annotations.name)
        return pixels
