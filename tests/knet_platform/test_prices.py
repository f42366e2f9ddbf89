"""Prices: the table that comes along, and what a trial costs by it."""

import datetime
from pathlib import Path

import pytest
import yaml

from knet_core import ConfigError
from knet_platform.prices import price_of, read_prices
from knet_platform.sweep_file import Resources

ROOT = Path(__file__).parents[2]


def test_the_table_that_comes_along_is_complete_and_dated():
    prices = read_prices()
    assert {row.gpu for row in prices.instances.values()} == {"L4", "A10G", "A100", "H100"}
    for row in prices.instances.values():
        assert datetime.date.fromisoformat(row.date)
        assert row.source
        assert 0 < row.spot < row.on_demand


def test_it_is_the_file_of_the_cluster_folder():
    """A link, so that wheels and jobs that carry only the package have it too."""
    assert read_prices().path.resolve() == ROOT / "cluster" / "prices.yaml"


def test_a_trial_pays_for_its_share_of_an_instance():
    prices = read_prices()
    whole = price_of(Resources(workers=8, gpus_per_worker=1, instance="p5.48xlarge"), prices)
    half = price_of(Resources(workers=4, gpus_per_worker=1, instance="p5.48xlarge"), prices)
    assert whole.usd_per_hour == pytest.approx(55.04)
    assert whole.trials_per_instance == pytest.approx(1)
    assert half.usd_per_hour == pytest.approx(55.04 / 2)
    cpu = price_of(Resources(workers=2, instance="g5.2xlarge"), prices)
    assert cpu.usd_per_hour == pytest.approx(1.212 / 4)


def test_without_an_instance_the_default_is_assumed():
    price = price_of(Resources(gpus_per_worker=1), read_prices())
    assert price.assumed
    assert price.basis.startswith("g5.2xlarge on demand")


def test_a_stated_price_wins():
    resources = Resources(workers=2, gpus_per_worker=1, price_per_gpu_hour=3)
    price = price_of(resources, read_prices())
    assert (price.usd_per_hour, price.assumed) == (6, False)


def test_an_unknown_instance_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'g5\.2xlrge' is not in .*did you mean 'g5\.2xlarge'"):
        price_of(Resources(instance="g5.2xlrge"), read_prices())


def test_a_price_list_of_ones_own_is_checked(tmp_path):
    good = {"gpu": "A100", "gpus": 1, "gpu_memory_gb": 40, "cpus": 8, "on_demand": 1}
    path = tmp_path / "mine.yaml"
    rows = {"mine": good, "odd": good | {"gpus": "x", "cpus": 0, "spt": 1}}
    path.write_text(yaml.safe_dump({"default": "their", "instances": rows, "currency": "EUR"}))
    with pytest.raises(ConfigError) as caught:
        read_prices(path)
    assert [line.removeprefix(f"{path}: ") for line in caught.value.problems] == [
        "currency: unknown key",
        "odd: spt: unknown key; did you mean 'spot'?",
        "odd: gpus: expected a number >= 0, got 'x'",
        "odd: cpus: expected a number > 0, got 0",
        "default: expected one of the instances, got 'their'",
    ]
    path.write_text(yaml.safe_dump({"default": "mine", "instances": {"mine": good}}))
    with pytest.raises(ConfigError, match="has no spot price of mine"):
        price_of(Resources(spot=True), read_prices(path))


def test_gpus_of_an_instance_without_any_are_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    row = {"gpu": "none", "gpus": 0, "gpu_memory_gb": 0, "cpus": 8, "on_demand": 1}
    path.write_text(yaml.safe_dump({"default": "mine", "instances": {"mine": row}}))
    prices = read_prices(path)
    assert price_of(Resources(gpus_per_worker=0, cpus_per_worker=4), prices).usd_per_hour > 0
    with pytest.raises(ConfigError, match="mine has no GPUs in "):
        price_of(Resources(gpus_per_worker=1), prices)


def test_a_price_of_gpus_makes_nothing_free_without_them():
    resources = Resources(workers=2, gpus_per_worker=0, price_per_gpu_hour=3)
    price = price_of(resources, read_prices())
    assert price.usd_per_hour > 0
    assert price.assumed
