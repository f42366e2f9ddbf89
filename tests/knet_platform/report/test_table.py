"""The numbers of the ablation table."""

import dataclasses
from collections.abc import Callable

import pytest
from scipy import stats

from knet_platform.provenance import Provenance
from knet_platform.report import build_report
from knet_platform.report.page import html
from knet_platform.storage import Pruned, Store, TrialResult, TrialStore
from knet_platform.sweep import Sweep
from knet_platform.sweep_file import Asha

Results = Callable[..., TrialResult]


def test_rows_keep_the_order_of_the_sweep_and_columns_those_of_the_paper(
    sweep: Sweep, store: Store
) -> None:
    report = build_report(sweep, store)
    assert [row.arm for row in report.rows] == ["1", "3", "4", "5"]
    assert [(column.metric, column.heading) for column in report.columns] == [
        ("val/AP", "AP"),
        ("val/AP50", "AP50"),
        ("val/AP75", "AP75"),
        ("bench/fps", "FPS"),
    ]
    assert report.axis == "stages"


def test_cells_are_in_the_papers_units_with_both_differences(sweep: Sweep, store: Store) -> None:
    report = build_report(sweep, store)
    one, three = (row.cells[0] for row in report.rows[:2])
    assert (three.n, three.mean) == (3, pytest.approx(33.0))
    assert three.ci95 == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem([30.0, 32.0, 37.0]))
    assert three.difference is None
    assert three.delta_paper == pytest.approx(33.0 - 34.1)
    assert (one.n, one.mean, one.ci95) == (1, pytest.approx(10.0), None)
    assert (one.paper, one.delta_paper) == (21.8, pytest.approx(10.0 - 21.8))


def test_an_arm_is_compared_with_the_baseline_on_shared_seeds_and_then_with_the_paper(
    sweep: Sweep, store: Store
) -> None:
    one = build_report(sweep, store).rows[0].cells[0]
    assert one.difference is not None
    assert (one.difference.n, one.difference.ci95) == (1, None)
    assert one.difference.mean == pytest.approx(10.0 - 30.0)  # seed 0 of both
    assert one.paper_difference == pytest.approx(21.8 - 34.1)
    assert one.delta_of_deltas == pytest.approx(-20.0 + 12.3)
    assert one.trend == "same sign"


def test_a_value_the_paper_lacks_leaves_its_difference_empty(sweep: Sweep, store: Store) -> None:
    report = build_report(sweep, store)
    speed_of_three, ap_of_four = report.rows[1].cells[3], report.rows[2].cells[0]
    assert (speed_of_three.mean, speed_of_three.paper, speed_of_three.delta_paper) == (
        pytest.approx(10.0),
        None,
        None,
    )
    assert (ap_of_four.n, ap_of_four.mean, ap_of_four.paper) == (0, None, None)


def test_every_missing_trial_is_named_with_its_reason(sweep: Sweep, store: Store) -> None:
    report = build_report(sweep, store)
    missing = {(line.arm, line.seed): line.detail for line in report.unfinished}
    assert set(missing) == {("1", 1), ("1", 2), *((arm, s) for arm in "45" for s in range(3))}
    assert missing["4", 0] == "failed: WorkerDied: killed <by> the kernel (attempt 3)"
    assert missing["5", 0].startswith("not started")


def test_without_a_paper_the_companions_that_were_measured_are_shown(
    sweep: Sweep, store: Store
) -> None:
    report = build_report(dataclasses.replace(sweep, paper=None), store)
    assert [column.metric for column in report.columns] == [
        "val/AP",
        "val/AP50",
        "val/AP75",
        "bench/fps",
    ]
    assert not any(column.in_paper for column in report.columns)


def test_an_arm_is_as_finished_as_its_seeds(sweep: Sweep, store: Store) -> None:
    report = build_report(sweep, store)
    assert [row.status for row in report.rows] == ["partial", "finished", "failed", "new"]


