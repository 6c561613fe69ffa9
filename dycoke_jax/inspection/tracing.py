"""Traces one answer: which visual tokens are kept, and which of them each decode step attends to.

    trace = trace_answer(model, "clip.mp4", "What happens?")
    trace.kept[3]          # which visual tokens of frame 3 entered the language model
    trace.attended[0, 3]   # which of them the pruned layers attended to in decode step 0

The compiled programs are those of ``LlavaVideo.generate``; after every token they return to the
host, which reads their state.
"""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, UInt8

from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.compression.protocol import Compressor, check_compressor
from dycoke_jax.compression.view import View
from dycoke_jax.engine.batch import run_batch
from dycoke_jax.engine.requests import Decoding, Request, TokenCounts
from dycoke_jax.errors import RequestError
from dycoke_jax.generation.state import DecodeState
from dycoke_jax.inputs.any_video import Video
from dycoke_jax.inputs.prompts import Conversation, Prompting
from dycoke_jax.inputs.sampling import FrameSampling
from dycoke_jax.inspection.coverage import covered
from dycoke_jax.llava_video import LlavaVideo


@dataclass(frozen=True)
class Trace:
    """One answer, and the visual tokens that were kept and attended to while it was generated.

    Attributes:
        text: the answer.
        words: the text of each generated token: ``words[0]`` is from prefill and ``words[1 + s]``
            from decode step s.
        frames: the part of each frame that visual tokens stand for, RGB.
        grid: numbers of rows and columns of the visual tokens of a frame.
        kept: whether each visual token was kept.
        attended: whether the pruned layers attended to each visual token, for each decode step;
            equal to ``kept`` in every step if nothing is pruned.
        refreshed: whether each decode step chose the attended tokens anew.
        tokens: numbers of tokens.
    """

    text: str
    words: tuple[str, ...]
    frames: UInt8[np.ndarray, "F height width 3"]
    grid: tuple[int, int]
    kept: Bool[np.ndarray, "F N"]
    attended: Bool[np.ndarray, "steps F N"]
    refreshed: Bool[np.ndarray, "steps"]
    tokens: TokenCounts


def trace_answer(
    model: LlavaVideo,
    video: Video,
    prompt: Conversation,
    *,
    compression: Compressor | None = DyCoke(),  # noqa: B008 (frozen)
    decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    sampling: FrameSampling = FrameSampling(),  # noqa: B008 (frozen)
    prompting: Prompting = Prompting(),  # noqa: B008 (frozen)
) -> Trace:
    """Answers one question and records the kept and the attended tokens.

    The arguments are those of ``LlavaVideo.generate``.

    Raises:
        RequestError: if there is no clip.
        DycokeError: whatever ``LlavaVideo.generate`` raises.
    """
    if video is None:
        raise RequestError("there is nothing to trace without a clip")
    check_compressor(compression)
    asked = Request(prompt, video, decoding, sampling, prompting)
    request = model.prepare(asked, compression=compression)
    assert request.frames is not None
    shape = request.num_frames, model.config.tokens_per_frame
    kept = np.zeros(shape, bool)
    attended: list[np.ndarray] = []
    refreshed: list[bool] = []

    def record(state: DecodeState) -> None:
        first, last = state.views[0], state.views[-1]
        step, refreshed_now = jax.device_get((state.step, state.refreshed[0]))
        if step == 1:  # The first token is from prefill; no decode step has run yet.
            kept[:] = _attended(first, shape)
            return
        attended.append(_attended(last, shape))
        refreshed.append(bool(refreshed_now[step - 1]))

    for rows in run_batch(
        model.model,
        [request],
        compression,
        model.stop_ids,
        stream_every=1,
        observe=record,
    ):
        generated = rows[0]
    decode = model.tokenizer.backend_tokenizer.decode
    return Trace(
        text=decode(list(generated.token_ids), skip_special_tokens=True),
        words=tuple(decode([token], skip_special_tokens=False) for token in generated.token_ids),
        frames=covered(request.frames, model.config),
        grid=model.config.frame_grid,
        kept=kept,
        attended=np.array(attended, bool).reshape(-1, *shape),
        refreshed=np.array(refreshed, bool),
        tokens=generated.tokens,
    )


def _attended(view: View, shape: tuple[int, int]) -> Bool[np.ndarray, "F N"]:
    """Which visual tokens of the first clip the layers of a view attend to."""
    visible, is_token, places = jax.device_get((view.visible[0], view.is_token[0], view.places[0]))
    marks = np.zeros(shape, bool)
    marks.reshape(-1)[places[visible & is_token]] = True
    return marks
