"""What nothing reads changes nothing: neither weights nor metrics, to the last bit."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from knet_core import Recipe, fit, unread
from knet_core.config import SemanticConfig

OTHER: dict[str, Any] = {
    "model.num_kernels": 7,
    "model.positional_encoding": False,
    "model.coordinates": True,
    "model.feature_branches": 1,
    "model.grouping": "hard",
    "model.adaptive_update": False,
    "model.interaction": False,
    "model.num_heads": 2,
    "model.ffn_channels": 48,
    "model.update_channels": 16,
    "model.semantic.head": "pspnet",
    "model.semantic.dropout": 0.5,
    "model.semantic.auxiliary": False,
    "loss.mask": 9.0,
    "loss.dice": 9.0,
    "loss.cls": 9.0,
    "loss.seg": 9.0,
    "loss.rank": 9.0,
    "loss.points": 9,
    "loss.ce": 9.0,
    "loss.auxiliary": 9.0,
    "eval.max_detections": 1,
    "eval.score_threshold": 0.9,
    "eval.overlap_threshold": 0.1,
    "eval.pasting": "separate",
    "data.root": "elsewhere",
    "data.train.images": ["elsewhere"],
    "data.val.annotations": ["elsewhere.json"],
    "data.classes": ["cat"],
    "data.crop_max_share": 0.5,
    "train.epochs": 99,
    "optim.decay_factor": 0.9,
    "optim.warmup_factor": 0.9,
    "optim.decay_norms": False,
}
"""Another value than the recipes below have."""
SEMANTIC = {"task": "semantic", "grouping": "soft", "semantic": SemanticConfig(head="fcn")}
PLAIN = {"warmup_iterations": 0, "decay_at": (), "weight_decay": 0.0}


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"task": "instance"}},
        {"model": {"task": "instance", "interaction": False, "adaptive_update": False}},
        {"model": {"task": "panoptic"}, "optim": PLAIN},
        {"model": SEMANTIC},
        {
            "model": SEMANTIC
            | {"stages": 0, "semantic": SemanticConfig(head="fcn", auxiliary=False)}
        },
    ],
    ids=["instance", "neither", "panoptic", "semantic", "semantic-baseline"],
)
def test_what_nothing_reads_changes_nothing(
    tiny_recipe, sections: dict[str, Any], tmp_path: Path
) -> None:
    recipe = tiny_recipe(**sections)
    keys = unread(recipe)
    values = recipe.to_dict()
    changed = set()
    for key, value in OTHER.items():
        if part := next((part for part in keys if f"{key}.".startswith(f"{part}.")), None):
            *sections_of_key, name = key.split(".")
            node = values
            for section in sections_of_key:
                node = node[section]
            assert node[name] != value
            node[name] = value
            changed.add(part)
    assert changed == keys.keys()
    assert unread(Recipe.from_dict(values)) == keys

    both = [
        fit(each, output_dir=tmp_path / name)
        for name, each in {"as it is": recipe, "changed": Recipe.from_dict(values)}.items()
    ]
    first, second = ({n: v for n, v in each.metrics.items() if "/fps" not in n} for each in both)
    assert first == second
    first, second = (load_file(each.checkpoint / "model.safetensors") for each in both)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
