"""Each trouble of a node is a failure with its mend; the rest stays as it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from knet_platform.checks import Check
from knet_platform.cluster.diagnosis import judge
from knet_platform.cluster.node_probe import NodeProbe, NodeReport

SOUND = NodeReport(
    host="head",
    versions={"python": "3.11.7", "ray": "2.60.0", "torch": "2.15.0"},
    gpus_promised=0,
    gpus_seen=0,
    storage_problem=None,
    cache_free_gib=300.0,
    skew_seconds=0.01,
)
WORKER = replace(SOUND, host="worker", gpus_promised=4, gpus_seen=4)


def judged(*changed: NodeReport, silent: tuple[str, ...] = ()) -> dict[str, Check]:
    checks = judge([SOUND, WORKER, *changed], silent, "s3://bucket/knet")
    return {check.name: check for check in checks}


def test_sound_nodes_pass() -> None:
    assert {check.status for check in judged().values()} == {"ok"}
    assert judged()["GPUs"].found == "4 on 2 nodes"


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("versions", {"versions": {**SOUND.versions, "ray": "2.59.0"}}, "odd: ray 2.59.0"),
        ("versions", {"versions": {**SOUND.versions, "torch": ""}}, "odd: torch missing"),
        ("GPUs", {"gpus_seen": 3}, "odd: 4 promised, 3 seen"),
        ("store", {"storage_problem": "s3://b: cannot write"}, "odd: s3://b: cannot write"),
        ("clocks", {"skew_seconds": -42.0}, "at most 42.00 s apart (odd)"),
        ("caches", {"cache_free_gib": 0.5}, "at least 0 GiB free (odd)"),
    ],
)
def test_a_trouble_is_named_with_its_node_and_its_mend(
    name: str, changes: dict[str, Any], found: str
) -> None:
    checks = judged(replace(WORKER, host="odd", **changes))
    assert checks[name].status == "fail"
    assert found in checks[name].found
    assert checks[name].mend
    assert {check.status for key, check in checks.items() if key != name} == {"ok"}


def test_a_node_that_does_not_answer_is_named() -> None:
    check = judged(silent=("lost",))["nodes"]
    assert check.status == "fail"
    assert "lost" in check.found


def test_where_no_node_answers_nothing_else_is_judged() -> None:
    (check,) = judge([], ["lost", "gone"], "s3://bucket")
    assert (check.name, check.status) == ("nodes", "fail")
    assert "lost, gone" in check.found


def test_a_folder_that_nodes_do_not_share_is_found(tmp_path: Path) -> None:
    (tmp_path / "doctor").mkdir()
    (tmp_path / "doctor" / "marker").write_bytes(b"")
    probe = NodeProbe()
    assert probe.answer(str(tmp_path), "doctor/marker", str(tmp_path)).storage_problem is None
    assert [path.name for path in (tmp_path / "doctor").iterdir()] == ["marker"]
    elsewhere = probe.answer(str(tmp_path / "other"), "doctor/marker", str(tmp_path))
    assert "cannot read" in str(elsewhere.storage_problem)
