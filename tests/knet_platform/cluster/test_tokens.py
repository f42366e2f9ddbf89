"""A cluster's token is its owner's alone, and never seen."""

import re
from pathlib import Path

import pytest

from knet_platform.cli.main import main
from knet_platform.cluster.tokens import secrets_folder


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_token_is_made_once_readable_by_its_owner_and_not_printed(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    assert main(["cluster", "token", "knet"]) == 0
    path = secrets_folder("knet") / "auth_token"
    token = path.read_text()
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [each.name for each in path.parent.iterdir()] == ["auth_token"]
    assert main(["cluster", "token", "knet", "--json"]) == 0
    assert path.read_text() == token
    assert main(["cluster", "token", "knet", "--renew"]) == 0
    assert path.read_text() != token
    output = "".join(capfd.readouterr()) + caplog.text
    assert f"RAY_AUTH_TOKEN_PATH={path}" in output
    for secret in (token, path.read_text()):
        assert secret not in output


def test_a_token_that_others_may_read_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    main(["cluster", "token", "knet"])
    path = secrets_folder("knet") / "auth_token"
    path.chmod(0o644)
    capsys.readouterr()
    assert main(["cluster", "token", "knet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "others may read it (mode 644), expected 600" in line
    assert path.read_text() not in line
    assert main(["cluster", "token", "knet", "--renew"]) == 0
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_name_that_leads_elsewhere_is_refused(tmp_path, capsys):
    for name in ("../other", "/tmp/other", "..", "", "Knet"):
        assert main(["cluster", "token", name]) == 2
        assert f"name: got '{name}', expected" in capsys.readouterr().err
    assert list(tmp_path.rglob("auth_token")) == []
