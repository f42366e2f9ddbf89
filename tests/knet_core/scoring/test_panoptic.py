"""Panoptic quality of files: panopticapi's algorithm, written out naively, and bad input."""

import contextlib
import copy
import json
import struct
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from knet_core.errors import DataError
from knet_core.scoring.panoptic import score_panoptic

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 7, "name": "dog", "isthing": 1},
    {"id": 92, "name": "sky", "isthing": 0},
    {"id": 100, "name": "wall", "isthing": 0},
]


def save_ids(path: Path, ids: NDArray[Any]) -> None:
    channels = [ids % 256, ids // 256 % 256, ids // 65536]
    Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).save(path)


def load_ids(path: Path) -> NDArray[np.int64]:
    pixels = np.asarray(Image.open(path)).astype(np.int64)
    return pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]


class Files:
    """Ground truth and predictions in a folder, written when they are scored."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gt: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
        self.pred: dict[str, Any] = {"annotations": []}
        for name in ("gt", "pred"):
            (root / name).mkdir()

    def add(
        self, image_id: int, truth: NDArray[Any], labels: dict[int, int], crowd: set[int],
        found: NDArray[Any], guesses: dict[int, int],
    ) -> None:  # fmt: skip
        height, width = truth.shape
        self.gt["images"].append({"id": image_id, "height": height, "width": width})
        for side, ids, names in (("gt", truth, labels), ("pred", found, guesses)):
            save_ids(self.root / side / f"{image_id}.png", ids)
            segments = [
                {"id": i, "category_id": c, "area": int((ids == i).sum())}
                for i, c in names.items()
            ]
            if side == "gt":
                for segment in segments:
                    segment["iscrowd"] = int(segment["id"] in crowd)
            getattr(self, side)["annotations"].append(
                {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments}
            )

    def write(self) -> tuple[Path, Path, Path, Path]:
        for side in ("gt", "pred"):
            (self.root / f"{side}.json").write_text(json.dumps(getattr(self, side)))
        root = self.root
        return root / "gt.json", root / "gt", root / "pred.json", root / "pred"

    def score(self, **options: Any) -> dict[str, Any]:
        return score_panoptic(*self.write(), **{"workers": 1, **options})

    def problems(self) -> list[str]:
        with pytest.raises(DataError) as caught:
            self.score()
        return str(caught.value).splitlines()


def by_definition(
    gt_json: Path, gt_dir: Path, pred_json: Path, pred_dir: Path
) -> dict[str, dict[str, float]]:
    """Score as `pq_compute` of panopticapi's evaluation.py does, one pair of pixels at a time."""
    gt, pred = json.loads(gt_json.read_text()), json.loads(pred_json.read_text())
    tally: dict[int, dict[str, float]] = defaultdict(
        lambda: {"iou": 0.0, "tp": 0, "fp": 0, "fn": 0}
    )
    predictions = {entry["image_id"]: entry for entry in pred["annotations"]}
    for entry in gt["annotations"]:
        other = predictions[entry["image_id"]]
        true_ids = load_ids(gt_dir / entry["file_name"]).ravel().tolist()
        ids = load_ids(pred_dir / other["file_name"]).ravel().tolist()
        pairs: dict[tuple[int, int], int] = defaultdict(int)
        area: dict[int, int] = defaultdict(int)
        for one, two in zip(true_ids, ids, strict=True):
            pairs[one, two] += 1
            area[two] += 1
        true_segments = {s["id"]: s for s in entry["segments_info"]}
        segments = {s["id"]: s for s in other["segments_info"]}
        matched: set[tuple[str, int]] = set()
        for (one, two), common in pairs.items():
            if one not in true_segments or two not in segments or true_segments[one]["iscrowd"]:
                continue
            category = true_segments[one]["category_id"]
            if category != segments[two]["category_id"]:
                continue
            union = area[two] + true_segments[one]["area"] - common - pairs.get((0, two), 0)
            if common / union > 0.5:
                tally[category]["tp"] += 1
                tally[category]["iou"] += common / union
                matched |= {("gt", one), ("pred", two)}
        crowds = {}
        for one, segment in true_segments.items():
            if segment["iscrowd"]:
                crowds[segment["category_id"]] = one
            elif ("gt", one) not in matched:
                tally[segment["category_id"]]["fn"] += 1
        for two, segment in segments.items():
            if ("pred", two) in matched:
                continue
            hidden = pairs.get((0, two), 0)
            if segment["category_id"] in crowds:
                hidden += pairs.get((crowds[segment["category_id"]], two), 0)
            if hidden / area[two] <= 0.5:
                tally[segment["category_id"]]["fp"] += 1
    result = {}
    for name, kinds in (("All", (0, 1)), ("Things", (1,)), ("Stuff", (0,))):
        rows = []
        for category in gt["categories"]:
            t = tally[category["id"]]
            each = t["tp"] + 0.5 * t["fp"] + 0.5 * t["fn"]
            if category["isthing"] in kinds and each:
                rows.append((t["iou"] / each, t["iou"] / max(t["tp"], 1), t["tp"] / each))
        means = np.mean(rows, axis=0) if rows else np.zeros(3)
        values = {k: 100 * float(v) for k, v in zip(("PQ", "SQ", "RQ"), means, strict=True)}
        result[name] = {**values, "N": len(rows)}
    return result


