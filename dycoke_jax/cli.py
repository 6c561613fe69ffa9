"""The command line: ``dycoke-jax``. Answers go to stdout, everything else to stderr."""

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dycoke_jax import __version__
from dycoke_jax.config import PRESETS, PoolMode
from dycoke_jax.errors import ConfigError, DycokeError

# Heavy imports (jax, flax, PyAV) happen inside the commands, so that --help answers at once.

USER_ERROR = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Fast video language models in JAX: LLaVA-OneVision and LLaVA-Video with DyCoke.",
)


def main() -> None:
    """Runs the command line; a DycokeError becomes its message and exit code 2."""
    # transformers would advise to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        app()
    except DycokeError as error:
        _say(f"error: {error}", style="red")
        sys.exit(USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)


def _print_version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"dycoke-jax {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = None,
) -> None:
    pass


Dtype = Literal["float32", "bfloat16", "float16"]


@app.command(
    epilog="Example: `dycoke-jax convert lmms-lab/llava-onevision-qwen2-0.5b-ov ov-0.5b "
    "--dtype bfloat16`"
)
def convert(
    source: Annotated[
        str, typer.Argument(help="Folder (lmms-lab, llava-hf, converted) or hub id.")
    ],
    destination: Annotated[Path, typer.Argument(help="Folder to make; it must not exist yet.")],
    to: Annotated[
        Literal["orbax", "llava-hf"],
        typer.Option(help="orbax: for this library. llava-hf: for transformers."),
    ] = "orbax",
    dtype: Annotated[Dtype | None, typer.Option(help="Change the dtype of all weights.")] = None,
) -> None:
    """Convert a checkpoint, bit for bit unless --dtype is given."""
    from dycoke_jax import checkpoint

    write = checkpoint.convert if to == "orbax" else checkpoint.export
    with _bars() as bar:
        write(source, destination, dtype=dtype, progress=_bytes(bar, "converting"))
    _say(f"wrote {destination}")


