"""Experiment tracking behind one protocol: MLflow in earnest, memory in tests."""

from knet_platform.tracking.background import BackgroundTracker
from knet_platform.tracking.memory import MemoryTracker
from knet_platform.tracking.protocol import PointLike, RejectedError, Status, Tracker

__all__ = [
    "BackgroundTracker",
    "MemoryTracker",
    "PointLike",
    "RejectedError",
    "Status",
    "Tracker",
]
