"""Where to read on about a sweep."""

from pathlib import Path

import pytest

from knet_platform.links import Link, read_links, write_links
from knet_platform.storage import Store
from knet_platform.tracking.mlflow import MLflowTracker


def test_links_are_kept_besides_earlier_ones_and_renewed_by_name(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert read_links(store, "stages") == ()
    write_links(store, "stages", {"runs": "http://a", "nothing": None})
    write_links(store, "stages", {"compared": "http://b"})
    write_links(store, "stages", {"runs": "http://c"})
    assert read_links(store, "stages") == (
        Link(name="runs", url="http://c"),
        Link(name="compared", url="http://b"),
    )
    assert read_links(store, "other") == ()


@pytest.mark.parametrize(
    ("uri", "pages"),
    [
        ("https://me:secret@mlflow.example:5000/", "https://mlflow.example:5000/#"),
        ("sqlite:////tmp/mlflow.db", "http://127.0.0.1:5000/#"),
    ],
)
def test_addresses_of_pages_bear_no_password(uri: str, pages: str, tmp_path: Path) -> None:
    assert MLflowTracker(uri, artifacts=tmp_path)._pages() == pages
