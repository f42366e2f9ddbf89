"""Other annotation formats as COCO instance files. No torch.

Polygons stay polygons and masks become run lengths. Images are not copied: the COCO file names
them as the source does, so `data.root` and `data.<split>.images` lead to where they are.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from knet_core.data.coco_json import Problems, get, short
from knet_core.data.images import open_image
from knet_core.data.storage import Folders, Listing, open_file
from knet_core.errors import DataError, DiskFullError

_IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp"}
_ROUND_POINTS = 64
"""Points that a circle or an ellipse becomes."""

Document = dict[str, Any]


def coco_from_via(
    source: Path, *, class_attribute: str | None = None, name: str = "object"
) -> Document:
    """Return VIA's own JSON as a COCO document.

    Args:
        source: The file (`via_region_data.json`, or a project with it inside); its images lie
            beside it.
        class_attribute: Region attribute that holds the class; unset: all are one class.
        name: Of that one class.

    Raises:
        DataError: The file is not VIA's, an image is missing, or a region is no area; one line
            for each problem.
    """
    try:
        with open_file(source) as file:
            entries: Any = json.load(file)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{source}: not JSON ({error}); expected VIA's export: export it again"
        ) from None
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from None
    project = get(entries, "_via_img_metadata")
    entries = entries if project is None else project
    if not isinstance(entries, dict) or not all(
        isinstance(get(entry, "filename"), str) for entry in entries.values()
    ):
        raise DataError(
            f"{source}: not VIA's export; expected an object whose values have a filename and "
            f"regions: export annotations as JSON from VIA"
        )
    problems = Problems(source)
    listing = Folders([source.parent]).list(source.parent)
    images: list[Document] = []
    regions: list[tuple[int, str, list[float]]] = []
    for entry in entries.values():
        size = _size(source.parent, entry["filename"], listing, problems)
        if size is None:
            continue
        images.append(_image(len(images) + 1, entry["filename"], size))
        found = entry.get("regions", [])
        found = list(found.values()) if isinstance(found, dict) else found
        if not isinstance(found, list):
            problems.add(f"image {short(entry['filename'])}", "regions are no list")
            continue
        for number, region in enumerate(found):
            where = f"image {short(entry['filename'])}, region {number}"
            polygon = _polygon(get(region, "shape_attributes"), where, problems)
            label = name
            if class_attribute is not None:
                label = get(get(region, "region_attributes"), class_attribute)
                if not isinstance(label, str) or not label:
                    problems.add(where, f"region_attributes hold no {class_attribute!r}; name it")
                    continue
            if polygon is not None:
                regions.append((len(images), label, polygon))
    problems.raise_all()
    classes = sorted({label for _, label, _ in regions} or {name})
    annotations = []
    for number, (image, label, polygon) in enumerate(regions, start=1):
        size = images[image - 1]["height"], images[image - 1]["width"]
        rle = mask_api.merge(mask_api.frPyObjects([polygon], *size))
        annotations.append(
            _annotation(number, image, classes.index(label) + 1, rle, segmentation=[polygon])
        )
    return _document(images, annotations, classes)


def coco_from_index_masks(images: Path, masks: Path, *, name: str = "object") -> Document:
    """Return masks that hold a number an object (0: none) as a COCO document.

    Args:
        images: Folder of the images.
        masks: Folder of PNGs or TIFFs with the images' names and up to 16 bits a pixel.
        name: Of the only class.

    Raises:
        DataError: An image has no mask or a mask no image, or one cannot be used.
    """
    problems = Problems(masks)
    folders = Folders([images, masks])
    listings = folders.list(images), folders.list(masks)
    stems = [
        {
            Path(file).stem: file
            for file in sorted(listing.names)
            if Path(file).suffix.lower() in _IMAGE_ENDINGS
        }
        for listing in listings
    ]
    for stem in sorted(stems[0].keys() ^ stems[1].keys()):
        there, absent = (images, masks) if stem in stems[0] else (masks, images)
        problems.add(f"image {stem}", f"in {there} but not in {absent}; add or remove one")
    if not stems[0]:
        problems.add("images", f"none in {images}; expected the folder of the images")
    problems.raise_all()
    entries: list[Document] = []
    annotations: list[Document] = []
    for stem, file in stems[0].items():
        size = _size(images, file, listings[0], problems)
        if size is None:
            continue
        entries.append(_image(len(entries) + 1, file, size))
        path = masks / stems[1][stem]
        ids = _read_ids(path)
        if ids.shape != size:
            problems.add(
                f"image {stem}",
                f"mask of {ids.shape[1]} x {ids.shape[0]} pixels, expected the image's "
                f"{size[1]} x {size[0]}",
            )
            continue
        for rle in _run_lengths(ids):
            text = {"size": rle["size"], "counts": rle["counts"].decode()}
            annotations.append(
                _annotation(len(annotations) + 1, len(entries), 1, rle, segmentation=text)
            )
    problems.raise_all()
    return _document(entries, annotations, [name])


def write_coco(document: Document, out: Path) -> None:
    """Write a COCO file, whole or not at all.

    Raises:
        DataError: It exists already or its folder cannot be written.
        DiskFullError: The disk took no more.
    """
    if out.exists():
        raise DataError(f"{out}: exists already; choose another name or remove it")
    unfinished = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(document))
        unfinished.rename(out)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        kind = DiskFullError if error.errno == 28 else DataError
        raise kind(f"{out}: cannot be written ({error.strerror})") from None


def _size(folder: Path, name: str, listing: Listing, problems: Problems) -> tuple[int, int] | None:
    """Return height and width of an image beside others; None, and noted, where it is not."""
    if name not in listing.names:
        problems.add(
            f"image {short(name)}", f"no such file in {folder}, or a link out of it; add the file"
        )
        return None
    try:
        with open_image(folder / name) as image:
            return image.height, image.width
    except DataError as error:
        problems.add(f"image {short(name)}", str(error))
        return None


def _polygon(shape: Any, where: str, problems: Problems) -> list[float] | None:
    """Return the outline x, y, x, y, ... of VIA's shape; None, and noted, where it has no area."""
    kind = get(shape, "name")
    if kind in ("polygon", "polyline"):
        x, y = get(shape, "all_points_x"), get(shape, "all_points_y")
        if _are_numbers(x) and _are_numbers(y) and len(x) == len(y) >= 3:
            return [float(value) for point in zip(x, y, strict=True) for value in point]
        problems.add(where, "expected as many x as y, three or more")
        return None
    keys = {
        "rect": ("x", "y", "width", "height"),
        "circle": ("cx", "cy", "r", "r"),
        "ellipse": ("cx", "cy", "rx", "ry"),
    }.get(kind if isinstance(kind, str) else "")
    if keys is None:
        problems.add(where, f"shape {short(kind)} has no area; expected polygon, rect or ellipse")
        return None
    values = [get(shape, key) for key in keys]
    if not _are_numbers(values) or min(values[2:]) <= 0:
        problems.add(where, f"expected numbers {', '.join(keys)}, and a size above 0")
        return None
    x, y, a, b = map(float, values)
    if kind == "rect":
        return [x, y, x + a, y, x + a, y + b, x, y + b]
    turn = float(theta) if _are_numbers([theta := get(shape, "theta", 0)]) else 0.0
    angles = np.linspace(0, 2 * np.pi, _ROUND_POINTS, endpoint=False)
    points = np.stack([a * np.cos(angles), b * np.sin(angles)], axis=1)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    outline: list[float] = (points @ rotation + (x, y)).round(2).ravel().tolist()
    return outline


