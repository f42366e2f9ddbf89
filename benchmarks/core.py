"""The core's speed and memory against the straightforward form of the same mathematics.

python benchmarks/core.py [--bf16] [--device cuda] [--quick] [--only PART ...]
    [--keep-memory both] [--no-memory]

Each form has a process of its own, and they run alternately, round by round; a row is the median
of the rounds, its ratio the median of the rounds' ratios. Before that their results are compared,
and a difference beyond the stated tolerance ends the run. Peak memory is what one call takes above
its inputs and weights, in a fresh process with the allocator as it comes.

The reference is `straightforward.py`, the published code's form pass by pass; its docstring names
the source of each. It runs as the published code does: fp32, NCHW, batch normalisation not folded,
PyTorch's AdamW as it comes, memory as the C library manages it. In training ours is NCHW too in
fp32, where channels_last gained nothing, and channels_last under bf16 and on a GPU. On a CPU our
process keeps the memory that it frees, as the commands of `knet` do; `--keep-memory both` gives
the reference the same, which tells what the rewrites alone are worth.
"""

import argparse
import copy
import ctypes
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import straightforward
import torch
from torch import Tensor, nn

from knet_core import KNet, build_model, keep_freed_memory, prepare_for_inference
from knet_core.config import (
    BackboneConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    Task,
    TrainConfig,
)
from knet_core.criterion import kernel_criterion
from knet_core.matching import assignment_cost, match
from knet_core.panoptic_paste import panoptic_maps
from knet_core.structures import (
    Batch,
    ImageInfo,
    ImageSize,
    KNetOutput,
    Matches,
    StageOutput,
    Targets,
)
from knet_core.trainer import Trainer

THINGS, STUFF, KERNELS = 80, 53, 100
SMALL, LARGE = (512, 512), (800, 1216)
OBJECTS = 10
CROWD = 300
SIDES = REFERENCE, OURS = "reference", "ours"
CROWD_LIMIT = 6.0
"""GB of peak resident memory that a training step on a crowded image may take."""
GAIN = 0.3
"""Scale of each residual branch's last normalisation: random weights stay in range with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How to run everything."""

    device: torch.device
    bf16: bool
    quick: bool

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size asked for, or a small one for a smoke run."""
        return (128, 192) if self.quick else size

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context of our forward pass."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two ways to the same result."""

    ours: Callable[[], object]
    reference: Callable[[], object]
    check: Callable[[], str]
    """Compares the results of both; returns their difference in words.

    Raises:
        AssertionError: They differ by more than the tolerance.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One row of the table."""

    name: str
    build: Callable[[Setting], Comparison]
    target: float
    """Highest ratio of ours to the reference's time that is good enough."""
    bf16_target: float | None = None
    """The same under bf16 autocast, against the reference in fp32; None: bf16 changes nothing."""


# Inputs.


@dataclass(frozen=True, slots=True)
class Kind:
    """A class as `build_model` sees it."""

    isthing: bool


def recipe_for(setting: Setting, task: Task = "panoptic") -> Recipe:
    """Return the R50 recipe, with a learning rate that leaves the weights where they are."""
    return Recipe(
        model=ModelConfig(
            task=task, backbone=BackboneConfig(pretrained=False), num_kernels=KERNELS
        ),
        loss=LossConfig(rank=0.1 if task == "panoptic" else 0.0),
        optim=OptimConfig(lr=1e-15, weight_decay=0.0),
        train=TrainConfig(
            precision="bf16" if setting.bf16 else "fp32",
            channels_last=setting.bf16 or setting.device.type == "cuda",
        ),
    )


def network(setting: Setting, task: Task = "panoptic") -> KNet:
    """Return the R50 model with random weights and statistics, the same every time."""
    torch.manual_seed(0)
    kinds = [Kind(True)] * THINGS + ([Kind(False)] * STUFF if task == "panoptic" else [])
    model = build_model(recipe_for(setting, task), kinds)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            if name.endswith("bn3"):
                nn.init.constant_(module.weight, GAIN)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(setting.device).eval()


