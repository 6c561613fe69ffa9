"""Assembles the embeddings of a prompt: prefix | visual tokens and newlines | question."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.compression.protocol import Rows
from dycoke_jax.config import LlavaConfig, Newline
from dycoke_jax.models.qwen2 import Embedding, positions_of


class Visual(NamedTuple):
    """The visual segment of a prompt."""

    embeds: Float[Array, "B visual D"]
    valid: Bool[Array, "B visual"]
    """Slots that hold a token; newlines whose row has no kept token are left out."""
    is_visual: Bool[Array, "B visual"]
    """Slots for visual tokens, as opposed to newlines; empty ones are not valid."""
    places: Int[Array, "B visual"]
    """Place of each visual token among the F * N tokens of its clip; 0 for newlines."""


class TextIds(NamedTuple):
    """The text segments of a prompt as token ids, each row filled from the left."""

    prefix: Int[Array, "B prefix"]
    prefix_length: Int[Array, "B"]
    question: Int[Array, "B question"]
    question_length: Int[Array, "B"]


def place_newlines(
    features: Float[Array, "B F N D"],
    rows: Rows,
    newline: Float[Array, "D"],
    where: Newline,
    grid: tuple[int, int],
) -> Visual:
    """Gathers the kept tokens, and inserts the learned newline where the model expects it.

    Compression never compares or drops a newline. In the ``grid`` layout a newline ends a row, so
    it is left out exactly if no token of its row is kept (in ``frame``: no token of its frame): in
    training two newlines never follow each other. Its slot remains and is not valid, because the
    number of empty rows is known only at run time.

    Args:
        features: pooled visual tokens of each clip.
        rows: the rows that enter the language model, with places among the F * N tokens of each
            clip, ascending unless ``where`` is one_token or no_token.
        newline: the learned vector.
        where: position of newlines, see ``config.Newline``.
        grid: rows and columns of a frame's tokens.

    Returns:
        The visual segment of M + 1 (one_token), M + F * rows (grid), M + F (frame) or M (no_token)
        slots.
    """
    batch, frames, tokens, width = features.shape
    places, flat = rows.places, rows.embeds
    if flat is None:
        flat = features.reshape(batch, frames * tokens, width)
        flat = jnp.take_along_axis(flat, places[:, :, None], axis=1)
    valid = jnp.ones(places.shape, bool) if rows.valid is None else rows.valid
    newline = newline.astype(flat.dtype)
    count = flat.shape[1]
    newlines = newline_slots(where, grid, frames)
    total = count + newlines
    if where in ("one_token", "no_token"):
        last = jnp.broadcast_to(newline, (batch, newlines, width))
        return Visual(
            embeds=jnp.concatenate([flat, last], axis=1),
            valid=jnp.pad(valid, ((0, 0), (0, newlines)), constant_values=True),
            is_visual=jnp.broadcast_to(jnp.arange(total) < count, (batch, total)),
            places=jnp.pad(places, ((0, 0), (0, newlines))),
        )

    # Tokens between one newline and the next: a row of the grid, or a frame.
    span = frames * tokens // newlines
    row = jnp.arange(batch)[:, None]
    filled = jnp.zeros((batch, newlines), bool).at[row, places // span].max(valid)
    # A token comes after all tokens before it and all newlines of the spans before its own;
    # a newline after all tokens of its span and of those before, and the newlines before it.
    per_span = jnp.zeros((batch, newlines), jnp.int32).at[row, places // span].add(1)
    slot = jnp.arange(count) + places // span
    newline_slot = jnp.cumsum(per_span, axis=1) + jnp.arange(newlines)
    nothing = jnp.zeros((batch, total), bool)
    return Visual(
        embeds=jnp.broadcast_to(newline, (batch, total, width)).at[row, slot].set(flat),
        valid=nothing.at[row, slot].set(valid).at[row, newline_slot].set(filled),
        is_visual=nothing.at[row, slot].set(True),
        places=jnp.zeros((batch, total), places.dtype).at[row, slot].set(places),
    )


def all_rows(features: Float[Array, "B F N D"], frames: Int[Array, "B"]) -> Rows:
    """All visual tokens of each clip, where nothing is dropped.

    Args:
        features: pooled visual tokens.
        frames: number of frames of each clip; the others are empty.
    """
    batch, length, tokens, width = features.shape
    places = jnp.arange(length * tokens, dtype=jnp.int32)
    return Rows(
        places=jnp.broadcast_to(places, (batch, places.size)),
        valid=places // tokens < frames[:, None],
        embeds=features.reshape(batch, places.size, width),
    )


def no_visual(config: LlavaConfig, batch: int) -> Visual:
    """The empty visual segment of prompts without video."""
    empty = jnp.zeros((batch, 0), bool)
    width = config.text.hidden_size
    return Visual(jnp.zeros((batch, 0, width)), empty, empty, jnp.zeros((batch, 0), jnp.int32))


def newline_slots(where: Newline, grid: tuple[int, int], frames: int) -> int:
    """Number of newline slots of a clip with this many frames."""
    match where:
        case "one_token":
            return 1
        case "grid":
            return frames * grid[0]
        case "frame":
            return frames
        case "no_token":
            return 0


class Prompt(NamedTuple):
    """Whole prompts as the decoder layers read them: prefix | visual segment | question."""

    embeds: Float[Array, "B T D"]
    """Embeddings in the dtype of the computation."""
    valid: Bool[Array, "B T"]
    """Slots that hold a token."""
    positions: Int[Array, "B T"]
    """Rotary position of each slot."""


def assemble(
    embed: Embedding,
    prefix: Int[Array, "B prefix"],
    prefix_length: Int[Array, "B"],
    visual: Visual,
    question: Int[Array, "B question"],
    question_valid: Bool[Array, "B question"],
    offset: Int[Array, "B question"],
) -> Prompt:
    """Joins the segments of B prompts.

    Args:
        embed: the token embedding of the language model.
        prefix: token ids before the visual segment, each row filled from the left.
        prefix_length: number of tokens of each prefix.
        visual: the visual segment; its embeddings are converted to the dtype of ``embed``.
        question: token ids after the visual segment; in training, several questions and answers.
        question_valid: slots of ``question`` that hold a token.
        offset: number of tokens from the end of the visual segment to a slot of ``question``. In
            training each question of a row counts from 0 anew.
    """
    before, after = embed(prefix), embed(question)
    embeds = jnp.concatenate([before, visual.embeds.astype(before.dtype), after], axis=1)
    prefix_valid = jnp.arange(prefix.shape[1]) < prefix_length[:, None]
    shared = jnp.concatenate([prefix_valid, visual.valid], axis=1)
    valid = jnp.concatenate([shared, question_valid], axis=1)
    first = shared.sum(1, keepdims=True, dtype=jnp.int32)
    positions = jnp.concatenate([positions_of(shared), first + offset], axis=1)
    return Prompt(embeds, valid, positions)
