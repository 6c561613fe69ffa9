"""Floating-point operations and bytes that each stage needs at least, from shapes alone.

Counted are the matrix products, with a multiplication and an addition as two operations, and causal
attention without what lies above the diagonal. Not counted are norms, activations, softmax, rotary
embedding and pooling. Bytes are those of weights as they are stored, inputs, caches and results,
each read or written once, as if what lies between stayed in the processor. So both are lower
bounds. Empty slots of a layout are counted, because the programs compute them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dycoke_jax.config import LlavaConfig
from dycoke_jax.generation.layout import Layout
from dycoke_jax.models.llava import Params


@dataclass(frozen=True)
class Cost:
    """What a stage needs at least.

    Attributes:
        flops: floating-point operations of its matrix products.
        bytes: bytes that are read from memory and written to it.
    """

    flops: int
    bytes: int


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights that the stages read.

    Attributes:
        vision: vision tower and projector.
        language: decoder layers, final norm, and the head or the embedding that stands for it.
    """

    vision: int
    language: int


def weight_bytes(params: Params) -> WeightBytes:
    """Counts the bytes of weights as they are stored, in whatever dtypes."""
    head = "lm_head." if "lm_head.weight" in params else "language_model.embed_tokens."

    def of(*prefixes: str) -> int:
        return sum(array.nbytes for path, array in params.items() if path.startswith(prefixes))

    layers = ("language_model.layers.", "language_model.norm.")
    return WeightBytes(of("vision_tower.", "projector."), of(*layers, head))


def vision(config: LlavaConfig, frames: int, weights: int, size: int) -> Cost:
    """The vision tower, projector and pooling.

    Args:
        config: the model.
        frames: number of frames of all clips together.
        weights: ``WeightBytes.vision``.
        size: bytes of a number of the computation.
    """
    tower, width = config.vision, config.text.hidden_size
    patches, pixels = tower.grid**2, 3 * tower.patch_size**2
    layer = 4 * tower.hidden_size**2 + 2 * tower.hidden_size * tower.intermediate_size
    attention = 4 * patches**2 * tower.hidden_size
    projector = tower.hidden_size * width + width**2
    products = pixels * tower.hidden_size + tower.num_layers * layer + projector
    flops = frames * (2 * patches * products + tower.num_layers * attention)
    moved = 3 * tower.image_size**2 + config.tokens_per_frame * width * size
    return Cost(flops, weights + frames * moved)


def token_stage(config: LlavaConfig, layout: Layout, size: int) -> Cost:
    """A stage before the language model: it reads all visual tokens and writes those that go on.

    What it computes depends on the method, and is little beside the bytes: no operation is counted.

    Args:
        config: the model.
        layout: the layout of the batch.
        size: bytes of a number of the computation.
    """
    tokens = layout.frames * config.tokens_per_frame + layout.slots.visual
    return Cost(0, layout.rows * tokens * config.text.hidden_size * size)


def prefill(config: LlavaConfig, layout: Layout, weights: int, size: int) -> Cost:
    """The language model over the prompts, with the token stage before it and the head behind it.

    Args:
        config: the model.
        layout: the layout of the batch.
        weights: ``WeightBytes.language``.
        size: bytes of a number of the computation.
    """
    text, rows = config.text, layout.rows
    flops = rows * 2 * text.vocab_size * text.hidden_size
    inputs = layout.frames * config.tokens_per_frame + layout.slots.prefix + layout.slots.question
    numbers = rows * inputs * text.hidden_size
    for group in layout.groups:
        layers, slots = group.stop - group.first, group.slots.prompt
        attention = 4 * text.num_heads * text.head_dim * slots * (slots + 1) // 2
        flops += layers * rows * (2 * slots * _products(config) + attention)
        numbers += layers * rows * slots * 2 * text.num_kv_heads * text.head_dim
    return Cost(flops, weights + numbers * size)


def decode_step(
    config: LlavaConfig, rows: int, slots: Sequence[int], weights: int, caches: int
) -> Cost:
    """One step of decoding.

    Args:
        config: the model.
        rows: rows of the batch.
        slots: for each layer, the slots of the key/value cache that it reads.
        weights: ``WeightBytes.language``.
        caches: bytes of these slots, of all rows and layers.
    """
    text = config.text
    products = text.num_layers * _products(config) + text.vocab_size * text.hidden_size
    attention = 4 * text.num_heads * text.head_dim * sum(slots)
    return Cost(rows * (2 * products + attention), weights + caches)


def _products(config: LlavaConfig) -> int:
    """Weights of the matrices of a decoder layer."""
    text = config.text
    heads = 2 * text.num_heads + 2 * text.num_kv_heads
    return text.hidden_size * (heads * text.head_dim + 3 * text.intermediate_size)
