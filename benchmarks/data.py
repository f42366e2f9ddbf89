"""What a COCO-sized annotation file costs: time to start, and memory of a worker.

python benchmarks/data.py [--folder DIR] [--images 118287] [--annotations 860001]

Writes a synthetic instance file (polygons of about 28 points, as many bytes an annotation as COCO
2017's) with empty image files, then opens it in fresh processes: parsed, from the cache, and by
`json.load` for comparison. Memory is the largest resident set of the process, and what of it is
private: pages of the cache are shared by all workers of a machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

_POINTS = 28
_OPEN = """
import resource, sys, time
from pathlib import Path
from knet_core.config import DataConfig
from knet_core.data import build_dataset
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
cpu = time.process_time()
dataset = build_dataset(DataConfig(root=sys.argv[1]), "train", seed=0)
seconds = time.perf_counter() - start
cpu = time.process_time() - cpu
source = dataset._source
for index in range(0, len(dataset), 100):
    source.objects(index)
"""
_PARSE = """
import json, resource, sys, time
from pathlib import Path
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
cpu = time.process_time()
with (Path(sys.argv[1]) / "annotations" / "instances_train.json").open() as file:
    document = json.load(file)
seconds = time.perf_counter() - start
cpu = time.process_time() - cpu
"""
_REPORT = """
private = 0
for line in open("/proc/self/smaps_rollup"):
    if line.startswith("Private"):
        private += int(line.split()[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(seconds, cpu, before / 1024, peak / 1024, private / 1024)
"""


def write_set(folder: Path, num_images: int, num_annotations: int) -> Path:
    """Write the set, unless it is there; the same bytes every time."""
    path = folder / "annotations" / "instances_train.json"
    if path.exists():
        return path
    (folder / "train").mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    owners = np.sort(rng.integers(0, num_images, num_annotations))
    unfinished = path.with_suffix(".part")
    with unfinished.open("w") as file:
        file.write('{"info": {}, "licenses": [], "images": [')
        for number in range(num_images):
            name = f"{number:012d}.jpg"
            (folder / "train" / name).touch()
            entry = {"license": 3, "file_name": name, "coco_url": f"http://images/{name}"}
            size = {"height": 480, "width": 640, "id": number}
            file.write(", " * (number > 0) + json.dumps({**entry, **size}))
        file.write('], "annotations": [')
        angles = np.linspace(0, 2 * np.pi, _POINTS, endpoint=False)
        for number, owner in enumerate(owners.tolist()):
            radius = rng.uniform(5, 100) * rng.uniform(0.8, 1.0, _POINTS)
            x = np.clip(rng.uniform(0, 640) + radius * np.cos(angles), 0, 640).round(2)
            y = np.clip(rng.uniform(0, 480) + radius * np.sin(angles), 0, 480).round(2)
            box = [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()]
            annotation = {
                "segmentation": [np.stack([x, y], axis=1).ravel().tolist()],
                "area": round(float(np.pi * radius.mean() ** 2), 4),
                "iscrowd": 0,
                "image_id": owner,
                "bbox": [round(float(side), 2) for side in box],
                "category_id": number % 80 + 1,
                "id": number + 1,
            }
            file.write(", " * (number > 0) + json.dumps(annotation))
        categories = [{"id": number + 1, "name": f"class {number}"} for number in range(80)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    unfinished.rename(path)
    return path


def measure(code: str, folder: Path, cache: Path) -> tuple[float, ...]:
    """Run code in a fresh process; return seconds, those of the CPU, and three sizes in MiB."""
    run = subprocess.run(
        [sys.executable, "-c", code + _REPORT, str(folder)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )
    return tuple(map(float, run.stdout.split()))


def main() -> None:
    """Print one line a way of opening the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "knet-data"))
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--annotations", type=int, default=860_001)
    args = parser.parse_args()
    path = write_set(args.folder, args.images, args.annotations)
    print(f"{path}: {path.stat().st_size / 2**20:.0f} MiB, {args.annotations} annotations")
    print(f"{'':12}{'seconds':>9}{'CPU':>8}{'MiB before':>12}{'MiB peak':>10}{'MiB private':>13}")
    with tempfile.TemporaryDirectory(dir=args.folder) as cache:
        for name, code in (("first", _OPEN), ("cached", _OPEN), ("json.load", _PARSE)):
            seconds, cpu, *memory = measure(code, args.folder, Path(cache))
            print(
                f"{name:12}{seconds:9.2f}{cpu:8.2f}{memory[0]:12.0f}{memory[1]:10.0f}{memory[2]:13.0f}"
            )


if __name__ == "__main__":
    main()
