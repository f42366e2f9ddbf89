"""Reading JSON files and PNGs that anybody may have written; every fault becomes one line."""

import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from PIL import Image

from knet_core.data.source import MOST_PIXELS
from knet_core.errors import DataError

Progress = Callable[[int, int], None]
"""Takes (images done, images in all)."""
Size = tuple[int, int]
"""(height, width)."""
_T = TypeVar("_T")
_R = TypeVar("_R")
_CHUNK = 16
"""Images that a process takes at a time."""
_WORTHWHILE = 64
"""Images for which starting another process pays."""


def read_json(path: Path, kind: str) -> Any:
    """Return what a JSON file holds.

    Args:
        path: The file.
        kind: What it should hold, for messages.

    Raises:
        DataError: The file is missing, empty, or not JSON.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path}: cannot be read ({reason}); expected {kind}: correct the path"
        ) from None
    if not content.strip():
        raise DataError(f"{path}: empty; expected {kind}: write it again")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); expected {kind}: write it again") from None


def folder_root(path: Path) -> Path:
    """Return a folder of PNGs with all links resolved; what leads out of it is not read.

    Raises:
        DataError: There is no such folder.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected one of PNGs: correct the path")
    return path.resolve()


def name_fault(root: Path, name: object) -> str | None:
    """Return what keeps a file from being read, by the name that a JSON file gives it.

    Args:
        root: From `folder_root`.
        name: Relative to it.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        return f"file_name {name!r}; expected the name of a PNG in {root}"
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        return f"file_name {name!r} points outside {root}; expected a PNG in it"
    path = root / name
    try:
        if not path.resolve().is_relative_to(root):
            return f"file_name {name!r} is a link that leads out of {root}; copy the file there"
        if not path.is_file():
            return f"no file {path}; write it or correct the file_name"
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a circle of links
        return f"file_name {name!r} cannot be looked up ({error}); expected a PNG in {root}"
    return None


@contextmanager
def open_png(path: Path, modes: Sequence[str], expected: Size | None) -> Iterator[Image.Image]:
    """Open a PNG; its pixels are decoded in the block, after its size is found to be right.

    Args:
        path: The file.
        modes: Pillow's names of the pixels that will do.
        expected: The size it must have; None for any up to `MOST_PIXELS`.

    Raises:
        DataError: The file is no whole PNG, or of other pixels or another size.
    """
    try:
        with warnings.catch_warnings():
            # Sizes are judged here, so that a file cannot make anybody decode gigabytes.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path, formats=("PNG",))
        with picture:
            width, height = picture.size
            if expected is not None and (height, width) != expected:
                raise DataError(
                    f"{path}: {width} x {height} pixels, expected {expected[1]} x {expected[0]}: "
                    f"write it at its image's size"
                )
            if width * height > MOST_PIXELS:
                raise DataError(
                    f"{path}: {width} x {height} pixels; expected at most {MOST_PIXELS} in all"
                )
            if picture.mode not in modes:
                raise DataError(
                    f"{path}: pixels of mode {picture.mode}; expected {' or '.join(modes)}: "
                    f"convert it"
                )
            yield picture
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: cannot be decoded ({reason}); expected a whole PNG: write it again"
        ) from None
    except Image.DecompressionBombError:
        raise DataError(
            f"{path}: claims more pixels than Pillow decodes; expected at most {MOST_PIXELS}"
        ) from None


def in_processes(
    work: Callable[[Sequence[_T]], _R],
    items: Sequence[_T],
    workers: int | None,
    progress: Progress | None,
) -> Iterator[_R]:
    """Yield the results of `work` on slices of the items, in order.

    Args:
        work: Can be sent to another process.
        items: One an image.
        workers: Processes; None for one a core. Few images are worked on in this one.
        progress: Told after every slice.
    """
    cores = len(os.sched_getaffinity(0)) if workers is None else workers
    processes = min(cores, len(items) // _WORTHWHILE) if workers is None else workers
    slices = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    done = 0
    with _mapper(min(processes, len(slices))) as mapper:
        for part, result in zip(slices, mapper(work, slices), strict=True):
            yield result
            done += len(part)
            if progress:
                progress(done, len(items))


@contextmanager
def _mapper(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    if processes < 2:
        yield map
        return
    # Forking a process that may have threads is unsafe.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield pool.map
