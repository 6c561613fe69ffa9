"""Cross entropy and accuracy of the answers of a packed batch, and auxiliary losses."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from dycoke_jax.generation.assemble import Visual, all_rows, assemble, place_newlines
from dycoke_jax.generation.walk import walk
from dycoke_jax.model import Model
from dycoke_jax.models.layers import EachLayer, unchanged
from dycoke_jax.models.llava import Llava, Params
from dycoke_jax.models.qwen2 import Qwen2Layer, Rope
from dycoke_jax.sharding import DATA, MODEL, constrain, constrain_rows, data_size, model_size
from dycoke_jax.training.batches import Batch
from dycoke_jax.training.token_dropping import TokenSelection

MAX_PARTS = 64
"""Number of parts of a row that ``Scores.right`` and ``Scores.asked`` cover.

The tokens of further parts count in the loss only.
"""


class Forward(NamedTuple):
    """The forward pass over a batch, as an auxiliary loss gets it.

    The T slots of a row are the prefix, the visual slots, and the Q slots of questions and answers.
    """

    network: Llava
    """The network, with its weights in the dtype of the computation."""
    params: Params
    """The weights as they were given to ``score_answers``, those of auxiliary losses included."""
    rope: Rope
    """Rotations of the T slots, see ``Qwen2.rope``."""
    valid: Bool[Array, "B T"]
    """Slots that hold a token."""
    parts: Int[Array, "B T"]
    """Part of each slot, see ``ops.attention``; 0 for the prefix, visual slots and empty slots."""
    visual: Visual
    """The visual segment: embeddings, and which slots are valid or newlines."""
    visual_slots: slice
    """Range of the visual slots among the T slots."""
    kept: Int[Array, "B M"]
    """Places of the kept visual tokens among the F * N tokens of a clip."""
    is_answer: Bool[Array, "B Q"]
    """Answer tokens, see ``batches.Batch``."""


@runtime_checkable
class AuxiliaryLoss(Protocol):
    """A loss on the states of some decoder layers that is added to the loss of the answers.

    It is hashable, because ``train_step`` takes it as a static argument.
    """

    def __hash__(self) -> int: ...

    def read(
        self, number: int, layer: Qwen2Layer, x: Float[Array, "B T D"], forward: Forward
    ) -> Any:
        """Computes what the loss needs from the input of one decoder layer.

        Args:
            number: index of the layer, from 0.
            layer: the layer.
            x: the input of the layer, in the dtype of the computation.
            forward: the forward pass over the batch.

        Returns:
            A pytree for ``loss``, or None if the loss does not use this layer.
        """

    def loss(self, reads: Sequence[Any], forward: Forward, targets: Any) -> Float[Array, ""]:
        """Computes the loss, its weight included, as a float32 scalar.

        Args:
            reads: the results of ``read`` that are not None, in the order of the layers.
            forward: the forward pass over the batch.
            targets: targets for the batch (``sources.StepData.targets``, without the accumulation
                axis).
        """


class Scores(NamedTuple):
    """Loss and accuracy of the answers of a batch."""

    loss: Float[Array, ""]
    """Cross entropy in nats, summed over the answer tokens, in float32."""
    tokens: Int[Array, ""]
    """Number of answer tokens."""
    right_tokens: Int[Array, ""]
    """Number of answer tokens that have the highest logit."""
    auxiliary: Float[Array, ""]
    """Sum of the weighted auxiliary losses, in float32; it is not part of ``loss``."""
    right: Bool[Array, "B parts"]
    """Whether every token of the answers of a part has the highest logit, so that greedy decoding
    would generate exactly these answers. The axis covers parts 1 to ``MAX_PARTS``."""
    asked: Bool[Array, "B parts"]
    """Whether a row has the part, that is, a question with this number."""


def score_answers(
    model: Model,
    batch: Batch,
    *,
    dropping: TokenSelection | None = None,
    key: Array | None = None,
    auxiliary: Sequence[AuxiliaryLoss] = (),
    targets: Any = None,
    rematerialise: bool = False,
) -> Scores:
    """Computes loss and accuracy of the answers of a batch; differentiable in the weights.

    Args:
        model: the model; its weights hold those of the auxiliary losses too.
        batch: a batch without an accumulation axis.
        dropping: which visual tokens are dropped. None: all are kept.
        key: random key; needed if ``dropping`` draws at random.
        auxiliary: auxiliary losses to compute.
        targets: pytree of targets for the auxiliary losses.
        rematerialise: compute the results of each layer again for the gradient instead of storing
            them.

    Returns:
        The scores; ``loss`` and ``auxiliary`` are differentiable.
    """
    # Each weight is converted once, so that its gradient is summed in the dtype of the computation.
    params = {path: x.astype(model.dtype) for path, x in model.params.items()}
    network = replace(model, params=params).bind()
    each_layer: EachLayer = unchanged
    if rematerialise:
        each_layer = jax.checkpoint
    elif model.fsdp:
        each_layer = partial(jax.checkpoint, policy=_is_kept)
    visual, kept = _visual(network, batch, dropping, key, each_layer)

    language = network.language_model
    x, valid, positions = assemble(
        language.embed_tokens,
        batch.prefix,
        batch.prefix_length,
        visual,
        batch.ids,
        batch.part > 0,
        batch.offset,
    )
    x, valid, positions = constrain_rows((x, valid, positions), model.mesh)
    slots = slice(batch.prefix.shape[1], batch.prefix.shape[1] + visual.valid.shape[1])
    parts = jnp.pad(batch.part, ((0, 0), (slots.stop, 0)))
    rope = language.rope(positions)
    forward = Forward(
        network, model.params, rope, valid, parts, visual, slots, kept, batch.is_answer
    )

    def visit(
        number: int, layer: Qwen2Layer, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        reads = [one.read(number, layer, x, forward) for one in auxiliary]
        run = each_layer(lambda x: layer.prefill(x, rope, valid, parts)[0])
        return run(x), reads

    x, reads = walk(language, x, visit)
    added = jnp.float32(0)
    for one, of_one in zip(auxiliary, zip(*reads, strict=True), strict=True):
        added += one.loss([read for read in of_one if read is not None], forward, targets)
    logits = network.logits(language.norm(x[:, slots.stop :]))

    # The logits of a slot predict the next slot. A part begins with its question, so the slot
    # before an answer token always belongs to the same part.
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


def _is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a result is kept for the gradient: all but gathered weights, which are gathered anew.

    They are the only results with a derivative rule of their own (``sharding.gathered``).
    """
    return primitive.name != "custom_vjp_call"


