"""The file of requests of a job: a JSON object on each line (JSON Lines, RFC 8259)."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dycoke_jax import checks
from dycoke_jax.engine.requests import Request
from dycoke_jax.errors import DycokeError, RequestError, printable
from dycoke_jax.jobs.settings import JobSettings

KEYS = ("id", "video", "prompt", "messages", "decoding", "sampling")
"""The keys that a request may have."""

LONGEST_LINE = 1 << 24
"""Bytes of the longest line that is read; a longer one is a fault of its own."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Settings = TypeVar("Settings")


@dataclass(frozen=True, eq=False)
class Line:
    """A line of the file.

    Attributes:
        number: its number, from 1.
        id: the id of the request; "line 7" for one that cannot be read.
        digest: 16 hexadecimal digits that change with the request and with its settings.
        request: what is asked; the error, if the line is no request.
    """

    number: int
    id: str
    digest: str
    request: Request | RequestError


def read_requests(path: Path, settings: JobSettings) -> Iterator[Line]:
    """Reads a file of requests line by line, so that it may be larger than the memory.

    Empty lines count, but are left out.

    Args:
        path: the file, in UTF-8, with or without a byte order mark. Relative paths of clips start
            at its folder.
        settings: those of requests that do not say otherwise.

    Yields:
        The lines in their order. One that is no request holds the error, which names its number.

    Raises:
        RequestError: if the file cannot be read.
    """
    try:
        if not path.is_file():
            kind = "no regular file" if path.exists() else "missing"
            raise RequestError(
                f"{path} is {kind}; name a file of requests, which is read several times"
            )
        with path.open("rb") as file:
            for number, text in enumerate(_lines(file), start=1):
                if number == 1:
                    text = text.removeprefix(_BYTE_ORDER_MARK)
                if text.strip():
                    yield _line(number, text, path.parent, settings)
    except OSError as error:
        raise RequestError(f"{path} cannot be read ({error.strerror or error})") from error


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long only the beginning."""
    while text := file.readline(LONGEST_LINE + 1):
        rest = text
        while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
            rest = file.readline(LONGEST_LINE + 1)
        yield text


def _line(number: int, text: bytes, folder: Path, settings: JobSettings) -> Line:
    """Makes a request of a line, or says why it is none."""
    name = f"line {number}"
    try:
        values = _values(text)
        if isinstance(values.get("id"), str) and values["id"]:
            name = values["id"]
        request = _request(values, folder, settings)
    except (ValueError, DycokeError) as error:
        fault = RequestError(printable(f"line {number}: {error}"))
        return Line(number, name, hashlib.sha256(text.strip()).hexdigest()[:16], fault)
    # The path as it is written: a folder of requests and clips may be moved.
    asked = [values.get("video"), request.prompt, settings.described(request)]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return Line(number, name, digest, request)


def _values(text: bytes) -> dict[str, Any]:
    """The object on a line.

    Raises:
        ValueError: if it is none.
    """
    if len(text) > LONGEST_LINE:
        raise ValueError(f"longer than {LONGEST_LINE >> 20} MiB")
    try:
        values = json.loads(
            text.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError:
        raise ValueError("not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("not an object")
    return values


def _request(values: Mapping[str, Any], folder: Path, settings: JobSettings) -> Request:
    """Makes a request of the object on a line.

    Raises:
        ValueError: if it has wrong keys or values; or a DycokeError, if a setting has.
    """
    _refuse_unknown("a request", values, KEYS)
    if not values.get("id"):
        raise ValueError("has no id")
    checks.text("id", values["id"])
    given = [key for key in ("prompt", "messages") if values.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"has {'both' if given else 'neither'} prompt and messages; give one")
    prompt = values[given[0]]
    if given == ["prompt"]:
        checks.text("prompt", prompt)
    elif not isinstance(prompt, list) or not all(isinstance(turn, dict) for turn in prompt):
        raise ValueError("messages must be a list of objects, the turns of a conversation")
    video = values.get("video")
    if video is not None and not checks.text("video", video).strip():
        raise ValueError("video is empty; name a file, or leave it out")
    return Request(
        prompt,
        None if video is None else folder / video,
        _changed("decoding", settings.decoding, values),
        _changed("sampling", settings.sampling, values),
        settings.prompting,
        settings.allow_damaged,
    )


def _changed(name: str, settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Settings with those fields that a request gives under their name."""
    given = values.get(name)
    if given is None:
        return settings
    if not isinstance(given, dict):
        raise ValueError(f"{name} must be an object of settings")
    _refuse_unknown(name, given, [field.name for field in fields(settings)])  # type: ignore[arg-type]
    try:
        return replace(settings, **given)  # type: ignore[type-var]
    except DycokeError as error:
        raise ValueError(f"{name}: {error}") from None


def _refuse_unknown(what: str, values: Mapping[str, Any], known: Any) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"{what} has no key {checks.shown(key)}; it has {', '.join(known)}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {checks.shown(key)} is given twice")
        values[key] = value
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")
