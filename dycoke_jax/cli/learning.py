"""Commands about learning and knowing: train, eval."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dycoke_jax.cli.app import app
from dycoke_jax.cli.console import bars, say, training_steps
from dycoke_jax.errors import ConfigError


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
    with bars() as bar:
        show = training_steps(bar)
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
    say(f"wrote {trained}")
