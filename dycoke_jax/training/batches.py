"""Clips with questions and answers as arrays, with all questions of a clip packed into one row.

The visual tokens of a row are computed once. Each question with its answer is a part of its own: it
attends to the prefix, to the visual tokens and to itself, but not to other parts. Its positions go
on from the visual tokens, as if it were the only question. The language model sees this row::

    prefix | visual | question 1, answer 1 | question 2, answer 2 | ... | empty
    part 0   part 0   part 1                 part 2                     part 0, not valid

A conversation is one part, with the tokens of all its answers to predict. A row without a clip has
an empty prefix, and its visual slots are not valid.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from dycoke_jax.errors import RequestError
from dycoke_jax.inputs.prompts import (
    Conversation,
    Tokenizer,
    build_prompt,
    encode_answer,
    encode_next_question,
)


@dataclass(frozen=True)
class Example:
    """A clip as model input, with its questions and answers.

    Attributes:
        frames: uint8 RGB frames, resized to the input size of the vision tower. Without a clip
            their values have no effect.
        questions: questions about the clip, at least one. Each is a text, or a conversation as
            ``inputs.prompts.build_prompt`` takes it.
        answers: the right answer to each question, not empty.
        further: for each question, the further questions of the same conversation with their
            answers, which are targets as well. Empty: there are none.
        has_clip: False for questions without a clip.
    """

    frames: UInt8[np.ndarray, "F height width 3"]
    questions: Sequence[Conversation]
    answers: Sequence[str]
    further: Sequence[Sequence[tuple[str, str]]] = ()
    has_clip: bool = True


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
    """True for the tokens to predict: those of the answers and the control tokens that end them."""
    has_clip: Bool[Array, "*steps B"]
    """False for rows without a clip: no slot of their visual segment is valid."""


class Part(NamedTuple):
    """A question or conversation with its answers as token ids."""

    before: tuple[int, ...]
    """Ids before the visual tokens; empty without a clip."""
    ids: tuple[int, ...]
    """Ids after the visual tokens, those of the answers included."""
    is_answer: tuple[bool, ...]
    """True for each of ``ids`` that is a token to predict."""


def encode_part(
    tokenizer: Tokenizer,
    question: Conversation,
    answer: str,
    further: Sequence[tuple[str, str]] = (),
    *,
    has_clip: bool = True,
) -> Part:
    """Encodes a question or conversation with its answers.

    Each answer is encoded on its own, as the model has to generate it. The ids are those of
    ``preprocess_qwen`` of LLaVA-NeXT up to the end of the last answer, but for an answer that
    begins with an empty line, which is joined there with the line before it. The tokens to predict
    are the answers and the control tokens that end them; LLaVA-NeXT adds control tokens and
    newlines of the template, which are never generated.

    Args:
        tokenizer: the tokenizer of the model.
        question: a text, or a conversation as ``inputs.prompts.build_prompt`` takes it.
        answer: the right answer to the question.
        further: the further questions of the conversation and their answers.
        has_clip: whether there is a clip.

    Raises:
        PromptError: if the conversation is malformed or an answer is empty.
    """
    prompt = build_prompt(tokenizer, question, has_video=has_clip)
    spans = [(prompt.after, False), (encode_answer(tokenizer, answer), True)]
    for next_question, next_answer in further:
        spans.append((encode_next_question(tokenizer, next_question), False))
        spans.append((encode_answer(tokenizer, next_answer), True))
    ids = tuple(token for span, _ in spans for token in span)
    is_answer = tuple(predicted for span, predicted in spans for _ in span)
    return Part(prompt.before, ids, is_answer)


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
        further = example.further or [()] * len(example.questions)
        conversations = zip(example.questions, example.answers, further, strict=True)
        for part, conversation in enumerate(conversations, start=1):
            before, ids, predicted = encode_part(
                tokenizer, *conversation, has_clip=example.has_clip
            )
            if before != prefixes.setdefault(row, before):
                raise RequestError(
                    "questions of one clip that share a row must share all text before the video"
                )
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
            is_answer[row, place] = predicted
            used += len(ids)
    lengths = np.array([len(prefix) for prefix in prefixes.values()], np.int32)
    prefix = np.zeros((count, -(-int(lengths.max()) // 8) * 8), np.int32)
    for row, values in prefixes.items():
        prefix[row, : len(values)] = values
    frames = np.stack([example.frames for example in examples])
    has_clip = np.array([example.has_clip for example in examples])
    arrays = [frames, prefix, lengths, *columns.values(), is_answer, has_clip]
    return Batch(*map(jnp.asarray, arrays))


def fill_rows(batch: Batch, multiple: int) -> Batch:
    """Adds empty rows to a batch without an accumulation axis, up to a multiple of rows.

    They have no clip, no questions and nothing to predict, so they count in no score.
    """
    short = -len(batch.ids) % multiple
    if not short:
        return batch
    return jax.tree.map(lambda x: jnp.pad(x, [(0, short), *[(0, 0)] * (x.ndim - 1)]), batch)
