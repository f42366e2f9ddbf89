"""The committed files are those that the command makes; a wrong wish is one line beforehand."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from knet_core import ConfigError
from knet_platform.cli.main import main
from knet_platform.cluster.description import Description
from knet_platform.cluster.machines import Cluster, plan_cluster, read_machines
from knet_platform.cluster.render import command, render
from knet_platform.prices import read_prices

ROOT = Path(__file__).parents[3]
FOLDERS = ("aws", "gcp", "kuberay")
SECRET = re.compile(r"AKIA|secret_access_key|PRIVATE KEY|\b[0-9a-f]{40,}\b")


@pytest.mark.parametrize("provider", FOLDERS)
def test_the_committed_files_are_what_their_command_makes(
    provider: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {path.name: path.read_text() for path in (ROOT / "cluster" / provider).glob("*.yaml")}
    (first,) = {text.splitlines()[0] for text in files.values()}
    words = shlex.split(first.removeprefix("# Made by: knet "))
    assert main([*words, "--out", str(tmp_path), "--json"]) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files
    assert json.loads(capsys.readouterr().out)["usd_per_hour_at_most"] > 1


@pytest.mark.parametrize("provider", FOLDERS)
def test_no_file_holds_a_secret_or_opens_a_dashboard(
    provider: str, planned: Callable[..., Cluster]
) -> None:
    for name, text in render(planned(provider)).items():
        assert not SECRET.search(text), name
        assert "0.0.0.0/0" not in text
        assert "LoadBalancer" not in text
        assert "NodePort" not in text
        # In a pod the dashboard must be reachable by the service; a network policy closes it.
        assert ("dashboard-host: 0.0.0.0" in text) == name.startswith("ray")


def test_the_ray_version_is_the_locked_one(planned: Callable[..., Cluster]) -> None:
    lock = (ROOT / "requirements.lock").read_text()
    (locked,) = re.findall(r"^ray(?:\[[\w,]+\])?==(\S+)", lock, re.MULTILINE)
    assert metadata.version("ray") == locked, "run make setup"
    for name in ("raycluster.yaml", "rayjob.yaml"):
        assert f"rayVersion: {locked}\n" in (ROOT / "cluster" / "kuberay" / name).read_text()


def test_a_description_survives_the_command_that_it_is_written_as(
    describe: Callable[..., Description], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that can be stated is forgotten in the heading."""
    seen: list[Description] = []
    stated = describe(
        "kuberay",
        name="other",
        spot=True,
        gpus_per_machine=4,
        region="us-west-2",
        idle_minutes=5,
        tracking_uri="https://mlflow.example.org",
        quota=1000,
        max_usd=200.5,
        queue="gpus",
        redis="redis:6379",
    )
    monkeypatch.setattr(
        "knet_platform.cluster.machines.plan_cluster",
        lambda description, table: seen.append(description) or plan_cluster(description, table),
    )
    monkeypatch.setattr("knet_platform.cluster.render.write_files", lambda files, folder: [])
    assert main(shlex.split(command(stated))[1:]) == 0
    assert seen == [stated]
    flags = {f"--{field.name.replace('_', '-')}" for field in fields(Description)}
    assert flags - set(shlex.split(command(stated))) == {
        "--ami",
        "--allow-ssh",
        "--project",
        "--zone",
    }


def test_spot_machines_come_first_and_others_stand_by(planned: Callable[..., Cluster]) -> None:
    for provider, file in (("aws", "cluster.yaml"), ("gcp", "cluster.yaml")):
        types = yaml.safe_load(render(planned(provider, spot=True))[file])["available_node_types"]
        assert list(types) == ["head", "gpu-spot", "gpu-on-demand"]
        assert types["gpu-spot"]["priority"] > types["gpu-on-demand"]["priority"]
        assert {(t["min_workers"], t["max_workers"]) for t in types.values()} == {(0, 0), (0, 8)}
        assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
        alone = yaml.safe_load(render(planned(provider))[file])["available_node_types"]
        assert list(alone) == ["head", "gpu-on-demand"]


@pytest.mark.parametrize("gpu", ["l4", "A10G", "a100", "h100"])
def test_every_gpu_is_to_be_had_somewhere(gpu: str, planned: Callable[..., Cluster]) -> None:
    for provider in ("aws", *(() if gpu == "A10G" else ("gcp",)), "kuberay"):
        cluster = planned(provider, gpu=gpu)
        assert cluster.machine.gpu.lower() == gpu.lower()
        assert cluster.machine.price == read_prices().instances[cluster.machine.name]
        assert render(cluster)


