"""Commands that answer questions: generate, demo."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from dycoke_jax.cli.app import Dtype, app
from dycoke_jax.cli.console import progress_bars, say
from dycoke_jax.config import PoolMode
from dycoke_jax.errors import ConfigError
from dycoke_jax.files import check_writable

Merged = Annotated[float, typer.Option(help="DyCoke: share of a compared frame's tokens to drop.")]
Pruned = Annotated[float, typer.Option(help="DyCoke: share of kept visual tokens to prune.")]
PrunedFrom = Annotated[int, typer.Option(help="DyCoke: first pruned layer, from 1.")]


@app.command(
    epilog="Example: `dycoke-jax generate --model ov-0.5b --video clip.mp4 "
    '--prompt "What happens?"`'
)
def generate(
    model: Annotated[str, typer.Option(help="Folder or hub id of the checkpoint.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    video: Annotated[Path | None, typer.Option(help="The clip; none asks the text alone.")] = None,
    frames: Annotated[int, typer.Option(help="Number of frames to use.")] = 32,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second to use, at most `frames`.")
    ] = None,
    k: Merged = 0.7,
    p: Pruned = 0.7,
    layer: PrunedFrom = 3,
    threshold: Annotated[
        float, typer.Option(help="DyCoke: similarity below which the kept set is chosen anew.")
    ] = 0.9,
    mode: Annotated[
        Literal["paper", "official"],
        typer.Option(help="DyCoke as in the paper or as in the published code."),
    ] = "paper",
    parked: Annotated[
        Literal["device", "drop"],
        typer.Option(help="DyCoke: where pruned KV waits; drop frees it, and it cannot return."),
    ] = "device",
    no_dycoke: Annotated[bool, typer.Option("--no-dycoke", help="Run the plain model.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option(help="Length of the longest answer in tokens.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 for greedy decoding.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    system: Annotated[
        str | None, typer.Option(help="System turn; an empty text leaves it out.")
    ] = None,
    time_text: Annotated[
        bool, typer.Option("--time-text", help="Tell the model the frames' times (LLaVA-Video).")
    ] = False,
    pool_mode: Annotated[
        PoolMode | None, typer.Option(help="Override the config's pooling.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Compute in this; default: as stored.")
    ] = None,
    allow_damaged: Annotated[
        bool, typer.Option("--allow-damaged", help="Use what can be decoded of a damaged clip.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Ask a question about a video."""
    from dycoke_jax.checkpoint import open_checkpoint
    from dycoke_jax.compression.dycoke import DyCoke
    from dycoke_jax.engine import Decoding
    from dycoke_jax.inputs import DEFAULT_SYSTEM, FrameSampling, check_clip
    from dycoke_jax.llava_video import LlavaVideo

    # Refuse what can be refused before a large checkpoint is read.
    compression = None if no_dycoke else DyCoke(k, layer, p, threshold, mode, parked)
    FrameSampling(frames=frames, fps=fps)
    Decoding(max_new_tokens, temperature, top_k, top_p, seed)
    if video is not None:
        check_clip(video, allow_damaged=allow_damaged)
    checkpoint = open_checkpoint(model, pool_mode=pool_mode)
    if compression is not None and video is not None and fps is None:
        compression.check(checkpoint.config, frames)
    with progress_bars() as progress:
        llava = LlavaVideo.from_checkpoint(checkpoint, dtype=dtype, progress=progress)
        pieces = llava.generate(
            [video],
            [prompt],
            compression=compression,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            frames=frames,
            fps=fps,
            system=DEFAULT_SYSTEM if system is None else system or None,
            time_text=time_text,
            allow_damaged=allow_damaged,
            stream=True,
            progress=progress,
        )
        first = next(pieces)
    # The bars are gone: from here on the answer is shown as it comes.
    answer = first.answer
    if not as_json:
        print(first.text, end="", flush=True)
    for piece in pieces:
        answer = piece.answer
        if not as_json:
            print(piece.text, end="", flush=True)
    assert answer is not None
    if as_json:
        shown = dataclasses.asdict(answer)
        # A text alone has nothing to compress.
        applied = compression if video is not None else None
        shown["compression"] = None if applied is None else dataclasses.asdict(applied)
        print(json.dumps(shown))
        return
    print()
    for note in answer.notes:
        say(f"note: {note}", style="yellow")
    say(f"tokens: {answer.tokens}")
    times = answer.seconds
    say(
        f"seconds: vision {times.vision:.2f}, prefill {times.prefill:.2f}, decode "
        f"{times.decode:.2f} (compilation included)"
    )


@app.command(
    epilog="Examples: `dycoke-jax demo`; `dycoke-jax demo --model ov-0.5b --video clip.mp4 "
    '--prompt "What happens?"`'
)
def demo(
    video: Annotated[
        Path | None, typer.Option(help="A clip of your own; needs --prompt, and has no verdict.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask about it.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id. Default: the tiny one that ships, trained on "
            "made-up clips and knowing nothing else."
        ),
    ] = None,
    frames: Annotated[int, typer.Option(help="Number of frames to use.")] = 16,
    k: Merged = 0.7,
    p: Pruned = 0.7,
    layer: PrunedFrom = 3,
    picture: Annotated[
        Path, typer.Option(help="PNG to write: what was dropped, and what was attended to.")
    ] = Path("dycoke-demo.png"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Answer questions with and without DyCoke, side by side, in a minute."""
    from dycoke_jax import demo as demonstration
    from dycoke_jax.assets import TINY
    from dycoke_jax.compression.dycoke import DyCoke
    from dycoke_jax.inputs import FrameSampling, check_clip
    from dycoke_jax.inspection.drawing import save, sheet
    from dycoke_jax.inspection.tracing import trace_answer
    from dycoke_jax.llava_video import LlavaVideo

    if (video is None) != (prompt is None):
        raise ConfigError("--video and --prompt go together")
    if video is None and model is not None:
        raise ConfigError("only the model that ships knows the made-up clips: give --video as well")
    compression = DyCoke(k, layer, p)
    FrameSampling(frames)
    check_writable(picture)
    if video is not None:
        check_clip(video)
    with progress_bars() as progress:
        llava = LlavaVideo.from_pretrained(model or TINY, progress=progress)
        if video is not None and prompt is not None:
            asked = [demonstration.Asked(video.name, video, prompt)]
        else:
            asked = demonstration.made_up(llava.config.vision.image_size)
        sides = demonstration.answer_all(
            llava,
            asked,
            {"plain": None, "DyCoke": compression},
            frames=frames,
            progress=progress,
        )
        pictured = demonstration.longest_of_each_clip(asked)
        traces = []
        for number, a in enumerate(pictured):
            trace = trace_answer(llava, a.video, a.question, compression=compression, frames=frames)
            traces.append((f"{a.clip}: {a.question}\n{trace.text}", trace))
            progress("drawing", number + 1, len(pictured))
        save(sheet(traces), picture)
    if as_json:
        measured = demonstration.as_json(asked, sides)
        print(json.dumps(measured | {"picture": str(picture)}))
        return
    demonstration.show(asked, sides)
    say(f"wrote {picture}: what DyCoke dropped is dark, what later layers attended to is framed")
