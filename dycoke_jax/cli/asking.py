"""The commands that answer questions: generate, demo."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from dycoke_jax.cli.app import new_app
from dycoke_jax.cli.clips import AllowDamaged
from dycoke_jax.cli.compilation import compiles
from dycoke_jax.cli.compress import Compress, NoDycoke, chosen
from dycoke_jax.cli.console import progress_bars, say, say_notes
from dycoke_jax.cli.loading import (
    ComputedIn,
    Fsdp,
    KeysValues,
    MeshSizes,
    Pooling,
    Weights,
    connect,
)
from dycoke_jax.cli.options import GIVEN, Options, with_settings
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.compression.methods import described
from dycoke_jax.engine.requests import Decoding
from dycoke_jax.errors import ConfigError
from dycoke_jax.files import check_writable
from dycoke_jax.hosts import Hosts, is_first
from dycoke_jax.inputs import FrameSampling, Prompting, check_clip

# The networks and the readers of checkpoints are imported inside the commands: --help needs none.

app = new_app()

# Titles of the groups of options in the help texts.
_CLIP, _COMPRESSION, _DECODING, _PROMPT = "Clip", "Compression", "Decoding", "Prompt and model"
_HOSTS = "Several hosts"

_DEMO_SAMPLING = FrameSampling(frames=16)


@app.command(
    epilog="Example: `dycoke-jax generate --model ov-0.5b --video clip.mp4 "
    '--prompt "What happens?"`'
)
@compiles
@with_settings
def generate(
    *,
    given: Annotated[frozenset[str], GIVEN],
    model: Annotated[str, typer.Option(help="Checkpoint: folder or hub id.")],
    prompt: Annotated[str, typer.Option(help="Question about the clip.")],
    video: Annotated[
        Path | None, typer.Option(help="Video file. Default: none, the prompt is text only.")
    ] = None,
    sampling: Annotated[FrameSampling, Options(_CLIP)],
    dycoke: Annotated[DyCoke, Options(_COMPRESSION)],
    no_dycoke: NoDycoke = False,
    compress: Compress = None,
    decoding: Annotated[Decoding, Options(_DECODING)],
    prompting: Annotated[Prompting, Options(_PROMPT)],
    pool_mode: Pooling = None,
    dtype: ComputedIn = None,
    weights: Weights = None,
    kv: KeysValues = None,
    mesh: MeshSizes = None,
    fsdp: Fsdp = False,
    hosts: Annotated[Hosts, Options(_HOSTS)],
    allow_damaged: AllowDamaged = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Answer a question about a video."""
    from dycoke_jax.checkpoint import open_checkpoint
    from dycoke_jax.checkpoint.chat_template import find_chat_template
    from dycoke_jax.inputs.chat_template import check_template
    from dycoke_jax.llava_video import LlavaVideo

    # Bad settings and clips are refused before a large checkpoint is read.
    compression = chosen(given, compress, None if no_dycoke else dycoke)
    sizes = connect(hosts, mesh)
    if video is not None and not hosts.several:  # of several processes one alone opens the clip
        check_clip(video, allow_damaged=allow_damaged)
    checkpoint = open_checkpoint(model, pool_mode=pool_mode)
    say_notes(checkpoint.notes)
    if prompting.prompt_format == "checkpoint":
        check_template(find_chat_template(checkpoint.folder.path, checkpoint.tokenizer))
    if compression is not None and video is not None and sampling.fps is None:
        compression.stages.check(checkpoint.config, sampling.frames)
    with progress_bars() as progress:
        llava = LlavaVideo.from_checkpoint(
            checkpoint,
            dtype=dtype,
            weights=weights,
            kv=kv,
            mesh=sizes,
            fsdp=fsdp,
            progress=progress,
        )
        pieces = llava.stream(
            [video],
            [prompt],
            compression=compression,
            decoding=decoding,
            sampling=sampling,
            prompting=prompting,
            allow_damaged=allow_damaged,
            progress=progress,
        )
        first = next(pieces)
    if hosts.several and not is_first():
        for _ in pieces:
            pass
        return
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
        result["compression"] = None if applied is None else described(applied)
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
@compiles
@with_settings
def demo(
    *,
    given: Annotated[frozenset[str], GIVEN],
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
    sampling: Annotated[FrameSampling, Options(_CLIP)] = _DEMO_SAMPLING,
    dycoke: Annotated[DyCoke, Options(_COMPRESSION)],
    compress: Compress = None,
    picture: Annotated[
        Path,
        typer.Option(help="PNG file to write; it shows the dropped and the attended tokens."),
    ] = Path("dycoke-demo.png"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Compare answers, token counts and times with and without compression."""
    from dycoke_jax import demo as demonstration
    from dycoke_jax.assets import TINY
    from dycoke_jax.checkpoint import open_checkpoint
    from dycoke_jax.inspection.drawing import save, sheet
    from dycoke_jax.inspection.tracing import trace_answer
    from dycoke_jax.llava_video import LlavaVideo

    if (video is None) != (prompt is None):
        raise ConfigError("--video and --prompt go together")
    if video is None and model is not None:
        raise ConfigError("only the model that ships knows the made-up clips: give --video as well")
    compression = chosen(given, compress, dycoke)
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
            {"plain": None, compress or "DyCoke": compression},
            sampling=sampling,
            progress=progress,
        )
        pictured = demonstration.longest_of_each_clip(asked)
        traces = []
        for number, a in enumerate(pictured):
            trace = trace_answer(
                llava, a.video, a.question, compression=compression, sampling=sampling
            )
            traces.append((f"{a.clip}: {a.question}\n{trace.text}", trace))
            progress("drawing", number + 1, len(pictured))
        save(sheet(traces), picture)
    if as_json:
        measured = demonstration.as_json(asked, sides)
        print(json.dumps(measured | {"picture": str(picture)}))
        return
    demonstration.show(asked, sides)
    say(f"wrote {picture}: dropped tokens are dark, attended tokens have a yellow border")
