"""When a run saves beyond its schedule."""

import itertools

from knet_core import save_clock
from knet_core.save_clock import SaveClock


def test_looks_are_two_seconds_apart_whatever_a_step_takes(monkeypatch):
    now, looks = [0.0], []
    monkeypatch.setattr(save_clock.time, "perf_counter", lambda: now[0])
    clock = SaveClock(None, lambda: bool(looks.append(now[0])), step=0)
    for step in range(1, 101):
        now[0] += 0.125 if step <= 50 else 1.0
        assert not clock.is_due(step)
    assert looks[:3] == [0.125, 2.125, 4.125]
    assert [b - a for a, b in itertools.pairwise(looks)][-5:] == [2.0] * 5


def test_one_wish_is_enough_and_age_counts_from_the_last_checkpoint(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(save_clock.time, "perf_counter", lambda: now[0])
    clock = SaveClock(1.0, None, step=0)
    due = []
    for step in range(1, 131):
        now[0] += 1.0
        if clock.is_due(step):
            due.append(step)
            clock.saved()
    assert due == [61, 121]


def test_nobody_looks_where_nothing_is_asked_for():
    clock = SaveClock(None, None, step=0)
    assert not any(clock.is_due(step) for step in range(1, 5))
