"""What `mlflow.pyfunc.load_model` calls for a model that this project logged.

MLflow finds this module by the name in a model's `MLmodel` file, so that name is part of every
registered model. Weights are safetensors; nothing is unpickled.
"""

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from knet_platform.storage import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from knet_core import Instances, KNet, PanopticMap, SemanticMap

FOLDER = "checkpoint"
"""Of a model's artifacts: the checkpoint, where it was registered."""
FILES = ("model.safetensors", "state.json", "recipe.yaml", "manifest.json")
"""What predicting needs of a checkpoint, and the digests to verify it by."""


class Predictor:
    """A trained model as MLflow runs one.

    Args:
        checkpoint: Holds `FILES`.

    Raises:
        CheckpointError: A file is missing, cut short, or belongs to another model.
    """

    def __init__(self, checkpoint: Path) -> None:
        import torch

        from knet_core import load_model, load_recipe, prepare_for_inference, read_state

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._recipe = load_recipe(checkpoint)
        self._model = prepare_for_inference(load_model(checkpoint, device=self._device))
        self.categories = tuple(item.name for item in read_state(checkpoint).categories)
        """Names of classes in the order of labels."""

    def predict(
        self, images: "Iterable[str | Path | NDArray[np.uint8]]"
    ) -> "list[Instances | PanopticMap | SemanticMap]":
        """Return what the model finds in each image, at the image's own size.

        Args:
            images: Files, or pixels (H, W, 3) RGB.

        Raises:
            DataError: An image is missing, cannot be decoded, or has another form.
        """
        from knet_core import image_batch, load_image, predict

        found: list[Instances | PanopticMap | SemanticMap] = []
        for image in images:
            if isinstance(image, str | Path):
                _, batch = load_image(Path(image), self._recipe.data)
            else:
                batch = image_batch(image, self._recipe.data)
            inputs = batch.images.to(self._device)
            found += predict(self._model, inputs, batch.infos, self._recipe.eval)
        return found

    def get_raw_model(self) -> "KNet":
        """Return the network, as MLflow's `get_raw_model` and `unwrap_python_model` do."""
        return self._model


def _load_pyfunc(data_path: str, model_config: Mapping[str, str]) -> Predictor:
    """Return the model of MLflow's folder `data_path`, or of the checkpoint that it names."""
    folder = Path(data_path)
    if folder.is_dir():
        return Predictor(folder)
    parent, _, name = model_config["checkpoint"].rpartition("/")
    store = Store(parent).run_folder()
    with tempfile.TemporaryDirectory(prefix="knet-") as scratch:
        for file in FILES:
            Path(scratch, file).write_bytes(store.read_bytes(f"{name}/{file}"))
        return Predictor(Path(scratch))