def test_a_pruned_arm_is_said_to_be_and_has_no_values(
    sweep: Sweep, store: Store, make_result: Results
) -> None:
    pruned = Pruned(sweep="stages", run="r", step=40, total=300)
    first = next(trial for trial in sweep.trials if trial.name == "5/0")
    store.trial(first.hash).write_pruned(pruned)
    full = build_report(sweep, store).rows[3]
    assert (full.status, full.fate) == ("new", "new")
    report = build_report(dataclasses.replace(sweep, scheduler=Asha()), store)
    row = report.rows[3]
    assert (row.status, row.fate, row.cells[0].mean) == ("pruned", "pruned at step 40", None)
    assert [line.detail for line in row.trials] == [
        "pruned at step 40 of 300",
        *["not run: seed 0 pruned at step 40 of 300"] * 2,
    ]
    assert "pruned at step 40" in html(report)
    store.trial(first.hash).write_result(make_result(first.hash, 0.3))
    row = build_report(dataclasses.replace(sweep, scheduler=Asha()), store).rows[3]
    assert row.status == "partial"


def test_a_score_that_is_no_number_is_left_out_and_named(
    sweep: Sweep, store: Store, make_result: Results
) -> None:
    trial = next(trial for trial in sweep.trials if trial.name == "3/2")
    store.trial(trial.hash).write_result(make_result(trial.hash, float("nan")))
    report = build_report(sweep, store)
    assert report.rows[1].cells[0].n == 2
    (line,) = [line for line in report.unfinished if line.arm == "3"]
    assert line.detail == "finished at step 300 without a finite val/AP"


@pytest.mark.parametrize("content", [b'{"trial_hash": "cut', b'{"step": 3}', b"[]", b""])
def test_a_damaged_result_is_named_and_spoils_no_other(
    sweep: Sweep, store: Store, content: bytes
) -> None:
    trial = next(trial for trial in sweep.trials if trial.name == "3/2")
    store.trial(trial.hash).write_bytes("result.json", content)
    report = build_report(sweep, store)
    assert (report.rows[1].status, report.rows[1].cells[0].n) == ("unreadable", 2)
    assert any(line.status == "unreadable" for line in report.unfinished)


