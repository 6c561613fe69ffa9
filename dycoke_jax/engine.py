"""Runs batches: requests of equal shapes pass vision, prefill and decoding together."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dycoke_jax.checks import number, whole_number
from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import RequestError
from dycoke_jax.generation.assemble import TextIds
from dycoke_jax.generation.decode import decode
from dycoke_jax.generation.encode import encode
from dycoke_jax.generation.layout import Layout, plan
from dycoke_jax.generation.prefill import prefill
from dycoke_jax.generation.sampling import Sampling
from dycoke_jax.generation.score import score
from dycoke_jax.generation.state import DecodeState, Limits
from dycoke_jax.inputs.prompts import Prompt
from dycoke_jax.model import Model
from dycoke_jax.progress import Progress

# The smallest bucket of each segment; larger buckets double. Few shapes mean few compilations.
MIN_PREFIX, MIN_QUESTION, MIN_GENERATED, STOP_SLOTS = 16, 32, 32, 8

_INT32 = 2**31 - 1
"""The largest max_new_tokens, top_k and seed: they are int32 on the device."""


@dataclass(frozen=True)
class Decoding:
    """How one answer is generated.

    Attributes:
        max_new_tokens: number of tokens after which the answer is cut off, at least 1.
        temperature: sampling temperature, 0 or more; 0 for greedy decoding.
        top_k: number of most likely tokens to sample from; 0 for the whole vocabulary.
        top_p: sample from the fewest tokens that hold this probability, in (0, 1].
        seed: of sampling, in [0, 2**31).

    Raises:
        RequestError: naming the setting and its range.

    Numbers of NumPy are converted to those of Python.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checked = {
            "max_new_tokens": whole_number(
                "max_new_tokens", self.max_new_tokens, 1, _INT32, error=RequestError
            ),
            "temperature": number("temperature", self.temperature, 0, error=RequestError),
            "top_k": whole_number("top_k", self.top_k, 0, _INT32, error=RequestError),
            "top_p": number(
                "top_p", self.top_p, 0, 1, with_low=False, with_high=True, error=RequestError
            ),
            "seed": whole_number("seed", self.seed, 0, _INT32, error=RequestError),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Request:
    """One question with its frames, ready for the device."""

    prompt: Prompt
    frames: UInt8[np.ndarray, "F height width 3"] | None
    decoding: Decoding

    @property
    def num_frames(self) -> int:
        """Number of frames (F); 0 without video."""
        return 0 if self.frames is None else len(self.frames)


@dataclass(frozen=True)
class TokenCounts:
    """Numbers of tokens of a request, counted from its arrays and not computed from settings.

    Attributes:
        prompt: tokens of the prompt as the language model read it.
        visual: visual tokens of the clip before compression (F * N).
        merged: visual tokens that entered the language model.
        newlines: learned newline tokens in the prompt; ``merged`` does not count them.
        attended: visual tokens that the pruned layers attended to in each decode step; the first
            step makes the second token. Layers below ``DyCoke.layer`` attend to all ``merged``
            tokens. Without pruning every entry is ``merged``.
        refreshes: decode steps that chose the attended tokens anew.
        generated: tokens of the answer, its stop token included.
    """

    prompt: int
    visual: int
    merged: int
    newlines: int
    attended: tuple[int, ...]
    refreshes: int
    generated: int

    def __str__(self) -> str:
        if not self.visual:
            return f"{self.prompt} prompt, no video"
        counts = sorted(set(self.attended))
        if not counts:
            steps = "no decoding step"
        elif len(counts) == 1:
            steps = f"{counts[0]} attended per step"
        else:
            mean = sum(self.attended) / len(self.attended)
            steps = f"{counts[0]}..{counts[-1]} attended per step (mean {mean:.0f})"
        return f"{self.visual} visual -> {self.merged} after merging -> {steps}"


@dataclass(frozen=True)
class Seconds:
    """Wall time of the batch of a request in seconds; the first batch of a shape also compiles."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Generated:
    """The answer of one row so far; final if ``finish_reason`` is set."""

    token_ids: tuple[int, ...]
    finish_reason: str | None
    """``stop`` (the last of ``token_ids`` is a stop token), ``length``, or None if it goes on."""
    tokens: TokenCounts
    seconds: Seconds


def run_batch(
    model: Model,
    requests: Sequence[Request],
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
        requests: all with the same number of frames (0 for none).
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
    layout, text = _lay_out(model.config, requests, compression)
    rows = layout.rows
    sampling, limits = _sampling(requests, rows), _limits(requests, rows, stop_ids)

    started = time.perf_counter()
    features = _features(model, requests, rows, progress)
    if features is not None:
        features.block_until_ready()
    encoded = time.perf_counter()
    if progress:
        progress("prefill", 0, 1)
    state = prefill(model, features, text, sampling, limits, layout=layout)
    step, done = _ask(state)
    seconds = Seconds(encoded - started, time.perf_counter() - encoded)
    if progress:
        progress("prefill", 1, 1)

    longest = max(r.decoding.max_new_tokens for r in requests)
    visual = 0 if features is None else features.shape[1] * features.shape[2]
    while not done:
        if observe:
            observe(state)
        if stream_every is not None:
            yield _results(requests, state, visual, seconds)
        until = longest if stream_every is None else step + stream_every
        began = time.perf_counter()
        state = decode(model, state, sampling, limits, np.int32(until), layout=layout)
        step, done = _ask(state)
        # Only the time of the device counts, not that of a slow reader of the stream.
        seconds = replace(seconds, decode=seconds.decode + time.perf_counter() - began)
        if progress:
            progress("generating", step, longest)
    if observe:
        observe(state)
    yield _results(requests, state, visual, seconds)


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a given answer.

    Attributes:
        token_ids: the tokens of the answer.
        log_likelihoods: natural logarithm of the probability of each token after the prompt and the
            tokens before it.
        is_greedy: whether greedy decoding would give exactly these tokens.
        visual: visual tokens of the clip before compression (F * N).
        merged: visual tokens that entered the language model.
    """

    token_ids: tuple[int, ...]
    log_likelihoods: tuple[float, ...]
    is_greedy: bool
    visual: int
    merged: int

    @property
    def total(self) -> float:
        """Log-likelihood of the whole answer."""
        return float(np.sum(self.log_likelihoods, dtype=np.float64))


def score_batch(
    model: Model,
    requests: Sequence[Request],
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
        requests: all with the same number of frames (0 for none); of their settings of decoding
            none counts.
        answers: token ids of an answer to each request, at least one id each.
        compression: method and settings, or None for the plain model.
        progress: called while frames are encoded.

    Returns:
        The likelihood of each answer, in the order of the requests.

    Raises:
        RequestError: if an answer is empty, or a request does not fit into the model's positions.
        ConfigError: if the compression cannot work on this model or clip length.
    """
    if not all(answers):
        raise RequestError(f"answer {[*map(bool, answers)].index(False)} is empty; give its ids")
    requests = [
        replace(request, decoding=Decoding(max_new_tokens=len(answer)))
        for request, answer in zip(requests, answers, strict=True)
    ]
    layout, text = _lay_out(model.config, requests, compression)
    features = _features(model, requests, layout.rows, progress)
    ids, lengths = _pad(answers, layout.rows, layout.slots.generated)
    scored = jax.device_get(score(model, features, text, ids, lengths, layout=layout))
    visual = 0 if features is None else features.shape[1] * features.shape[2]
    return [
        Likelihood(
            token_ids=tuple(answer),
            log_likelihoods=tuple(scored.log_likelihood[row, : len(answer)].tolist()),
            is_greedy=bool(scored.is_likeliest[row, : len(answer)].all()),
            visual=visual,
            merged=int(scored.merged[row]),
        )
        for row, answer in enumerate(answers)
    ]


def _lay_out(
    config: LlavaConfig, requests: Sequence[Request], compression: Compressor | None
) -> tuple[Layout, TextIds]:
    """Returns the layout of a batch and the token ids of its prompts.

    Raises:
        RequestError: if a request does not fit into the model's positions.
        ConfigError: if the compression cannot work on this model or clip length.
    """
    frames = requests[0].num_frames
    if not frames:
        compression = None  # nothing to compress: share the plain model's programs
    generated = bucket(max(r.decoding.max_new_tokens for r in requests), MIN_GENERATED)
    rows = bucket(len(requests), 1)
    text = _text(requests, rows)
    prompt = text.prefix.shape[1], text.question.shape[1]
    layout = plan(config, rows, frames, *prompt, generated, compression)
    _check_lengths(config, requests, layout.slots.visual)
    return layout, text


def _ask(state: DecodeState) -> tuple[int, bool]:
    """Number of tokens so far, and whether all rows are done; waits for the device."""
    step, done = jax.device_get((state.step, state.done))
    return int(step), bool(done.all())


def bucket(size: int, least: int) -> int:
    """The smallest of least, 2 * least, 4 * least, ... that is at least ``size``."""
    while least < size:
        least *= 2
    return least


def _check_lengths(config: LlavaConfig, requests: Sequence[Request], visual: int) -> None:
    for request in requests:
        prompt = len(request.prompt.before) + visual + len(request.prompt.after)
        if prompt + request.decoding.max_new_tokens > config.text.max_positions:
            raise RequestError(
                f"a prompt of up to {prompt} tokens ({visual} of them visual) and "
                f"{request.decoding.max_new_tokens} new ones exceed the model's "
                f"{config.text.max_positions} positions; use fewer frames or a shorter text"
            )


def _features(
    model: Model,
    requests: Sequence[Request],
    rows: int,
    progress: Progress | None,
) -> Float[Array, "B F N D"] | None:
    clips = [request.frames for request in requests if request.frames is not None]
    return encode(model, clips, rows, progress) if clips else None


def _text(requests: Sequence[Request], rows: int) -> TextIds:
    prefixes = [request.prompt.before for request in requests]
    questions = [request.prompt.after for request in requests]
    longest = max(map(len, prefixes))
    prefix, prefix_length = _pad(prefixes, rows, bucket(longest, MIN_PREFIX) if longest else 0)
    longest = max(map(len, questions))
    question, question_length = _pad(questions, rows, bucket(longest, MIN_QUESTION))
    return TextIds(*map(jnp.asarray, (prefix, prefix_length, question, question_length)))


def _pad(
    ids: Sequence[tuple[int, ...]], rows: int, width: int
) -> tuple[Int[np.ndarray, "B width"], Int[np.ndarray, "B"]]:
    table, length = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    for row, values in enumerate(ids):
        table[row, : len(values)] = values
        length[row] = len(values)
    # An empty row reads one token, so that it has a last token.
    length[len(ids) :] = min(width, 1)
    return table, length


def _sampling(requests: Sequence[Request], rows: int) -> Sampling:
    def column(values: list, kind: type, empty: float) -> Array:
        # A temperature above the largest float32 becomes infinity: all tokens are equally likely.
        with np.errstate(over="ignore"):
            return jnp.asarray(np.array(values + [empty] * (rows - len(values)), kind))

    return Sampling(
        temperature=column([r.decoding.temperature for r in requests], np.float32, 0),
        top_k=column([r.decoding.top_k for r in requests], np.int32, 0),
        top_p=column([r.decoding.top_p for r in requests], np.float32, 1),
        seed=column([r.decoding.seed for r in requests], np.int32, 0),
    )


def _limits(requests: Sequence[Request], rows: int, stop_ids: Sequence[int]) -> Limits:
    if len(stop_ids) > STOP_SLOTS:
        raise RequestError(f"{len(stop_ids)} stop ids were given; at most {STOP_SLOTS} work")
    stops = np.full((rows, STOP_SLOTS), -1, np.int32)
    stops[:, : len(stop_ids)] = list(stop_ids)
    most = np.zeros(rows, np.int32)
    most[: len(requests)] = [request.decoding.max_new_tokens for request in requests]
    return Limits(max_new_tokens=jnp.asarray(most), stop_ids=jnp.asarray(stops))


def _results(
    requests: Sequence[Request], state: DecodeState, visual: int, seconds: Seconds
) -> list[Generated]:
    # One transfer from the device for all of it.
    (ids, length, done, stopped), (count, merged, newlines, attended, refreshed) = jax.device_get(
        (
            (state.tokens, state.length, state.done, state.stopped),
            (state.count, state.visual, state.newlines, state.attended, state.refreshed),
        )
    )
    results = []
    for row in range(len(requests)):
        steps = slice(1, int(count[row]))
        of_steps = attended[row, steps]
        if state.pruned is None:
            of_steps = np.full_like(of_steps, merged[row])
        reason = "stop" if stopped[row] else "length"
        counts = TokenCounts(
            prompt=int(length[row]),
            visual=visual,
            merged=int(merged[row]),
            newlines=int(newlines[row]),
            attended=tuple(of_steps.tolist()),
            refreshes=int(refreshed[row, steps].sum()),
            generated=int(count[row]),
        )
        own = tuple(ids[row, : count[row]].tolist())
        results.append(Generated(own, reason if done[row] else None, counts, seconds))
    return results
