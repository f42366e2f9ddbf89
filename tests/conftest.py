"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

_DEFAULT = Path(__file__).parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images with true annotations; never part of the project (licences)."""
    folder = Path(os.environ.get("KNET_TEST_DATA", _DEFAULT)).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real test data at {folder}; set KNET_TEST_DATA")
    return folder
