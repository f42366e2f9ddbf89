import pytest

from knet_platform.metrics import METRICS, find_metric


def test_average_precision_is_shown_as_papers_print_it():
    assert METRICS["val/AP"].show(0.3412) == "34.1"


@pytest.mark.parametrize(
    ("name", "title"),
    [("train/loss/stage2/dice", "Loss: stage2/dice"), ("val/stage1/AP", "AP, stage 1")],
)
def test_metrics_of_a_term_or_a_stage_are_known(name, title):
    info = find_metric(name)
    assert info is not None
    assert info.title == title


def test_every_score_of_every_task_is_known():
    precision = [f"AP{suffix}" for suffix in ("", "50", "75", "s", "m", "l")]
    quality = [f"{name}{kind}" for name in ("PQ", "SQ", "RQ") for kind in ("", "_th", "_st")]
    for name in [*precision, *quality, "mIoU", "mAcc", "aAcc"]:
        for info in (find_metric(f"val/{name}"), find_metric(f"val/stage0/{name}")):
            assert info is not None
            assert info.scale == 100.0
            assert info.higher_is_better


@pytest.mark.parametrize("name", ["val/ap", "AP", "val/stage1/XX", "train/loss/"])
def test_other_names_are_unknown(name):
    assert find_metric(name) is None
