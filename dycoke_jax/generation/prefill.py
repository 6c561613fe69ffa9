"""Prefill: selects visual tokens, fills the key/value caches, gives the first token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.cache import Slots
from dycoke_jax.compression.protocol import PromptStage
from dycoke_jax.compression.view import View
from dycoke_jax.generation.assemble import (
    TextIds,
    Visual,
    all_rows,
    assemble,
    no_visual,
    place_newlines,
)
from dycoke_jax.generation.encode import Features
from dycoke_jax.generation.layout import Layout
from dycoke_jax.generation.sampling import Sampling, sample
from dycoke_jax.generation.state import DecodeState, Limits, spread_on, take_token
from dycoke_jax.generation.walk import walk_prompt
from dycoke_jax.model import Model
from dycoke_jax.models.llava import Llava
from dycoke_jax.sharding import constrain_rows


@jax.jit(static_argnames="layout")
def prefill(
    model: Model,
    features: Features | None,
    text: TextIds,
    sampling: Sampling,
    limits: Limits,
    *,
    layout: Layout,
) -> DecodeState:
    """Runs the language model over B prompts and samples their first tokens, in one call.

    Args:
        model: the model.
        features: visual tokens of one clip a row, or None for prompts without video.
        text: token ids before and after the clip, in as many slots as the layout has.
        sampling: how each row samples its tokens.
        limits: when each row stops.
        layout: what is known about the batch (static), see ``layout.plan``.
    """
    logits, state = begin(model, features, text, limits, layout)
    return take_token(state, sample(logits, sampling, jnp.int32(0)), limits)


def begin(
    model: Model, features: Features | None, text: TextIds, limits: Limits, layout: Layout
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Reads B prompts; the arguments are those of ``prefill``.

    Returns:
        The logits of the first token, float32, and the state before it.
    """
    network, config = model.bind(), model.config
    features, text, limits = constrain_rows((features, text, limits), model.mesh)
    if features is None:
        visual = no_visual(config, layout.rows)
    else:
        tokens, frames, signals = features
        rows = all_rows(tokens, frames)
        if layout.tokens is not None:
            with jax.named_scope("token_stage"):
                rows = layout.tokens.select(tokens, frames, signals)
        newline = network.image_newline[...]
        visual = place_newlines(tokens, rows, newline, config.newline, config.frame_grid)
    read = read_prompt(network, visual, text, layout, int8_kv=model.kv == "int8")
    last = jnp.take_along_axis(read.states, read.last[:, None, None], axis=1)[:, 0]
    logits = network.logits(network.language_model.norm(last))
    state = start(visual, text, read.views, limits, layout.slots.generated)
    return logits, spread_on(state, model.mesh)


class _Sequence(NamedTuple):
    """The slots of the prompts as a group of layers reads them."""

    valid: Bool[Array, "B T"]
    positions: Int[Array, "B T"]
    is_token: Bool[Array, "B T"]
    """Slots that hold visual tokens."""
    places: Int[Array, "B T"]
    """As in ``View``."""


class PromptRead(NamedTuple):
    """Results of a pass over the prompts."""

    states: Float[Array, "B T D"]
    """Output of the last layer in the slots that it reads, before the final norm."""
    last: Int[Array, "B"]
    """Slot of the last token of each prompt."""
    views: list[View]
    """What each group of layers sees, with room for the generated tokens."""


def read_prompt(
    network: Llava, visual: Visual, text: TextIds, layout: Layout, *, int8_kv: bool = False
) -> PromptRead:
    """Runs the language model over all slots of the prompts.

    Args:
        network: the network with its weights.
        visual: the visual slots.
        text: as given to ``prefill``.
        layout: as given to ``prefill``.
        int8_kv: whether the caches are left as int8. The prompts themselves are read with the keys
            and values as computed.
    """
    language, generated = network.language_model, layout.slots.generated
    x, sequence = constrain_rows(_assemble(network, visual, text), network.mesh)
    views = []
    scores, before = jnp.zeros(visual.valid.shape), layout.slots
    for group in layout.groups:
        if group.prompt is not None:
            with jax.named_scope("prompt_stage"):
                x, sequence = _select(group.prompt, x, sequence, scores, before, group.slots)
        before = group.slots
        x, caches, inputs = walk_prompt(
            language, x, sequence.positions, sequence.valid, group.first, group.stop
        )
        if int8_kv:
            caches = [cache.int8() for cache in caches]
        view = View(
            caches=[cache.pad(generated) for cache in caches],
            visible=jnp.pad(sequence.valid, ((0, 0), (0, generated))),
            is_token=jnp.pad(sequence.is_token, ((0, 0), (0, generated))),
            places=jnp.pad(sequence.places, ((0, 0), (0, generated))),
            refreshed=jnp.zeros(x.shape[0], bool),
        )
        if group.cache is not None:
            view = group.cache.start(view, group.slots, scores)
        views.append(view)
        last = group.slots.prefix + group.slots.visual + text.question_length - 1
        if group is not layout.groups[-1]:
            # Of the layer before the next group, one row of the attention weights.
            layer = language.layers[group.stop - 1]
            position = jnp.take_along_axis(sequence.positions, last[:, None], axis=1)
            of_last = jnp.take_along_axis(inputs[-1], last[:, None, None], axis=1)
            rope = language.rope(position)
            weights = layer.attention_of(of_last, rope, caches[-1], sequence.valid)
            scores = weights[:, :, group.slots.visual_range].mean(1)
    return PromptRead(x, last, views)


