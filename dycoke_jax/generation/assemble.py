"""Assembles the embeddings of a prompt: prefix | visual tokens and newlines | question."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.config import Newline


class Visual(NamedTuple):
    """The visual segment of a prompt."""

    embeds: Float[Array, "B visual D"]
    valid: Bool[Array, "B visual"]
    """Slots that hold a token; newlines whose row has no kept token are left out."""
    is_visual: Bool[Array, "B visual"]
    """Slots of visual tokens, as opposed to newlines."""


class TextIds(NamedTuple):
    """The text segments of a prompt as token ids, each row filled from the left."""

    prefix: Int[Array, "B prefix"]
    prefix_length: Int[Array, "B"]
    question: Int[Array, "B question"]
    question_length: Int[Array, "B"]


def place_newlines(
    features: Float[Array, "B F N D"],
    kept: Int[Array, "B M"] | None,
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
        kept: indices into the F * N tokens of each clip, in raster order unless ``where`` is
            one_token or no_token. None: all are kept.
        newline: the learned vector.
        where: position of newlines, see ``config.Newline``.
        grid: rows and columns of a frame's tokens.

    Returns:
        The visual segment of M + 1 (one_token), M + F * rows (grid), M + F (frame) or M (no_token)
        slots.
    """
    batch, frames, tokens, width = features.shape
    flat = features.reshape(batch, frames * tokens, width)
    newline = newline.astype(flat.dtype)
    if kept is not None:
        flat = jnp.take_along_axis(flat, kept[:, :, None], axis=1)
    count = flat.shape[1]
    newlines = newline_slots(where, grid, frames)
    total = count + newlines
    if where in ("one_token", "no_token"):
        last = jnp.broadcast_to(newline, (batch, newlines, width))
        is_visual = jnp.broadcast_to(jnp.arange(total) < count, (batch, total))
        embeds = jnp.concatenate([flat, last], axis=1)
        return Visual(embeds, jnp.ones((batch, total), bool), is_visual)

    # Tokens between one newline and the next: a row of the grid, or a frame.
    span = frames * tokens // newlines
    if kept is None:
        kept = jnp.broadcast_to(jnp.arange(count), (batch, count))
    rows = jnp.arange(batch)[:, None]
    filled = jnp.zeros((batch, newlines), bool).at[rows, kept // span].set(True)
    # A token comes after all tokens before it and all newlines of the spans before its own;
    # a newline after all tokens of its span and of those before, and the newlines before it.
    per_span = jnp.zeros((batch, newlines), jnp.int32).at[rows, kept // span].add(1)
    token_slot = jnp.arange(count) + kept // span
    newline_slot = jnp.cumsum(per_span, axis=1) + jnp.arange(newlines)
    embeds = jnp.broadcast_to(newline, (batch, total, width)).at[rows, token_slot].set(flat)
    is_visual = jnp.zeros((batch, total), bool).at[rows, token_slot].set(True)
    return Visual(embeds, is_visual.at[rows, newline_slot].set(filled), is_visual)


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


def text_valid(text: TextIds) -> tuple[Bool[Array, "B prefix"], Bool[Array, "B question"]]:
    """Prefix slots and question slots that hold a token."""
    prefix = jnp.arange(text.prefix.shape[1]) < text.prefix_length[:, None]
    question = jnp.arange(text.question.shape[1]) < text.question_length[:, None]
    return prefix, question
