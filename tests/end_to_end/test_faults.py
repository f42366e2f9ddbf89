"""Every class of failures, injected into real trials of a real cluster, and what follows."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from knet_core import make_shapes
from knet_platform.cli.main import main
from knet_platform.planning import load_sweep
from knet_platform.storage import Store, TrialStore
from knet_platform.sweep import Trial

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

TINY = Path(__file__).parents[1] / "tiny_recipe.yaml"
# Statistics of batch normalisation stay as they are, so that a batch can be trained in pieces.
RECIPE = f"""\
base: {TINY}
data: {{shapes: {{num_train: 16}}}}
model: {{backbone: {{norm_eval: true}}, stages: 1}}
train: {{iterations: 8, batch_size: 4, log_every: 1, eval_every: 4, checkpoint_every: 2}}
eval: {{batch_size: 2, fps_iterations: 0, probe_images: 0}}
"""
# More detections than there are pairs of kernels and classes: trials of their own, trained alike.
FAULTS = {
    "clean": {},
    "interrupted": {"kill_worker": 3, "kill_driver": 5, "hang": 7},
    "short_of_memory": {"train_limit": 1, "eval_limit": 1, "nan": 5},
}
AP = ("val/AP", "val/AP50")
SWEEP = """\
name: faults
base: recipe.yaml
metric: {name: val/AP, mode: max}
baseline: clean
resources: {workers: 2, hang_minutes: 0.25}
arms:
""" + "".join(
    f"  {arm}: {{eval.max_detections: {99 - number}}}\n" for number, arm in enumerate(FAULTS)
)
UNUSABLE = """\
name: unusable
base: recipe.yaml
metric: {name: val/AP, mode: max}
baseline: good
resources: {max_concurrent: 1}
arms:
  good: {}
  better: {eval.max_detections: 99}
