"""Which pictures a page takes."""

import io

import pytest
from PIL import Image

from knet_platform.report import pictures
from knet_platform.report.pictures import contact_sheets
from knet_platform.storage import Store
from knet_platform.sweep import Sweep


def _webp(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 16), (shade, 0, 0)).save(buffer, "WEBP")
    return buffer.getvalue()


@pytest.fixture
def long_store(sweep: Sweep, store: Store) -> Store:
    """Arm 3, seed 0, was evaluated a hundred times and more, and has a picture of its updates."""
    trial = next(trial for trial in sweep.trials if trial.name == "3/0")
    for step in range(10, 1010, 10):
        store.trial(trial.hash).write_bytes(f"pictures/step_{step:06d}.webp", _webp(step % 256))
    store.trial(trial.hash).write_bytes("pictures/stages_001000.webp", _webp(0))
    return store


def test_a_few_evaluations_from_the_first_to_the_last_stand_for_all(
    sweep: Sweep, long_store: Store
) -> None:
    one, three = contact_sheets(sweep, long_store)
    steps = [picture.step for picture in three.evaluations]
    assert (steps[0], steps[-1], len(steps)) == (10, 1000, 6)
    assert three.stages is not None
    assert (three.arm, three.seed, three.stages.step) == ("3", 0, 1000)
    # Steps are chosen over all arms; what arm 1 has of them is shown, and always its last.
    assert [picture.step for picture in one.evaluations] == [300]


def test_a_page_without_room_keeps_the_last_evaluation_of_every_arm(
    sweep: Sweep, long_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "BYTES", 1)
    one, three = contact_sheets(sweep, long_store)
    assert [picture.step for picture in three.evaluations] == [1000]
    assert [picture.step for picture in one.evaluations] == [300]
    assert three.stages is None


def test_what_is_no_picture_is_left_out(sweep: Sweep, store: Store) -> None:
    one, _ = contact_sheets(sweep, store)  # step 100 is damaged
    assert [picture.step for picture in one.evaluations] == [300]
    assert one.evaluations[0].url.startswith("data:image/webp;base64,")
