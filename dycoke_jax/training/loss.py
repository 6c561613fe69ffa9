"""Cross entropy of the answers, and which of them are right, for packed batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.config import LlavaConfig
from dycoke_jax.generation.assemble import Visual, place_newlines
from dycoke_jax.models.llava import Llava, Params, bind
from dycoke_jax.models.qwen2 import positions_of
from dycoke_jax.training.batches import Batch
from dycoke_jax.training.foresight import foresight_loss, visual_attention
from dycoke_jax.training.watching import DEPTH, READERS, fact_loss

FACTS_WEIGHT, FORESIGHT_WEIGHT = 0.5, 0.5
"""Of what is learned beside the answers, in the loss."""


@dataclass(frozen=True)
class Thinning:
    """Which visual tokens a model is trained with.

    Attributes:
        k: as temporal token merging with this share keeps them (see ``DyCoke.k``).
        at_random: as many tokens, but drawn at random.
        pruned_layer: layer from which they are to be pruned while decoding (``DyCoke.layer``): the
            one before it learns to attend to what the later ones read, see ``foresight``. 0: none.
    """

    k: float
    at_random: bool = False
    pruned_layer: int = 0


class Scores(NamedTuple):
    """What a batch's answers were worth."""

    loss: Float[Array, ""]
    """Cross entropy in nats, summed over tokens."""
    tokens: Int[Array, ""]
    right_tokens: Int[Array, ""]
    beside: Float[Array, ""]
    """Losses of what is learned beside the answers (``watching.fact_loss`` where the batch has
    facts, ``foresight_loss`` for a pruned layer), weighted."""
    right: Bool[Array, "B parts"]
    """Whether every token of a part's answer was the most likely one, from part 1 on: greedy
    decoding would then have said just this answer."""
    asked: Bool[Array, "B parts"]
    """Which parts there are."""


def score_answers(
    config: LlavaConfig,
    params: Params,
    batch: Batch,
    *,
    thinning: Thinning | None = None,
    key: Array | None = None,
    dtype: DTypeLike = jnp.float32,
    rematerialise: bool = False,
) -> Scores:
    """Runs the model over a batch, gradients included if asked for.

    Args:
        config: the model.
        params: its weights.
        batch: without an accumulation axis.
        thinning: visual tokens to leave out; None keeps all.
        key: of random thinning.
        dtype: of the computation; softmax and loss are in float32.
        rematerialise: compute each layer again for the gradient instead of storing it.
    """
    model = bind(config, {path: x.astype(dtype) for path, x in params.items()})
    again = jax.checkpoint if rematerialise else lambda function: function
    visual, facts = _visual(model, batch, thinning, key, again)

    embed = model.language_model.embed_tokens
    x = jnp.concatenate([embed(batch.prefix), visual.embeds, embed(batch.ids)], axis=1)
    prefix_valid = jnp.arange(batch.prefix.shape[1]) < batch.prefix_length[:, None]
    shared = jnp.concatenate([prefix_valid, visual.valid], axis=1)
    valid = jnp.concatenate([shared, batch.part > 0], axis=1)
    before = shared.sum(1, keepdims=True)
    positions = jnp.concatenate([positions_of(shared), before + batch.offset], axis=1)
    parts = jnp.pad(batch.part, ((0, 0), (shared.shape[1], 0)))
    rope = model.language_model.rope(positions)
    first, pruned_layer = batch.prefix.shape[1], thinning.pruned_layer if thinning else 0
    slots = slice(first, shared.shape[1])
    beside, read = jnp.float32(0), []
    for number, layer in enumerate(model.language_model.layers):
        if pruned_layer and number >= pruned_layer - 1:
            read.append(visual_attention(layer, x, rope, valid, parts, slots, slots.stop))
        x = again(lambda x, layer=layer: layer.prefill(x, rope, valid, parts)[0])(x)
        if facts is not None and number == DEPTH - 1:
            states = model.language_model.norm(x[:, first : first + facts.shape[1]])
            beside += FACTS_WEIGHT * fact_loss(states, params[READERS], facts)
    if read:
        early, late = read[0], jnp.stack(read[1:])
        loss = foresight_loss(early, late, visual.is_visual & visual.valid, batch.is_answer)
        beside += FORESIGHT_WEIGHT * loss
    logits = model.logits(model.language_model.norm(x[:, shared.shape[1] :]))

    # A slot predicts the next one; an answer never begins its part, so the two are of one part.
    target, wanted = batch.ids[:, 1:], batch.is_answer[:, 1:]
    scores = jax.nn.log_softmax(logits[:, :-1])
    likely = jnp.take_along_axis(scores, target[:, :, None], axis=2)[:, :, 0]
    right = scores.argmax(-1) == target
    wrong = _count_by_part(wanted & ~right, batch.part[:, 1:])
    asked = _count_by_part(wanted, batch.part[:, 1:])
    return Scores(
        loss=-(likely * wanted).sum(),
        tokens=wanted.sum(dtype=jnp.int32),
        beside=beside,
        right_tokens=(right & wanted).sum(dtype=jnp.int32),
        right=(wrong == 0) & (asked > 0),
        asked=asked > 0,
    )


MAX_PARTS = 64
"""Parts of a row that are told apart in ``Scores``."""


def _count_by_part(flags: Bool[Array, "B Q"], part: Int[Array, "B Q"]) -> Int[Array, "B parts"]:
    numbers = jnp.arange(1, MAX_PARTS + 1)
    return (flags[:, :, None] & (part[:, :, None] == numbers)).sum(1, dtype=jnp.int32)


def _visual(
    model: Llava,
    batch: Batch,
    thinning: Thinning | None,
    key: Array | None,
    again: Callable[[Callable], Callable],
) -> tuple[Visual, Int[Array, "B V facts"] | None]:
    rows, frames = batch.frames.shape[:2]
    features = again(model.encode)(batch.frames.reshape(rows * frames, *batch.frames.shape[2:]))
    features = features.reshape(rows, frames, *features.shape[1:])
    kept = None
    if thinning is not None:
        # Which tokens stay is a choice, not something to learn by.
        kept = DyCoke(k=thinning.k).merge(jax.lax.stop_gradient(features))
        if thinning.at_random and kept is not None:
            assert key is not None
            places = jax.random.uniform(key, (rows, frames * features.shape[2]))
            kept = jnp.sort(jax.lax.top_k(places, kept.shape[1])[1], axis=1)
    config = model.config
    newline = model.image_newline[...]
    visual = place_newlines(features, kept, newline, config.newline, config.frame_grid)
    facts = batch.facts
    if facts is not None:
        facts = facts.reshape(rows, -1, facts.shape[-1])
        if kept is not None:
            facts = jnp.take_along_axis(facts, kept[:, :, None], axis=1)
    return visual, facts
