"""Keeps a running sweep within what it may cost; knows no Ray and no clock of its own.

All trials of a sweep take the same resources, so money and GPU-hours are both limits on the
seconds that trials train, added up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from knet_platform.sweep import Sweep

RESERVE_SECONDS = 10.0
"""Of each running trial: it hears that it has to stop with its next report, then saves."""


def limit_seconds(sweep: Sweep, usd_per_hour: float) -> float | None:
    """Return for how long the sweep's trials may train, added up; None without a limit.

    Elastic trials count as if they always had the most workers: the limit is never passed, and
    may be reached early.

    Args:
        sweep: The sweep.
        usd_per_hour: What an hour of one trial costs with the least workers.
    """
    resources = sweep.resources
    gpus = resources.most_workers * resources.gpus_per_worker
    usd = usd_per_hour * resources.most_workers / resources.least_workers
    caps = ((sweep.budget.usd, usd), (sweep.budget.gpu_hours, gpus))
    limits = [cap / rate * 3600 for cap, rate in caps if cap is not None and rate > 0]
    return min(limits, default=None)


@dataclass(slots=True)
class _Running:
    began: float
    first: tuple[int, float] | None = None
    """Step and time of the first report."""
    left: float = 0.0
    """Seconds that it still needs, as far as that is known."""


class Governor:
    """Decides which running trials may go on; once it has stopped one, no new one starts."""

    def __init__(
        self, limit: float | None, *, spent: Mapping[str, float], priority: Sequence[str]
    ) -> None:
        """Start with what earlier runs have spent.

        Args:
            limit: Seconds that the trials may train, added up; None: it counts and stops nothing.
            spent: Seconds already trained, by trial hash.
            priority: Hashes of trials, the one to be stopped last first; others follow as they
                start.
        """
        self._limit = limit
        self._spent = sum(spent.values())
        self._priority = dict.fromkeys(priority)
        self._running: dict[str, _Running] = {}
        self._allowed: frozenset[str] | None = None

    def begin(self, trial_hash: str, now: float) -> None:
        """A trial started, or started again; `now` in seconds of any monotonic clock."""
        self.end(trial_hash, now)
        self._priority.setdefault(trial_hash)
        self._running[trial_hash] = _Running(now)

    def advance(self, trial_hash: str, step: int, total: int, now: float) -> None:
        """A trial came to `step` of `total`."""
        running = self._running.get(trial_hash)
        if running is None:
            return
        if running.first is None:
            running.first = (step, now)
        first_step, first_time = running.first
        if step > first_step:
            running.left = (now - first_time) / (step - first_step) * (total - step)

    def end(self, trial_hash: str, now: float) -> None:
        """A trial ended, in whatever way."""
        running = self._running.pop(trial_hash, None)
        if running is not None:
            self._spent += now - running.began

    def spent(self, now: float) -> float:
        """Return the seconds trained so far, by all trials of all runs."""
        return self._spent + sum(now - running.began for running in self._running.values())

    def allowed(self, now: float) -> frozenset[str] | None:
        """Return the trials that may go on; None while all may, and new ones may start.

        A trial of low priority is stopped as soon as those above it need what is left; the one
        of the highest priority goes on until nothing is left.
        """
        if self._limit is None:
            return None
        left = self._limit - self.spent(now) - RESERVE_SECONDS * len(self._running)
        going: set[str] = set()
        for trial_hash in self._priority:
            if trial_hash not in self._running or left <= 0:
                continue
            needs = self._running[trial_hash].left
            if needs <= left or not going:
                going.add(trial_hash)
                left -= needs
        if left <= 0 or going < self._running.keys():
            self._allowed = frozenset(going if self._allowed is None else going & self._allowed)
        return self._allowed
