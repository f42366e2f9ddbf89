"""Whatever a file holds, the readers return or raise one DataError whose lines name the file."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from knet_core.data.coco import CocoSource
from knet_core.data.coco_panoptic import CocoPanopticSource
from knet_core.data.convert import coco_from_via
from knet_core.data.paths import SplitFiles
from knet_core.errors import DataError

POLYGON = [8, 8, 40, 8, 40, 30, 8, 30]
VALID: dict[str, dict[str, Any]] = {
    "instances": {
        "images": [{"id": 1, "file_name": "0.png", "height": 48, "width": 64}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "area": 5.0, "segmentation": [POLYGON]},
            {
                "id": 2,
                "image_id": 1,
                "category_id": 7,
                "iscrowd": 1,
                "segmentation": {"size": [48, 64], "counts": [3000, 72]},
            },
            {
                "id": 3,
                "image_id": 1,
                "category_id": 7,
                "segmentation": {"size": [48, 64], "counts": "PP3"},
            },
        ],
        "categories": [{"id": 7, "name": "dog"}],
    },
    "panoptic": {
        "images": [{"id": 1, "file_name": "0.png", "height": 48, "width": 64}],
        "annotations": [
            {
                "image_id": 1,
                "file_name": "0.png",
                "segments_info": [{"id": 7, "category_id": 7, "iscrowd": 0}],
            }
        ],
        "categories": [{"id": 7, "name": "dog", "isthing": 1}],
    },
    "via": {
        "0": {
            "filename": "0.png",
            "regions": [
                {
                    "shape_attributes": {
                        "name": "polygon",
                        "all_points_x": [8, 40, 40],
                        "all_points_y": [8, 8, 30],
                    },
                    "region_attributes": {"kind": "dog"},
                },
                {"shape_attributes": {"name": "circle", "cx": 9, "cy": 9, "r": 4}},
            ],
        }
    },
}

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([-1, 0, 1, 7, 48, 64, 2**31, 2**32, 2**63, 10**30, -(2**63) - 1]),
    st.floats(),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(),
    st.sampled_from(
        ["../0.png", "/etc/hostname", "\0", "\ud800", "a\nb", ".", "", "0.png/x", "^"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=8),
        st.dictionaries(
            st.one_of(st.text(max_size=3), st.sampled_from(["counts", "size", "id", "name"])),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where in a document values lie."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in inner:
        found.append((*path, key))
        if isinstance(child, dict | list):
            found += places(child, (*path, key))
    return found


@st.composite
def spoiled(draw: st.DrawFn, kind: str) -> bytes:
    """Return a valid document of which up to three values are replaced, taken out or doubled."""
    document = copy.deepcopy(VALID[kind])
    for _ in range(draw(st.integers(0, 3))):
        if not (everywhere := places(document)):
            break
        *path, last = draw(st.sampled_from(everywhere))
        holder: Any = document
        for key in path:
            holder = holder[key]
        change = draw(st.sampled_from(["replace", "remove", "repeat"]))
        if change == "replace":
            holder[last] = draw(VALUES)
        elif change == "remove":
            del holder[last]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
    return json.dumps(document).encode()


def files(kind: str) -> st.SearchStrategy[bytes]:
    return st.one_of(
        spoiled(kind),
        VALUES.map(lambda value: json.dumps(value).encode()),
        st.binary(),
        st.tuples(spoiled(kind), st.integers(0, 400)).map(lambda pair: pair[0][: pair[1]]),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    (root / "panoptic").mkdir()
    Image.new("RGB", (64, 48)).save(root / "0.png")
    ids = np.zeros((48, 64, 3), dtype=np.uint8)
    ids[:, :20, 0] = 7
    Image.fromarray(ids).save(root / "panoptic" / "0.png")
    return root


def read_instances(root: Path, path: Path) -> None:
    for training in (False, True):
        source = CocoSource(
            SplitFiles(root=root, images=root, annotations=path), training=training
        )
        for index in range(len(source)):
            source.image(index)
            source.objects(index)
            source.semantic(index)
        json.dumps(source.ground_truth())


def read_panoptic(root: Path, path: Path) -> None:
    source = CocoPanopticSource(
        SplitFiles(root=root, images=root, annotations=path), training=False, task="panoptic"
    )
    for index in range(len(source)):
        source.image(index)
        source.panoptic(index)


def read_via(root: Path, path: Path) -> None:
    json.dumps(coco_from_via(path))


READERS: dict[str, Callable[[Path, Path], None]] = {
    "instances": read_instances,
    "panoptic": read_panoptic,
    "via": read_via,
}


@pytest.mark.parametrize("kind", READERS)
def test_the_valid_document_is_read(folder: Path, kind: str) -> None:
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(VALID[kind]))
    READERS[kind](folder, path)


@pytest.mark.parametrize("kind", READERS)
@given(data=st.data())
@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
def test_no_file_ends_in_anything_but_one_line_a_problem(
    folder: Path, kind: str, data: st.DataObject
) -> None:
    path = folder / f"{kind}.json"
    path.write_bytes(data.draw(files(kind)))
    try:
        READERS[kind](folder, path)
    except DataError as error:
        message = str(error)
        message.encode()  # a terminal can show it
        for line in message.split("\n"):
            assert line.startswith(str(folder))


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("text", ["[" * 100_000, '{"images":' * 50_000, "9" * 5000])
def test_deep_and_long_texts_are_one_line(folder: Path, kind: str, text: str) -> None:
    path = folder / f"{kind}.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"{kind}") as caught:
        READERS[kind](folder, path)
    assert "\n" not in str(caught.value)
