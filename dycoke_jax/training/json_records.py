"""The records of a JSON Lines file, or of a file with one JSON array (RFC 8259)."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dycoke_jax.errors import RequestError

_SPACE = " \t\r\n"
_SPACES = re.compile(f"[{_SPACE}]*")


def read_json_records(path: Path) -> Iterator[tuple[str, object]]:
    """Reads the records of a file, which is an array if its first character is ``[``.

    Lines end at a line feed, before which a carriage return may stand. Other separators of lines
    are characters of the texts. Empty lines are ignored.

    Args:
        path: the file, in UTF-8, with or without a byte order mark.

    Returns:
        The place of each record, "line N" or, in an array, "record N", both from 1; and its value,
        which is a ValueError where the text is not valid JSON. In an array that is the last value,
        because the next record cannot be found.

    Raises:
        RequestError: if the file cannot be read or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{path} cannot be read ({reason})") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The offset counts from behind a byte order mark, which holds no line feed.
        line = error.object[: error.start].count(b"\n") + 1
        raise RequestError(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from None
    start = _skip_spaces(text, 0)
    return _array(text, start) if text.startswith("[", start) else _lines(text)


def _lines(text: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip(_SPACE):
            continue
        place = f"line {number}"
        try:
            value, end = _value(line, _skip_spaces(line, 0))
            end = _skip_spaces(line, end)
            if end < len(line):
                raise ValueError(f"text after the end of the JSON value (column {end + 1})")
        except ValueError as error:
            yield place, error
        else:
            yield place, value


def _array(text: str, start: int) -> Iterator[tuple[str, object]]:
    """The elements of an array one by one, so that a fault is found in the element that has it."""
    place = _skip_spaces(text, start + 1)
    closed = text.startswith("]", place)
    number = 0
    while not closed:
        number += 1
        try:
            value, place = _value(text, place)
            place = _skip_spaces(text, place)
            closed = text.startswith("]", place)
            if not closed and not text.startswith(",", place):
                raise ValueError(f"no comma or ] follows it ({_line_of(text, place)})")
        except ValueError as error:
            yield f"record {number}", error
            return
        yield f"record {number}", value
        if not closed:
            place = _skip_spaces(text, place + 1)
    place = _skip_spaces(text, place + 1)
    if place < len(text):
        fault = ValueError(f"text after the end of the array ({_line_of(text, place)})")
        yield f"record {number + 1}", fault


def _value(text: str, start: int) -> tuple[Any, int]:
    """One JSON value of a text, and where it ends.

    Raises:
        ValueError: in words without the place of the record, which the caller adds.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"{error.msg} ({line}column {error.colno})") from None
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice[:40]!r} is given twice")
    return values


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")


# Integers are read as floats because Python refuses to convert very long ones. No key that is read
# holds a number. Control characters in texts, which JSON wants escaped, are accepted as they are.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_number, parse_int=float, strict=False
)


def _skip_spaces(text: str, start: int) -> int:
    match = _SPACES.match(text, start)
    assert match is not None
    return match.end()


def _line_of(text: str, place: int) -> str:
    return f"line {text.count(chr(10), 0, place) + 1}"
