"""Command-line options that are made from the fields of settings.

A setting is declared once, in a frozen dataclass: its name, type, default and description. The
description is its entry in the section ``Attributes:`` of the docstring.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

import docstring_parser
import typer
from docstring_parser.common import DocstringStyle


@dataclass(frozen=True)
class Options:
    """Marks a parameter of a command, ``Annotated[DyCoke, Options("DyCoke")]``, as settings.

    Attributes:
        panel: title of the group of their options in the help text; None for the main group.
        omit: fields that are no options, and keep their defaults.
        prefix: what the names of the options begin with, ``clip_`` for ``--clip-seconds`` of the
            field ``seconds``.
    """

    panel: str | None = None
    omit: tuple[str, ...] = ()
    prefix: str = ""


GIVEN = "given"
"""Marks a parameter, ``Annotated[frozenset[str], GIVEN]``, that gets the names of those parameters
of the command whose options are on the command line."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces each parameter of a command that is marked with ``Options`` by options.

    A parameter that is marked with ``GIVEN`` is filled in.

    There is one option for each field of the parameter's class. Its default is the field's, or that
    of the instance that is the parameter's default. A field that is True or False is a flag. A
    field whose default is ``...``, which stands for a default that depends on other things, keeps
    it where the option is left out, and is None where the option is an empty text.

    Args:
        command: function for ``typer``; its parameters are passed to it by name.

    Returns:
        The function whose signature ``typer`` shall read. It passes instances of the settings.

    Raises:
        TypeError: if a field has no description, or if two options have the same name.
    """
    given = ""
    settings: dict[str, tuple[type, Any, dict[str, str]]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind, *marks = get_args(parameter.annotation) or (parameter.annotation,)
        options = next((mark for mark in marks if isinstance(mark, Options)), None)
        if GIVEN in marks:
            given = parameter.name
            parameter = parameter.replace(annotation=typer.Context)
        if options is None:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        base = None if parameter.default is parameter.empty else parameter.default
        of_fields = _parameters(kind, base, options)
        names_of = {name: option.name for name, option in of_fields.items()}
        settings[parameter.name] = kind, base, names_of
        parameters += of_fields.values()
    names = [parameter.name for parameter in parameters]
    for name in names:
        if names.count(name) > 1:
            raise TypeError(f"{command.__name__}: there are two options named {name}")

    @functools.wraps(command)
    def run(**values: Any) -> None:
        if given:
            values[given] = _given(values[given])
        for name, (kind, base, names_of) in settings.items():
            given_values = {field: values.pop(own) for field, own in names_of.items()}
            values[name] = _build(kind, base, given_values)
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def option(name: str) -> str:
    """The option of a parameter: ``--max-new-tokens`` for ``max_new_tokens``."""
    return f"--{name.replace('_', '-')}"


def _given(context: Any) -> frozenset[str]:
    """Names of the parameters of a command whose options are on the command line."""
    return frozenset(
        parameter.name
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name).name == "COMMANDLINE"
    )


def _parameters(kind: type, base: Any, options: Options) -> dict[str, inspect.Parameter]:
    """Parameters for the fields of a dataclass; their defaults are those of ``base`` if given."""
    described, types = _descriptions(kind, options.prefix), get_type_hints(kind)
    parameters = {}
    for field in dataclasses.fields(kind):
        if field.name in options.omit:
            continue
        if field.name not in described:
            raise TypeError(f"{kind.__name__}: the docstring does not describe {field.name}")
        default = field.default if base is None else getattr(base, field.name)
        annotation = types[field.name]
        if default is ...:
            default, annotation = None, str | None
        if default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        # Only a flag that is on by default needs another that turns it off.
        name = f"{options.prefix}{field.name}"
        flag = [option(name)] if default is False else []
        help_ = described[field.name]
        parameters[field.name] = inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[
                annotation, typer.Option(*flag, help=help_, rich_help_panel=options.panel)
            ],
        )
    return parameters


def _build(kind: type, base: Any, values: dict[str, Any]) -> Any:
    """An instance of a dataclass with the values of its options."""
    for field in dataclasses.fields(kind):
        default = field.default if base is None else getattr(base, field.name)
        if default is ... and field.name in values:
            text = values[field.name]
            values[field.name] = ... if text is None else text or None
    return kind(**values) if base is None else dataclasses.replace(base, **values)


def _descriptions(kind: type, prefix: str) -> dict[str, str]:
    """Descriptions of a dataclass's fields, as Markdown for the terminal.

    Names of its fields are written as the options that stand for them.
    """
    names = {field.name for field in dataclasses.fields(kind)}

    def code(match: re.Match[str]) -> str:
        return f"`{option(prefix + match[1]) if match[1] in names else match[1]}`"

    described = {}
    for entry in docstring_parser.parse(kind.__doc__ or "", DocstringStyle.GOOGLE).params:
        text = " ".join((entry.description or "").split())
        if entry.args[0] == "attribute" and text:
            text = re.sub("``(.+?)``", code, text)
            described[entry.arg_name] = text[0].upper() + text[1:]
    return described