def _are_numbers(values: Any) -> bool:
    """Tell whether these are coordinates; an image has fewer than a million pixels a side."""
    return isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e6 for v in values
    )


def _read_ids(path: Path) -> NDArray[np.int64]:
    with open_image(path) as picture:
        if picture.mode not in ("L", "P", "1", "I", "I;16", "I;16B"):
            raise DataError(
                f"{path}: pixels of mode {picture.mode}; expected one whole number a pixel, the "
                f"object's: convert it"
            )
        ids = np.array(picture).astype(np.int64)
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= 2**16:
        raise DataError(f"{path}: holds {ids.min()} to {ids.max()}; expected numbers of 16 bits")
    return ids


def _run_lengths(ids: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """Encode every object of a mask (H, W), by number."""
    rows, columns = np.nonzero(ids)
    values, owner = np.unique(ids[rows, columns], return_inverse=True)
    order = np.argsort(owner, kind="stable")
    first = np.searchsorted(owner[order], np.arange(len(values) + 1))
    for number in range(len(values)):
        mine = order[first[number] : first[number + 1]]
        mask = np.zeros(ids.shape, dtype=np.uint8, order="F")
        mask[rows[mine], columns[mine]] = 1
        yield mask_api.encode(mask)


def _image(number: int, name: str, size: tuple[int, int]) -> Document:
    return {"id": number, "file_name": name, "height": size[0], "width": size[1]}


def _annotation(
    number: int, image: int, category: int, rle: dict[str, Any], *, segmentation: Any
) -> Document:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "iscrowd": 0,
        "area": float(mask_api.area(rle)),
        "bbox": mask_api.toBbox(rle).tolist(),
        "segmentation": segmentation,
    }


def _document(images: list[Document], annotations: list[Document], classes: list[str]) -> Document:
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}
