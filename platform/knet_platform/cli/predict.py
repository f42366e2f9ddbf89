"""`knet predict`: masks drawn over images, and the predictions as files for other tools."""

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

from knet_platform.cli.inference import (
    add_checkpoint,
    add_device,
    chosen_device,
    refused_overrides,
)
from knet_platform.errors import UsageError

EXAMPLES = """\
examples:
  knet predict .knet/runs/0123456789abcdef/checkpoint_300 photo.jpg
  knet predict checkpoint_270000 photos/*.jpg --out predictions --device cuda
  knet predict checkpoint_270000 photo.jpg --stages       masks before and after every update
  knet predict checkpoint_80000 photo.jpg eval.scales=[0.5,1,1.5] eval.flip=true"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_checkpoint(parser)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files; data.key=value and eval.key=value may stand among them",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("predictions"), metavar="DIR", help="a new folder"
    )
    parser.add_argument(
        "--stages",
        action="store_true",
        help="draw the static kernels' masks and those after every update side by side",
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print the written files as JSON")


def run(args: argparse.Namespace) -> int:
    """Predict every image and write the folder; it appears complete or not at all.

    Raises:
        UsageError: The folder exists, an image does not, or two images share a name.
        CheckpointError: The checkpoint cannot be used.
        DataError: An image cannot be decoded.
    """
    overrides = [item for item in args.images if _is_override(item)]
    images = [Path(item) for item in args.images if not _is_override(item)]
    _check(images, overrides, args.out)

    from knet_core import (
        ResultWriter,
        contact_sheet,
        draw,
        keep_freed_memory,
        load_image,
        load_model,
        new_folder,
        predict,
        predict_stages,
        prepare_for_inference,
        read_state,
    )
    from knet_platform.cli.output import progress_bar
    from knet_platform.config import load_recipe

    recipe = load_recipe(args.checkpoint / "recipe.yaml", overrides=overrides)
    if args.stages and recipe.eval.views:
        raise UsageError(
            f"--stages: shows images as seen once and whole; expected eval.scales=[1] "
            f"eval.flip=false eval.window=null, found {', '.join(recipe.eval.views)} set"
        )
    categories = read_state(args.checkpoint).categories
    device = chosen_device(args.device)
    keep_freed_memory()
    model = prepare_for_inference(
        load_model(args.checkpoint, device=device, evaluation=recipe.eval)
    )
    with new_folder(args.out) as folder:
        with (
            ResultWriter(folder, categories) as results,
            progress_bar("predicting") as advance,
        ):
            for done, path in enumerate(images, start=1):
                pixels, batch = load_image(path, recipe.data)
                image = batch.images.to(device)
                if args.stages:
                    found = [stage[0] for stage in predict_stages(model, image, batch.infos)]
                else:
                    found = [predict(model, image, batch.infos, recipe.eval)[0]]
                results.add(replace(batch.infos[0], image_id=done), found[-1])
                cells = [draw(pixels, prediction, categories) for prediction in found]
                picture = contact_sheet(cells, columns=len(cells))
                (folder / f"{path.stem}.png").write_bytes(picture)
                advance(done, len(images))
        written = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    if args.json:
        print(json.dumps({"folder": str(args.out), "files": written}, indent=2))
    else:
        print(f"{args.out}: {len(images)} pictures; {', '.join(_others(written))}")
    return 0


def _is_override(item: str) -> bool:
    """Tell settings from files: shells hand both over in one list."""
    return "=" in item and not Path(item).exists()


def _check(images: list[Path], overrides: list[str], out: Path) -> None:
    problems = [
        f"{path}: is a folder; expected image files, such as {path}/*.jpg"
        if path.is_dir()
        else f"{path}: no such image"
        for path in images
        if not path.is_file()
    ]
    problems += [
        f"{stem}: {count} images of this name would overwrite each other's picture; rename one"
        for stem, count in Counter(path.stem for path in images).items()
        if count > 1
    ]
    problems += refused_overrides(overrides)
    if not images:
        problems.append("IMAGE: none given; name at least one image file")
    if out.exists():
        problems.append(f"--out: {out} exists; remove it or choose another folder")
    if problems:
        raise UsageError("\n".join(problems))


def _others(written: list[str]) -> list[str]:
    """Return what lies there beside the pictures; label images by their folder."""
    folders = {f"{Path(name).parent}/" for name in written if "/" in name}
    return sorted(folders | {name for name in written if name.endswith(".json")})
