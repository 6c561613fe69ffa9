"""Commands about learning and knowing: train, eval."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dycoke_jax.cli.app import app
from dycoke_jax.cli.console import progress_bars, say
from dycoke_jax.errors import ConfigError
from dycoke_jax.files import check_writable


@app.command(
    epilog="Example: `dycoke-jax train run --model ov-0.5b --data records.jsonl --steps 1000`"
)
def train(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the run; a run that was cut off there goes on.")
    ],
    model: Annotated[str, typer.Option(help="Checkpoint to start from: folder or hub id.")],
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
    steps: Annotated[int, typer.Option(help="Number of training steps.")] = 1000,
    rows: Annotated[int, typer.Option(help="Clips whose gradient is computed at a time.")] = 1,
    accumulate: Annotated[int, typer.Option(help="Gradients that are summed in a step.")] = 8,
    width: Annotated[
        int, typer.Option(help="Slots of a row for questions and answers, in tokens.")
    ] = 256,
    frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 16,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second to use, at most `frames`.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate, above 0.")] = 1e-5,
    language: Annotated[
        float, typer.Option(help="Relative learning rate of the language model; 0 freezes it.")
    ] = 1.0,
    projector: Annotated[
        float, typer.Option(help="Relative learning rate of the projector; 0 freezes it.")
    ] = 1.0,
    tower: Annotated[
        float, typer.Option(help="Relative learning rate of the vision tower; 0 freezes it.")
    ] = 0.2,
    frozen_layers: Annotated[
        int,
        typer.Option(help="Number of layers of the language model, from the first, to freeze."),
    ] = 0,
    warm_up: Annotated[int, typer.Option(help="Steps of linear learning-rate warm-up.")] = 30,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW weight decay, on matrices only.")
    ] = 0.01,
    clip: Annotated[float, typer.Option(help="Largest global norm of the gradient.")] = 1.0,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Dtype of the computation.")
    ] = "bfloat16",
    rematerialise: Annotated[
        bool, typer.Option(help="Compute layers again for the gradient.")
    ] = True,
    merged: Annotated[
        float, typer.Option(help="Share of the steps that merge visual tokens (stage 1).")
    ] = 0.0,
    random: Annotated[
        float, typer.Option(help="Share of the steps that drop visual tokens at random.")
    ] = 0.0,
    k: Annotated[
        float, typer.Option(help="Share of tokens that such steps drop, in [0, 1).")
    ] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the data's order and of dropping.")] = 0,
    log_every: Annotated[int, typer.Option(help="Steps between two log entries.")] = 10,
    evaluate_every: Annotated[int, typer.Option(help="Steps between two evaluations.")] = 200,
    save_every: Annotated[int, typer.Option(help="Steps between two saved states.")] = 100,
) -> None:
    """Fine-tune a model on clips with questions and answers."""
    from dycoke_jax.inputs import FrameSampling
    from dycoke_jax.training.fine_tuning import FineTuning, fine_tune
    from dycoke_jax.training.run import Intervals
    from dycoke_jax.training.sources import BatchShape
    from dycoke_jax.training.step import Optimisation
    from dycoke_jax.training.token_dropping import TokenDroppingMix

    intervals = Intervals(log_every, evaluate_every, save_every)
    with progress_bars() as progress:
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
        trained = fine_tune(folder, what, intervals, progress)
    say(f"wrote {trained}")


@app.command(
    "train-tiny", epilog="Example: `dycoke-jax train-tiny tiny-run`; two hours on two CPU cores."
)
def make_tiny(
    folder: Annotated[
        Path, typer.Argument(help="Folder of the run; a run that was cut off there goes on.")
    ],
    seed: Annotated[int, typer.Option(help="Seed of weights, clips and dropping.")] = 0,
    log_every: Annotated[int, typer.Option(help="Steps between two log entries.")] = 10,
    evaluate_every: Annotated[int, typer.Option(help="Steps between two evaluations.")] = 100,
    save_every: Annotated[int, typer.Option(help="Steps between two saved states.")] = 50,
) -> None:
    """Make the package's own tiny model anew, from random weights."""
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
        Path, typer.Argument(help="JSON file to write; settings that it holds are not run again.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id. Default: the tiny one that ships.")
    ] = None,
    clips: Annotated[
        int, typer.Option(help="Number of unseen clips, of about nine questions each.")
    ] = 1000,
    settings: Annotated[
        Literal["headlines", "all"],
        typer.Option(help="headlines: plain, DyCoke, random and whole-frame dropping."),
    ] = "headlines",
    frames: Annotated[int, typer.Option(help="Frames of a clip.")] = 16,
    through_files: Annotated[
        bool, typer.Option("--through-files", help="Write every clip as H.264 and read that.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Questions that run together.")] = 32,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw: accuracy against tokens.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure accuracy on made-up clips, by kind of question and setting of compression."""
    from dycoke_jax.assets import TINY
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
    with progress_bars() as progress:
        llava = LlavaVideo.from_pretrained(model or TINY, progress=progress)
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
    chosen = [done[name] for name in compared]
    if plot is not None:
        report.plot(chosen, plot)
    if as_json:
        print(json.dumps(report.everything(described, done, blind)))
        return
    console = Console(highlight=False)
    console.width = max(console.width, report.WIDTH)
    console.print(report.table(chosen, blind))
