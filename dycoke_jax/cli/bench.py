"""The command that measures time and memory: bench."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dycoke_jax.checks import choice, shown, whole_number
from dycoke_jax.cli.app import Dtype, new_app
from dycoke_jax.cli.compilation import compiles
from dycoke_jax.cli.compress import FORM
from dycoke_jax.cli.console import progress_bars, say_notes
from dycoke_jax.cli.numbers import whole_numbers
from dycoke_jax.compression.methods import PLAIN, parse_compression
from dycoke_jax.config import PRESETS, Storage
from dycoke_jax.errors import ConfigError
from dycoke_jax.files import check_writable

app = new_app()

_STAGES = "vision,token stage,prefill,decode,end to end"


@app.command(epilog="Example: `dycoke-jax bench --preset onevision-0.5b --batch 1,8 --frames 8,16`")
@compiles
def bench(
    *,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Released model whose shapes to use, with random weights: "
            f"{', '.join(PRESETS)}. Default: tiny."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint to measure in place of a preset: folder or hub id."),
    ] = None,
    batch: Annotated[
        str, typer.Option(help="Numbers of requests that run together, as a list: `1,8`.")
    ] = "1",
    frames: Annotated[
        str, typer.Option(help="Numbers of frames of a clip, as a list: `8,16`.")
    ] = "16",
    compress: Annotated[
        list[str] | None,
        typer.Option(
            help="Method of token compression; it may be given several times. "
            f"Default: `{PLAIN}` and `dycoke`. {FORM}"
        ),
    ] = None,
    stages: Annotated[
        str,
        typer.Option(
            help="What to time, as a list; vision takes most of the time on a CPU, and end to end "
            "runs everything once more."
        ),
    ] = _STAGES,
    new_tokens: Annotated[
        int, typer.Option(help="Number of tokens that each request generates, at least 2.")
    ] = 64,
    rounds: Annotated[
        int,
        typer.Option(
            help="Number of rounds, at least 3; in each, every combination runs once, and then "
            "medians are taken."
        ),
    ] = 5,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of weights and computation. Default: float32, or as a checkpoint's weights "
            "are stored."
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="How the language model's matrices are stored, as a list: `stored`, which is as "
            "they are, and `int8`."
        ),
    ] = "stored",
    kv: Annotated[
        str,
        typer.Option(
            help="How keys and values are stored, as a list: `stored`, which is in the dtype of "
            "the computation, and `int8`."
        ),
    ] = "stored",
    against: Annotated[
        Literal["transformers"] | None,
        typer.Option(
            help="Run the same weights and inputs through torch in the same rounds, and print how "
            "many times as long it takes. It needs torch, float32 and the CPU."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="PNG file to write: time and memory against frames and batch size. It needs "
            "matplotlib."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all results as one JSON object.")
    ] = False,
) -> None:
    """Measure time and memory of each stage, by batch size, frames and compression."""
    import jax

    from dycoke_jax.bench import report
    from dycoke_jax.bench.against import check_against
    from dycoke_jax.bench.machine import sizes_for
    from dycoke_jax.bench.run import bench as measured
    from dycoke_jax.bench.run import untrained
    from dycoke_jax.bench.stages import STAGES, Combination
    from dycoke_jax.checkpoint import open_checkpoint
    from dycoke_jax.evaluation.report import check_plot

    whole_number("--new-tokens", new_tokens, 2)
    whole_number("--rounds", rounds, 3)
    chosen = [choice("--stages", stage.strip(), STAGES) for stage in stages.split(",")]
    methods = {text: parse_compression(text) for text in compress or (PLAIN, "dycoke")}
    batches, lengths = (
        [whole_number(name, number, 1) for number in dict.fromkeys(whole_numbers(name, text))]
        for name, text in (("--batch", batch), ("--frames", frames))
    )
    combinations = [
        Combination(rows, length, name, compression, stored, cached)
        for rows in batches
        for length in lengths
        for name, compression in methods.items()
        for stored in _storages("--weights", weights)
        for cached in _storages("--kv", kv)
    ]
    if plot is not None:
        check_writable(plot)
        check_plot()
    if model is not None and preset is not None:
        raise ConfigError("--model and --preset both choose the model; give one of them")
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"no preset {shown(preset)}; there are {', '.join(PRESETS)}")
    checkpoint = None if model is None else open_checkpoint(model)
    name = model or preset or "tiny"
    config = PRESETS[preset or "tiny"] if checkpoint is None else checkpoint.config
    for combination in combinations:
        if combination.compression is not None:
            combination.compression.stages.check(config, combination.frames)
    with progress_bars() as progress:
        if checkpoint is None:
            if against is not None:
                check_against(config, dtype or "float32")
            loaded = untrained(config, dtype or "float32", progress)
        else:
            say_notes(checkpoint.notes)
            loaded = checkpoint.load(dtype, progress)
        results = measured(
            name,
            loaded,
            combinations,
            new_tokens=new_tokens,
            rounds=rounds,
            stages=chosen,
            sizes=sizes_for(jax.devices()[0]),
            against=against is not None,
            progress=progress,
        )
    if plot is not None:
        report.plot(results, plot)
    if as_json:
        print(json.dumps(report.as_json(results)))
        return
    console = Console(highlight=False)
    console.width = max(console.width, report.WIDTH)
    console.print(report.headline(results), markup=False)
    console.print(report.times(results), report.limits(results))
    for line in report.agreement(results):
        console.print(line, markup=False)


def _storages(option: str, text: str) -> list[Storage | None]:
    """Reads a list of ``stored``, which is None, and ``int8``."""
    names = dict.fromkeys(part.strip() for part in text.split(","))
    chosen = [choice(option, name, ("stored", "int8")) for name in names]
    return [None if name == "stored" else "int8" for name in chosen]
