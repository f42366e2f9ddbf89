"""What a point says of the machine."""

import pynvml
import pytest
import torch

from knet_core.meter import Meter
from knet_core.trainer import StepResult

GPU = torch.device("cuda", 0)


def point(meter):
    one = torch.tensor(1.0)
    meter.add(StepResult(losses={"seg": one}, grad_norm=one, lr=0.1), waited=0.0)
    return meter.point(1).metrics


def test_of_a_cpu_there_is_nothing_about_a_gpu():
    assert not [name for name in point(Meter(4)) if "gpu" in name]


def test_a_gpus_use_is_the_mean_of_all_looks_since_the_last_point(monkeypatch):
    answers = [40, 80, 100]
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: answers.pop(0))
    meter = Meter(4)
    meter._look(GPU)
    meter._look(GPU)
    assert point(meter)["sys/gpu_utilization"] == pytest.approx(0.6)
    meter._look(GPU)
    assert point(meter)["sys/gpu_utilization"] == 1.0


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_NOT_SUPPORTED]
)
def test_where_the_driver_does_not_tell_nothing_is_made_up(monkeypatch, code):
    def refuse(device):
        raise pynvml.NVMLError(code)

    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    meter = Meter(4)
    meter._look(GPU)
    assert "sys/gpu_utilization" not in point(meter)


@pytest.mark.gpu
def test_a_gpu_tells_how_busy_it_is():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    meter = Meter(4)
    meter._look(GPU)
    assert 0 <= point(meter)["sys/gpu_utilization"] <= 1
