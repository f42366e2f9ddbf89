"""Errors of the platform. Each maps to one exit code of the command line (DESIGN: Commands)."""

from knet_core import KNetError


class PlatformError(KNetError):
    """Base of the platform's user-facing errors."""


class UsageError(PlatformError):
    """A command was called in a way that cannot work (arguments, environment, ports)."""

    exit_code = 2


class CapacityError(PlatformError):
    """The cluster can never hold even one trial as its resources are asked for."""

    exit_code = 2


class TrackingError(PlatformError):
    """The tracking store cannot be reached or used."""

    exit_code = 2


class StorageError(PlatformError):
    """The store of results and checkpoints cannot be read or written."""

    exit_code = 2


class TrialsFailedError(PlatformError):
    """A sweep ended with failed trials."""

    exit_code = 3


class BudgetError(PlatformError):
    """What a sweep may cost is not enough to start it, or is spent."""

    exit_code = 4


class InterruptedSweepError(PlatformError):
    """A sweep was stopped from outside; the same command continues it."""

    exit_code = 75
