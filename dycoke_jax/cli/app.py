"""The Typer application, and the table of its commands.

A command is imported when it is called, because the settings that its options are made from import
jax. So ``--help`` and ``--version`` answer at once.
"""

from importlib import import_module
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup
from typer.main import get_group

from dycoke_jax import __version__

COMMANDS = {
    "generate": ("asking", "Answer a question about a video."),
    "batch": (
        "batch",
        "Answer a file of requests about videos; a job that was killed is completed.",
    ),
    "serve": ("serve", "Answer requests over HTTP, in the form of the OpenAI API."),
    "warmup": ("warm_up", "Compile the programs for given sizes, ahead of the first question."),
    "demo": ("asking", "Compare answers, token counts and times with and without compression."),
    "inspect": ("inspecting", "Show which visual tokens of a clip methods keep, as a picture."),
    "convert": ("checkpoints", "Convert a checkpoint to another layout."),
    "init": ("checkpoints", "Write a checkpoint with random weights, in the llava-hf layout."),
    "train": ("learning", "Fine-tune a model on clips with questions and answers."),
    "train-tiny": (
        "learning",
        "Train the tiny model that ships with the package, from random weights.",
    ),
    "eval": (
        "learning",
        "Measure accuracy on made-up clips, by kind of question and compression setting.",
    ),
    "bench": (
        "bench",
        "Measure time and memory of each stage, by batch size, frames and compression.",
    ),
    "compile": (
        "compile",
        "Compile for a TPU slice or GPUs that need not be there, and print what it costs.",
    ),
}
"""By the name of each command, the module of this package that has it, and its help in one line."""

Dtype = Literal["float32", "bfloat16", "float16"]
"""Float dtypes that weights can be stored in."""


def new_app(**settings: Any) -> typer.Typer:
    """Returns a Typer application with the settings that all modules of commands share."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        **settings,
    )


class _Commands(TyperGroup):
    """The commands of ``COMMANDS``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Imports the command that is called, in place of the one that only has its help."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            module = import_module(f"dycoke_jax.cli.{COMMANDS[name][0]}")
            command = get_group(module.app).commands[name]
        return name, command, rest


app = new_app(
    cls=_Commands,
    no_args_is_help=True,
    help="Video language models in JAX, made fast by DyCoke: LLaVA-OneVision and LLaVA-Video.",
    epilog="Exit codes: 0 after success; 2 for bad input or usage, or output that cannot be "
    "written; 3 if requests of a batch job have failed; 130 after an interrupt; 141 if the reader "
    "of the output has closed it.",
)

for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)


def _print_version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"dycoke-jax {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = None,
) -> None:
    pass
