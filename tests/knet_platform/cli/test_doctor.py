"""`knet doctor` through the command line."""

import json
import socket
from pathlib import Path

import pytest

from knet_platform.cli.main import main


def _checks(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    code = main(["doctor", "--json"])
    return code, {check["name"]: check for check in json.loads(capsys.readouterr().out)}


def test_a_sound_machine_passes_and_nothing_is_written(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    code, checks = _checks(capsys)
    failed = [check for check in checks.values() if check["status"] == "fail"]
    assert (code, failed) == (0, [])
    assert {"python", "packages", "devices", "KNET_HOME", "disk", "tracking"} <= set(checks)
    assert not home.exists()


def test_every_trouble_is_found_at_once_with_its_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: every connection is refused
        port = taken.getsockname()[1]
        (tmp_path / "file").write_text("")
        (tmp_path / "broken.db").write_bytes(b"no database" * 100)
        for name, value in {
            "KNET_HOME": str(tmp_path / "file" / "below"),
            "KNET_DATA": str(tmp_path / "none"),
            "RAY_ADDRESS": f"http://127.0.0.1:{port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(tmp_path / "no_token"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/broken.db",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        code, checks = _checks(capsys)
    assert code == 2
    for name in ("KNET_HOME", "KNET_DATA", "RAY_ADDRESS", "RAY_AUTH_MODE", "tracking"):
        assert checks[name]["status"] == "fail", name
        assert checks[name]["mend"], name


def test_the_data_home_is_the_loaders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KNET_DATA", raising=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    found = _checks(capsys)[1]["DETECTRON2_DATASETS"]
    assert (found["status"], found["found"]) == ("ok", str(tmp_path))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "none"))
    assert _checks(capsys)[1]["DETECTRON2_DATASETS"]["status"] == "fail"


def test_an_unreachable_tracking_server_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        code, checks = _checks(capsys)
    assert (code, checks["tracking"]["status"]) == (2, "fail")


@pytest.mark.parametrize(("bucket", "status"), [("", "ok"), ("s3://nobody-made-it", "fail")])
def test_a_bucket_is_asked(
    bucket: str,
    status: str,
    s3_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KNET_STORAGE", bucket or s3_uri)
    check = _checks(capsys)[1]["storage"]
    assert check["status"] == status
    assert ("create the bucket" in check["mend"]) == (status == "fail")


def test_what_a_tracking_store_missed_is_pointed_out(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "tracking").mkdir(parents=True)
    (home / "tracking" / "stages.0123abcd.db").write_bytes(b"")
    check = _checks(capsys)[1]["journals"]
    assert check["status"] == "warn"
    assert "stages.0123abcd.db" in check["found"]
    assert "knet sync" in check["mend"]


def test_nothing_tracked_on_purpose_is_fine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert _checks(capsys)[1]["tracking"]["status"] == "ok"


def test_the_lines_for_people_show_the_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    main(["doctor"])
    printed = capsys.readouterr().out
    assert "warn RAY_AUTH_MODE" in printed
    assert "-> export RAY_AUTH_MODE=token" in printed
