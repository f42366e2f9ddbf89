"""COCO's average precision of masks or boxes, over any number of workers."""

import contextlib
import io
import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from knet_core.errors import NonFiniteError

if TYPE_CHECKING:  # files are scored without torch
    from knet_core.structures import ImageInfo, Instances

IouType = Literal["segm", "bbox"]
Engine = Literal["faster-coco-eval", "pycocotools"]
Tables = dict[str, NDArray[np.float64]]
"""Precision and recall of an engine."""

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")
"""In the order of the COCO API's summary."""
_VALIDATED = frozenset(NAMES[:6])
"""What an evaluation reports; the published tables hold no more."""
MOST_AT_ONCE = 20_000
"""Objects and detections that all engines are given, unless a category alone has more."""


class _HasId(Protocol):
    @property
    def id(self) -> int: ...


def average_precision(
    truth: Mapping[str, Any],
    detections: Callable[[int], Iterable[dict[str, Any]]],
    *,
    iou_type: IouType = "segm",
    engine: Engine = "faster-coco-eval",
    workers: int = 1,
) -> dict[str, float | None]:
    """Return COCO's nine numbers by name, from 0 to 1; None where there is no object to be scored.

    All images of the ground truth count, those without a detection as well. A few categories are
    evaluated at a time: engines need several times the memory of what they are given.

    Args:
        truth: Images, annotations and categories in COCO's form; ids of annotations from 1 (the
            engines take 0 for "not matched"). Left as it is.
        detections: Those of the category of an id, in the same form with `score` and `area`.
        iou_type: What overlaps: masks (run lengths or polygons) or boxes (x, y, width, height).
        engine: Both give the same numbers, but for the last bit of a mean.
        workers: Processes, each with categories of its own; the numbers are the same.
    """
    portions = _portions(truth, detections, MOST_AT_ONCE // workers)
    work = partial(_accumulate, iou_type=iou_type, engine=engine)
    tables = list(_each(work, portions, workers))
    precision = np.concatenate([table["precision"] for table in tables], axis=2)
    return _summary(precision, np.concatenate([table["recall"] for table in tables], axis=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Portion:
    """A few categories, as an engine takes them."""

    images: Sequence[Any]
    categories: tuple[int, ...]
    objects: list[dict[str, Any]]
    found: list[dict[str, Any]]


def _portions(
    truth: Mapping[str, Any], detections: Callable[[int], Iterable[dict[str, Any]]], size: int
) -> Iterator[_Portion]:
    """Yield all categories, in portions of so many objects and detections."""
    known: dict[int, list[dict[str, Any]]] = {}
    for annotation in truth["annotations"]:
        known.setdefault(annotation["category_id"], []).append(annotation)
    group: list[int] = []
    objects: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    categories = sorted(category["id"] for category in truth["categories"])
    for category in categories:
        group.append(category)
        # Engines write into annotations, so they get their own.
        objects += [dict(annotation) for annotation in known.get(category, ())]
        for number, detection in enumerate(detections(category), start=len(found) + 1):
            found.append({**detection, "id": number})
        if len(found) + len(objects) >= size or category == categories[-1]:
            yield _Portion(
                images=truth["images"], categories=tuple(group), objects=objects, found=found
            )
            group, objects, found = [], [], []


def _each(
    work: Callable[[_Portion], Tables], portions: Iterable[_Portion], workers: int
) -> Iterator[Tables]:
    """Yield the work on each portion, in order; twice as many as workers wait at most."""
    if workers < 2:
        yield from map(work, portions)
        return
    # Forking a process that may have threads is unsafe.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: deque[Future[Tables]] = deque()
        for portion in portions:
            waiting.append(pool.submit(work, portion))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _accumulate(portion: _Portion, *, iou_type: IouType, engine: Engine) -> Tables:
    """Return the engine's tables of precision (T, R, K, A, M) and recall (T, K, A, M).

    T overlaps, R recalls, K categories, A areas, M numbers of detections; -1 without an object.
    """
    if engine == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval.core.coco import COCO
        from faster_coco_eval.core.faster_eval_api import COCOeval_faster as COCOeval

    def index(annotations: list[dict[str, Any]]) -> Any:
        coco = COCO()
        coco.dataset = {
            "images": portion.images,
            "categories": [{"id": number, "name": str(number)} for number in portion.categories],
            "annotations": annotations,
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(index(portion.objects), index(portion.found), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
    return {name: evaluation.eval[name] for name in ("precision", "recall")}


def _summary(
    precision: NDArray[np.float64], recall: NDArray[np.float64]
) -> dict[str, float | None]:
    """Return what `COCOeval.summarize` prints of its tables, by name."""
    tables = (
        precision[..., 0, 2],
        precision[:1, ..., 0, 2],  # an overlap of 0.5
        precision[5:6, ..., 0, 2],  # 0.75
        precision[..., 1, 2],
        precision[..., 2, 2],
        precision[..., 3, 2],
        recall[..., 0, 0],
        recall[..., 0, 1],
        recall[..., 0, 2],
    )
    scored = (table[table > -1] for table in tables)
    return {
        name: float(values.mean()) if len(values) else None
        for name, values in zip(NAMES, scored, strict=True)
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections:
    """Detections (K) of some images as a few flat arrays: what a worker keeps and sends."""

    images: NDArray[np.int64]
    """(K,) ids."""
    labels: NDArray[np.int64]
    """(K,)."""
    scores: NDArray[np.float64]
    """(K,)."""
    sizes: NDArray[np.int64]
    """(K, 2) height and width of the masks."""
    ends: NDArray[np.int64]
    """(K,) where each mask's run lengths end in `runs`."""
    runs: bytes
    """COCO's compressed run lengths, one mask after the other."""


class MaskAP:
    """Collects detections and scores them against all images of the ground truth.

    Args:
        ground_truth: Images, annotations and categories in COCO's form; ids of annotations from
            1 (pycocotools takes 0 for "not matched"), masks as run lengths or polygons.
        categories: Classes in the order of labels.
    """

    def __init__(self, ground_truth: Mapping[str, Any], categories: Sequence[_HasId]) -> None:
        self._truth = ground_truth
        self._ids = [category.id for category in categories]
        self._parts: list[Detections] = []
        self._clear()

    def _clear(self) -> None:
        self._images, self._labels, self._scores = array("q"), array("q"), array("d")
        self._sizes, self._ends, self._runs = array("q"), array("q"), bytearray()

    def add(self, info: "ImageInfo", instances: "Instances") -> None:
        """Take the detections of one image; masks are kept as run lengths only.

        Raises:
            NonFiniteError: A score is NaN or infinite.
        """
        scores = instances.scores.tolist()
        wrong = sum(not math.isfinite(score) for score in scores)
        if wrong:
            raise NonFiniteError(
                f"evaluation: {wrong} of {len(scores)} scores of image {info.image_id} "
                f"({info.file_name}) are not finite; the model has diverged: lower optim.lr, or "
                f"train.precision=fp32"
            )
        masks = instances.masks.to("cpu").numpy().view(np.uint8)
        # Run lengths go down columns, so pycocotools wants each mask in Fortran's order.
        for mask in masks:
            self._runs += mask_api.encode(np.asfortranarray(mask))["counts"]
            self._ends.append(len(self._runs))
        count, size = len(masks), masks.shape[1:]
        self._images.extend([info.image_id] * count)
        self._sizes.extend(size * count)
        self._labels.extend(instances.labels.tolist())
        self._scores.extend(scores)

    def state(self) -> Detections:
        """Return what was collected, to send to another worker."""
        return Detections(
            images=np.array(self._images, dtype=np.int64),
            labels=np.array(self._labels, dtype=np.int64),
            scores=np.array(self._scores, dtype=np.float64),
            sizes=np.array(self._sizes, dtype=np.int64).reshape(-1, 2),
            ends=np.array(self._ends, dtype=np.int64),
            runs=bytes(self._runs),
        )

    def merge(self, states: Iterable[Detections]) -> None:
        """Replace what was collected by the states of all workers, this one's among them."""
        self._parts = list(states)
        self._clear()

    def compute(self) -> dict[str, float]:
        """Return AP, AP50, AP75 and AP of small, medium and large objects, each from 0 to 1.

        A key is left out where the ground truth holds no object to be scored.
        """
        parts = self._parts or [self.state()]
        scores = average_precision(
            self._truth, lambda category: self._of_category(category, parts)
        )
        return {
            f"val/{name}": value
            for name, value in scores.items()
            if name in _VALIDATED and value is not None
        }

    def _of_category(self, category: int, parts: Sequence[Detections]) -> Iterator[dict[str, Any]]:
        label = self._ids.index(category)
        for part in parts:
            starts = np.append(0, part.ends[:-1])
            for row in np.flatnonzero(part.labels == label).tolist():
                size = part.sizes[row].tolist()
                rle = {"size": size, "counts": part.runs[starts[row] : part.ends[row]]}
                yield {
                    "image_id": int(part.images[row]),
                    "category_id": category,
                    "score": float(part.scores[row]),
                    "iscrowd": 0,
                    # Of the mask; a box given by mistake would decide it in pycocotools' loader.
                    "area": float(mask_api.area(rle)),
                    "segmentation": rle,
                }
