"""Which tracker an address means."""

from collections.abc import Callable
from pathlib import Path

from knet_platform.home import UNTRACKED
from knet_platform.tracking.journal import journal_path
from knet_platform.tracking.journaled import JournaledTracker
from knet_platform.tracking.none import NoTracker
from knet_platform.tracking.protocol import Tracker


def open_store(uri: str, home: Path) -> Tracker:
    """Return the tracker of an address; files of a store without a server lie below `home`."""
    if uri == UNTRACKED:
        return NoTracker()
    from knet_platform.tracking.mlflow import MLflowTracker  # takes seconds to load

    return MLflowTracker(uri, artifacts=home / "mlartifacts")


def open_tracker(
    name: str, uri: str, home: Path, *, warn: Callable[[str], None]
) -> JournaledTracker | NoTracker:
    """Return the same for a run that must not wait: behind the journal `name`, if it keeps any.

    Args:
        name: Of the sweep; of whatever else runs at most once at a time.
        uri: Address of the store.
        home: State folder.
        warn: Told what did not arrive at once.
    """
    tracker = open_store(uri, home)
    if isinstance(tracker, NoTracker):
        return tracker
    return JournaledTracker(tracker, uri, journal_path(home, name, uri), warn=warn)
