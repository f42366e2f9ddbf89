import json
import random
from pathlib import Path
from typing import Any

import pytest

from knet_core.data import json_stream
from knet_core.data.json_stream import read_lists
from knet_core.errors import DataError


def read(path: Path, *names: str) -> tuple[dict[str, list[Any]], set[str]]:
    lists: dict[str, list[Any]] = {name: [] for name in names}

    def taker(name: str) -> json_stream.Consumer:
        def take(position: int, value: Any) -> None:
            assert position == len(lists[name])
            lists[name].append(value)

        return take

    return lists, read_lists(path, "instances", {name: taker(name) for name in names})


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 2**20])
def test_elements_are_those_of_the_whole_document_wherever_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(json_stream, "_PIECE", piece)
    values = [
        12345,
        -0.5e-3,
        'ä\\"}] \u2028 \U0001f600',
        True,
        None,
        {"a": [1, {"b": []}]},
        [],
        {},
    ]
    document = {"info": {"x": values}, "a": values * 3, "n": 5, "b": [], "c": [values]}
    path = tmp_path / "file.json"
    for ascii_only, indent in ((True, None), (False, 1)):
        text = json.dumps(document, ensure_ascii=ascii_only, indent=indent)
        path.write_text(text, encoding="utf-8")
        lists, found = read(path, "a", "b", "c", "d")
        assert lists == {"a": values * 3, "b": [], "c": [values], "d": []}
        assert found == {"a", "b", "c"}


def test_a_text_cut_anywhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_PIECE", 16)
    text = json.dumps({"a": [{"id": 1, "x": [1.5, "b"]}, 17], "b": {"c": "d"}})
    path = tmp_path / "file.json"
    for length in range(len(text)):
        path.write_text(text[:length])
        with pytest.raises(
            DataError, match=r"file\.json: not JSON \(.+\); expected COCO"
        ) as caught:
            read(path, "a")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ['{"a": []} x', '{"a": [1,]}', '{"a": [1 2]}', '{"a" []}', '{"a": [], "a": []}', "{1: 2}"],
)
def test_what_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(DataError, match="not JSON"):
        read(path, "a")


def test_a_mistake_at_the_start_is_found_without_reading_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with path.open("w") as file:
        file.write('{"a": [oops')
        file.write(" " * 2**23)
    with path.open("rb") as file:
        stream = json_stream._Stream(file)
        with pytest.raises(ValueError, match="Expecting value"):
            stream.lists({"a": lambda position, value: None})
        assert file.tell() <= 2**21


def test_numbers_are_those_of_the_standard_library(tmp_path: Path) -> None:
    rng = random.Random(0)
    numbers = [rng.uniform(-1e6, 1e6) for _ in range(1000)] + [1e-320, 1.7e308, 0.1, -0.0]
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"a": numbers}))
    assert read(path, "a")[0]["a"] == numbers
