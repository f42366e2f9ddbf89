"""YAML and key=value in, one recipe out, or every problem at once."""

from pathlib import Path

import pytest

from knet_core import ConfigError, Recipe
from knet_platform.config import load_recipe, mapping_layers, override_layers, read_yaml, resolve

ROOT = Path(__file__).parents[2]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems_of(call, *args, **kwargs) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return caught.value.problems


def test_no_layers_give_the_defaults():
    assert resolve(()) == Recipe()


def test_later_sources_win_over_earlier_ones(tmp_path):
    write(tmp_path, "base.yaml", "optim: {lr: 1e-3}\nmodel: {stages: 1, channels: 64}\n")
    recipe = write(tmp_path, "recipe.yaml", "base: base.yaml\nmodel: {stages: 2}\n")
    scale = write(
        tmp_path, "scale.yaml", "recipe:\n  model.num_kernels: 7\n  train: {epochs: 3}\n"
    )
    loaded = load_recipe(
        recipe, scale=scale, arm={"train.epochs": 4}, overrides=["model.num_kernels=9"]
    )
    assert (loaded.optim.lr, loaded.model.channels, loaded.model.stages) == (1e-3, 64, 2)
    assert (loaded.model.num_kernels, loaded.train.epochs) == (9, 4.0)


def test_lists_become_tuples_and_numbers_get_their_type():
    loaded = resolve(override_layers(["data.short_edge=[640,800]", "optim.lr=1e-3"]))
    assert loaded.data.short_edge == (640, 800)
    assert loaded.optim.lr == 1e-3
    assert Recipe.from_dict(loaded.to_dict()) == loaded


def test_all_unknown_keys_are_reported_with_the_nearest_name():
    found = problems_of(
        mapping_layers, "a.yaml", {"model": {"stagse": 1}, "optim.lrr": 2, "lr": 1}
    )
    assert found == (
        "a.yaml: model.stagse: unknown key; did you mean 'model.stages'?",
        "a.yaml: optim.lrr: unknown key; did you mean 'optim.lr'?",
        "a.yaml: lr: unknown key; did you mean 'optim.lr'?",
    )


def test_problems_of_several_files_are_reported_together(tmp_path):
    write(tmp_path, "base.yaml", "modle: {stages: 1}\n")
    recipe = write(tmp_path, "recipe.yaml", "base: base.yaml\ntrain: {epoch: 1}\n")
    found = problems_of(load_recipe, recipe, overrides=["sead=1", "model"])
    assert [line.split(":")[0].rpartition("/")[2] for line in found] == [
        "base.yaml",
        "recipe.yaml",
        "command line",
        "command line",
    ]


def test_all_wrong_types_are_reported_with_their_source():
    layers = mapping_layers(
        "a.yaml",
        {
            "model.stages": "x",
            "train.precision": "fp8",
            "data.short_edge": [1, 2, 3],
            "seed": None,
        },
    )
    assert problems_of(resolve, layers) == (
        "a.yaml: model.stages: expected int, got 'x'",
        "a.yaml: train.precision: expected one of fp32, bf16, fp16, got 'fp8'",
        "a.yaml: data.short_edge: expected two int, got [1, 2, 3]",
        "a.yaml: seed: expected int, got None",
    )


def test_all_values_out_of_range_are_reported_with_the_source_that_set_them():
    layers = (*mapping_layers("a.yaml", {"model.stages": 0}), *override_layers(["optim.lr=-1"]))
    first, second = problems_of(resolve, layers)
    assert first.startswith("a.yaml: model.stages: must be >= 1")
    assert second == "command line: optim.lr: must be > 0, got -1.0"


def test_a_section_cannot_be_replaced_by_a_value():
    (found,) = problems_of(mapping_layers, "a.yaml", {"model": 3})
    assert "a.yaml: model: got 3, expected keys below it" in found


@pytest.mark.parametrize("value", ["${oc.env:HOME}", ["${seed}"], "???"])
def test_nothing_is_interpolated(value):
    (found,) = problems_of(mapping_layers, "a.yaml", {"data.root": value})
    assert "expected the value itself" in found


