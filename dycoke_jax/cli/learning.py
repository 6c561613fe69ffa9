"""The commands that train and evaluate models: train, train-tiny, eval."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dycoke_jax.checks import whole_number
from dycoke_jax.cli.app import new_app
from dycoke_jax.cli.compilation import compiles
from dycoke_jax.cli.compress import FORM
from dycoke_jax.cli.console import progress_bars, say, say_notes
from dycoke_jax.cli.loading import Fsdp, MeshSizes
from dycoke_jax.cli.options import GIVEN, Options, with_settings
from dycoke_jax.compression.methods import parse_compression
from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError
from dycoke_jax.evaluation.settings import (
    FULL,
    HEADLINES,
    LONGER,
    SWEEPS,
    Comparison,
    methods,
    more_frames,
    of_names,
)
from dycoke_jax.files import check_writable
from dycoke_jax.inputs import FrameSampling
from dycoke_jax.training.fine_tuning import FineTuning, fine_tune
from dycoke_jax.training.run import Intervals
from dycoke_jax.training.sources import BatchShape
from dycoke_jax.training.step import Optimisation
from dycoke_jax.training.token_dropping import TokenDroppingMix

app = new_app()

# Titles of the groups of options in the help text of ``train``.
_DATA, _OPTIMISER, _DROPPING, _RUN = "Data and batches", "Optimisation", "Token dropping", "Run"

_TINY_INTERVALS = Intervals(evaluate_every=100, save_every=50)


@app.command(
    epilog="Example: `dycoke-jax train run --model ov-0.5b --data records.jsonl --steps 1000`"
)
@compiles
@with_settings
def train(
    *,
    folder: Annotated[
        Path, typer.Argument(help="Folder of the run; an interrupted run in it is resumed.")
    ],
    model: Annotated[str, typer.Option(help="Checkpoint to start from: folder or hub id.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help='JSON Lines file, or file with one JSON array, of records `{"video": ..., '
            '"question": ..., "answer": ...}` or, as LLaVA has them, `{"video": ..., '
            '"conversations": [{"from": ..., "value": ...}, ...]}`; relative paths start at its '
            "folder. Default: the built-in task.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    test_data: Annotated[
        Path | None,
        typer.Option(
            help="File of held-out records to evaluate on, in the same forms. Default: none; with "
            "the built-in task, clips of its test split.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    shape: Annotated[BatchShape, Options(_DATA)] = FineTuning.shape,
    sampling: Annotated[FrameSampling, Options(_DATA)] = FineTuning.sampling,
    optimisation: Annotated[
        Optimisation, Options(_OPTIMISER, omit=("cycles",))
    ] = FineTuning.optimisation,
    dropping: Annotated[TokenDroppingMix, Options(_DROPPING)] = FineTuning.dropping,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the order of the data and of random token dropping, 0 or more.",
            rich_help_panel=_RUN,
        ),
    ] = 0,
    intervals: Annotated[Intervals, Options(_RUN)],
    mesh: MeshSizes = None,
    fsdp: Fsdp = False,
) -> None:
    """Fine-tune a model on clips with questions and answers."""
    from dycoke_jax.checkpoint import open_folder
    from dycoke_jax.sharding import make_mesh

    devices = None if mesh is None else make_mesh(mesh)
    what = FineTuning(model, data, test_data, sampling, shape, dropping, optimisation, seed)
    say_notes(open_folder(model).notes)
    with progress_bars() as progress:
        trained = fine_tune(folder, what, intervals, progress, mesh=devices, fsdp=fsdp)
    say(f"wrote {trained}")


@app.command(
    "train-tiny",
    epilog="Example: `dycoke-jax train-tiny tiny-run`, which takes three hours on two CPU cores.",
)
@compiles
@with_settings
def make_tiny(
    *,
    folder: Annotated[
        Path, typer.Argument(help="Folder of the run; an interrupted run in it is resumed.")
    ],
    seed: Annotated[
        int,
        typer.Option(help="Seed of initial weights, training clips and token dropping, 0 or more."),
    ] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            help="Tiny model, folder or hub id, that is trained on with the last stage alone. "
            "Default: all stages, from random weights."
        ),
    ] = None,
    intervals: Annotated[Intervals, Options()] = _TINY_INTERVALS,
) -> None:
    """Train the tiny model that ships with the package, from random weights."""
    from dycoke_jax.recipes.tiny.recipe import train_tiny

    with progress_bars() as progress:
        trained = train_tiny(folder, intervals, seed, progress, model=model)
    say(f"wrote {trained}")


@app.command(
    "eval",
    epilog="Example: `dycoke-jax eval results.json --settings all --clips 200 --plot results.png`",
)
@compiles
@with_settings
def evaluate(
    *,
    given: Annotated[frozenset[str], GIVEN],
    results: Annotated[
        Path,
        typer.Argument(help="JSON file to write; settings that it already holds are not repeated."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint: folder or hub id. Default: the tiny model that ships with the "
            "package."
        ),
    ] = None,
    clips: Annotated[
        int,
        typer.Option(help="Number of held-out clips, at least 1; each has about nine questions."),
    ] = 1000,
    settings: Annotated[
        Literal["headlines", "all", "methods", "more-frames"],
        typer.Option(
            help="Compression settings to compare. headlines: none, DyCoke, random tokens and "
            "whole frames. all: more values of each setting as well. methods: all methods at 50, "
            "25, 15, 10 and 5 % of the visual tokens. more-frames: --frames whole frames against "
            "2, 4, 8 .. times as many for as many visual tokens, by all methods."
        ),
    ] = "headlines",
    compress: Annotated[
        list[str] | None,
        typer.Option(
            help="Method of token compression to compare with the plain model, in place of "
            f"--settings; it may be given several times. {FORM}"
        ),
    ] = None,
    frames: Annotated[
        int, typer.Option(help="Number of frames that are sampled of a clip, spread evenly.")
    ] = 16,
    clip_frames: Annotated[
        int | None,
        typer.Option(
            help="Number of frames of a clip: 1, or at least 9. Default: as many as are sampled; "
            f"with --settings more-frames {LONGER} times as many."
        ),
    ] = None,
    through_files: Annotated[
        bool,
        typer.Option(
            "--through-files", help="Encode every clip as an H.264 file and read it from there."
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(help="Number of questions that run together, at least 1.")
    ] = 32,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="PNG file to write: accuracy against visual tokens. It needs matplotlib."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all results as one JSON object.")
    ] = False,
) -> None:
    """Measure accuracy on made-up clips, by kind of question and compression setting."""
    from dycoke_jax.assets import TINY
    from dycoke_jax.checkpoint import open_checkpoint
    from dycoke_jax.checkpoint.fingerprint import fingerprint
    from dycoke_jax.evaluation import accuracy, report
    from dycoke_jax.llava_video import LlavaVideo
    from dycoke_jax.tasks.questions import blind_score
    from dycoke_jax.tasks.scenes import SceneSettings
    from dycoke_jax.tasks.task import MONITORED, task_clip

    if clips < 1:
        raise ConfigError(f"clips is {clips}; it must be at least 1")
    frames = whole_number("--frames", frames, 1)
    check_writable(results)
    if plot is not None:
        check_writable(plot)
        report.check_plot()
    if compress is not None and "settings" in given:
        raise ConfigError(
            "--compress and --settings both choose what is compared; give one of them"
        )
    if clip_frames is None:
        clip_frames = LONGER * frames if settings == "more-frames" else frames
    if clip_frames < frames:
        raise ConfigError(
            f"--frames {frames} samples more frames than clips of --clip-frames {clip_frames} have"
        )
    own = None if compress is None else {text: parse_compression(text) for text in compress}
    checkpoint = open_checkpoint(model or TINY)
    say_notes(checkpoint.notes)
    compared = _compared(settings, own, checkpoint.config, frames, clip_frames)
    for setting in compared.settings:
        if setting.compression is not None:
            setting.compression.stages.check(checkpoint.config, setting.frames)
    scenes = SceneSettings(clip_frames)
    task = [task_clip("test", MONITORED + number, scenes) for number in range(clips)]
    blind = blind_score(question for clip in task for question in clip.questions)
    with progress_bars() as progress:
        llava = LlavaVideo.from_checkpoint(checkpoint, progress=progress)
        described = {
            "model": fingerprint(llava.params),
            "clips": clips,
            "frames": clip_frames,
            "through_files": through_files,
        }
        if settings != "more-frames" and frames != clip_frames:
            described["sampled"] = frames  # else the names of the settings say it
        done = report.read(results, described)
        for number, setting in enumerate(compared.settings):
            progress("settings", number, len(compared.settings))
            if setting.name not in done:
                done[setting.name] = accuracy.evaluate(
                    llava,
                    task,
                    setting.name,
                    setting.compression,
                    frames=setting.frames,
                    through_files=through_files,
                    batch_size=batch_size,
                    progress=progress,
                )
                report.write(results, described, done, blind)
    selected = [done[setting.name] for setting in compared.settings]
    if plot is not None:
        of_settings = {setting.name: setting.frames for setting in compared.settings}
        differ = len(set(of_settings.values())) > 1
        lines = report.lines_of(compared)
        report.plot(selected, plot, lines, of_settings if differ else None)
    if as_json:
        print(json.dumps(report.everything(described, done, blind)))
        return
    console = Console(highlight=False)
    console.width = max(console.width, report.WIDTH)
    headings = {setting.name: setting.group for setting in compared.settings}
    console.print(report.table(selected, blind, headings, compared.left_out))


def _compared(
    settings: str,
    own: Mapping[str, Compressor | None] | None,
    config: LlavaConfig,
    frames: int,
    clip_frames: int,
) -> Comparison:
    """What the options of ``eval`` choose; ``own`` are the methods of ``--compress``."""
    if own is not None:
        return of_names({FULL: None, **own}, frames)
    match settings:
        case "methods":
            return methods(config, frames)
        case "more-frames":
            return more_frames(config, frames, clip_frames)
        case "all":
            return of_names(HEADLINES | SWEEPS, frames)
        case _:
            return of_names(HEADLINES, frames)
