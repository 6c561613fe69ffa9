"""Prefill: selects visual tokens, fills the key/value caches, gives the first token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.cache import KV
from dycoke_jax.compression.protocol import DecodePruning
from dycoke_jax.config import LlavaConfig
from dycoke_jax.generation.assemble import TextIds, Visual, place_newlines, text_valid
from dycoke_jax.generation.layout import Layout
from dycoke_jax.generation.sampling import Sampling, sample
from dycoke_jax.generation.state import DecodeState, Limits, take_token
from dycoke_jax.generation.walk import walk_prompt
from dycoke_jax.model import Model
from dycoke_jax.models.llava import Llava
from dycoke_jax.models.qwen2 import positions_of


@jax.jit(static_argnames="layout")
def prefill(
    model: Model,
    features: Float[Array, "B F N D"] | None,
    text: TextIds,
    sampling: Sampling,
    limits: Limits,
    *,
    layout: Layout,
) -> DecodeState:
    """Runs the language model over B prompts and samples their first tokens, in one call.

    Args:
        model: the model.
        features: pooled visual tokens of one clip a row, or None for prompts without video.
        text: token ids before and after the clip.
        sampling: how each row samples its tokens.
        limits: when each row stops.
        layout: what is known about the batch (static), see ``layout.plan``.
    """
    logits, state = begin(model, features, text, limits, layout)
    return take_token(state, sample(logits, sampling, jnp.int32(0)), limits)


def begin(
    model: Model,
    features: Float[Array, "B F N D"] | None,
    text: TextIds,
    limits: Limits,
    layout: Layout,
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Reads B prompts; the arguments are those of ``prefill``.

    Returns:
        The logits of the first token, float32, and the state before it.
    """
    network, config = model.bind(), model.config
    compression, pruning = layout.compression, layout.pruning
    kept = None
    if features is None:
        visual = no_visual(config, text.question.shape[0])
    else:
        kept = None if compression is None else compression.select(features)
        newline = network.image_newline[...]
        visual = place_newlines(features, kept, newline, config.newline, config.frame_grid)
    read = read_prompt(network, visual, text)
    last = read.valid.shape[1] - text.question.shape[1] + text.question_length - 1
    logits = network.logits(jnp.take_along_axis(read.states, last[:, None, None], axis=1)[:, 0])
    scores = None
    if pruning is not None:
        attended = last_attention(network, read, pruning.layer - 1, last)
        first = text.prefix.shape[1]
        scores = attended[:, :, first : first + visual.valid.shape[1]].mean(1)
    return logits, start(
        read.caches, read.valid, visual, kept, scores, limits, pruning, layout.slots.generated
    )


class PromptRead(NamedTuple):
    """Results of a pass over the prompts."""

    states: Float[Array, "B T D"]
    """States after the final norm."""
    caches: list[KV]
    valid: Bool[Array, "B T"]
    """Slots that hold a token."""
    inputs: list[Float[Array, "B T D"]]
    """Input of each layer; the compiler drops those that nothing reads."""


def read_prompt(network: Llava, visual: Visual, text: TextIds) -> PromptRead:
    """Runs the language model over all slots of the prompts."""
    embed = network.language_model.embed_tokens
    prefix, question = embed(text.prefix), embed(text.question)
    x = jnp.concatenate([prefix, visual.embeds.astype(prefix.dtype), question], axis=1)
    prefix_valid, question_valid = text_valid(text)
    valid = jnp.concatenate([prefix_valid, visual.valid, question_valid], axis=1)
    x, caches, inputs = walk_prompt(network.language_model, x, positions_of(valid), valid)
    return PromptRead(x, caches, valid, inputs)


def last_attention(
    network: Llava, read: PromptRead, layer: int, last: Int[Array, "B"]
) -> Float[Array, "B H T"]:
    """Attention weights, float32, of the last token of each prompt in a layer."""
    language = network.language_model
    position = jnp.take_along_axis(positions_of(read.valid), last[:, None], axis=1)
    x = jnp.take_along_axis(read.inputs[layer], last[:, None, None], axis=1)
    rope = language.rope(position)
    return language.layers[layer].attention_of(x, rope, read.caches[layer], read.valid)


def start(
    caches: list[KV],
    valid: Bool[Array, "B T"],
    visual: Visual,
    kept: Int[Array, "B M"] | None,
    scores: Float[Array, "B visual"] | None,
    limits: Limits,
    pruning: DecodePruning | None,
    generated: int,
) -> DecodeState:
    """The state before the first token: caches with room for generated tokens, and pruning."""
    batch = valid.shape[0]
    length = valid.sum(1, dtype=jnp.int32)
    caches = [cache.pad(generated) for cache in caches]
    valid = jnp.pad(valid, ((0, 0), (0, generated)))
    pruned = None
    if pruning is not None:
        assert scores is not None
        pruned = pruning.start(caches[pruning.layer :], valid, visual.is_visual, scores)
        caches = caches[: pruning.layer]
    return DecodeState(
        step=jnp.int32(0),
        token=jnp.zeros(batch, jnp.int32),
        tokens=jnp.zeros((batch, generated), jnp.int32),
        count=jnp.zeros(batch, jnp.int32),
        done=limits.max_new_tokens <= 0,
        stopped=jnp.zeros(batch, bool),
        length=length,
        visual=(visual.valid & visual.is_visual).sum(1, dtype=jnp.int32),
        newlines=(visual.valid & ~visual.is_visual).sum(1, dtype=jnp.int32),
        kept=kept,
        caches=caches,
        valid=valid,
        pruned=pruned,
        attended=jnp.zeros((batch, generated), jnp.int32),
        refreshed=jnp.zeros((batch, generated), bool),
    )


def no_visual(config: LlavaConfig, batch: int) -> Visual:
    """The empty visual segment of prompts without video."""
    empty = jnp.zeros((batch, 0), bool)
    return Visual(jnp.zeros((batch, 0, config.text.hidden_size)), empty, empty)
