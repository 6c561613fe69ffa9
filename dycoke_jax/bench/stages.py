"""What is timed: the stages of one combination of batch size, frames and compression."""

from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dycoke_jax.bench import costs
from dycoke_jax.bench.costs import Cost
from dycoke_jax.bench.measure import Run, Watch
from dycoke_jax.cache import KV
from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.config import LlavaConfig, Storage
from dycoke_jax.engine.batch import layout_of, rows_for, run_batch
from dycoke_jax.engine.requests import Decoding, Prepared
from dycoke_jax.generation.assemble import TextIds, Visual, place_newlines
from dycoke_jax.generation.decode import decode
from dycoke_jax.generation.encode import Features, encode
from dycoke_jax.generation.layout import Layout
from dycoke_jax.generation.prefill import prefill
from dycoke_jax.generation.sampling import Sampling
from dycoke_jax.generation.state import DecodeState, Limits
from dycoke_jax.inputs.prompts import Prompt
from dycoke_jax.model import Model
from dycoke_jax.models.signals import Signal

STAGES = ("vision", "token stage", "prefill", "decode", "end to end")
"""Decoding is timed by the step. End to end is a run of its own: a batch of prepared requests."""

PREFIX, QUESTION = 14, 20
"""Tokens of the text before and after the clip, as in a short question."""


@dataclass(frozen=True)
class Combination:
    """One row of the results.

    Attributes:
        batch: number of requests that run together.
        frames: frames of each clip.
        name: the compression as text, ``none`` for the plain model.
        compression: the compression; None for the plain model.
        weights: ``int8`` for the matrices of the language model as int8; None: as stored.
        kv: ``int8`` for key/value caches as int8; None: in the dtype of the computation.
    """

    batch: int
    frames: int
    name: str
    compression: Compressor | None
    weights: Storage | None = None
    kv: Storage | None = None

    @property
    def label(self) -> str:
        """The compression, and what is stored as int8."""
        stored = {"weights": self.weights, "KV": self.kv}
        return ", ".join([self.name, *(f"{what} int8" for what, how in stored.items() if how)])


