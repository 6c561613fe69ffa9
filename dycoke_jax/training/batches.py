"""Clips with questions and answers as arrays, with all questions of a clip packed into one row.

The visual tokens of a row are computed once. Each question with its answer is a part of its own: it
attends to the prefix, to the visual tokens and to itself, but not to other parts. Its positions go
on from the visual tokens, as if it were the only question. The language model sees this row::

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
    """A clip as model input, with its questions and answers.

    Attributes:
        frames: uint8 RGB frames, resized to the input size of the vision tower.
        questions: questions about the clip, at least one. Each is a text, or a conversation as
            ``inputs.prompts.build_prompt`` takes it.
        answers: the right answer to each question, not empty.
    """

    frames: UInt8[np.ndarray, "F height width 3"]
    questions: Sequence[Conversation]
    answers: Sequence[str]


class Batch(NamedTuple):
    """B examples as arrays; integers are int32.

    The axes ``*steps`` are absent, or a single axis of gradient accumulation.
    """

    frames: UInt8[Array, "*steps B F height width 3"]
    """RGB frames at the input size of the vision tower."""
    prefix: Int[Array, "*steps B prefix"]
    """Token ids of the text before the visual tokens, padded with 0 at the end."""
    prefix_length: Int[Array, "*steps B"]
    """Number of valid tokens of each prefix."""
    ids: Int[Array, "*steps B Q"]
    """Token ids of questions and answers, one after the other, padded with 0 at the end."""
    part: Int[Array, "*steps B Q"]
    """Number of the question that a token belongs to, from 1; 0 in slots without a token."""
    offset: Int[Array, "*steps B Q"]
    """Index of a token in its part, from 0."""
    is_answer: Bool[Array, "*steps B Q"]
    """True for the tokens to predict: those of the answer and the control token that ends it."""


def token_count(tokenizer: Tokenizer, question: Conversation, answer: str) -> int:
    """The number of slots that a question with its answer takes in a row.

    Raises:
        PromptError: if the conversation is malformed or the answer is empty.
    """
    prompt = build_prompt(tokenizer, question, has_video=True)
    return len(prompt.after) + len(encode_answer(tokenizer, answer))


def pack(tokenizer: Tokenizer, examples: Sequence[Example], width: int) -> Batch:
    """Packs examples into one batch without an accumulation axis, one example to a row.

    Args:
        tokenizer: the tokenizer of the model.
        examples: at least one; all have the same number of frames.
        width: slots of a row for questions and answers (Q), at least 1. From the first question
            that does not fit on, the questions of that row are left out.

    Returns:
        The batch. Its ``prefix`` axis is padded to a multiple of 8.

    Raises:
        RequestError: if the first question of an example does not fit, or if the text before the
            video differs between the questions of one clip.
        PromptError: if a conversation is malformed or an answer is empty.
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
