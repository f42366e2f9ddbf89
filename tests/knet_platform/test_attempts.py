"""A trial's folder belongs to one run of the sweep at a time."""

from pathlib import Path

import pytest

from knet_platform import attempts
from knet_platform.attempts import SupersededError
from knet_platform.storage import Pruned, Store, TrialStore


@pytest.fixture
def store(tmp_path: Path) -> TrialStore:
    return Store(str(tmp_path)).trial("0123456789abcdef")


def test_attempts_are_counted_over_runs(store: TrialStore) -> None:
    assert attempts.claim(store, "first") == 0
    assert attempts.begin(store, "first") == 1
    assert attempts.begin(store, "first") == 2
    assert attempts.claim(store, "second") == 2
    assert attempts.begin(store, "second") == attempts.count(store) == 3


def test_leftovers_of_an_earlier_run_may_not_write(store: TrialStore) -> None:
    attempts.claim(store, "first")
    attempts.begin(store, "first")
    attempts.claim(store, "second")
    with pytest.raises(SupersededError):
        attempts.verify(store, "first")
    with pytest.raises(SupersededError):
        attempts.begin(store, "first")
    attempts.verify(store, "second")


def test_a_run_says_which_of_its_trials_may_go_on(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert attempts.may_go_on(store, "run", "a")
    attempts.allow(store, "run", {"a"})
    assert attempts.may_go_on(store, "run", "a")
    assert not attempts.may_go_on(store, "run", "b")
    assert attempts.may_go_on(store, "another run", "b")


def test_a_trial_may_not_go_on_in_the_run_that_pruned_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.trial("a").write_pruned(Pruned(sweep="s", run="run", step=1, total=2))
    assert not attempts.may_go_on(store, "run", "a")
    assert attempts.may_go_on(store, "another run", "a")  # which took the trial over
    store.trial("a").clear_pruned()
    assert attempts.may_go_on(store, "run", "a")