def test_an_interpolation_on_the_command_line_does_not_leak_the_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    (found,) = problems_of(override_layers, ["data.root=${oc.env:SECRET_TOKEN}"])
    assert "hunter2" not in found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [1\n", "line 3"),
        ("a: 1\na: 2\n", "line 2: not valid YAML (found duplicate key a)"),
        ("a:\n\tb: 1\n", "line 2"),
        ("a: ${oc.env\n", "not valid YAML"),
        ("- a\n", "expected `key: value` lines, found list"),
    ],
)
def test_broken_yaml_names_file_and_line(tmp_path, text, expected):
    (found,) = problems_of(read_yaml, write(tmp_path, "broken.yaml", text))
    assert found.startswith(f"{tmp_path}/broken.yaml: ")
    assert expected in found


def test_a_missing_file_is_named(tmp_path):
    (found,) = problems_of(load_recipe, write(tmp_path, "a.yaml", "base: gone.yaml\n"))
    assert f"{tmp_path}/gone.yaml: cannot read the file" in found


def test_a_chain_of_bases_that_leads_back_is_refused(tmp_path):
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    (found,) = problems_of(load_recipe, write(tmp_path, "a.yaml", "base: b.yaml\n"))
    assert "leads back to itself" in found


def test_a_data_file_replaces_the_description_and_keeps_the_sizes(tmp_path):
    recipe = write(
        tmp_path, "r.yaml", "data: {root: old, format: shapes, short_edge: [64, 96], flip: 0}\n"
    )
    data = write(
        tmp_path, "mine.yaml", "root: mine\ntrain: {images: [t], annotations: [t.json]}\n"
    )
    loaded = load_recipe(recipe, overrides=["data.flip=0.25", f"data={data}"])
    assert (loaded.data.format, loaded.data.root) == ("coco", "mine")
    assert loaded.data.train.images == ("t",)
    assert (loaded.data.short_edge, loaded.data.flip) == ((64, 96), 0.25)


@pytest.mark.parametrize("swapped", [False, True])
def test_keys_refine_a_data_file_wherever_they_stand(tmp_path, swapped):
    recipe = write(tmp_path, "r.yaml", "seed: 1\n")
    data = write(tmp_path, "mine.yaml", "root: mine\n")
    overrides = [f"data={data}", "data.root=other"]
    loaded = load_recipe(recipe, overrides=overrides[::-1] if swapped else overrides)
    assert loaded.data.root == "other"


@pytest.mark.parametrize(
    ("values", "key", "decider"),
    [
        (["data.root=mine"], "data.root", "data.format=shapes"),
        (["data.train.images=[a]"], "data.train.images", "data.format=shapes"),
        (["data.format=coco", "data.shapes.size=64"], "data.shapes.size", "data.format=coco"),
        (["data.format=coco", "data.classes=[cat]"], "data.classes", "data.format=coco"),
        (["train.iterations=9", "train.epochs=3"], "train.epochs", "train.iterations=9"),
        (["loss.ce=3"], "loss.ce", "model.task=instance"),
        (["model.task=semantic", "model.num_kernels=9"], "model.num_kernels", "model.task"),
        (["model.interaction=false", "model.num_heads=4"], "model.num_heads", "model.interaction"),
    ],
)
def test_what_is_typed_and_never_read_is_refused(tmp_path, values, key, decider):
    recipe = write(tmp_path, "r.yaml", "data: {root: old, format: shapes, shapes: {size: 96}}\n")
    (found,) = problems_of(load_recipe, recipe, overrides=values)
    assert found.startswith(f"command line: {key}: nothing reads it with {decider}")


def test_a_data_file_named_in_yaml_lies_beside_it(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "mine.yaml", "root: mine\n")
    recipe = write(tmp_path, "r.yaml", "data: data/mine.yaml\n")
    assert load_recipe(recipe).data.root == "mine"


def test_a_missing_data_file_is_named():
    (found,) = problems_of(override_layers, ["data=gone.yaml"])
    assert "command line: data: no file 'gone.yaml'" in found


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps/data").glob("*.yaml")))
def test_every_shipped_data_file_loads(path):
    recipe = ROOT / "sweeps/recipes/knet_r50_instance_1x.yaml"
    assert load_recipe(recipe, overrides=[f"data={path}"]).model.stages == 3


def test_the_published_recipe_is_the_defaults():
    assert load_recipe(ROOT / "sweeps/recipes/knet_r50_instance_1x.yaml") == Recipe()
