"""Prometheus' files, by its own tool; what they say of real numbers: tests/knet_platform."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from knet_platform.gauges import SERIES

FOLDER = Path(__file__).parents[2] / "dashboards" / "prometheus"
RULES = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
ALERTS = [rule for group in RULES for rule in group["rules"] if "alert" in rule]


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    assert found, "no promtool: apt-get install prometheus (it holds promtool too)"
    return found


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
