"""What a finished trial leaves, for tests that need no training."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from knet_platform.storage import TrialResult

_RESULT = TrialResult(
    trial_hash="",
    step=100,
    metrics={"val/AP": 0.3},
    evaluations=(),
    checkpoint="checkpoint_100",
    num_parameters=1,
    seconds=60.0,
    wall_seconds=70.0,
    device="cpu",
    workers=1,
    finished_at="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
def finished() -> Callable[..., TrialResult]:
    """Return a function that makes the result of the trial of that hash, changed as asked."""

    def make(trial_hash: str, **changes: Any) -> TrialResult:
        return replace(_RESULT, trial_hash=trial_hash, **changes)

    return make
