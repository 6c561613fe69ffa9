"""Clips with questions and answers as arrays: all questions of a clip in one row, kept apart.

A row reads the clip once, and then every question with its answer as if it alone came after it::

    prefix | visual | question 1, answer 1 | question 2, answer 2 | ... | empty
    part 0   part 0   part 1                 part 2                     part 0, not valid
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from dycoke_jax.errors import RequestError
from dycoke_jax.inputs.prompts import Conversation, Tokenizer, build_prompt, encode_answer


@dataclass(frozen=True)
class Example:
    """A clip, ready for the model, with what is asked of it.

    Attributes:
        frames: resized to the tower's input.
        questions: a text or the turns of a conversation each, see ``inputs.prompts``.
        answers: the right answer to each.
    """

    frames: UInt8[np.ndarray, "F height width 3"]
    questions: Sequence[Conversation]
    answers: Sequence[str]


class Batch(NamedTuple):
    """B examples; axes before B, if any, are steps of gradient accumulation."""

    frames: UInt8[Array, "*steps B F height width 3"]
    prefix: Int[Array, "*steps B prefix"]
    prefix_length: Int[Array, "*steps B"]
    ids: Int[Array, "*steps B Q"]
    """Questions and answers, one after the other."""
    part: Int[Array, "*steps B Q"]
    """Which question a token belongs to, from 1; 0 where there is no token."""
    offset: Int[Array, "*steps B Q"]
    """Place of a token in its part."""
    is_answer: Bool[Array, "*steps B Q"]
    """Tokens to be predicted: the answer and the control token that ends it."""


def token_count(tokenizer: Tokenizer, question: Conversation, answer: str) -> int:
    """Slots that a question with its answer takes."""
    prompt = build_prompt(tokenizer, question, has_video=True)
    return len(prompt.after) + len(encode_answer(tokenizer, answer))


def pack(tokenizer: Tokenizer, examples: Sequence[Example], width: int) -> Batch:
    """Writes examples as one batch.

    Args:
        tokenizer: the model's.
        examples: all with the same number of frames.
        width: slots for questions and answers (Q); what does not fit into a row is left out.

    Raises:
        RequestError: if not even the first question of an example fits.
    """
    count = len(examples)
    columns = {name: np.zeros((count, width), np.int32) for name in ("ids", "part", "offset")}
    is_answer = np.zeros((count, width), bool)
    prefixes: dict[int, tuple[int, ...]] = {}
    for row, example in enumerate(examples):
        used = 0
        pairs = zip(example.questions, example.answers, strict=True)
        for part, (question, answer) in enumerate(pairs, start=1):
            prompt = build_prompt(tokenizer, question, has_video=True)
            if prompt.before != prefixes.setdefault(row, prompt.before):
                raise RequestError(
                    "questions of one clip that share a row must share all text before the video"
                )
            ids = [*prompt.after, *encode_answer(tokenizer, answer)]
            if used + len(ids) > width:
                if part == 1:
                    raise RequestError(
                        f"a question and its answer take {len(ids)} tokens, and {width} are allowed"
                    )
                break
            place = slice(used, used + len(ids))
            columns["ids"][row, place] = ids
            columns["part"][row, place] = part
            columns["offset"][row, place] = range(len(ids))
            is_answer[row, used + len(prompt.after) : used + len(ids)] = True
            used += len(ids)
    lengths = np.array([len(prefix) for prefix in prefixes.values()], np.int32)
    prefix = np.zeros((count, -(-int(lengths.max()) // 8) * 8), np.int32)
    for row, values in prefixes.items():
        prefix[row, : len(values)] = values
    frames = np.stack([example.frames for example in examples])
    arrays = [frames, prefix, lengths, *columns.values(), is_answer]
    return Batch(*map(jnp.asarray, arrays))
