"""The commands that train and evaluate models: train, train-tiny, eval."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dycoke_jax.cli.app import app
from dycoke_jax.cli.console import progress_bars, say, say_notes
from dycoke_jax.errors import ConfigError
from dycoke_jax.files import check_writable

# Titles of the groups of options in the help text of ``train``.
_DATA, _OPTIMISER, _DROPPING, _RUN = "Data and batches", "Optimisation", "Token dropping", "Run"


@app.command(
    epilog="Example: `dycoke-jax train run --model ov-0.5b --data records.jsonl --steps 1000`"
)
def train(
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
    steps: Annotated[int, typer.Option(help="Number of training steps, at least 1.")] = 1000,
    rows: Annotated[
        int,
        typer.Option(
            help="Clips whose gradient is computed at a time, at least 1.", rich_help_panel=_DATA
        ),
    ] = 1,
    accumulate: Annotated[
        int,
        typer.Option(
            help="Number of such gradients that are summed in a step, at least 1.",
            rich_help_panel=_DATA,
        ),
    ] = 8,
    width: Annotated[
        int,
        typer.Option(
            help="Tokens of questions and answers that fit into a row, at least 1.",
            rich_help_panel=_DATA,
        ),
    ] = 256,
    frames: Annotated[
        int,
        typer.Option(
            help="Number of frames of a clip to use, at least 1, spread evenly; with --fps, the "
            "maximum number.",
            rich_help_panel=_DATA,
        ),
    ] = 16,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames a second to use, above 0; needs --data. Default: --frames alone decides.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    learning_rate: Annotated[
        float,
        typer.Option(
            help="Highest learning rate of the cycle, above 0.", rich_help_panel=_OPTIMISER
        ),
    ] = 1e-5,
    language: Annotated[
        float,
        typer.Option(
            help="Learning-rate factor of the language model; 0 freezes it.",
            rich_help_panel=_OPTIMISER,
        ),
    ] = 1.0,
    projector: Annotated[
        float,
        typer.Option(
            help="Learning-rate factor of the projector; 0 freezes it.",
            rich_help_panel=_OPTIMISER,
        ),
    ] = 1.0,
    tower: Annotated[
        float,
        typer.Option(
            help="Learning-rate factor of the vision tower; 0 freezes it.",
            rich_help_panel=_OPTIMISER,
        ),
    ] = 0.2,
    frozen_layers: Annotated[
        int,
        typer.Option(
            help="Number of layers of the language model, from the first, to freeze.",
            rich_help_panel=_OPTIMISER,
        ),
    ] = 0,
    warm_up: Annotated[
        int,
        typer.Option(
            help="Number of steps of linear learning-rate warm-up, 0 or more.",
            rich_help_panel=_OPTIMISER,
        ),
    ] = 30,
    weight_decay: Annotated[
        float,
        typer.Option(
            help="AdamW weight decay, on matrices only, 0 or more.", rich_help_panel=_OPTIMISER
        ),
    ] = 0.01,
    clip: Annotated[
        float,
        typer.Option(
            help="Largest global norm of the gradient, above 0.", rich_help_panel=_OPTIMISER
        ),
    ] = 1.0,
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(
            help="Dtype of the computation; trained weights are float32.",
            rich_help_panel=_OPTIMISER,
        ),
    ] = "bfloat16",
    rematerialise: Annotated[
        bool,
        typer.Option(
            help="Compute the results of layers again in the backward pass instead of storing "
            "them.",
            rich_help_panel=_OPTIMISER,
        ),
    ] = True,
    merged: Annotated[
        float,
        typer.Option(
            help="Share of the steps, in [0, 1], that drop tokens by temporal token merging.",
            rich_help_panel=_DROPPING,
        ),
    ] = 0.0,
    random: Annotated[
        float,
        typer.Option(
            help="Share of the steps, in [0, 1 - merged], that drop as many tokens at random.",
            rich_help_panel=_DROPPING,
        ),
    ] = 0.0,
    k: Annotated[
        float,
        typer.Option(
            help="Share of a compared frame's tokens that these steps drop, in [0, 1).",
            rich_help_panel=_DROPPING,
        ),
    ] = 0.7,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the order of the data and of random token dropping, 0 or more.",
            rich_help_panel=_RUN,
        ),
    ] = 0,
    log_every: Annotated[
        int,
        typer.Option(help="Steps between two log entries, at least 1.", rich_help_panel=_RUN),
    ] = 10,
    evaluate_every: Annotated[
        int,
        typer.Option(help="Steps between two evaluations, at least 1.", rich_help_panel=_RUN),
    ] = 200,
    save_every: Annotated[
        int,
        typer.Option(
            help="Steps between two saved training states, at least 1.", rich_help_panel=_RUN
        ),
    ] = 100,
) -> None:
    """Fine-tune a model on clips with questions and answers."""
    from dycoke_jax.checkpoint import open_folder
    from dycoke_jax.inputs import FrameSampling
    from dycoke_jax.training.fine_tuning import FineTuning, fine_tune
    from dycoke_jax.training.run import Intervals
    from dycoke_jax.training.sources import BatchShape
    from dycoke_jax.training.step import Optimisation
    from dycoke_jax.training.token_dropping import TokenDroppingMix

    intervals = Intervals(log_every, evaluate_every, save_every)
    what = FineTuning(
        model=model,
        data=data,
        test_data=test_data,
        sampling=FrameSampling(frames, fps),
        shape=BatchShape(rows, accumulate, width),
        dropping=TokenDroppingMix(merged, random, k),
        optimisation=Optimisation(
            steps=steps,
            learning_rate=learning_rate,
            language=language,
            projector=projector,
            tower=tower,
            frozen_layers=frozen_layers,
            warm_up=warm_up,
            weight_decay=weight_decay,
            clip=clip,
            dtype=dtype,
            rematerialise=rematerialise,
        ),
        seed=seed,
    )
    say_notes(open_folder(model).notes)
    with progress_bars() as progress:
        trained = fine_tune(folder, what, intervals, progress)
    say(f"wrote {trained}")


@app.command(
    "train-tiny",
    epilog="Example: `dycoke-jax train-tiny tiny-run`, which takes two hours on two CPU cores.",
)
def make_tiny(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the run; an interrupted run in it is resumed.")
    ],
    seed: Annotated[
        int,
        typer.Option(help="Seed of initial weights, training clips and token dropping, 0 or more."),
    ] = 0,
    log_every: Annotated[int, typer.Option(help="Steps between two log entries, at least 1.")] = 10,
    evaluate_every: Annotated[
        int, typer.Option(help="Steps between two evaluations, at least 1.")
    ] = 100,
    save_every: Annotated[
        int, typer.Option(help="Steps between two saved training states, at least 1.")
    ] = 50,
) -> None:
    """Train the tiny model that ships with the package, from random weights."""
    from dycoke_jax.recipes.tiny.recipe import train_tiny
    from dycoke_jax.training.run import Intervals

    intervals = Intervals(log_every, evaluate_every, save_every)
    with progress_bars() as progress:
        trained = train_tiny(folder, intervals, seed, progress)
    say(f"wrote {trained}")


@app.command(
    "eval",
    epilog="Example: `dycoke-jax eval results.json --settings all --clips 200 --plot results.png`",
)
def evaluate(
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
        Literal["headlines", "all"],
        typer.Option(
            help="Compression settings to compare. headlines: none, DyCoke, random tokens and "
            "whole frames. all: more values of each setting as well."
        ),
    ] = "headlines",
    frames: Annotated[int, typer.Option(help="Number of frames of a clip: 1, or at least 9.")] = 16,
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
    from dycoke_jax.evaluation.settings import HEADLINES, SWEEPS
    from dycoke_jax.llava_video import LlavaVideo
    from dycoke_jax.tasks.questions import blind_score
    from dycoke_jax.tasks.scenes import SceneSettings
    from dycoke_jax.tasks.task import MONITORED, task_clip

    if clips < 1:
        raise ConfigError(f"clips is {clips}; it must be at least 1")
    check_writable(results)
    if plot is not None:
        check_writable(plot)
        report.check_plot()
    compared = HEADLINES if settings == "headlines" else HEADLINES | SWEEPS
    scenes = SceneSettings(frames)
    task = [task_clip("test", MONITORED + number, scenes) for number in range(clips)]
    blind = blind_score(question for clip in task for question in clip.questions)
    checkpoint = open_checkpoint(model or TINY)
    say_notes(checkpoint.notes)
    with progress_bars() as progress:
        llava = LlavaVideo.from_checkpoint(checkpoint, progress=progress)
        described = {
            "model": fingerprint(llava.params),
            "clips": clips,
            "frames": frames,
            "through_files": through_files,
        }
        done = report.read(results, described)
        for number, (name, compression) in enumerate(compared.items()):
            progress("settings", number, len(compared))
            if name not in done:
                done[name] = accuracy.evaluate(
                    llava,
                    task,
                    name,
                    compression,
                    through_files=through_files,
                    batch_size=batch_size,
                    progress=progress,
                )
                report.write(results, described, done, blind)
    selected = [done[name] for name in compared]
    if plot is not None:
        report.plot(selected, plot)
    if as_json:
        print(json.dumps(report.everything(described, done, blind)))
        return
    console = Console(highlight=False)
    console.width = max(console.width, report.WIDTH)
    console.print(report.table(selected, blind))
