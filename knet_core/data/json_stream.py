"""Reads the lists of a JSON object element by element.

COCO 2017's training annotations are 450 MB of text and some 5 GB as Python objects; here the text
is decoded a piece at a time and every element is handed over and forgotten.
"""

import codecs
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from knet_core.data.storage import open_file
from knet_core.errors import DataError

Consumer = Callable[[int, Any], None]
"""Takes the position and value of one element."""

_PIECE = 2**20
"""Bytes read at once; doubled while one value does not fit."""
_NEAR_END = 16
"""A parser's error so close to the end of a piece may be the cut; no longer token is cut there."""
_SPACE = re.compile(r"[ \t\r\n]*")


def read_lists(path: Path, kind: str, consumers: Mapping[str, Consumer]) -> set[str]:
    """Hand over the elements of the named lists of a file's object; its other values are dropped.

    Returns:
        The names that the file has.

    Raises:
        DataError: The file cannot be read, is not one JSON object, or a name occurs twice or is
            no list.
    """
    try:
        with open_file(path) as file:
            return _Stream(file).lists(consumers)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON ({error}); expected COCO {kind}: write or download it again"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check the file's permissions"
        ) from None


class _Stream:
    """A JSON text, of which a piece is in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._text = ""
        self._place = 0
        self._ended = False
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._decoder = json.JSONDecoder()

    def lists(self, consumers: Mapping[str, Consumer]) -> set[str]:
        found: set[str] = set()
        if self._peek() != "{":
            self._value()
            self._end()
            return found
        self._place += 1
        if self._peek() == "}":
            self._place += 1
            self._end()
            return found
        while True:
            key = self._value()
            if not isinstance(key, str):
                raise ValueError("a name is no text")  # noqa: TRY004 a wrong file, not a wrong call
            self._expect(":")
            if key in consumers and self._peek() == "[":
                if key in found:
                    raise ValueError(f"{key!r} occurs twice")
                found.add(key)
                self._elements(consumers[key])
            else:
                self._value()
            if self._expect(",}") == "}":
                self._end()
                return found

    def _elements(self, consume: Consumer) -> None:
        self._place += 1
        if self._peek() == "]":
            self._place += 1
            return
        position = 0
        while True:
            consume(position, self._value())
            position += 1
            if self._text.startswith(", ", self._place):  # as most writers separate elements
                self._place += 2
            elif self._expect(",]") == "]":
                return

    def _value(self) -> Any:
        if not self._text.startswith(("{", "["), self._place):
            self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                cut = error.pos + _NEAR_END >= len(self._text) or error.msg.startswith("Untermin")
                if self._ended or not cut:
                    raise ValueError(error.msg) from None
            else:
                # A number may go on behind the end: "1." is read as 1.
                whole = not isinstance(value, int | float) or end + _NEAR_END < len(self._text)
                if whole or self._ended:
                    self._place = end
                    return value
            self._more()

    def _expect(self, characters: str) -> str:
        found = self._peek()
        if not found or found not in characters:
            raise ValueError(f"expected {' or '.join(characters)}, found {found or 'the end'!r}")
        self._place += 1
        return found

    def _peek(self) -> str:
        """Skip white space; return the next character, or nothing at the end."""
        while True:
            self._place = _SPACE.match(self._text, self._place).end()  # type: ignore[union-attr]
            if self._place < len(self._text):
                return self._text[self._place]
            if self._ended:
                return ""
            self._more()

    def _more(self) -> None:
        rest = self._text[self._place :]
        data = self._file.read(max(_PIECE, len(rest)))
        self._ended = not data
        self._text = rest + self._utf8.decode(data, final=self._ended)
        self._place = 0

    def _end(self) -> None:
        if found := self._peek():
            raise ValueError(f"goes on with {found!r} behind its end")