@app.command(epilog="Example: `dycoke-jax init tiny-random --preset tiny`")
def init(
    destination: Annotated[Path, typer.Argument(help="Folder to make; it must not exist yet.")],
    preset: Annotated[str, typer.Option(help=f"Sizes: {', '.join(PRESETS)}.")] = "tiny",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Make an untrained checkpoint (llava-hf layout): the real shapes, answers of pure noise."""
    from dycoke_jax.checkpoint.untrained import write_untrained

    if preset not in PRESETS:
        raise ConfigError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    with _bars() as bar:
        write_untrained(destination, PRESETS[preset], dtype, seed, _bytes(bar, "writing weights"))
    _say(f"wrote {destination}: random weights, its answers mean nothing")


@app.command(
    epilog="Example: `dycoke-jax generate --model ov-0.5b --video clip.mp4 "
    '--prompt "What happens?"`'
)
def generate(
    model: Annotated[str, typer.Option(help="Folder or hub id of the checkpoint.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    video: Annotated[Path | None, typer.Option(help="The clip; none asks the text alone.")] = None,
    frames: Annotated[int, typer.Option(help="Frames to look at, at most.")] = 32,
    fps: Annotated[float | None, typer.Option(help="Frames a second to look at.")] = None,
    k: Annotated[float, typer.Option(help="DyCoke: share of redundant tokens to merge.")] = 0.7,
    p: Annotated[float, typer.Option(help="DyCoke: share of visual KV to prune.")] = 0.7,
    layer: Annotated[int, typer.Option(help="DyCoke: first layer that is pruned.")] = 3,
    threshold: Annotated[
        float, typer.Option(help="DyCoke: similarity below which the kept set is chosen anew.")
    ] = 0.9,
    mode: Annotated[
        Literal["paper", "official"],
        typer.Option(help="DyCoke as in the paper or as in the published code."),
    ] = "paper",
    no_dycoke: Annotated[bool, typer.Option("--no-dycoke", help="Run the plain model.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among this share of probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random draws.")] = 0,
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
    compression = None if no_dycoke else DyCoke(k, layer, p, threshold, mode)
    FrameSampling(frames=frames, fps=fps)
    Decoding(max_new_tokens, temperature, top_k, top_p, seed)
    if video is not None:
        check_clip(video, allow_damaged=allow_damaged)
    config = open_checkpoint(model).config
    if compression is not None and video is not None and fps is None:
        compression.check(config, frames)
    with _bars() as bar:
        llava = LlavaVideo.from_pretrained(
            model,
            dtype=dtype,
            pool_mode=pool_mode,
            progress=_bytes(bar, "loading weights"),
        )
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
            progress=_counts(bar),
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
        _say(f"note: {note}", style="yellow")
    _say(f"tokens: {answer.tokens}")
    times = answer.seconds
    _say(
        f"seconds: vision {times.vision:.2f}, prefill {times.prefill:.2f}, decode "
        f"{times.decode:.2f} (compilation included)"
    )


@app.command(
    epilog="Examples: `dycoke-jax train run --model ov-0.5b --data records.jsonl --steps 1000`; "
    "`dycoke-jax train tiny --from-scratch`"
)
def train(
    folder: Annotated[
        Path, typer.Argument(help="Of the run; one that was cut off goes on where it was.")
    ],
    model: Annotated[str | None, typer.Option(help="Checkpoint to start from.")] = None,
    from_scratch: Annotated[
        bool,
        typer.Option("--from-scratch", help="Make the package's own tiny model anew (2 hours)."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file of {video, question, answer}, paths relative to it. "
            "Default: the built-in task."
        ),
    ] = None,
    test_data: Annotated[
        Path | None, typer.Option(help="Records of the same form, to evaluate on in between.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Changes of the weights.")] = 1000,
    rows: Annotated[int, typer.Option(help="Clips in memory at a time.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Times `rows` clips a step.")] = 8,
    width: Annotated[
        int, typer.Option(help="Tokens of questions and answers of a clip at a time.")
    ] = 256,
    frames: Annotated[int, typer.Option(help="Of a clip.")] = 16,
    fps: Annotated[float | None, typer.Option(help="Frames a second, `frames` at most.")] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 1e-5,
    language: Annotated[float, typer.Option(help="Relative rate; 0 freezes.")] = 1.0,
    projector: Annotated[float, typer.Option(help="Relative rate; 0 freezes.")] = 1.0,
    tower: Annotated[float, typer.Option(help="Relative rate; 0 freezes.")] = 0.2,
    warm_up: Annotated[int, typer.Option(help="Steps of rising learning rate.")] = 30,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.01,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of the computation.")
    ] = "bfloat16",
    rematerialise: Annotated[bool, typer.Option(help="Store less, compute layers twice.")] = True,
    merged: Annotated[
        float, typer.Option(help="Share of the steps with temporal token merging.")
    ] = 0.0,
    random: Annotated[
        float, typer.Option(help="Share of the steps that drop as many tokens at random.")
    ] = 0.0,
    k: Annotated[float, typer.Option(help="Share of redundant tokens to merge there.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of the data's order and random dropping.")] = 0,
    log_every: Annotated[int, typer.Option(help="Steps.")] = 10,
    evaluate_every: Annotated[int, typer.Option(help="Steps.")] = 200,
    save_every: Annotated[int, typer.Option(help="Steps.")] = 100,
) -> None:
    """Fine-tune a model on clips with questions and answers."""
    from dycoke_jax.inputs import FrameSampling
    from dycoke_jax.training import command
    from dycoke_jax.training.run import Intervals
    from dycoke_jax.training.sources import BatchShape, ThinningMix
    from dycoke_jax.training.step import Optimisation

    if from_scratch == (model is not None):
        raise ConfigError("give either --model, to fine-tune it, or --from-scratch")
    if from_scratch and data is not None:
        raise ConfigError("--from-scratch is the recipe on the built-in task; --data needs --model")
    intervals = Intervals(log_every, evaluate_every, save_every)
    with _bars() as bar:
        show = _steps(bar)
        if model is None:
            trained = command.from_scratch(folder, intervals, seed, show)
        else:
            what = command.FineTuning(
                model=model,
                data=data,
                test_data=test_data,
                sampling=FrameSampling(frames, fps),
                shape=BatchShape(rows, accumulate, width),
                thinning=ThinningMix(merged, random, k),
                optimisation=Optimisation(
                    steps=steps,
                    learning_rate=learning_rate,
                    language=language,
                    projector=projector,
                    tower=tower,
                    warm_up=warm_up,
                    weight_decay=weight_decay,
                    clip=clip,
                    dtype=dtype,
                    rematerialise=rematerialise,
                ),
                seed=seed,
            )
            trained = command.fine_tune(folder, what, intervals, show)
    _say(f"wrote {trained}")


def _say(text: str, style: str | None = None) -> None:
    """Writes a line for the person at the terminal, as it is and unbroken."""
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bars() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield progress


def _counts(bars: Progress) -> Callable[[str, int, int], None]:
    """A bar for each thing that is done."""
    tasks: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total)

    return show


def _steps(bars: Progress) -> Callable[[int, int, str], None]:
    """A bar that says how training goes."""
    task = bars.add_task("compiling", total=None)
    return lambda done, total, line: bars.update(
        task, completed=done, total=total, description=line
    )


def _bytes(bars: Progress, what: str) -> Callable[[int, int, str], None]:
    show = _counts(bars)
    mega = 1 << 20
    return lambda done, total, _: show(f"{what} (MiB)", -(-done // mega), -(-total // mega))
