"""The command that compiles ahead of traffic: warmup."""

import dataclasses
import json
from typing import Annotated

import typer

from dycoke_jax.cli.app import new_app
from dycoke_jax.cli.compress import FORM
from dycoke_jax.cli.console import progress_bars, say, say_notes
from dycoke_jax.cli.loading import ComputedIn, Fsdp, KeysValues, MeshSizes, Pooling, Weights
from dycoke_jax.cli.numbers import whole_numbers
from dycoke_jax.cli.options import Options, with_settings
from dycoke_jax.compilation import use_compilation_cache
from dycoke_jax.compression.methods import parse_compression
from dycoke_jax.inputs import Prompting

app = new_app()

# Titles of the groups of options in the help texts.
_SIZES, _PROMPT = "Sizes", "Prompt and model"

_LIST = "Numbers with commas between them; each stands for all that are rounded up to the same."


@app.command(epilog="Example: `dycoke-jax warmup --model ov-0.5b --frames 16,32 --batch 1,2,4,8`")
@with_settings
def warmup(
    *,
    model: Annotated[str, typer.Option(help="Checkpoint: folder or hub id.")],
    frames: Annotated[
        str,
        typer.Option(
            help=f"Numbers of frames of clips; 0 for questions without a clip. {_LIST}",
            rich_help_panel=_SIZES,
        ),
    ] = "32",
    batch: Annotated[
        str,
        typer.Option(
            help=f"Numbers of questions that are answered together. {_LIST}", rich_help_panel=_SIZES
        ),
    ] = "1",
    question_tokens: Annotated[
        str, typer.Option(help=f"Numbers of tokens of questions. {_LIST}", rich_help_panel=_SIZES)
    ] = "64",
    max_new_tokens: Annotated[
        str,
        typer.Option(
            help=f"Numbers of tokens after which answers are cut off. {_LIST}",
            rich_help_panel=_SIZES,
        ),
    ] = "128",
    compress: Annotated[
        list[str] | None,
        typer.Option(
            help="Method of token compression; it may be given several times. Default: dycoke. "
            f"{FORM}"
        ),
    ] = None,
    prompting: Annotated[Prompting, Options(_PROMPT)],
    pool_mode: Pooling = None,
    dtype: ComputedIn = None,
    weights: Weights = None,
    kv: KeysValues = None,
    mesh: MeshSizes = None,
    fsdp: Fsdp = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Compile the programs for given sizes, ahead of the first question.

    They are kept in the compilation cache, where later commands and other processes on this machine
    find them.
    """
    from dycoke_jax.checkpoint import open_checkpoint
    from dycoke_jax.llava_video import LlavaVideo

    sizes = {
        "frames": whole_numbers("--frames", frames),
        "batch": whole_numbers("--batch", batch),
        "question_tokens": whole_numbers("--question-tokens", question_tokens),
        "max_new_tokens": whole_numbers("--max-new-tokens", max_new_tokens),
    }
    methods = [parse_compression(text) for text in compress or ["dycoke"]]
    folder = use_compilation_cache()
    checkpoint = open_checkpoint(model, pool_mode=pool_mode)
    say_notes(checkpoint.notes)
    with progress_bars() as progress:
        llava = LlavaVideo.from_checkpoint(
            checkpoint,
            dtype=dtype,
            weights=weights,
            kv=kv,
            mesh=mesh,
            fsdp=fsdp,
            progress=progress,
        )
        done = [
            llava.warm_up(**sizes, compression=method, prompting=prompting, progress=progress)
            for method in methods
        ]
    total = {
        field.name: sum(getattr(one, field.name) for one in done)
        for field in dataclasses.fields(done[0])
    }
    if as_json:
        print(json.dumps(total | {"folder": str(folder)}))
        return
    say(
        f"{total['layouts']} layouts: {total['compiled']} programs compiled, {total['found']} "
        f"found in {folder}; {total['seconds']:.1f} seconds"
    )
