"""What travels between the parts of the core: frozen dataclasses of tensors.

Shapes:  B images · N kernels · C classes · D channels · G ground-truth objects · K detections
H, W the padded network input · h, w the stride-8 maps · H0, W0 the image as stored on disk
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Ground truth of one image, at the size of the network's input before padding."""

    labels: Tensor
    """(G,) int64, positions in the data set's category list."""
    masks: Tensor
    """(G, height, width) uint8, 0 or 1."""

    def to(self, device: torch.device) -> "Targets":
        """Return a copy on `device`."""
        return Targets(
            labels=self.labels.to(device, non_blocking=True),
            masks=self.masks.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfo:
    """Where an image of a batch came from and how large it was on the way."""

    image_id: int
    file_name: str
    input_size: tuple[int, int]
    """(height, width) after resizing, before padding."""
    original_size: tuple[int, int]
    """(H0, W0) as stored."""


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
            targets=tuple(
                Targets(labels=t.labels.pin_memory(), masks=t.masks.pin_memory())
                for t in self.targets
            ),
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
    """(B, N, h, w) logits."""
    class_logits: Tensor | None
    """(B, N, C) one sigmoid per class; None for the static kernels."""
    kernels: Tensor
    """(B, N, D)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KNetOutput:
    """Every stage's prediction, static kernels first."""

    stages: tuple[StageOutput, ...]
    semantic: Tensor
    """(B, C, h, w) logits of the auxiliary semantic map."""


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
    """Weighted scalar losses of one stage; `cls` is None for the static kernels."""

    mask: Tensor
    dice: Tensor
    cls: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Weighted scalar losses; their sum is what training minimises."""

    stages: tuple[StageLosses, ...]
    seg: Tensor

    def named(self) -> dict[str, Tensor]:
        """Return every term as `seg`, `stage<i>/mask`, `stage<i>/dice`, `stage<i>/cls`."""
        terms = {"seg": self.seg}
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
