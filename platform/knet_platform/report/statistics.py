"""What a few seeds say: means, differences on shared seeds, and whether a paper's trend holds.

Seeds are few and each costs hours of training, so everything rests on Student's t: the exact
interval for normal errors down to two seeds, where a bootstrap has next to nothing to resample.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtr, stdtrit

Trend = Literal["holds", "contradicts", "unclear", "same sign", "opposite sign"]
"""What our difference to the baseline says of the paper's.

- holds: its 95 % interval lies on the paper's side of zero, or includes zero where the paper
  sees no difference;
- contradicts: the interval lies on the other side, or excludes a zero that the paper printed;
- unclear: the interval includes zero, the paper's difference is another;
- same sign, opposite sign: one shared seed, so no interval.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """An arm minus the baseline, over the seeds that both have."""

    n: int
    """Shared seeds."""
    mean: float
    """Mean of the differences seed by seed."""
    ci95: float | None
    """Half-width of the mean's 95 % interval, paired t; None for one seed."""
    p: float | None
    """Two-sided p of the paired t-test, not corrected for the number of arms; None for one seed,
    and where the differences of all seeds are the same."""


def mean_and_ci(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and the half-width of its 95 % confidence interval.

    Student's t with n - 1 degrees of freedom: t(0.975, n - 1) * s / sqrt(n). One value has no
    interval, no value no mean.
    """
    if not values:
        return None, None
    mean = statistics.fmean(values)
    n = len(values)
    if n == 1:
        return mean, None
    return mean, float(stdtrit(n - 1, 0.975)) * _standard_error(values)


def difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare an arm with the baseline, both by seed; None without a shared seed."""
    paired = [arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())]
    mean, ci95 = mean_and_ci(paired)
    if mean is None:
        return None
    p = None
    if ci95:
        degrees = len(paired) - 1
        p = 2 * float(stdtr(degrees, -abs(mean) / _standard_error(paired)))
    return Difference(n=len(paired), mean=mean, ci95=ci95, p=p)


def trend(ours: Difference | None, paper: float | None) -> Trend | None:
    """Say whether the paper's difference to the baseline shows in ours; None without either."""
    if ours is None or paper is None:
        return None
    if ours.ci95 is None:
        if ours.mean * paper == 0:
            return "same sign" if ours.mean == paper else "unclear"
        return "same sign" if ours.mean * paper > 0 else "opposite sign"
    if abs(ours.mean) <= ours.ci95:
        return "holds" if paper == 0 else "unclear"
    return "holds" if ours.mean * paper > 0 else "contradicts"


def _standard_error(values: Sequence[float]) -> float:
    # Long curves have many steps, and `statistics.stdev` counts in fractions: a hundred times the
    # time. Seen from one of them, equal values have no error at all, not one of rounding.
    n, shifted = len(values), [value - values[0] for value in values]
    mean = math.fsum(shifted) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in shifted) / (n - 1) / n)
