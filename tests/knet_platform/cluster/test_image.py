"""The image's files, as far as they can be tried without docker."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
IMAGE = ROOT / "cluster" / "image"


@pytest.mark.parametrize("folder", ["image", "tracking"])
def test_hadolint_has_nothing_to_say(folder: str) -> None:
    done = subprocess.run(
        ["hadolint", "--no-color", ROOT / "cluster" / folder / "Dockerfile"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"},
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_closed_pinned_and_not_roots() -> None:
    text = (IMAGE / "Dockerfile").read_text()
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["1000"]
    assert "RAY_AUTH_MODE=token" in text
    assert re.search(r"^ARG PYTHON=3\.11\.\d+-", text, re.MULTILINE)
    last = text.rpartition("FROM ")[2]
    # What changes with every commit is copied after what takes minutes to install.
    assert (
        last.index("COPY requirements.lock") < last.index("/wheels") < last.index("COPY --chown")
    )
    ignored = (IMAGE / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"  # only what is named goes in
    for name in re.findall(r"^COPY (?!-)(.+) \S+$", text, re.MULTILINE):
        for source in name.split():
            assert f"!{source}" in ignored
            assert (ROOT / source).exists()


def test_both_variants_install_the_locked_versions(tmp_path: Path) -> None:
    (tmp_path / "uv").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "uv").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def installed(variant: str) -> tuple[int, list[str]]:
        done = subprocess.run(
            [IMAGE / "install.sh", variant, ROOT / "requirements.lock"],
            capture_output=True,
            text=True,
            env=environment,
        )
        return done.returncode, done.stdout.splitlines()

    assert installed("rocm") == (2, [])
    code, (everything,) = installed("cuda")
    assert code == 0
    assert everything.endswith("requirements.lock")
    assert "--require-hashes" in everything
    code, (rest, torch) = installed("cpu")
    assert code == 0
    assert "--require-hashes" in rest
    lock = (ROOT / "requirements.lock").read_text()
    for name in ("torch", "torchvision"):
        (version,) = re.findall(rf"^{name}==(\S+)", lock, re.MULTILINE)
        assert f"{name}=={version}" in torch
    kept = re.findall(r"^([\w-]+)==", Path(rest.split()[-1]).read_text(), re.MULTILINE)
    gone = set(re.findall(r"^([\w-]+)==", lock, re.MULTILINE)) - set(kept)
    assert {"torch", "torchvision", "triton", "nvidia-nccl-cu13"} <= gone
    assert {"ray", "timm", "mlflow"} <= set(kept)