def test_the_table_is_dated_and_agrees_with_the_prices() -> None:
    table = read_machines()
    assert table.path.resolve() == ROOT / "cluster" / "machines.yaml"
    assert {m.name for m in table.machines} <= read_prices().instances.keys()
    for cloud in yaml.safe_load(table.path.read_text())["clouds"].values():
        assert cloud["date"]
        assert cloud["source"]


@pytest.mark.parametrize(
    ("provider", "changes", "line"),
    [
        ("azure", {}, "provider: no files for 'azure'; expected aws, gcp, kuberay"),
        ("gpc", {}, "provider: no files for 'gpc'; did you mean 'gcp'?"),
        ("aws", {"gpu": "a10"}, "gpu: aws has no 'a10' in .*only A100, A10G, H100, L4; did you"),
        ("gcp", {"gpu": "a10g"}, "gpu: gcp has no 'a10g' in "),
        ("aws", {"gpus_per_machine": 3}, "aws has no machine with 3 x A10G; expected one of 1, 4"),
        (
            "aws",
            {"gpu": "h100", "region": "eu-west-1"},
            "region: eu-west-1 has no p5.48xlarge .H100.; expected one of ap-northeast-1, us-",
        ),
        ("gcp", {"zone": "us-centrall-a"}, "region: us-centrall has no .*mean 'us-central1'"),
        (
            "aws",
            {"quota": 32, "spot": True},
            "max_workers: 8 x g5.2xlarge need 64 vCPU of quota L-3819A6DF in us-east-1, and 32 "
            "are granted; use at most 4 workers",
        ),
        ("gcp", {"quota": 0}, "NVIDIA_L4_GPUS in us-central1, and 0 are granted"),
        ("aws", {"max_workers": 0}, "max_workers: expected more than 0, got 0"),
        ("aws", {"storage": "/data"}, "storage: got '/data', expected s3://bucket/prefix"),
        (
            "aws",
            {"image": "example/knet"},
            "image: got 'example/knet', expected registry/name:tag",
        ),
        ("aws", {"allow_ssh": "0.0.0.0/0"}, "allow_ssh: 0.0.0.0/0 is the whole world"),
        ("aws", {"allow_ssh": "home"}, "allow_ssh: 'home' does not appear to be"),
        ("aws", {"ami": None}, "ami: not set; aws needs it"),
        ("aws", {"queue": "gpus"}, "queue: aws has no use for it; leave it out"),
        ("kuberay", {"redis": "redis"}, "redis: got 'redis', expected host:port"),
        ("aws", {"name": "Our cluster"}, "name: got 'Our cluster', expected at most 30 small"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_line(
    provider: str,
    changes: dict[str, object],
    line: str,
    planned: Callable[..., Cluster],
) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        planned(provider, **changes)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_refused_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "cluster render --provider aws --gpu h200 --max-workers 8 --storage bucket --image x"
    assert main([*command.split(), "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4  # everything at once: ami, allow_ssh, storage, image
    assert all(line.startswith("error: ") for line in errors)
    assert not (tmp_path / "out").exists()


def test_unknown_keys_of_a_table_are_named_all_at_once(tmp_path: Path) -> None:
    machines = "machines: {g5.2xlarge: {cloud: aws, region: [x]}}\n"
    text = f"{machines}clouds: {{aws: {{quota: {{}}}}}}\nowner: me\n"
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_machines(tmp_path / "mine.yaml")
    assert [line.split(": ", 1)[1] for line in caught.value.problems] == [
        "owner: unknown key",
        "clouds.aws.quota: unknown key; did you mean 'quotas'?",
        "machines.g5.2xlarge.region: unknown key; did you mean 'regions'?",
    ]


def test_a_table_of_another_form_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("machines: {g5.2xlarge: {cloud: aws}}\nclouds: {}\n")
    with pytest.raises(ConfigError, match="not a table of machines"):
        read_machines(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("machines: {g7.large: {}}\nclouds: {}\n")
    with pytest.raises(ConfigError, match="not in prices"):
        read_machines(tmp_path / "mine.yaml")