def _count_by_part(flags: Bool[Array, "B Q"], part: Int[Array, "B Q"]) -> Int[Array, "B parts"]:
    numbers = jnp.arange(1, MAX_PARTS + 1)
    return (flags[:, :, None] & (part[:, :, None] == numbers)).sum(1, dtype=jnp.int32)


def _visual(
    network: Llava,
    batch: Batch,
    dropping: TokenSelection | None,
    key: Array | None,
    each_layer: EachLayer,
) -> tuple[Visual, Int[Array, "B M"]]:
    """The visual segment, and the places of its visual tokens among those of the clip."""
    features = _features(network, batch.frames, each_layer)
    counts = jnp.where(batch.has_clip, features.shape[1], 0)
    kept = all_rows(features, counts)
    if dropping is not None:
        # The selection of tokens is discrete and has no gradient.
        kept = dropping.select(jax.lax.stop_gradient(features), counts, key)
    config, newline = network.config, network.image_newline[...]
    visual = place_newlines(features, kept, newline, config.newline, config.frame_grid)
    # Slots that are not valid are never attended to and take no position, so that a row without a
    # clip is a row of text.
    return visual._replace(valid=visual.valid & batch.has_clip[:, None]), kept.places


def _features(
    network: Llava,
    clips: UInt8[Array, "B F height width 3"],
    each_layer: EachLayer,
) -> Float[Array, "B F N D"]:
    """The visual tokens of each frame.

    On a mesh the devices that share rows each encode an equal part of their frames.
    """
    rows, frames = clips.shape[:2]
    shards, mesh = data_size(network.mesh), network.mesh
    folded = clips.reshape(shards, rows // shards * frames, *clips.shape[2:])
    if short := -folded.shape[1] % model_size(mesh):
        folded = jnp.pad(folded, ((0, 0), (0, short), (0, 0), (0, 0), (0, 0)))
    folded = constrain(folded, mesh, DATA, MODEL)
    flat = constrain(folded.reshape(-1, *clips.shape[2:]), mesh, (DATA, MODEL))
    features = network.encode(flat, each_layer)
    # The language model needs all tokens of a row on each device that holds the row.
    features = constrain(features.reshape(*folded.shape[:2], *features.shape[1:]), mesh, DATA)
    features = features[:, : rows // shards * frames]
    return constrain(features.reshape(rows, frames, *features.shape[2:]), mesh, DATA)
