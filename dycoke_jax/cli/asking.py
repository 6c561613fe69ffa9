"""The commands that answer questions: generate, demo."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from dycoke_jax.cli.app import Dtype, app
from dycoke_jax.cli.console import progress_bars, say, say_notes
from dycoke_jax.config import PoolMode
from dycoke_jax.errors import ConfigError
from dycoke_jax.files import check_writable

# Titles of the groups of options in the help texts.
_CLIP, _DYCOKE, _DECODING, _PROMPT = "Clip", "DyCoke", "Decoding", "Prompt and model"

K = Annotated[
    float,
    typer.Option(
        help="Share of tokens that temporal token merging drops from each compared frame, "
        "in [0, 1).",
        rich_help_panel=_DYCOKE,
    ),
]
P = Annotated[
    float,
    typer.Option(
        help="Share of the kept visual tokens that the pruned layers do not attend to in a "
        "decode step, in [0, 1).",
        rich_help_panel=_DYCOKE,
    ),
]
Layer = Annotated[
    int,
    typer.Option(
        help="First pruned layer, counted from 0; at least 1 and below the number of layers.",
        rich_help_panel=_DYCOKE,
    ),
]


@app.command(
    epilog="Example: `dycoke-jax generate --model ov-0.5b --video clip.mp4 "
    '--prompt "What happens?"`'
)
def generate(
    model: Annotated[str, typer.Option(help="Checkpoint: folder or hub id.")],
    prompt: Annotated[str, typer.Option(help="Question about the clip.")],
    video: Annotated[
        Path | None, typer.Option(help="Video file. Default: none, the prompt is text only.")
    ] = None,
    frames: Annotated[
        int,
        typer.Option(
            help="Number of frames to use, at least 1, spread evenly over the clip; with --fps, "
            "the maximum number.",
            rich_help_panel=_CLIP,
        ),
    ] = 32,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames a second to use, above 0. Default: --frames alone decides.",
            rich_help_panel=_CLIP,
        ),
    ] = None,
    k: K = 0.7,
    p: P = 0.7,
    layer: Layer = 3,
    threshold: Annotated[
        float,
        typer.Option(
            help="Cosine similarity, in (0, 1], of the attention of successive decode steps; "
            "below it the attended tokens are chosen anew.",
            rich_help_panel=_DYCOKE,
        ),
    ] = 0.9,
    mode: Annotated[
        Literal["paper", "official"],
        typer.Option(
            help="paper: as the text of the paper describes it. official: as the published code "
            "computes it.",
            rich_help_panel=_DYCOKE,
        ),
    ] = "paper",
    parked: Annotated[
        Literal["device", "drop"],
        typer.Option(
            help="Where keys and values that are not chosen are stored. device: in device memory, "
            "so that they can be chosen later. drop: nowhere; the choice is made once.",
            rich_help_panel=_DYCOKE,
        ),
    ] = "device",
    no_dycoke: Annotated[
        bool,
        typer.Option("--no-dycoke", help="Run the model without DyCoke.", rich_help_panel=_DYCOKE),
    ] = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            help="Number of tokens after which the answer is cut off, at least 1.",
            rich_help_panel=_DECODING,
        ),
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            help="Sampling temperature, 0 or more; 0 is greedy decoding.",
            rich_help_panel=_DECODING,
        ),
    ] = 0.0,
    top_k: Annotated[
        int,
        typer.Option(
            help="Number of most likely tokens to sample from; 0 for the whole vocabulary.",
            rich_help_panel=_DECODING,
        ),
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample from the fewest tokens that hold this probability, in (0, 1].",
            rich_help_panel=_DECODING,
        ),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Seed of sampling, 0 or more.", rich_help_panel=_DECODING)
    ] = 0,
    system: Annotated[
        str | None,
        typer.Option(
            help="Text of the system turn; an empty text omits the turn. Default: "
            '"You are a helpful assistant." in the format llava-next, no such turn in checkpoint.',
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    prompt_format: Annotated[
        Literal["llava-next", "checkpoint"],
        typer.Option(
            help="llava-next: the conversation format of LLaVA-NeXT, in which the models were "
            "trained. checkpoint: the chat template in the checkpoint's own files.",
            rich_help_panel=_PROMPT,
        ),
    ] = "llava-next",
    time_text: Annotated[
        bool,
        typer.Option(
            "--time-text",
            help="Add the times of the frames to the prompt, as LLaVA-Video does.",
            rich_help_panel=_PROMPT,
        ),
    ] = False,
    pool_mode: Annotated[
        PoolMode | None,
        typer.Option(
            help="Pooling of visual tokens. Default: that of the checkpoint's configuration.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of weights and computation. Default: as stored.",
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    allow_damaged: Annotated[
        bool,
        typer.Option(
            "--allow-damaged",
            help="Use the frames of a damaged clip that can be decoded, instead of refusing it.",
            rich_help_panel=_CLIP,
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Answer a question about a video."""
    from dycoke_jax.checkpoint import open_checkpoint
    from dycoke_jax.checkpoint.chat_template import find_chat_template
    from dycoke_jax.compression.dycoke import DyCoke
    from dycoke_jax.engine import Decoding
    from dycoke_jax.inputs import FrameSampling, check_clip
    from dycoke_jax.inputs.chat_template import check_template
    from dycoke_jax.llava_video import LlavaVideo

    # Bad settings and clips are refused before a large checkpoint is read.
    compression = None if no_dycoke else DyCoke(k, layer, p, threshold, mode, parked)
    FrameSampling(frames=frames, fps=fps)
    Decoding(max_new_tokens, temperature, top_k, top_p, seed)
    if video is not None:
        check_clip(video, allow_damaged=allow_damaged)
    checkpoint = open_checkpoint(model, pool_mode=pool_mode)
    say_notes(checkpoint.notes)
    if prompt_format == "checkpoint":
        check_template(find_chat_template(checkpoint.folder.path, checkpoint.tokenizer))
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
            system=... if system is None else system or None,
            prompt_format=prompt_format,
            time_text=time_text,
            allow_damaged=allow_damaged,
            stream=True,
            progress=progress,
        )
        first = next(pieces)
    # The progress bars are removed by now, so the answer can be printed as it is generated.
    answer = first.answer
    if not as_json:
        print(first.text, end="", flush=True)
    for piece in pieces:
        answer = piece.answer
        if not as_json:
            print(piece.text, end="", flush=True)
    assert answer is not None
    if as_json:
        result = dataclasses.asdict(answer)
        # A prompt without a clip has nothing to compress.
        applied = compression if video is not None else None
        result["compression"] = None if applied is None else dataclasses.asdict(applied)
        print(json.dumps(result))
        return
    print()
    say_notes(answer.notes)
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
        Path | None,
        typer.Option(help="Video file of your own; needs --prompt. Default: the made-up clips."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Question about your own video file; needs --video.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint: folder or hub id; needs --video. Default: the tiny model that "
            "ships with the package, which is trained on made-up clips only."
        ),
    ] = None,
    frames: Annotated[
        int, typer.Option(help="Number of frames of the video file to use, at least 1.")
    ] = 16,
    k: K = 0.7,
    p: P = 0.7,
    layer: Layer = 3,
    picture: Annotated[
        Path,
        typer.Option(help="PNG file to write; it shows the dropped and the attended tokens."),
    ] = Path("dycoke-demo.png"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Compare answers, token counts and times with and without DyCoke."""
    from dycoke_jax import demo as demonstration
    from dycoke_jax.assets import TINY
    from dycoke_jax.checkpoint import open_checkpoint
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
    checkpoint = open_checkpoint(model or TINY)
    say_notes(checkpoint.notes)
    with progress_bars() as progress:
        llava = LlavaVideo.from_checkpoint(checkpoint, progress=progress)
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
    say(f"wrote {picture}: dropped tokens are dark, attended tokens have a yellow border")
