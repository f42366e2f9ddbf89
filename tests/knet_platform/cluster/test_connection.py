"""Ray that does not start is one line with the way out."""

import subprocess
import sys
from pathlib import Path

import pytest

START = """\
from knet_platform.cluster import connected, prepare_environment
from knet_platform.errors import UsageError

prepare_environment()
try:
    with connected():
        pass
except UsageError as error:
    print(error)
"""


@pytest.mark.ray
def test_a_cluster_that_cannot_be_started_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sockets would lie in a folder with more characters than the system takes."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 120)))
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("Ray: cannot start a cluster here (")
    assert "107 bytes" in line
    assert "set RAY_ADDRESS to a running cluster" in line