@dataclass(frozen=True)
class Counts:
    """Numbers of tokens of a request, counted from arrays; those of a batch are all alike.

    Attributes:
        prompt: tokens of the prompt as the language model read it.
        visual: visual tokens of the clip before compression.
        merged: visual tokens that entered the language model.
        attended: mean number of visual tokens that the last layers attended to in a decode step.
        refreshes: mean number of decode steps that chose these tokens anew.
        token_ids: the generated tokens of each request.
    """

    prompt: int
    visual: int
    merged: int
    attended: float
    refreshes: float
    token_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Work:
    """The inputs of a combination.

    Attributes:
        model: the model.
        combination: what is run.
        layout: the layout of its batch.
        requests: the requests, with clips and token ids that are made up.
    """

    model: Model
    combination: Combination
    layout: Layout
    requests: tuple[Prepared, ...]

    @property
    def new_tokens(self) -> int:
        """Number of tokens that each request generates."""
        return self.requests[0].decoding.max_new_tokens

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that there are."""
        if self.layout.tokens is not None:
            return STAGES
        return tuple(stage for stage in STAGES if stage != "token stage")


class _Inputs(NamedTuple):
    """What prefill reads beside the clips, on the device."""

    text: TextIds
    sampling: Sampling
    limits: Limits


def prepare(model: Model, combination: Combination, new_tokens: int, seed: int = 0) -> Work:
    """Makes up the requests of a combination.

    Args:
        model: the model.
        combination: what is to be run.
        new_tokens: number of tokens to generate, at least 2; no token ends an answer.
        seed: seed of clips and token ids; the same requests for every compression.

    Raises:
        ConfigError: if the compression cannot work on this model or clip length.
        RequestError: if the request does not fit into the model's positions.
    """
    config = model.config
    requests = tuple(
        _request(config, combination.frames, new_tokens, np.random.default_rng([seed, row]))
        for row in range(combination.batch)
    )
    rows = rows_for(len(requests), model.mesh)
    layout = layout_of(config, requests, rows, combination.compression)
    return Work(model, combination, layout, requests)


def _request(
    config: LlavaConfig, frames: int, new_tokens: int, random: np.random.Generator
) -> Prepared:
    """A question on a clip of noise, of which a third changes from frame to frame."""
    side = config.vision.image_size
    clip = np.empty((frames, side, side, 3), np.uint8)
    clip[0] = random.integers(0, 256, clip.shape[1:], np.uint8)
    for number in range(1, frames):
        noise = random.integers(0, 256, clip.shape[1:], np.uint8)
        clip[number] = np.where(random.random((side, side, 1)) < 1 / 3, noise, clip[number - 1])
    ids = random.integers(0, config.text.vocab_size, PREFIX + QUESTION).tolist()
    prompt = Prompt(tuple(ids[:PREFIX]), tuple(ids[PREFIX:]))
    return Prepared(prompt, clip, Decoding(new_tokens))


def stage_costs(work: Work) -> dict[str, Cost]:
    """What each stage needs at least; see ``costs``."""
    config, layout = work.model.config, work.layout
    size = jnp.dtype(work.model.dtype).itemsize
    frames = len(work.requests) * work.combination.frames

    def caches_of(model: Model, features: Features, inputs: _Inputs) -> list[KV]:
        state = prefill(model, features, *inputs, layout=layout)
        return [cache for view in state.views for cache in view.caches]

    # As the compression has made them: nothing else knows what the pruned layers read.
    caches = jax.eval_shape(caches_of, work.model, _shapes_of_features(work), _inputs(work))
    moved = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
    slots, weights = [cache.slots for cache in caches], costs.weight_bytes(work.model.params)
    return {
        "vision": costs.vision(config, frames, weights.vision, size),
        "token stage": costs.token_stage(config, layout, size),
        "prefill": costs.prefill(config, layout, weights.language, size),
        "decode": costs.decode_step(config, layout.rows, slots, weights.language, moved),
    }


def stages_run(work: Work, chosen: Collection[str]) -> Run:
    """A case that runs stages one after another, each on what the one before it gave.

    Args:
        work: the inputs.
        chosen: names of the stages that are timed. Without ``vision`` the clips are encoded before
            the first run, and what comes of it is kept. A stage behind the last of them is not run.

    Returns:
        The case; its runs return ``Counts`` if anything behind vision was run, and else None.
    """
    model, layout = work.model, work.layout
    stages = [stage for stage in work.stages if stage in chosen]
    inputs = _inputs(work)
    kept: list[Features] = []

    def encoded(watch: Watch) -> Features:
        if "vision" in stages:
            with watch.time("vision"):
                return jax.block_until_ready(_encode(work))
        if not kept:
            kept.append(jax.block_until_ready(_encode(work)))
        return kept[0]

    def run(watch: Watch) -> Counts | None:
        counts = None
        if stages != ["end to end"]:
            features = encoded(watch)
            if "token stage" in stages:
                with watch.time("token stage"):
                    jax.block_until_ready(run_token_stage(model, features, layout=layout))
            if "prefill" in stages or "decode" in stages:
                counts = _language_stages(work, features, inputs, stages, watch)
        if "end to end" in stages:
            with watch.time("end to end"):
                compression = work.combination.compression
                for _ in run_batch(model, work.requests, compression, ()):
                    pass
        return counts

    return run


def _language_stages(
    work: Work, features: Features, inputs: _Inputs, stages: Collection[str], watch: Watch
) -> Counts:
    # Without prefill among the stages, it only makes the state that decoding needs.
    with watch.time("prefill") if "prefill" in stages else nullcontext():
        state = prefill(work.model, features, *inputs, layout=work.layout)
        jax.block_until_ready(state)
    if "decode" in stages:
        until = np.int32(work.new_tokens)
        settings = inputs.sampling, inputs.limits
        with watch.time("decode", parts=work.new_tokens - 1):
            state = decode(work.model, state, *settings, until, layout=work.layout)
            jax.block_until_ready(state)
    return _counts(work, state)


@jax.jit(static_argnames="layout")
def run_token_stage(model: Model, features: Features, *, layout: Layout) -> Visual:
    """Selects or merges visual tokens and places the newlines, as ``prefill`` does at its start.

    Args:
        model: the model, of which the newline is read.
        features: visual tokens of the clips.
        layout: a layout with a token stage (static).
    """
    assert layout.tokens is not None
    rows = layout.tokens.select(features.tokens, features.frames, features.signals)
    config, newline = model.config, model.params["image_newline"]
    return place_newlines(features.tokens, rows, newline, config.newline, config.frame_grid)


def _encode(work: Work) -> Features:
    layout = work.layout
    signals = () if layout.tokens is None else layout.tokens.signals
    clips = [request.frames for request in work.requests if request.frames is not None]
    return encode(work.model, clips, layout.rows, layout.frames, signals)


def _shapes_of_features(work: Work) -> Features:
    """Shapes and dtypes of what ``_encode`` gives; nothing is computed."""
    config, layout, dtype = work.model.config, work.layout, work.model.dtype
    shape = (layout.rows, layout.frames, config.tokens_per_frame)
    signals = () if layout.tokens is None else layout.tokens.signals

    def of_signal(signal: Signal) -> Array:
        width, heads = config.vision.hidden_size, config.vision.num_heads
        match signal.kind:
            case "keys":
                return jnp.zeros((*shape, width), dtype)
            case "mean_keys":
                return jnp.zeros((*shape, width // heads), dtype)
            case "attention":
                return jnp.zeros(shape)

    def features() -> Features:
        tokens = jnp.zeros((*shape, config.text.hidden_size), dtype)
        return Features(tokens, jnp.zeros(shape[0], jnp.int32), tuple(map(of_signal, signals)))

    return jax.eval_shape(features)


def _inputs(work: Work) -> _Inputs:
    """Texts, and greedy decoding of as many tokens as asked for.

    Rows without a request are done at once.
    """
    layout, real = work.layout, len(work.requests)
    rows, slots = layout.rows, layout.slots
    prefix = np.zeros((rows, slots.prefix), np.int32)
    question = np.zeros((rows, slots.question), np.int32)
    for row, request in enumerate(work.requests):
        prefix[row, :PREFIX], question[row, :QUESTION] = request.prompt.before, request.prompt.after
    limits = np.where(np.arange(rows) < real, work.new_tokens, 0)
    return _Inputs(
        TextIds(
            jnp.asarray(prefix),
            jnp.full(rows, PREFIX, jnp.int32),
            jnp.asarray(question),
            jnp.full(rows, QUESTION, jnp.int32),
        ),
        Sampling(
            temperature=jnp.zeros(rows),
            top_k=jnp.zeros(rows, jnp.int32),
            top_p=jnp.ones(rows),
            seed=jnp.zeros(rows, jnp.int32),
        ),
        Limits(jnp.asarray(limits, jnp.int32), jnp.full((rows, 1), -1, jnp.int32)),
    )


def _counts(work: Work, state: DecodeState) -> Counts:
    step, length, visual, tokens, count, of_steps = jax.device_get(
        (
            *(state.step, state.length, state.visual, state.tokens, state.count),
            (state.attended, state.refreshed),
        )
    )
    rows, steps = slice(len(work.requests)), slice(1, max(int(step), 1))
    attended, refreshed = (array[rows, steps] for array in of_steps)
    return Counts(
        prompt=int(length[0]),
        visual=work.combination.frames * work.model.config.tokens_per_frame,
        merged=int(visual[0]),
        attended=float(attended.mean()) if attended.size else 0.0,
        refreshes=float(refreshed.sum(1).mean()),
        token_ids=tuple(
            tuple(ids[:number].tolist())
            for ids, number in zip(tokens[rows], count[rows], strict=True)
        ),
    )
