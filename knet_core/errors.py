"""Every error a user can cause, and nothing else. Programmer errors stay `assert`s.

A message is one line: where (file or dotted key), what was found, what was expected, what to do.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class KNetError(Exception):
    """Base of all user-facing errors; the command line prints it without a traceback."""

    exit_code = 1


class ConfigError(KNetError):
    """One or more configuration values are impossible.

    Args:
        problems: One line each, beginning with the dotted key or the file they are about.
    """

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[str, ...]]]:
        """Survive the pickling that brings worker errors back to the driver."""
        return type(self), (self.problems,)


class DataError(KNetError):
    """A data set, an image or an annotation cannot be used as it is."""

    exit_code = 5


class CheckpointError(KNetError):
    """A checkpoint is missing, cut short, or belongs to another model."""

    exit_code = 2


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a newer version: it is not damaged, this version is too old."""


class NonFiniteError(KNetError):
    """A loss or a matching cost became NaN or infinite; training stops rather than hide it.

    Args:
        message: One line.
        costs: Matching costs (N, G) of each image, where they are to blame.
    """

    def __init__(self, message: str, costs: Sequence["Tensor"] = ()) -> None:
        self.costs = costs
        super().__init__(message)

    def __reduce__(self) -> tuple[type["NonFiniteError"], tuple[str]]:
        """Leave the costs where they are: errors travel to processes without torch."""
        return type(self), (str(self),)


class TrainingMemoryError(KNetError):
    """The device has no memory for a training step.

    Args:
        message: One line.
        fewer: Images of a worker to try at a time (`fit(images_at_once=...)`); None: no fewer can
            be, or they would train another model.
    """

    def __init__(self, message: str, fewer: int | None) -> None:
        self.fewer = fewer
        super().__init__(message)

    def __reduce__(self) -> tuple[type["TrainingMemoryError"], tuple[str, int | None]]:
        """Survive the pickling that brings worker errors back to the driver."""
        return type(self), (str(self), self.fewer)


class EvaluationMemoryError(KNetError):
    """The device has no memory to predict a single image."""


class DiskFullError(KNetError):
    """The disk or the store took no more; nothing half-written was left behind."""
