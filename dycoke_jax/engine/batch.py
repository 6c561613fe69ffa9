"""One batch on the device: its requests pass vision, prefill and decoding together."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.config import LlavaConfig
from dycoke_jax.engine.requests import (
    Decoding,
    Generated,
    Likelihood,
    Prepared,
    Seconds,
    TokenCounts,
)
from dycoke_jax.errors import RequestError
from dycoke_jax.generation.assemble import TextIds
from dycoke_jax.generation.decode import decode
from dycoke_jax.generation.encode import Features, encode
from dycoke_jax.generation.layout import Layout, plan
from dycoke_jax.generation.prefill import prefill
from dycoke_jax.generation.sampling import Sampling
from dycoke_jax.generation.score import score
from dycoke_jax.generation.state import DecodeState, Limits
from dycoke_jax.hosts import fetch, replicate
from dycoke_jax.model import Model
from dycoke_jax.progress import Progress
from dycoke_jax.sharding import data_size

# The smallest bucket of each segment; larger buckets double. Few shapes mean few compilations.
MIN_PREFIX, MIN_QUESTION, MIN_GENERATED, STOP_SLOTS = 16, 32, 32, 8


def run_batch(
    model: Model,
    requests: Sequence[Prepared | None],
    compression: Compressor | None,
    stop_ids: Sequence[int],
    *,
    stream_every: int | None = None,
    progress: Progress | None = None,
    observe: Callable[[DecodeState], None] | None = None,
) -> Iterator[list[Generated]]:
    """Answers requests in one batch.

    Each row gets the answer that the same request gets alone: token for token in float32, up to
    rounding in half precision, where the shapes of a batch change the order of sums.

    Args:
        model: the model.
        requests: all with video, of any lengths, or all without; a row each, of which None leaves
            one empty.
        compression: method and settings, or None for the plain model.
        stop_ids: ids that end an answer, at most 8.
        stream_every: number of tokens between two yields, of which the first comes after the first
            token; None yields once, at the end.
        progress: called while frames are encoded and tokens are generated.
        observe: called with the state on the device before each yield. The state is donated to the
            next step.

    Yields:
        The answer of each request so far, in the order of the requests.

    Raises:
        RequestError: if a request does not fit into the model's positions.
        ConfigError: if the compression cannot work on this model or clip length.
    """
    layout, text = _lay_out(model, requests, compression)
    rows = layout.rows
    sampling, limits = _sampling(requests, rows), _limits(requests, rows, stop_ids)
    text, sampling, limits = replicate((text, sampling, limits), model.mesh)

    started = time.perf_counter()
    features = _features(model, requests, layout, progress)
    if features is not None:
        features.tokens.block_until_ready()
    encoded = time.perf_counter()
    if progress:
        progress("prefill", 0, 1)
    state = prefill(model, features, text, sampling, limits, layout=layout)
    step, done = _ask(state, model.mesh)
    seconds = Seconds(encoded - started, time.perf_counter() - encoded)
    if progress:
        progress("prefill", 1, 1)

    longest = max(r.decoding.max_new_tokens for r in requests if r is not None)
    while not done:
        if observe:
            observe(state)
        if stream_every is not None:
            yield _results(model, requests, state, seconds)
        until = longest if stream_every is None else step + stream_every
        began = time.perf_counter()
        state = decode(model, state, sampling, limits, np.int32(until), layout=layout)
        step, done = _ask(state, model.mesh)
        # Only the time of the device counts, not that of a slow reader of the stream.
        seconds = replace(seconds, decode=seconds.decode + time.perf_counter() - began)
        if progress:
            progress("generating", step, longest)
    if observe:
        observe(state)
    yield _results(model, requests, state, seconds)


def score_batch(
    model: Model,
    requests: Sequence[Prepared | None],
    answers: Sequence[tuple[int, ...]],
    compression: Compressor | None,
    *,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """Computes how likely given answers are, in one batch (teacher forcing).

    With a compressor each token of an answer is scored as it would be generated: after token
    merging, and with the visual tokens that its decode step attends to. Programs are shared by
    answers of similar length, as those of ``run_batch``.

    Args:
        model: the model.
        requests: as in ``run_batch``; of their settings of decoding none counts.
        answers: token ids of an answer to each request, at least one id each; those in empty rows
            do not count.
        compression: method and settings, or None for the plain model.
        progress: called while frames are encoded.

    Returns:
        The likelihood of each answer, in the order of the requests.

    Raises:
        RequestError: if an answer is empty, or a request does not fit into the model's positions.
        ConfigError: if the compression cannot work on this model or clip length.
    """
    asked = [request is not None for request in requests]
    answers = [answer if ask else () for ask, answer in zip(asked, answers, strict=True)]
    empty = [bool(answer) is not ask for ask, answer in zip(asked, answers, strict=True)]
    if any(empty):
        raise RequestError(f"answer {empty.index(True)} is empty; give its ids")
    requests = [
        None if request is None else replace(request, decoding=Decoding(max_new_tokens=len(answer)))
        for request, answer in zip(requests, answers, strict=True)
    ]
    layout, text = _lay_out(model, requests, compression)
    features = _features(model, requests, layout, progress)
    of_rows = [answer or None for answer in answers]
    ids, lengths = _pad(of_rows, layout.rows, layout.slots.generated)
    text, ids, lengths = replicate((text, ids, lengths), model.mesh)
    scored = fetch(score(model, features, text, ids, lengths, layout=layout), model.mesh)
    return [
        Likelihood(
            token_ids=tuple(answer),
            log_likelihoods=tuple(scored.log_likelihood[row, : len(answer)].tolist()),
            is_greedy=bool(scored.is_likeliest[row, : len(answer)].all()),
            visual=request.num_frames * model.config.tokens_per_frame,
            merged=int(scored.merged[row]),
        )
        for row, (request, answer) in enumerate(zip(requests, answers, strict=True))
        if request is not None
    ]


def layout_of(
    config: LlavaConfig, requests: Sequence[Prepared], rows: int, compression: Compressor | None
) -> Layout:
    """The layout of a batch: sizes of all segments, rounded up to few values.

    A batch of requests of one layout has this layout; a request also fits into any larger one.

    Args:
        config: the model.
        requests: at least one; all with video or all without.
        rows: rows of the batch.
        compression: method and settings, or None for the plain model.

    Raises:
        RequestError: if a request does not fit into the model's positions.
        ConfigError: if the compression cannot work on this model or clip length.
    """
    most = max(request.num_frames for request in requests)
    if not most:
        compression = None  # nothing to compress: share the plain model's programs
    if compression is not None:
        for frames in {request.num_frames for request in requests}:
            compression.stages.check(config, frames)
    layout = plan(
        config,
        rows,
        frame_bucket(most),
        bucket(max(len(r.prompt.before) for r in requests), MIN_PREFIX),
        bucket(max(len(r.prompt.after) for r in requests), MIN_QUESTION),
        bucket(max(r.decoding.max_new_tokens for r in requests), MIN_GENERATED),
        compression,
    )
    _check_lengths(config, requests, compression)
    return layout


def rows_for(requests: int, mesh: Mesh | None) -> int:
    """Rows of a batch of so many requests; on a mesh a multiple of those that it is spread over."""
    return bucket(requests, data_size(mesh))


def _lay_out(
    model: Model, requests: Sequence[Prepared | None], compression: Compressor | None
) -> tuple[Layout, TextIds]:
    """Returns the layout of a batch and the token ids of its prompts."""
    rows = rows_for(len(requests), model.mesh)
    present = [request for request in requests if request is not None]
    layout = layout_of(model.config, present, rows, compression)
    return layout, _text(requests, layout)


def _text(requests: Sequence[Prepared | None], layout: Layout) -> TextIds:
    """Token ids of prompts in the slots of a layout."""
    before = [None if request is None else request.prompt.before for request in requests]
    after = [None if request is None else request.prompt.after for request in requests]
    prefix = _pad(before, layout.rows, layout.slots.prefix)
    question = _pad(after, layout.rows, layout.slots.question)
    return TextIds(*map(jnp.asarray, (*prefix, *question)))


def empty_batch(layout: Layout) -> tuple[TextIds, Sampling, Limits]:
    """What the programs of a layout are given besides the clips, in a batch without requests."""
    return _text([], layout), _sampling([], layout.rows), _limits([], layout.rows, ())


def _ask(state: DecodeState, mesh: Mesh | None) -> tuple[int, bool]:
    """Number of tokens so far, and whether all rows are done; waits for the device."""
    step, done = fetch((state.step, state.done), mesh)
    return int(step), bool(done.all())


def bucket(size: int, least: int) -> int:
    """The smallest of 0, least, 2 * least, 4 * least, ... that is at least ``size``."""
    if not size:
        return 0
    while least < size:
        least *= 2
    return least


def frame_bucket(frames: int) -> int:
    """The smallest of 0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ... that is at least ``frames``."""
    whole = bucket(frames, 1)
    return 3 * whole // 4 if frames <= 3 * whole // 4 and whole >= 32 else whole


def _check_lengths(
    config: LlavaConfig, requests: Sequence[Prepared], compression: Compressor | None
) -> None:
    for request in requests:
        slots = plan(config, 1, request.num_frames, 0, 0, 0, compression).slots
        prompt = len(request.prompt.before) + slots.visual + len(request.prompt.after)
        if prompt + request.decoding.max_new_tokens > config.text.max_positions:
            raise RequestError(
                f"a prompt of up to {prompt} tokens ({slots.visual} of them visual) and "
                f"{request.decoding.max_new_tokens} new ones exceed the model's "
                f"{config.text.max_positions} positions; use fewer frames or a shorter text"
            )


def _features(
    model: Model, requests: Sequence[Prepared | None], layout: Layout, progress: Progress | None
) -> Features | None:
    if not layout.frames:
        return None
    clips = [None if request is None else request.frames for request in requests]
    signals = () if layout.tokens is None else layout.tokens.signals
    return encode(model, clips, layout.rows, layout.frames, signals, progress)


def _pad(
    ids: Sequence[tuple[int, ...] | None], rows: int, width: int
) -> tuple[Int[np.ndarray, "B width"], Int[np.ndarray, "B"]]:
    # An empty row reads one token, so that it has a last token.
    table, length = np.zeros((rows, width), np.int32), np.full(rows, min(width, 1), np.int32)
    for row, values in enumerate(ids):
        if values is not None:
            table[row, : len(values)] = values
            length[row] = len(values)
    return table, length


def _sampling(requests: Sequence[Prepared | None], rows: int) -> Sampling:
    def column(name: str, kind: type, empty: float) -> Array:
        values: np.ndarray = np.full(rows, empty, kind)
        for row, request in enumerate(requests):
            if request is not None:
                # A temperature above the largest float32 becomes infinity: all tokens are equally
                # likely.
                with np.errstate(over="ignore"):
                    values[row] = getattr(request.decoding, name)
        return jnp.asarray(values)

    return Sampling(
        temperature=column("temperature", np.float32, 0),
        top_k=column("top_k", np.int32, 0),
        top_p=column("top_p", np.float32, 1),
        seed=column("seed", np.int32, 0),
    )


def _limits(requests: Sequence[Prepared | None], rows: int, stop_ids: Sequence[int]) -> Limits:
    if len(stop_ids) > STOP_SLOTS:
        raise RequestError(f"{len(stop_ids)} stop ids were given; at most {STOP_SLOTS} work")
    stops = np.full((rows, STOP_SLOTS), -1, np.int32)
    stops[:, : len(stop_ids)] = list(stop_ids)
    most = np.zeros(rows, np.int32)
    most[: len(requests)] = [
        0 if request is None else request.decoding.max_new_tokens for request in requests
    ]
    return Limits(max_new_tokens=jnp.asarray(most), stop_ids=jnp.asarray(stops))


def _results(
    model: Model, requests: Sequence[Prepared | None], state: DecodeState, seconds: Seconds
) -> list[Generated]:
    # One transfer from the device for all of it.
    (ids, length, done, stopped), (count, merged, newlines, attended, refreshed) = fetch(
        (
            (state.tokens, state.length, state.done, state.stopped),
            (state.count, state.visual, state.newlines, state.attended, state.refreshed),
        ),
        model.mesh,
    )
    results = []
    for row, request in enumerate(requests):
        if request is None:
            continue
        steps = slice(1, int(count[row]))
        reason = "stop" if stopped[row] else "length"
        counts = TokenCounts(
            prompt=int(length[row]),
            visual=request.num_frames * model.config.tokens_per_frame,
            merged=int(merged[row]),
            newlines=int(newlines[row]),
            attended=tuple(attended[row, steps].tolist()),
            refreshes=int(refreshed[row, steps].sum()),
            generated=int(count[row]),
        )
        own = tuple(ids[row, : count[row]].tolist())
        results.append(Generated(own, reason if done[row] else None, counts, seconds))
    return results
