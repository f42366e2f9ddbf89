"""Experiment tracking behind one protocol: MLflow in earnest, memory in tests, none at will."""

from knet_platform.tracking.delivery import Delivery, pause
from knet_platform.tracking.journal import Journal, journals, without_password
from knet_platform.tracking.journaled import JournaledTracker
from knet_platform.tracking.memory import MemoryTracker
from knet_platform.tracking.none import NoTracker
from knet_platform.tracking.opening import open_store, open_tracker
from knet_platform.tracking.protocol import (
    PointLike,
    RejectedError,
    Status,
    SweepRun,
    Tracker,
    TrialModel,
    TrialRun,
)

__all__ = [
    "Delivery",
    "Journal",
    "JournaledTracker",
    "MemoryTracker",
    "NoTracker",
    "PointLike",
    "RejectedError",
    "Status",
    "SweepRun",
    "Tracker",
    "TrialModel",
    "TrialRun",
    "journals",
    "open_store",
    "open_tracker",
    "pause",
    "without_password",
]
