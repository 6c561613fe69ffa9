"""Cross entropy of the answers, and which of them are right, for packed batches."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.config import LlavaConfig
from dycoke_jax.generation.assemble import Visual, place_newlines
from dycoke_jax.models.llava import Llava, Params, bind
from dycoke_jax.models.qwen2 import Qwen2Layer, Rope, positions_of
from dycoke_jax.training.batches import Batch
from dycoke_jax.training.token_dropping import TokenDropping

MAX_PARTS = 64
"""Questions of a row that are told apart in ``Scores``."""


class Forward(NamedTuple):
    """What an auxiliary loss may know of the pass over a batch."""

    model: Llava
    """With the weights in the dtype of the computation."""
    params: Params
    """As they were given, entries included that are not the model's own."""
    rope: Rope
    valid: Bool[Array, "B T"]
    parts: Int[Array, "B T"]
    """See ``ops.attention``; questions and answers begin where the visual slots end."""
    visual: Visual
    visual_slots: slice
    kept: Int[Array, "B M"] | None
    """Visual tokens that were kept, as indices into the F * N of a clip; None: all."""
    is_answer: Bool[Array, "B Q"]


@runtime_checkable
class AuxiliaryLoss(Protocol):
    """A loss on the states of some layers, added to that of the answers.

    Hashable, because training steps are compiled for it.
    """

    def __hash__(self) -> int: ...

    def read(
        self, number: int, layer: Qwen2Layer, x: Float[Array, "B T D"], forward: Forward
    ) -> Any:
        """What the loss needs to know of the input ``x`` of decoder layer ``number``, or None."""

    def loss(self, reads: Sequence[Any], forward: Forward, targets: Any) -> Float[Array, ""]:
        """The weighted loss.

        Args:
            reads: what ``read`` returned and was not None, in the order of the layers.
            forward: the pass over the batch.
            targets: what the source gives besides the batch (``sources.StepData.targets``).
        """


class Scores(NamedTuple):
    """What a batch's answers were worth."""

    loss: Float[Array, ""]
    """Cross entropy in nats, summed over answer tokens."""
    tokens: Int[Array, ""]
    """Answer tokens."""
    right_tokens: Int[Array, ""]
    """Answer tokens that were the most likely ones."""
    auxiliary: Float[Array, ""]
    """Sum of the auxiliary losses."""
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
    dropping: TokenDropping | None = None,
    key: Array | None = None,
    auxiliary: Sequence[AuxiliaryLoss] = (),
    targets: Any = None,
    dtype: DTypeLike = jnp.float32,
    rematerialise: bool = False,
) -> Scores:
    """Runs the model over a batch; differentiable in ``params``.

    Args:
        config: the model.
        params: its weights, and those of auxiliary losses.
        batch: without an accumulation axis.
        dropping: visual tokens to drop; None keeps all.
        key: random key of dropping at random; not needed otherwise.
        auxiliary: losses to be added to that of the answers.
        targets: what the auxiliary losses compare with, a pytree.
        dtype: of the computation; softmax and losses are in float32.
        rematerialise: compute each layer again for the gradient instead of storing it.
    """
    model = bind(config, {path: x.astype(dtype) for path, x in params.items()})
    maybe_rematerialised = jax.checkpoint if rematerialise else lambda function: function
    visual, kept = _visual(model, batch, dropping, key, maybe_rematerialised)

    embed = model.language_model.embed_tokens
    x = jnp.concatenate([embed(batch.prefix), visual.embeds, embed(batch.ids)], axis=1)
    prefix_valid = jnp.arange(batch.prefix.shape[1]) < batch.prefix_length[:, None]
    shared = jnp.concatenate([prefix_valid, visual.valid], axis=1)
    valid = jnp.concatenate([shared, batch.part > 0], axis=1)
    before = shared.sum(1, keepdims=True)
    positions = jnp.concatenate([positions_of(shared), before + batch.offset], axis=1)
    parts = jnp.pad(batch.part, ((0, 0), (shared.shape[1], 0)))
    rope = model.language_model.rope(positions)
    slots = slice(batch.prefix.shape[1], shared.shape[1])
    forward = Forward(model, params, rope, valid, parts, visual, slots, kept, batch.is_answer)
    reads: list[list[Any]] = [[] for _ in auxiliary]
    for number, layer in enumerate(model.language_model.layers):
        for one, of_one in zip(auxiliary, reads, strict=True):
            if (read := one.read(number, layer, x, forward)) is not None:
                of_one.append(read)
        x = maybe_rematerialised(lambda x, layer=layer: layer.prefill(x, rope, valid, parts)[0])(x)
    added = jnp.float32(0)
    for one, of_one in zip(auxiliary, reads, strict=True):
        added += one.loss(of_one, forward, targets)
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
        auxiliary=added,
        right_tokens=(right & wanted).sum(dtype=jnp.int32),
        right=(wrong == 0) & (asked > 0),
        asked=asked > 0,
    )


def _count_by_part(flags: Bool[Array, "B Q"], part: Int[Array, "B Q"]) -> Int[Array, "B parts"]:
    numbers = jnp.arange(1, MAX_PARTS + 1)
    return (flags[:, :, None] & (part[:, :, None] == numbers)).sum(1, dtype=jnp.int32)


def _visual(
    model: Llava,
    batch: Batch,
    dropping: TokenDropping | None,
    key: Array | None,
    maybe_rematerialised: Callable[[Callable], Callable],
) -> tuple[Visual, Int[Array, "B M"] | None]:
    """The visual segment, and which visual tokens are in it (None: all)."""
    rows, frames = batch.frames.shape[:2]
    folded = batch.frames.reshape(rows * frames, *batch.frames.shape[2:])
    features = maybe_rematerialised(model.encode)(folded)
    features = features.reshape(rows, frames, *features.shape[1:])
    kept = None
    if dropping is not None:
        # Which tokens stay is a choice and has no gradient.
        kept = DyCoke(k=dropping.k).select(jax.lax.stop_gradient(features))
        if dropping.at_random and kept is not None:
            assert key is not None
            places = jax.random.uniform(key, (rows, frames * features.shape[2]))
            kept = jnp.sort(jax.lax.top_k(places, kept.shape[1])[1], axis=1)
    config = model.config
    newline = model.image_newline[...]
    return place_newlines(features, kept, newline, config.newline, config.frame_grid), kept