def photographs(setting: Setting, size: tuple[int, int], count: int) -> Tensor:
    """Return normalised noise (count, 3, H, W) with the long-range structure of photographs."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    fine = torch.randn(count, 3, *size, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return (smooth + 0.3 * fine).to(setting.device)


def blobs(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return mask logits (count, h, w) of ellipses: 8 at the centre, 0 at the rim, -10 far away.

    Radii are 3 to 25 % of the shorter side, as of objects in photographs; trained masks are as
    smooth and as sure away from their rim.
    """
    height, width = size
    rows = torch.arange(height)[None, :, None]
    columns = torch.arange(width)[None, None, :]
    where = torch.rand(4, count, 1, 1, generator=generator)
    radii = (0.03 + 0.22 * where[2:] ** 2) * min(size)
    distance = ((rows - where[0] * height) / radii[0]).square()
    distance = distance + ((columns - where[1] * width) / radii[1]).square()
    return (8 * (1 - distance)).clamp(min=-10)


def regions(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return mask logits (count, h, w) of smooth areas; each pixel is inside one of them.

    One class in six is there: its logit is its lead over the best of the others, from -10 to 10.
    The others are unsure of nothing, between -10 and -5.
    """
    coarse = torch.randn(count, 4, 6, generator=generator)
    field = 8 * nn.functional.interpolate(coarse[None], size=size, mode="bicubic")[0]
    there = torch.arange(count) % 6 == 0
    best, second = field[there].topk(2, dim=0).values
    lead = torch.where(field[there] == best, field[there] - second, field[there] - best)
    field = (field / 8 - 8).clamp(-10, -5)
    field[there] = lead.clamp(-10, 10)
    return field


def prediction(setting: Setting, size: tuple[int, int], count: int, seed: int) -> StageOutput:
    """Return what a trained panoptic model predicts for `count` images of `size`, roughly.

    One kernel in four has found an object (score .3 to .95), the others none (below .25) under
    fainter blobs; one stuff class in six is there.
    """
    generator = torch.Generator().manual_seed(seed)
    small = (size[0] // 8, size[1] // 8)
    masks, scores = [], []
    for _ in range(count):
        things = blobs(KERNELS, small, generator)
        found = torch.arange(KERNELS) % 4 == 0
        things = torch.where(found[:, None, None], things, things - 3)
        masks.append(torch.cat([things, regions(STUFF, small, generator)]))
        score = 0.05 * torch.rand(KERNELS + STUFF, THINGS + STUFF, generator=generator)
        best = torch.randint(THINGS, (KERNELS,), generator=generator)
        sure = torch.rand(KERNELS, generator=generator)
        score[torch.arange(KERNELS), best] = torch.where(found, 0.3 + 0.65 * sure, 0.25 * sure)
        stuff = torch.arange(STUFF)
        score[KERNELS + stuff, THINGS + stuff] = torch.where(
            stuff % 6 == 0, 0.7 - 0.001 * stuff, 0.02
        )
        scores.append(score.logit(eps=1e-6))
    return StageOutput(
        masks=torch.stack(masks).to(setting.device),
        class_logits=torch.stack(scores).to(setting.device),
        kernels=torch.zeros(count, KERNELS + STUFF, 1, device=setting.device),
    )


def ground_truth(
    setting: Setting, size: tuple[int, int], count: int, seed: int, num_objects: int = OBJECTS
) -> Targets:
    """Return `num_objects` ellipses over regions of stuff; every pixel has a label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(THINGS, (num_objects,), generator=generator)
    masks = torch.stack([blobs(1, size, generator)[0] > 0 for _ in range(num_objects)])
    semantic = (regions(STUFF, size, generator)[::6].argmax(dim=0) * 6 + THINGS).to(torch.uint8)
    for label, mask in zip(labels, masks, strict=True):
        semantic[mask] = label.to(torch.uint8)
    target = Targets(labels=labels, masks=masks.to(torch.uint8), semantic=semantic)
    return target.to(setting.device)


def image_sizes(size: tuple[int, int], count: int) -> list[ImageInfo]:
    """Return the sizes of images that were neither resized nor padded."""
    return [
        ImageInfo(input_size=size, original_size=size, image_id=index, file_name="")
        for index in range(count)
    ]


# Parts.


def forward_part(size: tuple[int, int]) -> Callable[[Setting], Comparison]:
    """Compare the prepared network with the network as built."""

    def build(setting: Setting) -> Comparison:
        plain = network(setting)
        ready = prepare_for_inference(plain)
        images = photographs(setting, setting.size(size), 1)

        def ours() -> KNetOutput:
            with setting.autocast(), torch.inference_mode():
                return ready(images)

        def reference() -> KNetOutput:
            with torch.inference_mode():
                return straightforward.predict(plain, images)

        return Comparison(
            ours=ours,
            reference=reference,
            check=lambda: same_output(ours(), reference(), setting),
        )

    return build


def result_part(size: tuple[int, int]) -> Callable[[Setting], Comparison]:
    """Compare image to result.

    Random weights find nothing, so post-processing gets the masks of `prediction` instead.
    """

    def build(setting: Setting) -> Comparison:
        actual = setting.size(size)
        network_part = forward_part(size)(setting)
        maps = postprocess_comparison(setting, actual)

        def ours() -> object:
            network_part.ours()
            return maps.ours()

        def reference() -> object:
            network_part.reference()
            return maps.reference()

        return Comparison(ours=ours, reference=reference, check=maps.check)

    return build


def postprocess_part(setting: Setting) -> Comparison:
    """Compare the way from 153 masks to a panoptic map."""
    return postprocess_comparison(setting, setting.size(LARGE))


def postprocess_comparison(setting: Setting, size: tuple[int, int]) -> Comparison:
    """Compare the way from 153 masks to a panoptic map of `size`."""
    stage = prediction(setting, size, 1, seed=2)
    sizes: list[ImageSize] = [*image_sizes(size, 1)]
    evaluation = EvalConfig()

    def ours() -> object:
        return panoptic_maps(stage, sizes, evaluation, num_things=THINGS, compat="none")

    def reference() -> object:
        with torch.inference_mode():
            return straightforward.panoptic_map(stage, 0, sizes[0], evaluation, num_things=THINGS)

    def check() -> str:
        (found,) = panoptic_maps(stage, sizes, evaluation, num_things=THINGS, compat="none")
        ids, segments = straightforward.panoptic_map(
            stage, 0, sizes[0], evaluation, num_things=THINGS
        )
        differing = int((found.ids != ids).sum())
        assert [s.id for s in found.segments] == [s.id for s in segments]
        assert differing == 0, f"{differing} pixels differ"
        return f"equal ({len(segments)} segments)"

    return Comparison(ours=ours, reference=reference, check=check)


def matching_part(setting: Setting) -> Comparison:
    """Compare matching of 100 kernels with 20 objects on stride-4 maps."""
    size = setting.size(LARGE)
    stage = prediction(setting, size, 1, seed=2)
    target = ground_truth(setting, size, 1, seed=3, num_objects=20)
    weights = LossConfig()
    masks = straightforward._upsample(stage.masks[:, :KERNELS])[0]
    objects = straightforward._resize_objects(target.masks, size)
    assert stage.class_logits is not None
    scores = stage.class_logits[0, :KERNELS, :THINGS]

    def reference() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return straightforward.match(masks, scores, objects, target.labels, weights)

    def ours() -> Matches:
        cost = assignment_cost(masks, scores, objects, target.labels, weights)
        (found,) = match([cost])
        return found

    def check() -> str:
        found = ours()
        kernels, there = reference()
        assert torch.equal(found.kernels, kernels)
        assert torch.equal(found.objects, there)
        return "equal"

    return Comparison(ours=ours, reference=reference, check=check)


def losses_part(setting: Setting) -> Comparison:
    """Compare the panoptic criterion of one image, forward and backward to the predictions."""
    size = setting.size(LARGE)
    stages = []
    for number in range(4):
        stage = prediction(setting, size, 1, seed=10 + number)
        assert stage.class_logits is not None
        stages.append(
            replace(
                stage,
                masks=stage.masks.requires_grad_(),
                class_logits=stage.class_logits.requires_grad_() if number else None,
            )
        )
    generator = torch.Generator().manual_seed(4)
    small = (size[0] // 8, size[1] // 8)
    semantic = regions(THINGS + STUFF, small, generator)[None].to(setting.device)
    output = KNetOutput(stages=tuple(stages), semantic=semantic.requires_grad_(), padded_size=size)
    targets = [ground_truth(setting, size, 1, seed=3)]
    weights = LossConfig(rank=0.1)
    inputs = [semantic, *(s.masks for s in stages)]
    inputs += [s.class_logits for s in stages if s.class_logits is not None]

    def ours() -> tuple[dict[str, Tensor], list[Tensor]]:
        terms = kernel_criterion(output, targets, weights, num_things=THINGS, compat="none")
        return terms.named(), list(torch.autograd.grad(terms.total(), inputs))

    def reference() -> tuple[dict[str, Tensor], list[Tensor]]:
        terms = straightforward.panoptic_criterion(output, targets, weights, num_things=THINGS)
        return terms, list(torch.autograd.grad(torch.stack([*terms.values()]).sum(), inputs))

    def check() -> str:
        (found, gradients), (expected, wanted) = ours(), reference()
        terms = same_terms(found, expected, tolerance=1e-5)
        slope = max(deviation(a, b) for a, b in zip(gradients, wanted, strict=True))
        assert slope <= 1e-4, f"gradients differ by {slope:.1e}"
        return f"terms {terms:.0e}, gradients {slope:.0e}"

    return Comparison(ours=ours, reference=reference, check=check)


def training_part(setting: Setting) -> Comparison:
    """Compare an optimizer step on two images of ten objects."""
    size = setting.size(SMALL)
    recipe = recipe_for(setting)
    plain = network(setting).train()
    trainer = Trainer(
        copy.deepcopy(plain),
        recipe,
        num_iterations=1,
        device=setting.device,
        output_dir=Path(tempfile.gettempdir()),
    )
    targets = tuple(ground_truth(setting, size, 1, seed=5 + index) for index in range(2))
    batch = Batch(
        images=photographs(setting, size, 2), targets=targets, infos=tuple(image_sizes(size, 2))
    )
    parameters = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-15, weight_decay=0.0)

    def reference() -> tuple[dict[str, Tensor], Tensor]:
        terms = straightforward.panoptic_criterion(
            straightforward.predict(plain, batch.images),
            batch.targets,
            recipe.loss,
            num_things=THINGS,
        )
        torch.stack([*terms.values()]).sum().backward()
        norm = nn.utils.clip_grad_norm_(parameters, recipe.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return terms, norm

    def check() -> str:
        result = trainer.step(0, [batch])
        expected, norm = reference()
        tolerance = 0.2 if setting.bf16 else 1e-3
        terms = same_terms(result.losses, expected, tolerance=tolerance)
        slope = abs(float(result.grad_norm / norm) - 1)
        return f"terms {terms:.0e}, gradient norm {slope:.0e}"

    return Comparison(ours=lambda: trainer.step(0, [batch]), reference=reference, check=check)


PARTS = {
    "forward-512": Part(
        name="forward 512x512", build=forward_part(SMALL), target=0.75, bf16_target=0.45
    ),
    "forward-800": Part(
        name="forward 800x1216", build=forward_part(LARGE), target=0.75, bf16_target=0.45
    ),
    "result-512": Part(
        name="image to result 512x512", build=result_part(SMALL), target=0.5, bf16_target=0.5
    ),
    "result-800": Part(
        name="image to result 800x1216", build=result_part(LARGE), target=0.5, bf16_target=0.5
    ),
    "training": Part(
        name="training step, 2 x 512x512", build=training_part, target=0.87, bf16_target=0.55
    ),
    "matching": Part(name="matching N=100 G=20, 200x304", build=matching_part, target=1 / 4),
    "losses": Part(name="losses and gradients, 200x304", build=losses_part, target=1 / 2),
    "postprocess": Part(
        name="panoptic map, 153 masks, 800x1216", build=postprocess_part, target=1 / 5
    ),
}


# Comparing.


def deviation(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    found, expected = found.detach().float(), expected.detach().float()
    scale = expected.abs().max().clamp(min=1e-30)
    return float((found - expected).abs().max() / scale)


def noise(found: Tensor, expected: Tensor) -> float:
    """Return the root mean square difference relative to that of what is expected."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def same_terms(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float
) -> float:
    """Return the largest relative difference of two sets of loss terms."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    worst = max(found, key=lambda name: deviation(found[name], expected[name]))
    value = deviation(found[worst], expected[worst])
    assert value <= tolerance, f"{worst}: {found[worst]} instead of {expected[worst]}"
    return value


def same_output(found: KNetOutput, expected: KNetOutput, setting: Setting) -> str:
    """Return how far the static masks and the last masks differ.

    A pixel whose mask lies within rounding of one half may fall in another group, which moves the
    kernels behind it; hence the last stage's tolerance. In bf16, whose eight bits leave single
    pixels far off whatever the form (0.5 of the largest in the plain one, 0.06 in the mean), the
    mean counts.
    """
    differ = noise if setting.bf16 else deviation
    static, last = (
        differ(found.stages[index].masks, expected.stages[index].masks) for index in (0, -1)
    )
    limits = (0.1, 1.0) if setting.bf16 else (1e-5, 1e-3)
    assert static <= limits[0], f"static masks differ by {static:.1e}"
    assert last <= limits[1], f"last masks differ by {last:.1e}"
    return f"static {static:.0e}, last {last:.0e}"


# Measuring.


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return seconds of wall clock (of the GPU where there is one) and of this process's CPU."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        busy = time.process_time()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1000, time.process_time() - busy
    busy, start = time.process_time(), time.perf_counter()
    call()
    return time.perf_counter() - start, time.process_time() - busy


class Runner:
    """One form of a part, built in a process of its own and run on demand."""

    def __init__(self, part: str, side: str, flags: list[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *flags, "--serve", part, side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.agreement = self._answer()

    def run(self) -> tuple[float, float]:
        """Run once; return what `timed` does."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        clock, busy = self._answer().split()
        return float(clock), float(busy)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(self._process.wait())  # its traceback has been printed
        return line.strip()


def serve(part: Part, side: str, setting: Setting) -> None:
    """Be the process of a `Runner`."""
    comparison = part.build(setting)
    call: Callable[[], object] = getattr(comparison, side)
    call()
    print(comparison.check() if side == OURS else "", flush=True)
    for _ in sys.stdin:
        print(*timed(call, setting.device), flush=True)


def measure(name: str, setting: Setting, rounds: int, flags: list[str]) -> list[str]:
    """Return the cells of a part's row, memory aside."""
    part = PARTS[name]
    runners = [Runner(name, side, flags) for side in SIDES]
    times = [[runner.run() for runner in runners] for _ in range(rounds)]
    for runner in runners:
        runner.close()
    ratio, cpu_ratio = (
        statistics.median(ours[clock] / reference[clock] for reference, ours in times)
        for clock in range(2)
    )
    reference_ms, ours_ms = (
        1000 * statistics.median(pair[side][0] for pair in times) for side in range(2)
    )
    target = part.target if not setting.bf16 else part.bf16_target
    assert target is not None
    return [
        part.name,
        f"{reference_ms:.0f}",
        f"{ours_ms:.0f}",
        f"{ratio:.2f}",
        f"{cpu_ratio:.2f}",
        f"{target:.2f}",
        "yes" if ratio <= target else "no",
        runners[1].agreement,
    ]


def peak_of(call: Callable[[], object], setting: Setting) -> int:
    """Return the bytes that one call needs above what is held already."""
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
        held = torch.cuda.memory_allocated(setting.device)
        call()
        return torch.cuda.max_memory_allocated(setting.device) - held
    ctypes.CDLL(None).malloc_trim(0)  # what building left over is no room for the call
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    held = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - held


def status_bytes(key: str) -> int:
    """Return a size that Linux keeps of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def crowded(setting: Setting, batch_size: int) -> None:
    """Do one training step on images of 300 objects, and print what the process took."""
    size = setting.size(LARGE)
    recipe = recipe_for(setting, "instance")
    trainer = Trainer(
        network(setting, "instance").train(),
        recipe,
        num_iterations=1,
        device=setting.device,
        output_dir=Path(tempfile.gettempdir()),
    )
    targets = tuple(
        replace(ground_truth(setting, size, 1, seed=7, num_objects=CROWD), semantic=None)
        for _ in range(batch_size)
    )
    batch = Batch(
        images=photographs(setting, size, batch_size),
        targets=targets,
        infos=tuple(image_sizes(size, batch_size)),
    )
    trainer.step(0, [batch])
    if setting.device.type == "cuda":
        print(torch.cuda.max_memory_allocated(setting.device))
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def in_own_process(*arguments: str) -> float:
    """Return the GB that this script prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
    )
    return int(done.stdout) / 1e9


def main() -> None:
    """Measure what is asked for and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="our side under bf16 autocast")
    parser.add_argument("--quick", action="store_true", help="tiny maps, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "crowded"], metavar="PART")
    parser.add_argument("--rounds", type=int, help="default: 7, quick: 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument(
        "--keep-memory", choices=("ours", "both"), default="ours", help="see above (default: ours)"
    )
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = Setting(device=torch.device(args.device), bf16=args.bf16, quick=args.quick)
    if args.serve:
        part, side = args.serve
        if setting.device.type == "cpu" and (side == OURS or args.keep_memory == "both"):
            keep_freed_memory()
        serve(PARTS[part], side, setting)
        return
    if args.memory_of:
        part, side = args.memory_of
        if part == "crowded":
            crowded(setting, int(side))
        else:
            print(peak_of(getattr(PARTS[part].build(setting), side), setting))
        return

    passed_on = ["--device", args.device, "--threads", str(args.threads)]
    passed_on += ["--keep-memory", args.keep_memory]
    passed_on += ["--bf16"] * args.bf16 + ["--quick"] * args.quick
    memory = not args.no_memory
    columns = ["part", "reference ms", "ours ms", "ratio", "CPU-time ratio", "target", "reached"]
    columns += ["agreement"] + ["reference GB", "ours GB"] * memory
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, ", end="")
    print("ours in bf16, reference in fp32\n" if args.bf16 else "fp32\n")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name, part in PARTS.items():
        if (args.only and name not in args.only) or (args.bf16 and part.bf16_target is None):
            continue
        cells = measure(name, setting, args.rounds or (2 if args.quick else 7), passed_on)
        if memory:
            for side in SIDES:
                cells.append(f"{in_own_process(*passed_on, '--memory-of', name, side):.3f}")
        print(f"| {' | '.join(cells)} |", flush=True)
    if memory and (not args.only or "crowded" in args.only):
        print()
        for batch_size in (1, 2):
            peak = in_own_process(*passed_on, "--memory-of", "crowded", str(batch_size))
            limit = f" (limit {CROWD_LIMIT} GB)" if batch_size == 1 else ""
            print(
                f"Training step, {batch_size} x 800x1216 with {CROWD} objects each, "
                f"{KERNELS} kernels: peak {peak:.2f} GB{limit}",
                flush=True,
            )


if __name__ == "__main__":
    main()
