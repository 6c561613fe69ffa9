"""Looks at what compression does with one clip: which tokens stay, and which each step attends to.

    trace = trace_answer(model, "clip.mp4", "What happens?")
    trace.kept[3]          # which tokens of frame 3 entered the language model
    trace.attended[0, 3]   # and which of them the pruned layers read for the second token

The programs are those of ``LlavaVideo.generate``, stopped after every token to read their state.
"""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, UInt8

from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.engine import Decoding, TokenCounts, run_batch
from dycoke_jax.errors import RequestError
from dycoke_jax.generation.state import DecodeState
from dycoke_jax.inputs.prompts import DEFAULT_SYSTEM, Conversation
from dycoke_jax.inputs.video import FrameSampling
from dycoke_jax.llava_video import LlavaVideo, Video


@dataclass(frozen=True)
class Trace:
    """One answer, and what became of every visual token while it was made.

    Attributes:
        text: the answer.
        words: its text token by token; ``words[0]`` comes from reading the prompt, ``words[1 + s]``
            from decoding step s.
        frames: the clip as the model saw it, resized.
        grid: rows and columns of a frame's tokens.
        kept: tokens that entered the language model.
        attended: tokens that the pruned layers attended to, by decoding step; all kept ones where
            nothing is pruned.
        refreshed: decoding steps that chose those tokens anew.
        tokens: counts.
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
    max_new_tokens: int = 128,
    frames: int = 32,
    fps: float | None = None,
    system: str | None = DEFAULT_SYSTEM,
) -> Trace:
    """Answers one question greedily and notes what happens to the visual tokens.

    The arguments are those of ``LlavaVideo.generate``.

    Raises:
        DycokeError: as ``generate`` does.
    """
    if video is None:
        raise RequestError("there is nothing to trace without a clip")
    request, _ = model.request(
        video, prompt, Decoding(max_new_tokens), FrameSampling(frames, fps), system=system
    )
    assert request.frames is not None
    shape = request.num_frames, model.config.tokens_per_frame
    kept = np.zeros(shape, bool)
    attended: list[np.ndarray] = []
    refreshed: list[bool] = []

    def look(state: DecodeState) -> None:
        step, of_kept = jax.device_get((state.step, state.kept))
        order = np.arange(kept.size) if of_kept is None else of_kept[0]
        if step == 1:  # the first token: nothing has been decoded yet
            kept.reshape(-1)[order] = True
            return
        seen = kept
        if state.pruned is not None:
            slots = state.pruned.is_visual[0], state.pruned.chosen_slots()[0]
            visual, chosen = jax.device_get(slots)
            seen = np.zeros(shape, bool)
            # The visual slots that hold no newline hold the kept tokens in their order.
            seen.reshape(-1)[order] = chosen[visual]
        attended.append(seen)
        refreshed.append(bool(jax.device_get(state.refreshed[0, step - 1])))

    for rows in run_batch(
        model.config,
        model.params,
        [request],
        compression,
        model.stop_ids,
        stream_every=1,
        observe=look,
    ):
        generated = rows[0]
    decode = model.tokenizer.backend_tokenizer.decode
    return Trace(
        text=decode(list(generated.token_ids), skip_special_tokens=True),
        words=tuple(decode([token], skip_special_tokens=False) for token in generated.token_ids),
        frames=request.frames,
        grid=model.config.frame_grid,
        kept=kept,
        attended=np.array(attended, bool).reshape(-1, *shape),
        refreshed=np.array(refreshed, bool),
        tokens=generated.tokens,
    )
