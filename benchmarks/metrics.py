"""Compares the metrics with what others use, on the same inputs in one run.

Prints a Markdown table; times are medians of interleaved rounds, the ratio is the median of the
rounds' ratios: how many times as long as ours the other takes.

    python benchmarks/metrics.py [--rounds N] [--images N] [--workers N] [--quick]

- Panoptic quality, from memory and from PNG and JSON files, against one core of panopticapi, which
  reads PNGs. Where it is not installed, its algorithm as `evaluation.py` has it is run instead
  (`pq_by_panopticapi`): the table says which.
- mIoU against a histogram per kind of count by torch.histc, as mmsegmentation computes it.
- Mask AP by faster-coco-eval (ours) against pycocotools.
- Panoptic quality and mIoU from files, and mask AP, over processes. They start with the row, so
  these sets are larger.

    python benchmarks/metrics.py --memory [--images 5000]

instead prints the peak memory of the worker that scores mask AP of that many images with 100
detections each, gathered from two workers.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_api

from knet_core.data.source import PanopticTruth, TrueSegment
from knet_core.metrics.mask_ap import Detections, MaskAP, average_precision
from knet_core.metrics.mean_iou import PixelCounts
from knet_core.metrics.panoptic_quality import PanopticQuality
from knet_core.scoring.panoptic import score_panoptic
from knet_core.scoring.semantic import score_semantic

# Processes that score files import this module again, and can do without torch.
if TYPE_CHECKING:
    from knet_core.structures import PanopticMap

HEIGHT, WIDTH = 480, 640
CLASSES = 133
"""COCO panoptic's."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    name: str
    other: Callable[[], Any]
    ours: Callable[[], Any]
    check: Callable[[Any, Any], float]
    """Returns the largest difference between the two results."""
    target: float | None


# Panoptic quality.


@dataclass(frozen=True)
class PanopticSet:
    """The same maps in memory and on disk."""

    folder: Path
    truth: list[PanopticTruth]
    found: "list[PanopticMap]"
    categories: dict[int, dict[str, int]]


@dataclass(frozen=True)
class Kind:
    """What the metric needs to know of a class."""

    isthing: bool


@dataclass(frozen=True)
class HasId:
    """What mask AP needs to know of a class."""

    id: int


def regions(rng: np.random.Generator, count: int) -> NDArray[np.int32]:
    """Return a map (HEIGHT, WIDTH) of `count` cells with wavy borders, about 11 as in COCO."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    columns = columns + 9 * np.sin(rows / 17) + 3 * np.sin(rows / 3)
    rows = rows + 9 * np.sin(columns / 23)
    centres = rng.random((count, 2)) * (HEIGHT, WIDTH)
    distances = [(rows - y) ** 2 + (columns - x) ** 2 for y, x in centres]
    return np.argmin(distances, axis=0).astype(np.int32)


def panoptic_set(folder: Path, images: int) -> PanopticSet:
    """Write maps of truth and prediction as files and keep them."""
    import torch

    from knet_core.structures import PanopticMap, Segment

    rng = np.random.default_rng(0)
    categories = {i: {"id": i, "isthing": int(i <= 80)} for i in range(1, CLASSES + 1)}
    truth, found = [], []
    documents: dict[str, list[Any]] = {"gt": [], "pred": []}
    for side in documents:
        (folder / side).mkdir(parents=True)
    for number in range(images):
        cells = regions(rng, int(rng.integers(6, 18)))
        moved = np.roll(cells, int(rng.integers(-20, 21)), axis=1)
        labels = rng.integers(1, CLASSES + 1, cells.max() + 1)
        for side, cell, scale in (("gt", cells, 70_001), ("pred", moved, 1_000)):
            ids = (cell * scale).astype(np.int32)  # cell 0 is void
            present = np.unique(cell)[1:].tolist()
            segments = [
                {
                    "id": c * scale,
                    "category_id": int(labels[c]),
                    "area": int((cell == c).sum()),
                    "iscrowd": 0,
                }
                for c in present
            ]
            rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
            Image.fromarray(rgb).save(folder / side / f"{number}.png")
            documents[side].append(
                {"image_id": number, "file_name": f"{number}.png", "segments_info": segments}
            )
            if side == "gt":
                true_segments = tuple(
                    TrueSegment(id=s["id"], label=s["category_id"] - 1, iscrowd=False)
                    for s in segments
                )
                truth.append(PanopticTruth(ids=ids, segments=true_segments))
            else:
                guesses = tuple(
                    Segment(id=s["id"], label=s["category_id"] - 1, score=1.0) for s in segments
                )
                found.append(PanopticMap(ids=torch.from_numpy(ids), segments=guesses))
    for side, annotations in documents.items():
        document = {"annotations": annotations, "categories": list(categories.values())}
        (folder / f"{side}.json").write_text(json.dumps(document))
    return PanopticSet(folder=folder, truth=truth, found=found, categories=categories)


def rgb_to_id(path: Path) -> NDArray[np.uint32]:
    """Read ids as panopticapi's `rgb2id` does."""
    color = np.array(Image.open(path), dtype=np.uint32)
    return color[:, :, 0] + 256 * color[:, :, 1] + 256 * 256 * color[:, :, 2]


