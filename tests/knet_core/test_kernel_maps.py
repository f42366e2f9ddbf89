import pytest
import torch
from torch.nn import functional as F

from knet_core import ConfigError, build_dataset, build_model, mean_activations
from knet_core.data import collate

CPU = torch.device("cpu")


def test_a_map_is_the_mean_of_the_masks_over_all_images(tiny_recipe):
    recipe = tiny_recipe()
    dataset = build_dataset(recipe.data, "val", seed=0)
    torch.manual_seed(0)
    model = build_model(recipe, dataset.categories).train()
    maps = mean_activations(model, dataset, device=CPU)
    assert model.training
    model.eval()
    expected = torch.zeros(10, 200, 200, dtype=torch.float64)
    for index in range(len(dataset)):
        with torch.no_grad():
            masks = model(collate([dataset.load(index, epoch=0)]).images).stages[-1].masks
        expected += F.interpolate(masks.sigmoid(), (200, 200), mode="bilinear")[0]
    torch.testing.assert_close(maps, expected / len(dataset))


def test_a_semantic_model_has_none(tiny_recipe):
    recipe = tiny_recipe(model={"task": "semantic"})
    dataset = build_dataset(recipe.data, "val", seed=0, task="semantic")
    with pytest.raises(ConfigError, match=r"model\.task"):
        mean_activations(build_model(recipe, dataset.categories), dataset, device=CPU)