"""


@dataclass(frozen=True)
class Done:
    """A sweep that was run to its end."""

    code: int
    trials: dict[str, Trial]
    """By name, `arm/seed`."""
    runs: dict[str, Run]
    store: Store

    def trial(self, name: str) -> TrialStore:
        return self.store.trial(self.trials[name].hash)

    def attempts(self) -> dict[str, str]:
        return {
            name: run.data.tags["attempt"]
            for name, run in self.runs.items()
            if "attempt" in run.data.tags
        }


def run(
    folder: Path, sweep_file: str, make_home: Callable[..., Path], faults: Path | None = None
) -> Done:
    sweep = load_sweep(folder / sweep_file)
    for trial in sweep.trials if faults else ():
        for fault, value in FAULTS[trial.arm].items():
            (faults / trial.hash).mkdir(exist_ok=True)
            (faults / trial.hash / fault).write_text(str(value))
    with pytest.MonkeyPatch.context() as patch:
        make_home(folder, patch)
        code = main(["run", str(folder / sweep_file)])
    client = MlflowClient(f"sqlite:///{folder}/home/mlflow.db")
    experiment = client.get_experiment_by_name(sweep.name)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    runs = {str(item.info.run_name): item for item in found}
    assert len(runs) == len(found), "one run of MLflow for each trial"
    return Done(
        code=code,
        trials={trial.name: trial for trial in sweep.trials},
        runs=runs,
        store=Store(f"{folder}/home/storage"),
    )


@pytest.fixture(scope="module")
def done(
    ray_cluster: str,
    faults: Path,
    make_home: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Done:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "faults.yaml").write_text(SWEEP)
    return run(folder, "faults.yaml", make_home, faults)


def learnt(store: TrialStore) -> dict[str, float]:
    """Return what a finished trial measured of its model, to the last bit."""
    result = store.result()
    assert result is not None
    assert result.step == 8
    return {name: value for name, value in result.metrics.items() if not name.startswith("sys/")}


def test_one_run_for_each_trial_and_only_what_cannot_go_on_fails(done: Done) -> None:
    assert done.code == 3
    names = {f"{arm}/0" for arm in FAULTS}
    assert set(done.runs) == {"faults", *names}
    for name in names:
        failed = name == "short_of_memory/0"
        assert done.runs[name].info.status == ("FAILED" if failed else "FINISHED")
    assert done.attempts() == {"clean/0": "1", "interrupted/0": "4", "short_of_memory/0": "2"}


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("clean/0", []),
        (
            "interrupted/0",
            [
                ("preempted", "retried from step 2", 1),
                ("preempted", "retried from step 4", 2),
                ("hang", "retried from step 6", 3),
            ],
        ),
        (
            "short_of_memory/0",
            [
                ("out_of_memory_training", "same batch in pieces of 1, from step 0", 1),
                ("out_of_memory_evaluation", "evaluated 1 at a time", 2),
                ("non_finite", "stopped the trial", 2),
            ],
        ),
    ],
)
def test_what_happened_and_what_was_done_is_on_record(
    done: Done, name: str, record: list[tuple[str, str, int]]
) -> None:
    failures = done.trial(name).failures()
    assert [(item.cause, item.action, item.attempt) for item in failures] == record


def test_what_was_killed_and_hung_within_epochs_ends_as_if_it_had_not_been(done: Done) -> None:
    assert learnt(done.trial("interrupted/0")) == learnt(done.trial("clean/0"))
    weights = [
        done.trial(name).read_bytes("checkpoint_8/model.safetensors")
        for name in ("interrupted/0", "clean/0")
    ]
    assert weights[0] == weights[1]
    client = MlflowClient(f"sqlite:///{Path(done.store.uri).parent}/mlflow.db")

    def curve(name: str, metric: str) -> dict[int, float]:
        points = client.get_metric_history(done.runs[name].info.run_id, metric)
        assert len({point.step for point in points}) == len(points), "no point twice"
        return {point.step: point.value for point in points}

    assert curve("interrupted/0", "val/AP") == curve("clean/0", "val/AP")
    losses = curve("clean/0", "train/loss")
    assert list(losses) == list(range(1, 9))
    # Also what a driver was told and had not passed on.
    assert curve("interrupted/0", "train/loss") == losses


def test_every_worker_of_a_hung_trial_leaves_its_stacks(done: Done) -> None:
    store = done.trial("interrupted/0")
    stacks = [name for name in store.list("failures") if name.startswith("hang_")]
    assert stacks == ["hang_attempt3_rank0.txt", "hang_attempt3_rank1.txt"]
    texts = [store.read_bytes(f"failures/{name}").decode() for name in stacks]
    assert any("sitecustomize.py" in text and "in step" in text for text in texts)
    assert all("in train_worker" in text for text in texts)
    assert "hang_attempt3_rank0.txt" in store.failures()[-1].message


def test_too_little_memory_changes_how_not_what_is_learnt(done: Done) -> None:
    """As far as it has reported before the step whose images it cannot use."""
    curves = [
        [
            {name: value for name, value in point.metrics.items() if name in ("train/loss", *AP)}
            for point in done.trial(name).points()[:4]
        ]
        for name in ("short_of_memory/0", "clean/0")
    ]
    assert set(curves[0][3]) == {"train/loss", *AP}
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_loss_that_is_not_finite_leaves_what_explains_it(done: Done) -> None:
    store = done.trial("short_of_memory/0")
    failure = store.failure()
    assert failure is not None
    assert failure == store.failures()[-1]
    dumps = [name for name in store.list("failures") if name.endswith(".pt")]
    assert dumps
    assert any(name in failure.message for name in dumps)
    dump = torch.load(io.BytesIO(store.read_bytes(f"failures/{dumps[0]}")), weights_only=True)
    assert len(dump["image_ids"]) == len(dump["images"]) == 2
    assert dump["costs"][0][0].isnan().any()
    assert dump["step"] == 6


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder with a recipe whose training images lie in files."""
    make_shapes(tmp_path / "shapes", num_train=4, num_val=2, size=64, seed=0)
    data = f"data: {{format: coco, root: {tmp_path}/shapes, num_workers: 0}}\n"
    lines = [line for line in RECIPE.splitlines(keepends=True) if "data:" not in line]
    (tmp_path / "recipe.yaml").write_text("".join([*lines, data]))
    return tmp_path


def test_an_image_that_cannot_be_read_stops_every_trial_of_its_data(
    ray_cluster: str, photographs: Path, make_home: Callable[..., Path]
) -> None:
    broken = min((photographs / "shapes" / "train").iterdir())
    broken.write_bytes(broken.read_bytes()[:100])
    (photographs / "unusable.yaml").write_text(UNUSABLE)
    done = run(photographs, "unusable.yaml", make_home)
    assert done.code == 3
    assert done.attempts() == {"good/0": "1"}
    spoilt = done.trial("good/0").failure()
    assert spoilt is not None
    assert (spoilt.cause, spoilt.action) == ("data", "stopped every trial of the same data")
    assert broken.name in spoilt.message
    assert done.trial("better/0").status() == "new"