def pq_by_panopticapi(data: PanopticSet) -> float:
    """Return PQ by the steps of `pq_compute_single_core` of panopticapi's evaluation.py."""
    gt, pred = (
        json.loads((data.folder / f"{side}.json").read_text())["annotations"]
        for side in ("gt", "pred")
    )
    tally: dict[int, list[float]] = defaultdict(lambda: [0.0, 0, 0, 0])
    for entry, other in zip(gt, pred, strict=True):
        true_ids = rgb_to_id(data.folder / "gt" / entry["file_name"])
        ids = rgb_to_id(data.folder / "pred" / other["file_name"])
        true_segments = {s["id"]: s for s in entry["segments_info"]}
        segments = {s["id"]: s for s in other["segments_info"]}
        for number, area in zip(*np.unique(ids, return_counts=True), strict=True):
            if number in segments:
                segments[number]["area"] = area
        both = true_ids.astype(np.uint64) * 256**3 + ids.astype(np.uint64)
        pairs = {}
        for number, area in zip(*np.unique(both, return_counts=True), strict=True):
            pairs[number // 256**3, number % 256**3] = area
        matched: set[tuple[str, int]] = set()
        for (one, two), common in pairs.items():
            if one not in true_segments or two not in segments:
                continue
            category = true_segments[one]["category_id"]
            if category != segments[two]["category_id"]:
                continue
            union = segments[two]["area"] + true_segments[one]["area"] - common
            iou = common / (union - pairs.get((0, two), 0))
            if iou > 0.5:
                tally[category][0] += iou
                tally[category][1] += 1
                matched |= {("gt", one), ("pred", two)}
        for one, segment in true_segments.items():
            tally[segment["category_id"]][3] += ("gt", one) not in matched
        for two, segment in segments.items():
            if ("pred", two) not in matched and pairs.get((0, two), 0) / segment["area"] <= 0.5:
                tally[segment["category_id"]][2] += 1
    rows = [i / (tp + 0.5 * fp + 0.5 * fn) for i, tp, fp, fn in tally.values() if tp + fp + fn]
    return 100 * float(np.mean(rows))


def pq_by_installed(data: PanopticSet) -> float:
    """Return PQ by one core of the installed panopticapi."""
    import contextlib
    import io

    from panopticapi.evaluation import pq_compute_single_core

    gt, pred = (
        json.loads((data.folder / f"{side}.json").read_text())["annotations"]
        for side in ("gt", "pred")
    )
    folders = [str(data.folder / side) for side in ("gt", "pred")]
    with contextlib.redirect_stdout(io.StringIO()):
        pairs = list(zip(gt, pred, strict=True))
        stat = pq_compute_single_core(0, pairs, *folders, data.categories)
    return 100 * float(stat.pq_average(data.categories, isthing=None)[0]["pq"])


def pq_from_memory(data: PanopticSet) -> float:
    """Return PQ of the maps in memory."""
    from knet_core.structures import ImageInfo

    kinds = [Kind(bool(category["isthing"])) for category in data.categories.values()]
    metric = PanopticQuality(lambda number: data.truth[number], kinds)
    for number, found in enumerate(data.found):
        size = (HEIGHT, WIDTH)
        metric.add(
            ImageInfo(image_id=number, file_name="", input_size=size, original_size=size), found
        )
    return 100 * metric.compute()["val/PQ"]


def pq_from_files(data: PanopticSet, workers: int) -> float:
    """Return PQ of the same maps from PNG and JSON."""
    root = data.folder
    scores = score_panoptic(
        root / "gt.json", root / "gt", root / "pred.json", root / "pred", workers=workers
    )
    return float(scores["All"]["PQ"])


# Mean IoU.


def write_label_maps(
    folder: Path, pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], copies: int
) -> None:
    """Write every pair `copies` times as PNGs."""
    for side in ("gt", "pred"):
        (folder / side).mkdir(parents=True)
    for number, pair in enumerate(pairs * copies):
        for side, labels in zip(("gt", "pred"), pair, strict=True):
            Image.fromarray(labels).save(folder / side / f"{number}.png")


