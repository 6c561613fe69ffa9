"""What the processes of a run tell each other about the requests that each has prepared."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dycoke_jax.engine.requests import Failure, Prepared, Request
from dycoke_jax.errors import (
    ConfigError,
    HostError,
    PromptError,
    RequestError,
    VideoError,
)
from dycoke_jax.hosts import share
from dycoke_jax.inputs.prompts import Prompt
from dycoke_jax.inputs.system_errors import system_error

_ERRORS: dict[str, type[Exception]] = {
    "video": VideoError,
    "prompt": PromptError,
    "request": RequestError,
    "config": ConfigError,
    "internal": RuntimeError,
}


def share_prepared(
    requests: Mapping[int, Request], own: Iterable[tuple[int, Prepared] | Failure]
) -> list[tuple[int, Prepared] | Failure]:
    """Waits until every process has prepared its part of some requests.

    Args:
        requests: the requests by their numbers in the stream; the same in every process.
        own: those that this process has prepared, which is waited for, or their failures.

    Returns:
        All of them in the order of the stream. A request that another process has prepared has a
        clip of zeros, of the right shape, that takes no memory.

    Raises:
        HostError: if another process has failed, other than by a request that cannot be answered.
    """
    found = {}
    told: list[dict[str, Any]] = []
    broken: Exception | None = None
    try:
        for one in own:
            index = one.index if isinstance(one, Failure) else one[0]
            found[index] = one
            told.append(_told(one))
    except Exception as error:  # the others wait, and must not do so in vain
        broken, told = error, [{"broken": f"{type(error).__name__}: {error}"}]
    for process, text in enumerate(share(json.dumps(told).encode())):
        for one in json.loads(text):
            if broken is None and "broken" in one:
                raise HostError(f"process {process} has failed: {one['broken']}")
            if broken is None and one["index"] not in found:
                found[one["index"]] = _heard(one, requests)
    if broken is not None:
        raise broken
    return [found[index] for index in sorted(requests)]


def _told(one: tuple[int, Prepared] | Failure) -> dict[str, Any]:
    """What other processes need to know of a request."""
    if isinstance(one, Failure):
        told = {"index": one.index, "failure": one.kind, "message": one.message}
        return told | {"errno": system_error(one.error)}
    index, prepared = one
    return {
        "index": index,
        "before": prepared.prompt.before,
        "after": prepared.prompt.after,
        "clip": None if prepared.frames is None else prepared.frames.shape,
        "notes": prepared.notes,
    }


def _heard(
    one: Mapping[str, Any], requests: Mapping[int, Request]
) -> tuple[int, Prepared] | Failure:
    index = one["index"]
    if "failure" in one:
        kind, message = one["failure"], one["message"]
        error = _ERRORS[kind](message)
        if one["errno"] is not None:
            error.__cause__ = OSError(one["errno"], message)
        return Failure(index, kind, message, error)
    frames = None if one["clip"] is None else np.broadcast_to(np.uint8(0), one["clip"])
    prompt = Prompt(tuple(one["before"]), tuple(one["after"]))
    return index, Prepared(prompt, frames, requests[index].decoding, tuple(one["notes"]))
