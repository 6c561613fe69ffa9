"""The command that compiles for devices that are not there: compile."""

import json
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from dycoke_jax.checks import choice, shown, whole_number
from dycoke_jax.cli.app import Dtype, new_app
from dycoke_jax.cli.compress import FORM
from dycoke_jax.cli.console import progress_bars
from dycoke_jax.cli.loading import Fsdp, KeysValues, MeshSizes, Weights
from dycoke_jax.cli.numbers import whole_numbers
from dycoke_jax.compression.methods import PLAIN, parse_compression
from dycoke_jax.config import PRESETS
from dycoke_jax.errors import ConfigError

app = new_app()

_STAGES = "vision,prefill,decode"


@app.command(
    epilog="Example: `dycoke-jax compile --target v6e:2x4 --preset 7b --frames 32 --batch 32`"
)
def compile(
    *,
    target: Annotated[
        str,
        typer.Option(
            help="What to compile for: a TPU slice, as `v5e:2x2`, `v5p:2x2x2` or `v6e:2x4`, or "
            "GPUs of a machine, as `h100:8` or `a100:1`. Chips: v4, v5e, v5p, v6e, tpu7x, a100, "
            "h100."
        ),
    ],
    preset: Annotated[
        str,
        typer.Option(
            help=f"Released model whose shapes to use: {', '.join(PRESETS)}; `7b` is "
            "`onevision-7b`."
        ),
    ] = "onevision-7b",
    frames: Annotated[int, typer.Option(help="Frames of each clip.")] = 32,
    batch: Annotated[
        str, typer.Option(help="Numbers of requests that run together, as a list: `1,32`.")
    ] = "32",
    compress: Annotated[
        list[str] | None,
        typer.Option(
            help="Method of token compression; it may be given several times. Default: `dycoke`. "
            + FORM
        ),
    ] = None,
    no_dycoke: Annotated[
        bool, typer.Option("--no-dycoke", help=f"The plain model, as `--compress {PLAIN}`.")
    ] = False,
    prompt_tokens: Annotated[
        int, typer.Option(help="Tokens of the text around the clip, at least 1.")
    ] = 34,
    new_tokens: Annotated[
        int, typer.Option(help="Number of tokens that each request generates.")
    ] = 64,
    mesh: MeshSizes = None,
    fsdp: Fsdp = False,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of weights and computation.")] = "bfloat16",
    weights: Weights = None,
    kv: KeysValues = None,
    stages: Annotated[str, typer.Option(help="What to compile, as a list.")] = _STAGES,
    layers: Annotated[
        int | None,
        typer.Option(
            help="Layers of the language model and of the vision tower to compile, for a quick "
            "look. Default: all."
        ),
    ] = None,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Compile the largest batch that fits, too.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all results as one JSON object.")
    ] = False,
) -> None:
    """Compile for a TPU slice or GPUs that need not be there, and print what it costs."""
    from dycoke_jax.sharding import parse_mesh
    from dycoke_jax.targets import report
    from dycoke_jax.targets.environment import without_devices
    from dycoke_jax.targets.programs import STAGES, Workload, mesh_of, sizes_of_mesh
    from dycoke_jax.targets.run import compile_workload
    from dycoke_jax.targets.topology import as_if_cudnn_were_there, devices_of, parse_target

    if compress is not None and no_dycoke:
        raise ConfigError("--compress and --no-dycoke both choose the compression; give one")
    name = preset if preset in PRESETS else f"onevision-{preset}"
    if name not in PRESETS:
        raise ConfigError(f"no preset {shown(preset)}; there are {', '.join(PRESETS)}")
    config = PRESETS[name]
    if layers is not None:
        most = min(config.text.num_layers, config.vision.num_layers)
        whole_number("--layers", layers, 1, most)
        config = replace(
            config,
            text=replace(config.text, num_layers=layers),
            vision=replace(config.vision, num_layers=layers),
        )
    whole_number("--frames", frames, 1)
    whole_number("--prompt-tokens", prompt_tokens, 1)
    whole_number("--new-tokens", new_tokens, 1)
    chosen = [choice("--stages", stage.strip(), STAGES) for stage in stages.split(",")]
    batches = [whole_number("--batch", number, 1) for number in whole_numbers("--batch", batch)]
    names = (PLAIN,) if no_dycoke else compress or ("dycoke",)
    methods = {text: parse_compression(text) for text in names}
    wanted = parse_target(target)
    without_devices()
    devices = devices_of(wanted)
    sizes = sizes_of_mesh(config, len(devices)) if mesh is None else parse_mesh(mesh)
    on = mesh_of(devices, config, sizes)
    if on is None and fsdp:
        raise ConfigError("--fsdp spreads weights over devices, and there is one")
    results = []
    with progress_bars() as progress, as_if_cudnn_were_there():
        for rows in batches:
            for text, compression in methods.items():
                work = Workload(
                    config,
                    rows,
                    frames,
                    compression,
                    prompt_tokens,
                    new_tokens,
                    dtype,
                    weights,
                    kv,
                    fsdp,
                )
                results.append(
                    compile_workload(
                        text,
                        work,
                        wanted,
                        devices,
                        on,
                        chosen,
                        confirm=confirm,
                        progress=progress,
                    )
                )
    if as_json:
        print(json.dumps(report.as_json(name, wanted, on, results)))
        return
    console = Console(highlight=False)
    console.width = max(console.width, report.WIDTH)
    console.print(report.headline(name, wanted, on, mesh is None), markup=False)
    for result in results:
        console.print(report.memory(result, wanted), report.work(result))
        for line in report.lines(result):
            console.print(line, markup=False)