def random_files(root: Path, seed: int, images: int = 6) -> Files:
    rng = np.random.default_rng(seed)
    files = Files(root)
    categories = [category["id"] for category in CATEGORIES]
    for image_id in range(1, images + 1):
        blocks = rng.integers(0, 8, (3, 4)) * 65793  # up to three bytes
        truth = blocks.repeat(7, axis=0).repeat(5, axis=1)
        labels = {int(i): int(rng.choice(categories)) for i in np.unique(truth) if i}
        found = np.roll(truth, int(rng.integers(-3, 4)), axis=int(rng.integers(2)))
        found = np.where(rng.random(found.shape) < 0.1, 0, found)
        guesses = {
            int(i): labels[int(i)] if rng.random() < 0.8 else int(rng.choice(categories))
            for i in np.unique(found)
            if i
        }
        if rng.random() < 0.3:
            guesses[0] = 1  # the published map's first segment owns value 0
            found[0, 0] = 0
        crowd = {i for i in labels if rng.random() < 0.25}
        files.add(image_id, truth, labels, crowd, found, guesses)
    return files


@pytest.mark.parametrize("seed", range(12))
def test_scores_equal_panopticapis_algorithm(tmp_path: Path, seed: int) -> None:
    files = random_files(tmp_path, seed)
    scores = files.score()
    for name, expected in by_definition(*files.write()).items():
        assert scores[name] == pytest.approx(expected, abs=1e-10)
    assert set(scores) == {"All", "Things", "Stuff", "per_class"}
    assert list(scores["per_class"]) == ["1", "7", "92", "100"]


def test_scores_equal_the_installed_panopticapi(tmp_path: Path, capsys: Any) -> None:
    evaluation = pytest.importorskip(
        "panopticapi.evaluation",
        reason="needs the extra: pip install 'knet-platform[panopticapi]'",
    )
    files = random_files(tmp_path, 3, images=20)
    gt_json, gt_dir, pred_json, pred_dir = files.write()
    expected = evaluation.pq_compute(str(gt_json), str(pred_json), str(gt_dir), str(pred_dir))
    scores = files.score()
    for name in ("All", "Things", "Stuff"):
        for key in ("pq", "sq", "rq"):
            assert scores[name][key.upper()] == pytest.approx(100 * expected[name][key], abs=1e-10)
        assert scores[name]["N"] == expected[name]["n"]


def test_processes_share_the_images_and_change_no_bit(tmp_path: Path) -> None:
    files = random_files(tmp_path, 5, images=40)
    done: list[tuple[int, int]] = []
    alone = files.score(progress=lambda *where: done.append(where))
    assert files.score(workers=2) == alone
    assert done == [(16, 40), (32, 40), (40, 40)]


def test_ground_truth_as_predictions_scores_a_hundred(real_data: Path) -> None:
    folder = real_data / "coco_panoptic" / "annotations"
    gt = (folder / "panoptic_val2017.json", folder / "panoptic_val2017")
    scores = score_panoptic(*gt, *gt)
    assert {k: scores["All"][k] for k in ("PQ", "SQ", "RQ")} == {"PQ": 100, "SQ": 100, "RQ": 100}
    assert scores["All"]["N"] == scores["Things"]["N"] + scores["Stuff"]["N"] > 50


def test_panopticapis_sample_scores_a_hundred_against_itself(real_data: Path) -> None:
    folder = real_data / "evaluators" / "panopticapi_sample"
    files = (folder / "panoptic_examples.json", folder / "panoptic_examples")
    scores = score_panoptic(*files, *files)
    expected = by_definition(*files, *files)
    for name in expected:
        assert scores[name] == pytest.approx(expected[name], abs=1e-10)
    assert scores["All"]["PQ"] == 100


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return random_files(tmp_path, 0, images=3)


def test_all_problems_of_a_prediction_file_are_named_at_once(files: Files) -> None:
    annotations = files.pred["annotations"]
    annotations.append({**copy.deepcopy(annotations[0]), "image_id": 99})
    annotations.append(copy.deepcopy(annotations[1]))
    annotations[0]["segments_info"].append(copy.deepcopy(annotations[0]["segments_info"][0]))
    annotations[2]["segments_info"][0]["category_id"] = 5
    lines = files.problems()
    assert all(line.startswith(str(files.root / "pred.json")) for line in lines)
    text = "\n".join(lines)
    assert "image 99: not in" in text
    assert "image 2: annotated twice" in text
    assert "image 1: segment id" in text
    assert "of unknown category id 5" in text


