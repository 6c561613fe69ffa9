"""What lmms-eval asks of a model, as requests of the engine.

The rules are those of the models ``llava_onevision`` and ``llava_vid`` of lmms-eval 0.7.3 for
videos: one clip and one text, to which the engine adds the conversation around them; ``until`` is
left aside, since an answer ends with the model's own end token; greedy decoding unless
``do_sample`` is set; 1,024 new tokens unless the task gives a number.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dycoke_jax.checks import shown
from dycoke_jax.engine.requests import Decoding
from dycoke_jax.errors import RequestError

_MAX_NEW_TOKENS = 1024
"""The default of the reference models."""
_WITHOUT_EFFECT = ("until", "image_aspect_ratio")
"""Settings that change no answer about a video in the reference models."""
_KNOWN = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")
_PLACEHOLDER = "<image>"


def clip_of(visuals: Any, task: str) -> str | os.PathLike[str] | None:
    """Returns the clip of a request; None for a question without one.

    Args:
        visuals: what the task's ``doc_to_visual`` returned.
        task: name of the task, for the message.

    Raises:
        RequestError: if it is not the path of one clip.
    """
    if visuals is None or (isinstance(visuals, Sequence) and not visuals):
        return None
    if isinstance(visuals, list | tuple) and len(visuals) == 1:
        visual = visuals[0]
        if isinstance(visual, str | os.PathLike):
            return visual
        what = f"a visual of type {type(visual).__name__}"
    elif isinstance(visuals, list | tuple):
        what = f"{len(visuals)} visuals"
    else:
        what = f"visuals of type {type(visuals).__name__}"
    raise RequestError(
        f"task {task} gives {what} with a question; dycoke_jax answers questions about one video, "
        "given by its path: choose a task about videos"
    )


def question_of(context: str, task: str, *, has_clip: bool) -> str:
    """Returns the text of a question.

    Raises:
        RequestError: if it says itself where the clip belongs; the engine puts it first.
    """
    if has_clip and _PLACEHOLDER in context:
        raise RequestError(
            f"task {task} has {_PLACEHOLDER} in the text of a question; leave it out, since the "
            "clip is put before the text"
        )
    return context


def decoding_of(settings: Mapping[str, Any], task: str, number: int) -> Decoding:
    """Returns how an answer is generated.

    Args:
        settings: the task's ``generation_kwargs``; what is None is as if it were absent.
        task: name of the task, for the message.
        number: number of the request, which is the seed if the answer is sampled: repeats of a
            question are other samples.

    Raises:
        RequestError: if a setting is not known or not supported.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    unknown = [name for name in given if name not in (*_KNOWN, *_WITHOUT_EFFECT)]
    if unknown:
        raise RequestError(
            f"task {task} has {', '.join(unknown)} among its generation_kwargs, which dycoke_jax "
            f"does not support; it knows {', '.join(_KNOWN)}"
        )
    if given.get("num_beams", 1) != 1:
        raise RequestError(
            f"task {task} asks for beam search (num_beams is {shown(given['num_beams'])}), which "
            "dycoke_jax does not support; set num_beams to 1"
        )
    new = given.get("max_new_tokens", _MAX_NEW_TOKENS)
    if not given.get("do_sample", False):
        return Decoding(new)
    # The defaults are those of transformers.
    return Decoding(
        new,
        given.get("temperature", 1.0),
        given.get("top_k", 50),
        given.get("top_p", 1.0),
        number,
    )
