"""What travels between the parts of the core: frozen dataclasses of tensors.

Shapes:  B images · N kernels · C classes · D channels · G ground-truth objects · K detections
H, W the padded network input · h, w the stride-8 maps · H0, W0 the image as stored on disk
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORE = 255
"""Label of a pixel that no annotation decides: void and crowds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Ground truth of one image, at the size of the network's input before padding."""

    labels: Tensor
    """(G,) int64, positions in the data set's category list."""
    masks: Tensor
    """(G, height, width) uint8, 0 or 1. Of things; the semantic task has none."""
    semantic: Tensor | None = None
    """(height, width) uint8 label of every pixel, `IGNORE` where nobody knows. The panoptic and
    the semantic task need it; instance targets may mark crowds with it (elsewhere the number of
    classes, which stands for background)."""

    def to(self, device: torch.device) -> "Targets":
        """Return a copy on `device`."""
        return Targets(
            labels=self.labels.to(device, non_blocking=True),
            masks=self.masks.to(device, non_blocking=True),
            semantic=None
            if self.semantic is None
            else self.semantic.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "Targets":
        """Move to page-locked memory; the data loader calls it by this name."""
        return Targets(
            labels=self.labels.pin_memory(),
            masks=self.masks.pin_memory(),
            semantic=None if self.semantic is None else self.semantic.pin_memory(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSize:
    """How large an image was on its way into the network."""

    input_size: tuple[int, int]
    """(height, width) after resizing, before padding."""
    original_size: tuple[int, int]
    """(H0, W0) as stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo(ImageSize):
    """Which image of a data set a batch holds, and its sizes."""

    image_id: int
    file_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Images padded at the bottom and right to one multiple of 32."""

    images: Tensor
    """(B, 3, H, W) float32, normalised."""
    targets: tuple[Targets, ...]
    infos: tuple[ImageInfo, ...]

    def pin_memory(self) -> "Batch":
        """Move to page-locked memory; the data loader calls it by this name."""
        return Batch(
            images=self.images.pin_memory(),
            targets=tuple(target.pin_memory() for target in self.targets),
            infos=self.infos,
        )

    def to(self, device: torch.device, *, channels_last: bool = False) -> "Batch":
        """Return a copy on `device`."""
        layout = torch.channels_last if channels_last else torch.preserve_format
        return Batch(
            images=self.images.to(device, non_blocking=True, memory_format=layout),
            targets=tuple(t.to(device) for t in self.targets),
            infos=self.infos,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutput:
    """Prediction of the static kernels (element 0) or after one kernel update."""

    masks: Tensor
    """(B, N, h, w) logits. Panoptic rows: instance kernels first, then stuff by class. Semantic
    rows: one per class, a softmax over them."""
    class_logits: Tensor | None
    """(B, N, C) one sigmoid per class; None for static kernels and in the semantic task."""
    kernels: Tensor
    """(B, N, D)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticOutput:
    """What the part of a network before the kernel updates hands on."""

    stage: StageOutput
    features: Tensor
    """(B, D, h, w) the map that every update groups and convolves."""
    semantic: Tensor | None
    """As in `KNetOutput`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KNetOutput:
    """Every stage's prediction, static kernels first."""

    stages: tuple[StageOutput, ...]
    semantic: Tensor | None
    """(B, C, h', w') logits of the auxiliary semantic map; None where there is none."""
    padded_size: tuple[int, int]
    """(H, W) of the padded batch that this was predicted from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matches:
    """One-to-one assignment in one image; row m pairs `kernels[m]` with `objects[m]`.

    Rows are in increasing kernel order; their number is min(N, G).
    """

    kernels: Tensor
    """(M,) int64."""
    objects: Tensor
    """(M,) int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLosses:
    """Weighted scalar losses of one stage; None where the task or the stage has no such term."""

    mask: Tensor | None = None
    dice: Tensor | None = None
    cls: Tensor | None = None
    """Focal loss of classes; static kernels have none."""
    rank: Tensor | None = None
    """Cross-entropy over competing kernels (panoptic)."""
    ce: Tensor | None = None
    """Cross-entropy over classes (semantic)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Weighted scalar losses; their sum is what training minimises."""

    stages: tuple[StageLosses, ...]
    seg: Tensor | None
    """Of the auxiliary semantic map: focal loss (instance, panoptic) or cross-entropy (semantic);
    None where there is no such map."""
    costs: tuple[Tensor, ...] = ()
    """Matching costs (N, G) of each image, stage after stage; they explain what went wrong."""

    def named(self) -> dict[str, Tensor]:
        """Return every term there is: `seg`, `stage<i>/mask`, `stage<i>/dice`, ..."""
        terms = {} if self.seg is None else {"seg": self.seg}
        for index, stage in enumerate(self.stages):
            for item in fields(stage):
                value = getattr(stage, item.name)
                if value is not None:
                    terms[f"stage{index}/{item.name}"] = value
        return terms

    def total(self) -> Tensor:
        """Return the sum of all terms."""
        return torch.stack(list(self.named().values())).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class Instances:
    """Final detections of one image, best score first."""

    scores: Tensor
    """(K,) float, in [0, 1]."""
    labels: Tensor
    """(K,) int64."""
    masks: Tensor
    """(K, H0, W0) bool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One region of a panoptic map."""

    id: int
    """Its value in the map."""
    label: int
    """Position in the category list: things first, then stuff."""
    score: float
    """In [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PanopticMap:
    """One image's segments in order of rank; they never overlap."""

    ids: Tensor
    """(H0, W0) int32; 0 where no segment lies. A segment's id is its label + 1000 * its
    rank, which counts from 1 (from 0 under `compat: published`)."""
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticMap:
    """The class of every pixel of one image."""

    labels: Tensor
    """(H0, W0) uint8."""


Prediction = Instances | PanopticMap | SemanticMap
"""What a model finds in one image; which of them depends on its task alone."""
