"""Clips and pictures that a request names: data URLs, files under one folder, and web addresses."""

import base64
import binascii
import io
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dycoke_jax.inputs.any_video import Video
from dycoke_jax.serving.faults import Fault, bad
from dycoke_jax.serving.settings import Serving

_FETCH_SECONDS = 60.0
"""In which a clip from the web must have come."""
_PART_BYTES = 2**16
"""Bytes that are read at once."""


def read_media(url: str, settings: Serving) -> Video:
    """Returns the clip that a URL stands for.

    Args:
        url: a data URL in base64; or a file:// or http(s):// URL, where the settings allow it.
        settings: what is allowed.

    Returns:
        An open file in memory, or the path of a file with all links resolved.

    Raises:
        Fault: if the URL is malformed, not allowed, or holds or leads to too much.
    """
    scheme = url[:10].partition(":")[0].lower()
    if scheme == "data":
        # In a file object, because bytes alone may be the bytes of a path to the reader of clips.
        return io.BytesIO(_decoded(url))
    if scheme == "file":
        return str(_file(url, settings.media_root))
    if scheme in ("http", "https"):
        if not settings.allow_urls:
            raise bad("this server fetches no URLs; send the clip as a data URL", "messages")
        return io.BytesIO(_fetched(url, settings.body_bytes))
    raise bad("a clip must be a data: URL in base64, or a file:// URL", "messages")


def _decoded(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise bad("a data URL must have the form data:TYPE;base64,DATA", "messages")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise bad("the data URL is no valid base64", "messages") from None
    if not content:
        raise bad("the data URL is empty", "messages")
    return content


def _file(url: str, root: Path | None) -> Path:
    """The file of a file:// URL, which must lie under ``root`` when all links are resolved."""
    if root is None:
        raise bad("this server reads no files; send the clip as a data URL", "messages")
    # One message for all, so that nobody learns which files there are elsewhere.
    refused = bad("the file:// URL names no file in the folder that is served", "messages")
    try:
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise refused
        root = root.resolve(strict=True)
        path = Path(unquote(parts.path, errors="strict")).resolve(strict=True)
        if path.is_relative_to(root) and path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # no such file; an impossible path; links in a ring
        pass
    raise refused


def _fetched(url: str, most: int) -> bytes:
    """What an http or https URL leads to; no other scheme is followed, nor any proxy used."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    until = time.monotonic() + _FETCH_SECONDS
    content = bytearray()
    try:
        with opener.open(url, timeout=_FETCH_SECONDS) as response:
            while len(content) <= most and (part := response.read1(_PART_BYTES)):
                content += part
                if time.monotonic() > until:
                    raise TimeoutError
    except (OSError, ValueError, HTTPException) as error:
        status = f" (status {error.code})" if isinstance(error, urllib.error.HTTPError) else ""
        raise bad(f"the clip cannot be fetched from its URL{status}", "messages") from error
    if len(content) > most:
        raise Fault(413, f"the clip has more than {most} bytes", param="messages", code="too_large")
    return bytes(content)