def _assemble(
    network: Llava, visual: Visual, text: TextIds
) -> tuple[Float[Array, "B T D"], _Sequence]:
    """The embeddings of the prompts, and their slots as they enter the language model."""
    slot = jnp.arange(text.question.shape[1])
    prompt = assemble(
        network.language_model.embed_tokens,
        text.prefix,
        text.prefix_length,
        visual,
        text.question,
        question_valid=slot < text.question_length[:, None],
        offset=jnp.broadcast_to(slot, text.question.shape),
    )
    around = ((0, 0), (text.prefix.shape[1], text.question.shape[1]))
    return prompt.embeds, _Sequence(
        valid=prompt.valid,
        positions=prompt.positions,
        is_token=jnp.pad(visual.valid & visual.is_visual, around),
        places=jnp.pad(visual.places, around),
    )


def _select(
    stage: PromptStage,
    x: Float[Array, "B T D"],
    sequence: _Sequence,
    scores: Float[Array, "B visual"],
    before: Slots,
    after: Slots,
) -> tuple[Float[Array, "B _T D"], _Sequence]:
    """Leaves the visual slots that a prompt stage selects, and the newlines, in their order.

    Args:
        stage: the stage.
        x: states of all slots.
        sequence: the slots.
        scores: as ``PromptStage.select`` wants them.
        before: sizes of the segments so far.
        after: sizes of the segments from now on.
    """
    visual = before.visual_range
    states, valid = x[:, visual], sequence.valid[:, visual]
    is_token = sequence.is_token[:, visual]
    rows = stage.select(states, scores, is_token, before.tokens)
    row = jnp.arange(x.shape[0])[:, None]
    rows_valid = jnp.ones(rows.places.shape, bool) if rows.valid is None else rows.valid
    # Empty rows are written out of range, which is nowhere.
    places = jnp.where(rows_valid, rows.places, before.visual)
    selected = jnp.zeros(valid.shape, bool).at[row, places].set(True, mode="drop")
    if rows.embeds is not None:
        x = x.at[row, places + visual.start].set(rows.embeds.astype(x.dtype), mode="drop")
    kept = jnp.where(is_token, selected, valid)
    first = jnp.argsort(~kept, axis=1, stable=True)[:, : after.visual]
    kept = jnp.take_along_axis(kept, first, axis=1)

    def take(of_slots: Array) -> Array:
        index = first if of_slots.ndim == 2 else first[:, :, None]
        of_visual = jnp.take_along_axis(of_slots[:, visual], index, axis=1)
        parts = [of_slots[:, : visual.start], of_visual, of_slots[:, visual.stop :]]
        return jnp.concatenate(parts, axis=1)

    fewer = _Sequence(*map(take, sequence))
    return take(x), fewer._replace(
        valid=fewer.valid.at[:, after.visual_range].set(kept),
        is_token=fewer.is_token.at[:, after.visual_range].min(kept),
    )


def start(
    visual: Visual, text: TextIds, views: list[View], limits: Limits, generated: int
) -> DecodeState:
    """The state before the first token."""
    batch = visual.valid.shape[0]
    tokens = (visual.valid & visual.is_visual).sum(1, dtype=jnp.int32)
    newlines = (visual.valid & ~visual.is_visual).sum(1, dtype=jnp.int32)
    return DecodeState(
        step=jnp.int32(0),
        token=jnp.zeros(batch, jnp.int32),
        tokens=jnp.zeros((batch, generated), jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        done=limits.max_new_tokens <= 0,
        stopped=jnp.zeros(batch, bool),
        length=text.prefix_length + tokens + newlines + text.question_length,
        visual=tokens,
        newlines=newlines,
        views=views,
        attended=jnp.zeros((batch, generated), jnp.int32),
        refreshed=jnp.zeros((batch, generated), bool),
    )
