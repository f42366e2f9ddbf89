"""From a journal to a tracker: in order, in batches, and each record until it has arrived."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from knet_platform.storage import Evaluation
from knet_platform.tracking.journal import Journal, Record
from knet_platform.tracking.protocol import (
    RejectedError,
    SweepRun,
    Tracker,
    TrialModel,
    TrialRun,
)

BATCH_RECORDS = 1000
BATCH_BYTES = 8 * 2**20
SHORTEST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds between attempts to reach a store that does not answer: it doubles each time."""


class Delivery:
    """Sends what a journal holds.

    Args:
        journal: Forgets what has arrived.
        tracker: Whose sweep is started.
        warn: Told in one line what the tracker refused for good.
    """

    def __init__(self, journal: Journal, tracker: Tracker, *, warn: Callable[[str], None]) -> None:
        self._journal = journal
        self._tracker = tracker
        self._warn = warn
        self.refused = 0
        """Records that the store answered no to."""

    def send_batch(self) -> bool:
        """Send the oldest records; tell whether there were any.

        Raises:
            TrackingError: The store did not answer; the same call goes on where this one ended.
        """
        records = self._journal.head(BATCH_RECORDS, BATCH_BYTES)
        points: dict[str, list[Record]] = {}
        for record in records:
            if record.kind == "log_points":
                points.setdefault(record.trial, []).append(record)
                continue
            self._send_points(points)
            self._send([record])
        self._send_points(points)
        return bool(records)

    def _send_points(self, points: dict[str, list[Record]]) -> None:
        """Send many points of a trial at once; between trials the order says nothing."""
        for records in points.values():
            self._send(records)
        points.clear()

    def _send(self, records: Sequence[Record]) -> None:
        try:
            _call(self._tracker, records)
        except RejectedError as error:
            if half := len(records) // 2:  # the good ones among them shall arrive
                self._send(records[:half])
                self._send(records[half:])
                return
            self.refused += 1
            self._warn(str(error))
        self._journal.discard(records)


def pause(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row, from 1.

    Drawn at random, so that the sweeps that lost a server do not come back all at once.
    """
    longest = min(LONGEST_PAUSE, SHORTEST_PAUSE * 2 ** min(failures, 10))
    return random.uniform(longest / 2, longest)


def _call(tracker: Tracker, records: Sequence[Record]) -> None:
    """Call the method that the records name; several are points of one trial."""
    record = records[0]
    arguments = record.arguments
    match record.kind:
        case "start_sweep":
            tracker.start_sweep(SweepRun.from_dict(arguments["sweep"]))
        case "start_trial":
            trial = TrialRun(**arguments["trial"])
            tracker.start_trial(trial, arguments["attempt"], at=arguments["at"])
        case "log_points":
            points = [Evaluation(**item) for r in records for item in r.arguments["points"]]
            tracker.log_points(record.trial, points)
        case "log_picture":
            tracker.log_picture(record.trial, arguments["step"], record.content)
        case "log_file":
            tracker.log_file(record.trial, arguments["name"], record.content)
        case "log_model":
            tracker.log_model(record.trial, TrialModel(**arguments["model"]))
        case "finish_trial":
            status, reason = arguments["status"], arguments["reason"]
            tracker.finish_trial(record.trial, status, reason, at=arguments["at"])
        case "finish_sweep":
            artifacts = [path for name in arguments["artifacts"] if (path := Path(name)).exists()]
            tracker.finish_sweep(arguments["status"], artifacts, at=arguments["at"])
        case _:
            raise RejectedError(f"journal: a record of the unknown kind '{record.kind}'")
