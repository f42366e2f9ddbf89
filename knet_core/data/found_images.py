"""Images found in folders, numbered from 1 in their order; what layouts without a list share."""

import numpy as np
from numpy.typing import NDArray

from knet_core.data.images import open_image, read_image
from knet_core.data.paths import SplitFiles
from knet_core.data.source import ImageRecord


class FoundImages:
    """A part of a `Source`: image files of which only the names are known at first."""

    annotated = True

    _files: SplitFiles
    _file_names: tuple[str, ...]
    """Paths below the image folder."""

    def __len__(self) -> int:
        return len(self._file_names)

    def record(self, index: int) -> ImageRecord:
        """Return number, file name and size of one image; reads the file's header.

        Raises:
            DataError: The file is not an image.
        """
        name = self._file_names[index]
        with open_image(self._files.images / name) as image:
            width, height = image.size
        return ImageRecord(id=index + 1, file_name=name, height=height, width=width)

    def sizes(self) -> NDArray[np.int32]:
        """Return the height and width of all images (N, 2); reads every file's header.

        Raises:
            DataError: A file is not an image.
        """
        records = map(self.record, range(len(self)))
        return np.array([(r.height, r.width) for r in records], dtype=np.int32)

    def image(self, index: int) -> NDArray[np.uint8]:
        """Decode one image, (H0, W0, 3) RGB.

        Raises:
            DataError: The file is damaged.
        """
        return read_image(self._files.images / self._file_names[index])