def test_what_a_running_sweep_replaces_meanwhile_is_read_again(
    sweep: Sweep, store: Store, make_result: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure is listed, then cleared by the attempt that finishes, then read."""
    trial = next(trial for trial in sweep.trials if trial.name == "4/0")
    real = TrialStore.list

    def finishes_after(folder: TrialStore, relative: str = "") -> list[str]:
        names = real(folder, relative)
        if folder.uri.endswith(trial.hash) and "failure.json" in names:
            store.trial(trial.hash).write_result(make_result(trial.hash, 0.31))
        return names

    monkeypatch.setattr(TrialStore, "list", finishes_after)
    (line, *_) = build_report(sweep, store).rows[2].trials
    assert line.status == "finished"


def test_hours_and_money_are_added_up_over_seeds(sweep: Sweep, store: Store) -> None:
    for trial in sweep.trials:
        found = store.trial(trial.hash).result()
        if found is not None:
            metrics = {**found.metrics, "sys/gpu_hours": 1.5, "cost/usd": 3.0}
            changed = dataclasses.replace(found, metrics=metrics)
            store.trial(trial.hash).write_result(changed)
    rows = build_report(sweep, store).rows
    assert [(row.gpu_hours, row.usd) for row in rows] == [
        (1.5, 3.0),
        (4.5, 9.0),
        (None, None),
        (None, None),
    ]


def test_the_whole_curve_is_kept(sweep: Sweep, store: Store) -> None:
    row = build_report(sweep, store).rows[1]
    assert [(point.step, point.value) for point in row.trials[0].curve] == [
        (100, pytest.approx(10.0)),
        (200, pytest.approx(20.0)),
        (300, pytest.approx(30.0)),
    ]


def _provenance(sweep: Sweep, *, data: str, evaluation: str) -> Provenance:
    return Provenance(
        recipe=sweep.trials[0].recipe.to_dict(),
        workers=2,
        data_fingerprint=data,
        code_digest="c" * 64,
        code_files={},
        evaluation_digest=evaluation,
        git_sha="abc123",
        patch=True,
        notes=(),
        lock_digest=None,
        packages={},
        python="3.11",
        platform="Linux",
        accelerator=None,
        command="knet run stages.yaml --seeds 3",
        started_at="2026-01-01T00:00:00+00:00",
    )


def test_rows_of_other_data_or_evaluation_code_stand_in_tables_of_their_own(
    sweep: Sweep, store: Store, make_result: Results
) -> None:
    kinds = {"1/0": ("other", "same"), "5/0": ("same", "newer"), "3/2": ("same", "newer")}
    for trial in sweep.trials:
        data, evaluation = kinds.get(trial.name, ("same", "same"))
        provenance = _provenance(sweep, data=data, evaluation=evaluation)
        store.trial(trial.hash).write_provenance(provenance, "diff")
        if trial.name == "5/0":
            store.trial(trial.hash).write_result(make_result(trial.hash, 0.5))
    first, *apart = build_report(sweep, store).tables
    assert {row.arm: [line.seed for line in row.trials if line.metrics] for row in first.rows} == {
        "1": [],
        "3": [0, 1],
        "4": [],
        "5": [],
    }
    assert first.reason == ""
    assert first.rows[1].cells[0].mean == pytest.approx(31.0)
    tables = {table.reason: table for table in apart}
    assert set(tables) == {
        "other data (other, the first table has same)",
        "other evaluation code (newer, the first table has same)",
    }
    other, newer = tables.values()
    assert [(row.arm, row.cells[0].n) for row in other.rows] == [("1", 1)]
    assert other.rows[0].cells[0].difference is None  # its baseline saw other data
    assert [(row.arm, row.cells[0].n) for row in newer.rows] == [("3", 1), ("5", 1)]


def test_a_trial_on_other_data_stands_apart_from_its_start(sweep: Sweep, store: Store) -> None:
    trials = {trial.name: store.trial(trial.hash) for trial in sweep.trials}
    for name, data in {
        "3/0": "same",
        "3/1": "same",
        "3/2": "same",
        "1/0": "same",
        "5/1": "other",
    }.items():
        trials[name].write_provenance(_provenance(sweep, data=data, evaluation="same"), "")
    first, apart = build_report(sweep, store).tables
    assert [(row.arm, [line.seed for line in row.trials]) for row in apart.rows] == [("5", [1])]
    assert [line.seed for line in first.rows[3].trials] == [0, 2]


def test_results_without_a_record_are_not_mixed_with_others(
    sweep: Sweep, store: Store, make_result: Results
) -> None:
    trial = next(trial for trial in sweep.trials if trial.name == "5/0")
    provenance = _provenance(sweep, data="d" * 64, evaluation="e" * 64)
    store.trial(trial.hash).write_provenance(provenance, "diff")
    store.trial(trial.hash).write_result(make_result(trial.hash, 0.5))
    first, apart = build_report(sweep, store).tables
    assert [row.arm for row in first.rows if row.cells[0].n] == ["1", "3"]
    assert [row.arm for row in apart.rows] == ["5"]
    assert "first table were not recorded" in apart.reason
    assert "dddddddd and eeeeeeee" in apart.reason


def test_a_trial_tells_how_it_was_started(sweep: Sweep, store: Store) -> None:
    trial = next(trial for trial in sweep.trials if trial.name == "3/0")
    folder = store.trial(trial.hash)
    folder.write_provenance(_provenance(sweep, data="d", evaluation="e"), "diff")
    report = build_report(sweep, store)
    lines = {(line.arm, line.seed): line for line in report.trials}
    origin = lines["3", 0].origin
    assert origin is not None
    assert (origin.git_sha, origin.patch) == ("abc123", f"{folder.uri}/patch.diff")
    assert origin.command == "knet run stages.yaml --seeds 3"
    assert lines["5", 0].origin is None
    page = html(report)
    again = page[page.index('id="again"') :]
    for told in (f"knet repro {trial.hash}", origin.command, "abc123", origin.patch):
        assert told in again