def iou_from_files(folder: Path, workers: int) -> float:
    """Return mIoU of the same maps from PNGs."""
    scores = score_semantic(folder / "gt", folder / "pred", num_classes=150, workers=workers)
    return float(scores["mIoU"])


def label_maps(images: int) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Return truth and prediction (512, 683) of 150 classes, 0.3 of the pixels wrong."""
    rng = np.random.default_rng(1)
    pairs = []
    for _ in range(images):
        blocks = rng.integers(0, 150, (8, 11), dtype=np.uint8)
        truth = blocks.repeat(64, axis=0).repeat(63, axis=1)[:, :683].copy()
        noise = rng.integers(0, 150, truth.shape, dtype=np.uint8)
        found = np.where(rng.random(truth.shape) < 0.3, noise, truth)
        truth[:16] = 255
        pairs.append((truth, found))
    return pairs


def iou_by_histc(pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> NDArray[Any]:
    """Return IoU per class by three histograms an image (mmsegmentation's IoUMetric)."""
    import torch

    sums = torch.zeros(3, 150, dtype=torch.float64)
    for one, other in pairs:
        truth, found = torch.from_numpy(one), torch.from_numpy(other)
        counted = truth != 255
        truth, found = truth[counted], found[counted]
        for row, values in enumerate((found[found == truth], found, truth)):
            sums[row] += torch.histc(values.float(), bins=150, min=0, max=149)
    return (sums[0] / (sums[1] + sums[2] - sums[0])).numpy()


def iou_by_one_histogram(
    pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
) -> NDArray[Any]:
    """Return IoU per class, ours."""
    pixels = PixelCounts(150)
    for truth, found in pairs:
        pixels.add(truth, found)
    scores = pixels.scores()
    assert scores is not None
    return np.array(scores.per_class, dtype=np.float64)


# Mask AP.


def detection_set(images: int, detections: int) -> tuple[dict[str, Any], dict[int, list[Any]]]:
    """Return COCO's form of ellipses, and detections near them by category."""
    rng = np.random.default_rng(2)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    library = []
    for _ in range(100):
        y, x, a, b = rng.random(4) * (HEIGHT, WIDTH, 140, 140) + (0, 0, 5, 5)
        mask = ((rows - y) / a) ** 2 + ((columns - x) / b) ** 2 < 1
        near = np.roll(mask, rng.integers(-6, 7, 2).tolist(), axis=(0, 1))
        library.append(
            [mask_api.encode(np.asfortranarray(m, dtype=np.uint8)) for m in (mask, near)]
        )
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": number, "name": str(number)} for number in range(1, 81)]
    found: dict[int, list[Any]] = defaultdict(list)
    for image in range(1, images + 1):
        truth["images"].append({"id": image, "height": HEIGHT, "width": WIDTH})
        known = rng.integers(0, 100, 7).tolist()
        for place in [*known, *rng.integers(0, 100, detections - 7).tolist()]:
            category = place % 80 + 1
            annotation = {"image_id": image, "category_id": category, "iscrowd": 0}
            if len(truth["annotations"]) < 7 * image:
                area = float(mask_api.area(library[place][0]))
                number = len(truth["annotations"]) + 1
                mask = {"segmentation": library[place][0], "area": area, "id": number}
                truth["annotations"].append({**annotation, **mask})
            near = {"segmentation": library[place][1], "score": float(rng.random())}
            area = float(mask_api.area(library[place][1]))
            found[category].append({**annotation, **near, "area": area})
    return truth, found


def peak_memory(images: int) -> tuple[float, float]:
    """Return the peak resident MiB before and after scoring 100 detections an image."""
    truth, found = detection_set(10, 100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pattern = [entry for detections in found.values() for entry in detections]
    count = len(pattern) // 10
    runs = [entry["segmentation"]["counts"] for entry in pattern[:count]]
    ids = sorted(category["id"] for category in truth["categories"])
    half = [
        Detections(
            images=np.arange(start, images, 2).repeat(count) + 1,
            labels=np.tile([ids.index(e["category_id"]) for e in pattern[:count]], len(numbers)),
            scores=np.random.default_rng(start).random(count * len(numbers)),
            sizes=np.tile([HEIGHT, WIDTH], (count * len(numbers), 1)),
            ends=np.cumsum(np.tile([len(run) for run in runs], len(numbers))),
            runs=b"".join(runs) * len(numbers),
        )
        for start in (0, 1)
        for numbers in [range(start, images, 2)]
    ]
    objects = truth["annotations"][:7]
    truth["images"] = [
        {"id": number, "height": HEIGHT, "width": WIDTH} for number in range(1, images + 1)
    ]
    truth["annotations"] = [
        {**entry, "image_id": image, "id": 7 * image + place}
        for image in range(1, images + 1)
        for place, entry in enumerate(objects)
    ]
    metric = MaskAP(truth, [HasId(number) for number in ids])
    metric.merge(half)
    print(metric.compute())
    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# Measuring.


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(row: Row, rounds: int) -> str:
    """Return the Markdown row of one comparison."""
    others, ours = [], []
    difference = 0.0
    for _ in range(rounds):
        seconds, expected = timed(row.other)
        others.append(seconds)
        seconds, found = timed(row.ours)
        ours.append(seconds)
        difference = max(difference, row.check(expected, found))
    ratio = statistics.median(a / b for a, b in zip(others, ours, strict=True))
    cells = [
        row.name,
        f"{1000 * statistics.median(others):.0f}",
        f"{1000 * statistics.median(ours):.0f}",
        f"{ratio:.1f}",
        "-" if row.target is None else f"{row.target:g}",
        "-" if row.target is None else "yes" if ratio >= row.target else "no",
        f"{difference:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def largest(expected: Any, found: Any) -> float:
    """Return the largest difference of two results of numbers; None counts as 0."""
    if isinstance(expected, dict):
        expected, found = (
            [value or 0.0 for value in result.values()] for result in (expected, found)
        )
    return float(np.max(np.abs(np.asarray(expected) - np.asarray(found))))


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="default: 7, quick: 2")
    parser.add_argument("--images", type=int, help="panoptic maps (default: 100, quick: 8)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the last rows")
    parser.add_argument("--many", type=int, help="images of the last rows (default: 1000)")
    parser.add_argument("--quick", action="store_true", help="few images, to see that it runs")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = args.rounds or (2 if args.quick else 7)
    images = args.images or (8 if args.quick else 100)
    many = args.many or (8 if args.quick else 1000)
    if args.memory:
        before, after = peak_memory(args.images or 5000)
        print(f"peak {before:.0f} MiB before, {after:.0f} MiB after scoring")
        return
    installed = importlib.util.find_spec("panopticapi") is not None
    name = "panopticapi" if installed else "panopticapi's algorithm (not installed)"
    pq = pq_by_installed if installed else pq_by_panopticapi
    with tempfile.TemporaryDirectory() as folder:
        data = panoptic_set(Path(folder), images)
        maps = label_maps(4 if args.quick else 20)
        files = Path(folder, "labels")
        files.mkdir()
        write_label_maps(files, maps, max(1, many // len(maps)))
        many_maps = panoptic_set(Path(folder, "many"), many)
        few_found, many_found = (
            detection_set(20 if args.quick else 500, 20),
            detection_set(many, 100),
        )

        def ap(
            detections: Any, engine: Any = "faster-coco-eval", workers: int = 1
        ) -> dict[str, float | None]:
            truth, found = detections
            return average_precision(truth, lambda key: found[key], engine=engine, workers=workers)

        rows = [
            Row(
                f"PQ from memory / {name}, 1 core",
                lambda: pq(data), lambda: pq_from_memory(data), largest, 10,
            ),
            Row(
                f"PQ from files, 1 process / {name}, 1 core",
                lambda: pq(data), lambda: pq_from_files(data, 1), largest, 1,
            ),
            Row(
                "mIoU, 150 classes, 512x683 / torch.histc",
                lambda: iou_by_histc(maps), lambda: iou_by_one_histogram(maps), largest, 10,
            ),
            Row(
                f"mask AP, {len(few_found[0]['images'])} images x 20 / pycocotools",
                lambda: ap(few_found, "pycocotools"), lambda: ap(few_found), largest, None,
            ),
            Row(
                f"PQ from files, {args.workers} processes / 1 process",
                lambda: pq_from_files(many_maps, 1),
                lambda: pq_from_files(many_maps, args.workers), largest, None,
            ),
            Row(
                f"mask AP, {args.workers} processes / 1 process",
                lambda: ap(many_found), lambda: ap(many_found, workers=args.workers),
                largest, None,
            ),
            Row(
                f"mIoU from files, {args.workers} processes / 1 process",
                lambda: iou_from_files(files, 1), lambda: iou_from_files(files, args.workers),
                largest, None,
            ),
        ]  # fmt: skip
        print(f"torch {torch.__version__}, 1 thread, {images} maps of {WIDTH}x{HEIGHT}")
        print(f"{many} over processes\n")
        print("| ours / other | other ms | ours ms | ratio | target | reached | difference |")
        print(f"|{' --- |' * 7}")
        for row in rows:
            print(measure(row, rounds), flush=True)


if __name__ == "__main__":
    main()