def test_an_image_without_prediction_is_named(files: Files) -> None:
    del files.pred["annotations"][1]
    (line,) = files.problems()
    assert "image 2: no prediction" in line


def test_a_file_without_predictions_is_one_line(files: Files) -> None:
    files.pred["annotations"] = []
    (line,) = files.problems()
    assert "annotations: none; expected one for each of 3 images" in line


@pytest.mark.parametrize("name", ["../gt/1.png", "/etc/passwd", "link.png", "", "a\0b", None, 7])
def test_nothing_outside_the_folder_is_read(files: Files, name: Any) -> None:
    (files.root / "pred" / "link.png").symlink_to(files.root / "gt" / "1.png")
    files.pred["annotations"][0]["file_name"] = name
    (line,) = files.problems()
    assert "image 1: file_name" in line


def test_links_inside_the_folder_may_be_used(files: Files) -> None:
    (files.root / "pred" / "link.png").symlink_to("1.png")
    before = files.score()
    files.pred["annotations"][0]["file_name"] = "link.png"
    assert files.score() == before


def bomb(side: int) -> bytes:
    """Return a PNG of a few bytes that claims a side of so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def test_huge_and_wrong_pngs_are_named_with_their_images_and_not_decoded(files: Files) -> None:
    (files.root / "pred" / "1.png").write_bytes(bomb(50_000))
    (files.root / "pred" / "2.png").write_bytes(b"no picture")
    Image.new("RGB", (3, 3)).save(files.root / "pred" / "3.png")
    lines = files.problems()
    assert [f"(image {number})" in line for number, line in enumerate(lines, start=1)] == [
        True
    ] * 3
    assert "cannot be decoded" in lines[1]
    assert "3 x 3 pixels, expected 20 x 21" in lines[2]


def test_a_huge_ground_truth_is_refused(files: Files) -> None:
    (files.root / "gt" / "1.png").write_bytes(bomb(50_000))
    (files.root / "gt" / "2.png").write_bytes(bomb(12_000))  # below Pillow's own limit
    files.gt["images"] = []
    lines = files.problems()
    assert "image 1" in lines[0]
    assert "expected at most" in lines[1]


def test_pngs_and_json_must_hold_the_same_segments(files: Files) -> None:
    first, second = (files.pred["annotations"][i]["segments_info"] for i in (0, 1))
    gone = first.pop()["id"]
    second.append({"id": 4242, "category_id": 1})
    lines = files.problems()
    assert f"holds segment id {gone}" in lines[0]
    assert "has no pixel of segment id 4242" in lines[1]


@pytest.mark.parametrize("content", ["", "  \n", "{", "[1]", '"x"', "{}", '{"annotations": 3}'])
def test_a_file_that_is_no_such_document_is_one_line(files: Files, content: str) -> None:
    paths = files.write()
    paths[2].write_text(content)
    with pytest.raises(DataError) as caught:
        score_panoptic(*paths)
    assert str(caught.value).startswith(str(paths[2]))


def test_missing_files_and_folders_are_one_line(files: Files) -> None:
    paths = files.write()
    for place in range(4):
        wrong = list(paths)
        wrong[place] = files.root / "nowhere"
        with pytest.raises(DataError, match="nowhere"):
            score_panoptic(*wrong)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
KEYS = ("id", "image_id", "file_name", "segments_info", "category_id", "iscrowd", "isthing")
ENTRIES = st.dictionaries(st.sampled_from(KEYS), VALUES | st.integers(0, 3), max_size=7)
DOCUMENTS = VALUES | st.fixed_dictionaries(
    {key: st.lists(ENTRIES | VALUES, max_size=3) for key in ("annotations", "categories")}
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(document=DOCUMENTS, side=st.sampled_from(["gt", "pred"]))
def test_a_wrong_json_file_never_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, document: Any, side: str
) -> None:
    files = random_files(tmp_path_factory.mktemp("files"), 0, images=1)
    setattr(files, side, document)
    with contextlib.suppress(DataError):
        files.score()


@settings(deadline=None, max_examples=60)
@given(place=st.integers(0, 400), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_png_never_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int, cut: bool
) -> None:
    files = random_files(tmp_path_factory.mktemp("files"), 0, images=1)
    path = files.root / "pred" / "1.png"
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place] = value
    path.write_bytes(content[:place] if cut else content)
    with contextlib.suppress(DataError):
        files.score()
