"""Compiles the programs of requests before there are any."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jax.sharding import Mesh

from dycoke_jax.compilation import counted
from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.config import LlavaConfig
from dycoke_jax.engine.batch import empty_batch, layout_of, rows_for
from dycoke_jax.engine.requests import Decoding, Prepared
from dycoke_jax.generation.decode import decode
from dycoke_jax.generation.encode import encode
from dycoke_jax.generation.layout import Layout
from dycoke_jax.generation.prefill import prefill
from dycoke_jax.hosts import replicate
from dycoke_jax.inputs.prompts import Prompt
from dycoke_jax.model import Model
from dycoke_jax.progress import Progress


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up has done.

    Attributes:
        layouts: number of layouts, which are the sizes of batches that have programs of their own.
        compiled: programs that were compiled.
        found: programs that were found in the compilation cache on disk. Programs that the process
            had already count neither here nor there.
        seconds: wall time in seconds.
    """

    layouts: int
    compiled: int
    found: int
    seconds: float


def layouts_of(
    config: LlavaConfig,
    prompts: Iterable[Prompt],
    frames: Iterable[int],
    max_new_tokens: Iterable[int],
    batch: Iterable[int],
    compression: Compressor | None,
    mesh: Mesh | None = None,
) -> list[Layout]:
    """The layouts of batches of requests of all combinations of given sizes.

    Args:
        config: the model.
        prompts: token ids of prompts, of which the numbers alone count.
        frames: numbers of frames of clips; 0 for prompts without video.
        max_new_tokens: limits of answers.
        batch: numbers of requests that run together.
        compression: method and settings, or None for the plain model.
        mesh: the devices; None for a single one.

    Returns:
        Each layout once; those that take most memory come first.

    Raises:
        RequestError: if a combination does not fit into the model's positions.
        ConfigError: if the compression cannot work on this model or clip length.
    """
    side = config.vision.image_size
    layouts = set()
    for prompt, count, most, rows in product(prompts, frames, max_new_tokens, batch):
        clip = np.broadcast_to(np.uint8(0), (count, side, side, 3)) if count else None
        if clip is None:
            prompt = Prompt((), prompt.before + prompt.after)
        request = Prepared(prompt, clip, Decoding(max_new_tokens=most))
        layouts.add(layout_of(config, [request], rows_for(rows, mesh), compression))
    return sorted(
        layouts, key=lambda one: one.rows * (one.slots.prompt + one.slots.generated), reverse=True
    )


def warm_up(model: Model, layouts: Sequence[Layout], progress: Progress | None = None) -> WarmUp:
    """Runs the programs of each layout once, on rows without a request.

    After that no batch of one of these layouts compiles anything, whatever its requests are.

    Args:
        model: the model.
        layouts: the layouts.
        progress: called after each layout.
    """
    began = time.perf_counter()
    with counted() as count:
        for done, layout in enumerate(layouts):
            if progress:
                progress("compiling", done, len(layouts))
            _run(model, layout)
        if progress:
            progress("compiling", len(layouts), len(layouts))
    return WarmUp(len(layouts), count.compiled, count.found, time.perf_counter() - began)


def _run(model: Model, layout: Layout) -> None:
    """Encodes one frame, reads prompts of a token, and decodes nothing: no row has a request."""
    text, sampling, limits = replicate(empty_batch(layout), model.mesh)
    features = None
    if layout.frames:
        side = model.config.vision.image_size
        signals = () if layout.tokens is None else layout.tokens.signals
        frame = np.zeros((1, side, side, 3), np.uint8)
        features = encode(model, [frame], layout.rows, layout.frames, signals)
    state = prefill(model, features, text, sampling, limits, layout=layout)
    decode(model, state, sampling, limits, np.int32(0), layout=layout).done.block_until_ready()
