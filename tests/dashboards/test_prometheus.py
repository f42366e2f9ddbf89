"""Prometheus' files, by its own tool; what they say of real numbers: tests/knet_platform."""

import re
import shutil
import subprocess
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import yaml

from knet_platform.gauges import SERIES

FOLDER = Path(__file__).parents[2] / "dashboards" / "prometheus"
RULES = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
ALERTS = [rule for group in RULES for rule in group["rules"] if "alert" in rule]


def installed(program: str) -> str:
    found = shutil.which(program)
    assert found, f"no {program}: apt-get install prometheus (it holds promtool too)"
    return found


@pytest.fixture(scope="module")
def promtool() -> str:
    return installed("promtool")


def test_alerts_fire_when_they_should_and_not_next_to_it(promtool: str) -> None:
    command = [promtool, "test", "rules", "rules_test.yml"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_accepts_its_configuration_and_the_rules(promtool: str) -> None:
    # The token's file is not on this machine.
    command = [promtool, "check", "config", "--syntax-only", "prometheus.yml"]
    for check in (command, [promtool, "check", "rules", "--lint-fatal", "rules.yml"]):
        done = subprocess.run(check, cwd=FOLDER, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_shows_the_cluster_its_token(
    tmp_path: Path, start_process: Callable[..., Any]
) -> None:
    """As Ray wants it. In versions before 3, `type` has no default here."""
    shown: Queue[str | None] = Queue()

    class Head(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown.put(self.headers["Authorization"])
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (discovery,) = config["scrape_configs"][0]["http_sd_configs"]
    (tmp_path / "token").write_text("0123abcd\n")
    discovery["authorization"]["credentials_file"] = str(tmp_path / "token")
    with HTTPServer(("127.0.0.1", 0), Head) as head:
        discovery["url"] = f"http://127.0.0.1:{head.server_port}/api/prometheus/sd"
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump({**config, "rule_files": []}))
        command = [installed("prometheus"), f"--config.file={tmp_path}/prometheus.yml"]
        command += [f"--storage.tsdb.path={tmp_path}/data", "--web.listen-address=127.0.0.1:0"]
        server = start_process(command, tmp_path / "log")
        head.timeout = 30
        head.handle_request()
        server.kill()
    assert shown.get_nowait() == "Bearer 0123abcd"


def test_every_alert_has_its_test_and_says_what_to_do() -> None:
    tests = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    fired = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert fired == {alert["alert"] for alert in ALERTS}
    for alert in ALERTS:
        assert set(alert["annotations"]) == {"summary", "description", "action"}


def test_rules_name_only_series_that_exist() -> None:
    """Of ours; that Ray's exist is seen with a real head."""
    counters = {f"{name}_total" for name, series in SERIES.items() if series.is_counter}
    gauges = {name for name, series in SERIES.items() if not series.is_counter}
    text = (FOLDER / "rules.yml").read_text()
    assert set(re.findall(r"ray_(knet_\w+)", text)) <= gauges | counters
