"""The one schema of a training run: frozen, keyword-only, checked when it is built.

A `Recipe` holds everything that can change a result, except the data's content and the code.
Sizes are in pixels, learning rates per optimizer step, batch sizes in images over all workers.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from knet_core.errors import ConfigError

Task = Literal["instance", "panoptic", "semantic"]
Grouping = Literal["hard", "soft"]
SemanticHead = Literal["fcn", "pspnet", "deeplabv3", "upernet"]
Pasting = Literal["mixed", "separate"]
Compat = Literal["none", "published"]
Precision = Literal["fp32", "bf16", "fp16"]
DataFormat = Literal["coco", "coco_panoptic", "ade20k", "cityscapes", "shapes"]


def _check(*rules: tuple[bool, str]) -> None:
    problems = [problem for ok, problem in rules if not ok]
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """Feature extractor: any timm model with `features_only` and four stages from stride 4 on."""

    name: str = "resnet50.tv_in1k"
    pretrained: bool = True
    """Start from timm's ImageNet weights (downloaded once by timm)."""
    checkpoint: str | None = None
    """A local weights file for the backbone, instead of timm's download."""
    frozen_stages: int = 1
    """Leading stages that do not train: 0 none, 1 the stem and the first stage (published)."""
    norm_eval: bool = True
    """Keep batch normalisation on its stored statistics while training (published)."""
    output_stride: Literal[8, 32] = 32
    """Stride of the coarsest map; 8 dilates the last two stages (published for FCN, PSPNet and
    DeepLabV3)."""
    deformable: bool = False
    """Deformable 3x3 convolutions in the last three stages of a ResNet ("dcn-c3-c5")."""
    output_norm: bool = False
    """Layer normalisation of every output map (published for Swin)."""
    drop_path: float = 0.0
    """Highest rate of stochastic depth."""

    def __post_init__(self) -> None:
        _check(
            (
                0.0 <= self.drop_path < 1.0,
                f"model.backbone.drop_path: must be >= 0 and < 1, got {self.drop_path}",
            ),
            (
                0 <= self.frozen_stages <= 4,
                f"model.backbone.frozen_stages: must be 0 to 4, got {self.frozen_stages}",
            ),
            (
                not (self.pretrained and self.checkpoint),
                "model.backbone.checkpoint: set model.backbone.pretrained=false to use a file",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticConfig:
    """The dense classifier that semantic kernels start from; its width is `model.channels`."""

    head: SemanticHead = "upernet"
    dropout: float = 0.1
    """Probability of dropping a feature channel before a classifier, in training."""
    auxiliary: bool = True
    """A second classifier on the last but one backbone stage, in training."""

    def __post_init__(self) -> None:
        _check(
            (
                0.0 <= self.dropout < 1.0,
                f"model.semantic.dropout: must be >= 0 and < 1, got {self.dropout}",
            )
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """K-Net for one task, and the switches of its ablations (paper, Tables 4 and 5)."""

    task: Task = "instance"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    semantic: SemanticConfig = field(default_factory=SemanticConfig)
    """Where the kernels of the semantic task come from; other tasks do without."""
    channels: int = 256
    """Width of features and kernels."""
    num_kernels: int = 100
    """Instance kernels N, the most objects found in one image (Table 4d). The semantic task has
    one kernel per class instead, the panoptic task one more per stuff class."""
    stages: int = 3
    """Rounds of kernel update S (Tables 4c and 5); 0 is the plain semantic baseline."""
    update_channels: int | None = None
    """Width of the adaptive update; unset: `channels`. Wider kernels are updated in parts of it
    (published: 256 under semantic heads of 512 channels)."""
    num_heads: int = 8
    """Attention heads of kernel interaction."""
    ffn_channels: int = 2048
    """Hidden width of the feed-forward layer of kernel interaction."""
    adaptive_update: bool = True
    """Gate group features into kernels (Eq. 4-5); off: one FC-LN-ReLU of their sum (Table 4a)."""
    interaction: bool = True
    """Self-attention and feed-forward among kernels (Table 4a)."""
    positional_encoding: bool = True
    """Add sine positions to the coarsest pyramid level (Table 4b)."""
    coordinates: bool = False
    """Append x and y channels to the coarsest pyramid level (Table 4b)."""
    grouping: Grouping = "hard"
    """Features are summed under masks cut at one half, or weighed by probabilities (Eq. 3). The
    semantic task was published with soft, the other two with hard groups."""
    feature_branches: int = 2
    """Instances and semantics from features of their own (2) or from the same (1); the paper puts
    two at about one PQ more. The semantic task has one."""

    def __post_init__(self) -> None:
        width = self.update_channels or self.channels
        least = 0 if self.task == "semantic" else 1
        _check(
            (
                width >= 1 and self.channels % width == 0,
                f"model.update_channels: must divide model.channels = {self.channels}, "
                f"got {self.update_channels}",
            ),
            (
                self.feature_branches in (1, 2),
                f"model.feature_branches: must be 1 or 2, got {self.feature_branches}",
            ),
            (
                self.channels > 0 and self.channels % 32 == 0,
                f"model.channels: must be a multiple of 32 (group normalisation has 32 groups), "
                f"got {self.channels}",
            ),
            (self.num_kernels >= 1, f"model.num_kernels: must be >= 1, got {self.num_kernels}"),
            (
                self.stages >= least,
                f"model.stages: must be >= {least} for model.task={self.task}"
                f"{' (static kernels predict no classes)' if least else ''}, got {self.stages}",
            ),
            (
                self.num_heads >= 1 and self.channels % max(self.num_heads, 1) == 0,
                f"model.num_heads: must divide model.channels = {self.channels}, "
                f"got {self.num_heads}",
            ),
            (self.ffn_channels >= 1, f"model.ffn_channels: must be >= 1, got {self.ffn_channels}"),
            (
                self.task == "semantic" or self.backbone.output_stride == 32,
                f"model.backbone.output_stride: must be 32 for model.task={self.task}, whose "
                f"pyramid has strides 4 to 32, got {self.backbone.output_stride}",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of the loss terms; matching uses the same weights for its costs."""

    mask: float = 1.0
    """Binary cross-entropy of matched masks."""
    dice: float = 4.0
    cls: float = 2.0
    """Focal loss of class scores, after every update."""
    seg: float = 1.0
    """Focal loss of the auxiliary semantic map (instance, panoptic)."""
    rank: float | None = None
    """Cross-entropy over the kernels that compete for a pixel (panoptic, instance); 0: without.
    Unset: as published, 0.1 in the panoptic task and 0 in the instance task."""
    ce: float = 1.0
    """Cross-entropy over classes, static and after every update (semantic)."""
    auxiliary: float = 0.4
    """Cross-entropy of the auxiliary classifier (semantic)."""
    points: int | None = None
    """Pixels sampled per image for mask losses and costs; unset: all of them (published).
    Mask2Former's figure is 12544."""

    def __post_init__(self) -> None:
        _check(
            *(
                (getattr(self, name) >= 0, f"loss.{name}: must be >= 0, got {getattr(self, name)}")
                for name in ("mask", "dice", "cls", "seg", "ce", "auxiliary")
            ),
            (self.rank is None or self.rank >= 0, f"loss.rank: must be >= 0, got {self.rank}"),
            (
                self.points is None or self.points >= 1,
                f"loss.points: must be >= 1, got {self.points}",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """Where one split lies below `data.root`; of several candidates the first that exists."""

    images: tuple[str, ...]
    annotations: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapesConfig:
    """The synthetic set, rendered on the fly."""

    num_train: int = 256
    num_val: int = 64
    size: int = 128
    """Height and width of an image."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check(
            (self.num_train >= 1, f"data.shapes.num_train: must be >= 1, got {self.num_train}"),
            (self.num_val >= 1, f"data.shapes.num_val: must be >= 1, got {self.num_val}"),
            (self.size >= 32, f"data.shapes.size: must be >= 32, got {self.size}"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """A data set and how its images enter the network."""

    format: DataFormat = "coco"
    root: str = "coco"
    """Folder of the data set; a relative path lies below `KNET_DATA`, else
    `DETECTRON2_DATASETS`, else the working folder. An address, s3://bucket/prefix or
    file:///folder, is fetched once to every machine that trains."""
    train: SplitConfig = SplitConfig(
        images=("train2017", "train", "images/train"),
        annotations=(
            "annotations/instances_train2017.json",
            "annotations/instances_train.json",
        ),
    )
    val: SplitConfig = SplitConfig(
        images=("val2017", "val", "images/val"),
        annotations=("annotations/instances_val2017.json", "annotations/instances_val.json"),
    )
    classes: tuple[str, ...] = ()
    """Names of the categories 1, 2, ... of a set in ADE20K's layout, whose files hold none; unset:
    the lines of classes.txt in the root."""
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    short_edge: tuple[int, int] = (800, 800)
    """Training draws the shorter side uniformly from this range, both ends included; evaluation
    uses the upper end."""
    long_edge: int = 1333
    """The longer side never exceeds this."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    scale_range: tuple[float, float] = (1.0, 1.0)
    """Training multiplies both edges by a number drawn uniformly from this range."""
    crop: int | None = None
    """Side in pixels of the random square that training cuts out and pads to; unset: no crop."""
    crop_max_share: float = 1.0
    """A crop is drawn again, up to ten times, while one class covers more of its labelled pixels
    than this share (published for ADE20K: 0.75)."""
    photometric: bool = False
    """Random brightness, contrast, saturation and hue in training (published for ADE20K)."""
    group_by_aspect: bool = True
    """Order the images of every optimizer step wide before tall, so that micro-batches need little
    padding; crops are square, so with `crop` there is nothing to order."""
    num_workers: int = 2
    """Loader processes per training worker; 0 loads in the training process."""

    def __post_init__(self) -> None:
        low, high = self.short_edge
        _check(
            (
                32 <= low <= high <= self.long_edge,
                f"data.short_edge: must satisfy 32 <= low <= high <= data.long_edge = "
                f"{self.long_edge}, got [{low}, {high}]",
            ),
            (
                len(self.classes) <= 254,
                f"data.classes: must be at most 254 names, got {len(self.classes)}",
            ),
            (0.0 <= self.flip <= 1.0, f"data.flip: must be 0 to 1, got {self.flip}"),
            (
                0.0 < self.scale_range[0] <= self.scale_range[1],
                f"data.scale_range: must satisfy 0 < low <= high, got {list(self.scale_range)}",
            ),
            (
                self.crop is None or self.crop >= 32,
                f"data.crop: must be >= 32, got {self.crop}",
            ),
            (
                0.0 < self.crop_max_share <= 1.0,
                f"data.crop_max_share: must be > 0 and <= 1, got {self.crop_max_share}",
            ),
            (self.num_workers >= 0, f"data.num_workers: must be >= 0, got {self.num_workers}"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warm-up, step decay, and whatever else a schedule was found to need."""

    lr: float = 1e-4
    """Peak learning rate, for the stated global batch size; never rescaled behind your back."""
    backbone_lr_factor: float = 0.25
    weight_decay: float = 0.05
    decay_norms: bool = True
    """Weight decay also on normalisation layers and relative positions; published Swin semantic
    recipes leave them out."""
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_iterations: int = 1000
    warmup_factor: float = 0.001
    """Learning rate of the first iteration, as a fraction of `lr`."""
    decay_at: tuple[float, ...] = (8 / 12, 11 / 12)
    """Fractions of the run after which the learning rate is multiplied by `decay_factor`."""
    decay_factor: float = 0.1
    rescale_at: tuple[int, ...] = ()
    """Optimizer steps after which the learning rate is multiplied by the factor in the same place
    of `rescale_by`, beside all else; what a population finds is written so."""
    rescale_by: tuple[float, ...] = ()
    clip_norm: float = 1.0
    """Largest L2 norm of all gradients together."""

    def __post_init__(self) -> None:
        _check(
            (self.lr > 0, f"optim.lr: must be > 0, got {self.lr}"),
            (
                self.backbone_lr_factor >= 0,
                f"optim.backbone_lr_factor: must be >= 0, got {self.backbone_lr_factor}",
            ),
            (
                all(0 <= beta < 1 for beta in self.betas),
                f"optim.betas: must be >= 0 and < 1, got {list(self.betas)}",
            ),
            (
                0 < self.warmup_factor <= 1,
                f"optim.warmup_factor: must be > 0 and <= 1, got {self.warmup_factor}",
            ),
            (
                0 < self.decay_factor <= 1,
                f"optim.decay_factor: must be > 0 and <= 1, got {self.decay_factor}",
            ),
            (self.weight_decay >= 0, f"optim.weight_decay: must be >= 0, got {self.weight_decay}"),
            (
                self.warmup_iterations >= 0,
                f"optim.warmup_iterations: must be >= 0, got {self.warmup_iterations}",
            ),
            (
                all(0 < at < 1 for at in self.decay_at)
                and list(self.decay_at) == sorted(self.decay_at),
                f"optim.decay_at: must be increasing fractions in (0, 1), got {self.decay_at}",
            ),
            (
                all(at > 0 for at in self.rescale_at)
                and list(self.rescale_at) == sorted(set(self.rescale_at)),
                f"optim.rescale_at: must be increasing steps > 0, got {list(self.rescale_at)}",
            ),
            (
                len(self.rescale_by) == len(self.rescale_at)
                and all(by > 0 for by in self.rescale_by),
                f"optim.rescale_by: must be a factor > 0 for each of the {len(self.rescale_at)} "
                f"steps of optim.rescale_at, got {list(self.rescale_by)}",
            ),
            (self.clip_norm > 0, f"optim.clip_norm: must be > 0, got {self.clip_norm}"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, batch and rhythm of a run."""

    epochs: float = 12.0
    """Passes over the training images; ignored where `iterations` is set."""
    iterations: int | None = None
    """Optimizer steps."""
    batch_size: int = 16
    """Images per optimizer step over all workers together."""
    micro_batch: int | None = None
    """Images per worker in one forward pass; gradients accumulate until `batch_size` is reached.
    Unset: the worker's whole share at once."""
    precision: Precision = "fp32"
    """Autocast type; fp16 needs a GPU, a CPU trains in fp32 instead."""
    channels_last: bool = False
    """Memory layout of images and convolutions."""
    sync_batch_norm: bool = False
    """Batch normalisation takes its statistics from the images of all workers together (published
    for the semantic task), not from each worker's own. With several workers it needs GPUs."""
    compile: bool = False
    """Compile the forward pass (torch.compile): minutes at the start and after every new image
    size, faster steps then. A CPU needs a C++ compiler for it."""
    log_every: int = 50
    """Iterations between points of the training curves."""
    eval_every: int | None = None
    """Iterations between evaluations; unset: once an epoch. The last iteration evaluates too."""
    checkpoint_every: int | None = None
    """Iterations between checkpoints; unset: at every evaluation."""
    checkpoint_minutes: float | None = 15
    """Age of the last checkpoint at which one is written in between; unset: none is. What a run
    that dies has to do again takes about as long at most, and no result depends on it."""

    def __post_init__(self) -> None:
        positive = ("batch_size", "log_every", "epochs")
        rhythm = ("eval_every", "checkpoint_every", "checkpoint_minutes")
        optional = ("iterations", "micro_batch", *rhythm)
        values = {name: getattr(self, name) for name in (*positive, *optional)}
        _check(
            *(
                (value is None or value > 0, f"train.{name}: must be > 0, got {value}")
                for name, value in values.items()
            )
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Evaluation on the `val` split."""

    batch_size: int = 1
    """Images per worker in one forward pass."""
    max_detections: int = 100
    """Most instances kept per image."""
    score_threshold: float = 0.3
    """Least score of a thing in a panoptic map."""
    overlap_threshold: float = 0.6
    """Least share of its own mask that a panoptic segment must keep against the others."""
    pasting: Pasting = "mixed"
    """Things and stuff compete in order of score (mixed), or things come first (separate); the
    paper puts mixed at about one PQ more."""
    scales: tuple[float, ...] = (1.0,)
    """Sizes at which a semantic image is predicted, relative to its input size; probabilities are
    averaged. Published test-time augmentation: .5, .75, 1, 1.25, 1.5, 1.75 with flips."""
    flip: bool = False
    """Predict semantic images mirrored too."""
    window: int | None = None
    """Side in pixels of the sliding window over semantic images; unset: the whole image."""
    window_stride: int | None = None
    """Pixels between windows; unset: two thirds of `window`."""
    probe_images: int = 4
    """Validation images drawn with their predicted masks at every evaluation; 0 draws none."""
    fps_iterations: int = 50
    """Timed forward passes at the end of a run, one image each (`bench/fps`); 0 measures none."""

    @property
    def views(self) -> tuple[str, ...]:
        """Keys that ask for more than one look at every image, which semantic models take."""
        asked = {
            "eval.scales": self.scales != (1.0,),
            "eval.flip": self.flip,
            "eval.window": self.window is not None,
        }
        return tuple(key for key, value in asked.items() if value)

    def __post_init__(self) -> None:
        _check(
            (self.batch_size >= 1, f"eval.batch_size: must be >= 1, got {self.batch_size}"),
            (
                self.max_detections >= 1,
                f"eval.max_detections: must be >= 1, got {self.max_detections}",
            ),
            (
                0.0 <= self.score_threshold <= 1.0,
                f"eval.score_threshold: must be 0 to 1, got {self.score_threshold}",
            ),
            (
                0.0 <= self.overlap_threshold <= 1.0,
                f"eval.overlap_threshold: must be 0 to 1, got {self.overlap_threshold}",
            ),
            (
                bool(self.scales) and all(scale > 0 for scale in self.scales),
                f"eval.scales: must be one or more numbers > 0, got {list(self.scales)}",
            ),
            (
                self.window is None or self.window >= 32,
                f"eval.window: must be >= 32, got {self.window}",
            ),
            (
                self.window_stride is None
                or (self.window is not None and 1 <= self.window_stride <= self.window),
                f"eval.window_stride: must be 1 to eval.window = {self.window}, "
                f"got {self.window_stride}",
            ),
            (self.probe_images >= 0, f"eval.probe_images: must be >= 0, got {self.probe_images}"),
            (
                self.fps_iterations >= 0,
                f"eval.fps_iterations: must be >= 0, got {self.fps_iterations}",
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One training run, completely described."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    compat: Compat = "none"
    """`published` repeats the released code's quirks, for numbers equal to its own (ADR 0007)."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check(
            (self.seed >= 0, f"seed: must be >= 0, got {self.seed}"),
            *(
                (
                    self.model.task == "semantic",
                    f"{key}: only semantic models are averaged over scales, flips and windows; "
                    f"leave it out for model.task={self.model.task}",
                )
                for key in self.eval.views
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values, as written to `recipe.yaml`; tuples become lists."""
        plain: dict[str, Any] = _plain(self)
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Build a recipe from the complete values that `to_dict` wrote.

        Raises:
            ConfigError: A key is unknown or a value is out of range.
        """
        recipe = _build(cls, values, "")
        assert isinstance(recipe, Recipe)
        return recipe


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _build(schema: type, values: Mapping[str, Any], prefix: str) -> object:
    fields = {item.name: item for item in dataclasses.fields(schema)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError([f"{prefix}{key}: unknown key" for key in unknown])
    arguments = {}
    for name, value in values.items():
        kind = fields[name].type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            arguments[name] = _build(kind, value, f"{prefix}{name}.")
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return schema(**arguments)
