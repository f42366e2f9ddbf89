"""Grafana's files as far as they can be looked at without a Grafana.

That every query finds what a real sweep measured: tests/knet_platform/test_tuner.py.
"""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard

from knet_platform.gauges import SERIES

FOLDER = Path(__file__).parents[2] / "dashboards"
GRAFANA = FOLDER / "grafana"
FILES = sorted((GRAFANA / "dashboards").glob("*.json"))
BOARDS = {path.stem: json.loads(path.read_text()) for path in FILES}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_dashboards", GRAFANA / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def queries(board: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    chosen = [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    return asked + chosen


def test_the_committed_files_are_what_the_script_makes(maker: ModuleType) -> None:
    made = maker.make()
    assert {path.name: path.read_text() for path in FILES} == made, "run make.py"


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_is_of_the_form_that_grafana_11_reads(name: str) -> None:
    board = BOARDS[name]
    assert (board["uid"], board["schemaVersion"]) == (name, 41)
    Dashboard.from_json(board)
    names = [variable["name"] for variable in board["templating"]["list"]]
    assert names[0] == "datasource"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    covered: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        assert panel["datasource"] == SOURCE
        assert panel["title"]
        assert all(target["refId"] and target["expr"] for target in panel["targets"])
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & covered, panel["title"]
        assert place["x"] + place["w"] <= 24
        covered |= cells
    used = {used for query in queries(board) for used in re.findall(r"\$\{?(\w+)", query)}
    assert used <= {*names, "__range"}


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_leads_to_the_others_to_ray_and_to_mlflow(name: str) -> None:
    others, *pages = BOARDS[name]["links"]
    assert (others["type"], others["tags"]) == ("dashboards", ["knet"])
    assert BOARDS[name]["tags"] == ["knet"]
    assert [page["title"] for page in pages] == ["Ray", "MLflow"]
    assert all(page["url"].startswith("http://127.0.0.1:") for page in pages)


def test_everything_that_is_measured_is_shown_and_explained() -> None:
    rules = (FOLDER / "prometheus" / "rules.yml").read_text()
    text = rules + "".join(query for board in BOARDS.values() for query in queries(board))
    readme = (FOLDER / "README.md").read_text()
    for name, series in SERIES.items():
        exported = f"ray_{name}" + ("_total" if series.is_counter else "")
        assert re.search(rf"\b{exported}\b", text), name
        assert f"`{exported}`" in readme
    for alert in re.findall(r"alert: (\w+)", rules):
        assert f"| `{alert}` |" in readme


def test_the_provisioned_files_fit_the_containers() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    grafana, prometheus = compose["services"]["grafana"], compose["services"]["prometheus"]
    for service in (grafana, prometheus):
        assert service["network_mode"] == "host"  # so each says itself where it listens
        sources = [volume.split(":")[0] for volume in service["volumes"]]
        assert all((FOLDER / path).exists() for path in sources if path.startswith("./"))
    assert grafana["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert "--web.listen-address=127.0.0.1:9090" in prometheus["command"]
    provisioning = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    providers = yaml.safe_load((provisioning / "dashboards/knet.yml").read_text())["providers"]
    mounted = {volume.removesuffix(":ro").split(":")[-1] for volume in grafana["volumes"]}
    assert {provider["options"]["path"] for provider in providers} <= mounted
    (secret,) = prometheus["secrets"]
    scraped = yaml.safe_load((FOLDER / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    (discovery,) = scraped[0]["http_sd_configs"]
    assert discovery["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
