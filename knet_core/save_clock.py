"""When a run saves beyond its schedule: after some minutes, or at once because it may end soon."""

import time
from collections.abc import Callable

from knet_core.distributed import gather_on_zero, on_rank_zero

_LOOK_SECONDS = 2.0
"""Between looks. Each takes the workers a message or two, so not every step has one."""


class SaveClock:
    """Decides for all workers at once.

    Clocks differ and notices reach workers at different times, but all must save after the same
    step. So each look also agrees on the step of the next one.

    Args:
        minutes: Age of the last checkpoint at which the next is due; None: age does not matter.
        wanted: Asked on every worker at each look; one yes is enough. It says so once per reason.
        step: Steps done so far.
    """

    def __init__(
        self, minutes: float | None, wanted: Callable[[], bool] | None, *, step: int
    ) -> None:
        self._seconds = minutes * 60 if minutes is not None else None
        self._wanted = wanted
        self._last_look = self._last_save = time.perf_counter()
        self._looked_at, self._next_look = step, step + 1

    def saved(self) -> None:
        """Count the time from now."""
        self._last_save = time.perf_counter()

    def is_due(self, step: int) -> bool:
        """Tell whether to save after `step`; collective."""
        if step < self._next_look or (self._seconds is None and self._wanted is None):
            return False
        wishes = gather_on_zero(self._wanted is not None and self._wanted())
        due, pause = on_rank_zero(lambda: (any(wishes) or self._is_old(), self._pause(step)))
        self._last_look = time.perf_counter()
        self._looked_at, self._next_look = step, step + pause
        return due

    def _is_old(self) -> bool:
        age = time.perf_counter() - self._last_save
        return self._seconds is not None and age >= self._seconds

    def _pause(self, step: int) -> int:
        """Return how many steps fit between two looks, as fast as the last ones were."""
        elapsed = time.perf_counter() - self._last_look
        return max(1, int(_LOOK_SECONDS * (step - self._looked_at) / elapsed))
