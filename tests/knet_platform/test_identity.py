"""A trial's hash is the same wherever and whenever it is computed."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from knet_core import BackboneConfig, ConfigError, LossConfig, ModelConfig, Recipe
from knet_platform.identity import code_digest, digest, identity, trial_hash

ROOT = Path(__file__).parents[2]
PRINT = (
    "from knet_core import Recipe; from knet_platform.identity import trial_hash;"
    "print(trial_hash(Recipe(), 'data'))"
)


def with_weights(path: Path | str) -> Recipe:
    backbone = BackboneConfig(pretrained=False, checkpoint=str(path))
    return Recipe(model=ModelConfig(backbone=backbone))


@pytest.mark.parametrize(
    ("hash_seed", "locale", "folder"),
    [("0", "C", "/"), ("1", "C.UTF-8", "/tmp"), ("2", "POSIX", "/")],
)
def test_every_process_computes_the_same(hash_seed, locale, folder):
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    environment = os.environ | {
        "PYTHONHASHSEED": hash_seed, "LC_ALL": locale, "TZ": "Asia/Tokyo", "PYTHONPATH": path,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PRINT],
        capture_output=True, text=True, check=True, cwd=folder, env=environment,
    )  # fmt: skip
    assert done.stdout.strip() == trial_hash(Recipe(), "data")


def test_the_scheme_is_pinned():
    """Another hash here makes every trial of every user new: change it only on purpose."""
    values = {"seed": 7, "optim": {"lr": 1e-4, "betas": [0.9, 0.999]}, "compat": "none", "é": None}
    assert digest(values, "fingerprint", "code") == "6951d7fd928203f7"


def test_data_and_code_are_part_of_it():
    hashes = {
        trial_hash(Recipe(), "a", "x"),
        trial_hash(Recipe(), "b", "x"),
        trial_hash(Recipe(), "a", "y"),
    }
    assert len(hashes) == 3
    assert trial_hash(Recipe(), "a") == trial_hash(Recipe(), "a", code_digest())


def test_of_backbone_weights_the_content_counts_not_the_place(tmp_path):
    first, moved, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    first.write_bytes(b"weights")
    moved.write_bytes(b"weights")
    other.write_bytes(b"others")
    assert identity(with_weights(first)) == identity(with_weights(moved))
    assert identity(with_weights(first)) != identity(with_weights(other))


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        (with_weights("/nowhere/a.pt"), "model.backbone.checkpoint: no file /nowhere/a.pt"),
        (Recipe(loss=LossConfig(dice=float("inf"))), "loss.dice: inf equals nothing"),
    ],
)
def test_what_is_not_the_same_everywhere_is_refused(recipe, problem):
    with pytest.raises(ConfigError, match=problem):
        trial_hash(recipe, "data")


def test_what_has_no_one_way_to_be_written_is_refused():
    odd = dataclasses.replace(Recipe(), compat={"none"})
    with pytest.raises(ConfigError, match="compat: a set has no one way"):
        trial_hash(odd, "data")
