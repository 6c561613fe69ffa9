"""The static shapes of a batch, known before anything runs."""

from dataclasses import dataclass, replace
from functools import lru_cache

from dycoke_jax.cache import Slots
from dycoke_jax.compression.protocol import (
    CacheStage,
    Compression,
    Compressor,
    PromptStage,
    TokenStage,
)
from dycoke_jax.config import LlavaConfig
from dycoke_jax.generation.assemble import newline_slots

PROMPT_MULTIPLE = 128
"""The slots of a prompt are a multiple of this: attention kernels work in blocks of 128 keys."""


@dataclass(frozen=True)
class Group:
    """Decoder layers that follow each other and attend to the same slots.

    Attributes:
        first: number of the first layer, from 0.
        stop: number of the layer behind the last.
        slots: sizes of the segments of their key/value caches after prefill.
        prompt: what drops visual slots of the prompt before these layers; None: nothing.
        cache: what chooses among the slots while decoding; None: nothing.
    """

    first: int
    stop: int
    slots: Slots
    prompt: PromptStage | None = None
    cache: CacheStage | None = None


@dataclass(frozen=True)
class Layout:
    """All that is known about a batch before it runs: the static argument of its programs.

    Attributes:
        rows: rows of the batch (B).
        frames: the largest number of frames of a clip (F); 0 for prompts without video.
        tokens: what drops or merges visual tokens before the language model; None: nothing.
        groups: the layers of the language model. The plain model has one group; a group more begins
            at each layer where a stage acts.
    """

    rows: int
    frames: int
    tokens: TokenStage | None
    groups: tuple[Group, ...]

    @property
    def slots(self) -> Slots:
        """Sizes of the segments of the prompt as it enters the language model."""
        return self.groups[0].slots


@lru_cache(maxsize=1024)
def plan(
    config: LlavaConfig,
    rows: int,
    frames: int,
    prefix: int,
    question: int,
    generated: int,
    compression: Compressor | None,
) -> Layout:
    """The layout of a batch.

    Args:
        config: the model.
        rows: rows of the batch.
        frames: the largest number of frames of a clip; 0 for prompts without video.
        prefix: slots that the prefix needs.
        question: slots that the question needs; the layout may have more, see ``PROMPT_MULTIPLE``.
        generated: slots for generated tokens.
        compression: method and settings, or None for the plain model.
    """
    stages = None if compression is None or frames == 0 else compression.stages
    tokens = None if stages is None else stages.tokens
    count, newlines = frames * config.tokens_per_frame, 0
    if frames:
        newlines = newline_slots(config.newline, config.frame_grid, frames)
    if tokens is not None:
        count = tokens.most_rows(frames, config.tokens_per_frame)
    question += -(prefix + count + newlines + question) % PROMPT_MULTIPLE
    slots = Slots(prefix, count + newlines, question, generated, newlines)
    groups = group_layers(config.text.num_layers, slots, stages or Compression())
    return Layout(rows, frames, tokens, groups)


def group_layers(layers: int, slots: Slots, stages: Compression) -> tuple[Group, ...]:
    """Groups the layers of the language model by what they attend to.

    Args:
        layers: number of layers.
        slots: sizes of the segments of the prompt as it enters the language model.
        stages: what acts between and in the layers.
    """
    groups = [Group(0, layers, slots)]
    if stages.prompt is not None:
        layer, whole = stages.prompt.layer, groups[-1]
        visual = stages.prompt.most_rows(slots.tokens) + slots.newlines
        fewer = replace(slots, visual=visual)
        groups = [
            replace(whole, stop=layer),
            replace(whole, first=layer, slots=fewer, prompt=stages.prompt),
        ]
    if stages.cache is not None:
        layer, last = stages.cache.layer, groups[-1]
        pruned = replace(last, first=layer, prompt=None, cache=stages.cache)
        groups = [*groups[:-1], replace(last, stop=layer), pruned]
    return tuple(groups)
