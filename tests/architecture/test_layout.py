"""The shape of the repository, as tests."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_platform_folder_never_shadows_the_standard_library():
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert run("import platform; print(platform.system())") == "Linux"


def test_every_name_of_the_door_can_be_had():
    run("import knet_core; [getattr(knet_core, name) for name in knet_core.__all__]")


def test_sweep_files_are_executable_so_that_the_literal_job_form_works():
    for sweep in (ROOT / "sweeps").glob("*.yaml"):
        assert sweep.stat().st_mode & 0o111, f"chmod +x {sweep.name}"
        assert sweep.read_text().startswith("#!/usr/bin/env -S knet run\n"), sweep.name


def test_the_teams_tracking_server_is_the_mlflow_that_is_tested():
    (locked,) = re.findall(r"^mlflow==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    dockerfile = (ROOT / "cluster" / "tracking" / "Dockerfile").read_text()
    assert f"ARG MLFLOW={locked}\n" in dockerfile
