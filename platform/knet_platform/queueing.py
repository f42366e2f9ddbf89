"""Hands Tune the trials of a sweep one by one, each made ready when there is room for it.

A grid of Tune's own copies what all its trials are given for each of them: a thousand trials would
cost minutes before the first one starts.
"""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from knet_platform.sweep import Trial


class Queue(Searcher):
    """Known trials in their order; nothing of it must outlive the process."""

    def __init__(self, todo: Sequence[Trial], start: Callable[[Trial], dict[str, Any]]) -> None:
        """Begin with `todo`; `start` makes a trial ready and returns what Tune passes to it."""
        super().__init__()
        self._todo = deque(todo)
        self._start = start
        self.running: dict[str, Trial] = {}
        """By Tune's ids."""

    def suggest(self, trial_id: str) -> Any:
        """Return the configuration of the next trial."""
        trial = self._todo.popleft() if self._todo else self.further()
        if trial is None:
            return Searcher.FINISHED
        self.running[trial_id] = trial
        return self._start(trial)

    def further(self) -> Trial | None:
        """Return a trial that was not known before; None when there is no other."""
        return None

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Forget a trial; what came of it is in the store."""
        del self.running[trial_id]

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune saves its searchers for a restoration that never happens."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Leave an empty file, where Tune expects one."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: Tune is never restored."""
