"""Command-line options are made from the fields of settings: names, types, defaults and help."""

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import typer
from support.command_line import run_main

from dycoke_jax.assets import TINY
from dycoke_jax.cli import asking, batch, inspecting, learning, serve
from dycoke_jax.cli.app import COMMANDS, app, new_app
from dycoke_jax.cli.options import GIVEN, Options, with_settings
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.engine.requests import Decoding
from dycoke_jax.hosts import Hosts
from dycoke_jax.inputs import DecodingLimits, FrameSampling, Prompting
from dycoke_jax.serving.settings import Serving
from dycoke_jax.training.fine_tuning import FineTuning
from dycoke_jax.training.run import Intervals

MODULES = {
    "asking": asking,
    "batch": batch,
    "inspecting": inspecting,
    "learning": learning,
    "serve": serve,
}

# The settings of each command; instances where a command has other defaults than the class, and
# pairs where the names of options begin with more than those of the fields.
ASKING = [FrameSampling(), DyCoke(), Prompting()]
SETTINGS = {
    "generate": [*ASKING, Decoding()],
    "batch": [*ASKING, Decoding(), Hosts(), (DecodingLimits(), "clip_")],
    "serve": [*ASKING, Decoding(), Serving(), (DecodingLimits(seconds=60.0), "clip_")],
    "demo": [FrameSampling(frames=16), DyCoke()],
    "inspect": [FrameSampling()],
    "train": [
        FineTuning.shape,
        FineTuning.sampling,
        FineTuning.optimisation,
        FineTuning.dropping,
        Intervals(),
    ],
    "train-tiny": [Intervals(10, 100, 50)],
}
FIELDS = [
    pytest.param(command, settings, prefix, field.name, id=f"{command} {prefix}{field.name}")
    for command, of_command in SETTINGS.items()
    for entry in of_command
    for settings, prefix in [entry if isinstance(entry, tuple) else (entry, "")]
    for field in dataclasses.fields(settings)
    if field.name != "cycles" and (command, field.name) != ("serve", "seed")
]


def options_of(command):
    group = typer.main.get_group(MODULES[COMMANDS[command][0]].app)
    return {parameter.name: parameter for parameter in group.commands[command].params}


def documented(settings, name):
    """The entry of a field in the docstring of its class, as one sentence without marks of code."""
    text = inspect.getdoc(type(settings))
    entry = re.search(rf"^    {name}: (.*(?:\n {{8}}.*)*)", text, re.MULTILINE)[1]
    text = " ".join(entry.split())
    sentence = text if text.startswith("``") else text[0].upper() + text[1:]
    return sentence.replace("``", "")


@pytest.mark.parametrize(("command", "settings", "prefix", "name"), FIELDS)
def test_an_option_has_the_name_default_and_description_of_its_field(
    command, settings, prefix, name
):
    option = options_of(command)[prefix + name]
    dashed = "--" + (prefix + name).replace("_", "-")
    default = getattr(settings, name)
    assert option.opts == [dashed]
    assert option.secondary_opts == ([f"--no-{dashed[2:]}"] if default is True else [])
    assert option.default == (None if default is ... else default)
    assert not option.required
    # In the help, the names of fields are those of options: --frames, not frames.
    names = {prefix + field.name for field in dataclasses.fields(settings)}
    shown = re.sub(r"`--([a-z-]+)`", lambda match: match[1].replace("-", "_"), option.help)
    assert {match.replace("-", "_") for match in re.findall("`--([a-z-]+)`", option.help)} <= names
    assert shown.replace("`", "") == documented(settings, name)


def test_the_options_that_are_no_fields_keep_their_names_and_defaults():
    given = {name: option.default for name, option in options_of("generate").items()}
    others = {"no_dycoke": False, "pool_mode": None, "dtype": None, "allow_damaged": False}
    assert given.items() >= others.items()
    given = {name: option.default for name, option in options_of("train").items()}
    assert given.items() >= {"data": None, "test_data": None, "seed": 0}.items()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_of_commands_says_what_the_help_of_each_says(command):
    _, out, _ = run_main(command, "--help")
    lines = [line.strip() for line in out.splitlines()]
    assert COMMANDS[command][1] in " ".join(lines)
    assert app.registered_commands[list(COMMANDS).index(command)].name == command


def test_train_passes_the_settings_of_its_options(tmp_path, monkeypatch):
    calls = []

    def fine_tune(folder, what, intervals, progress, **places):
        assert places == {"mesh": None, "fsdp": False}
        calls.append((folder, what, intervals))
        return folder

    monkeypatch.setattr(learning, "fine_tune", fine_tune)
    train = ("train", tmp_path, "--model", TINY)
    assert run_main(*train)[0] == 0
    assert calls.pop() == (tmp_path, FineTuning(str(TINY)), Intervals())
    numbers = ("--steps", 7, "--frames", 4, "--rows", 2, "--merged", 0.5, "--save-every", 3)
    assert run_main(*train, *numbers, "--no-rematerialise", "--seed", 9)[0] == 0
    what = FineTuning(str(TINY), seed=9)
    what = dataclasses.replace(
        what,
        sampling=FrameSampling(4),
        shape=dataclasses.replace(what.shape, rows=2),
        dropping=dataclasses.replace(what.dropping, merged=0.5),
        optimisation=dataclasses.replace(what.optimisation, steps=7, rematerialise=False),
    )
    assert calls.pop() == (tmp_path, what, Intervals(save_every=3))


@dataclass(frozen=True)
class Recipe:
    """Settings with a field of each kind.

    Attributes:
        cook: who cooks.
        grams: of flour, with ``cook`` and ``is_sweet``.
        heat: ``low`` or
            ``high``.
        is_sweet: add sugar.
        is_baked: bake it.
        salt: pinches of salt.
        title: what it is called.
    """

    cook: str
    grams: int = 500
    heat: Literal["low", "high"] = "low"
    is_sweet: bool = False
    is_baked: bool = True
    salt: float | None = None
    title: str | None = ...


@pytest.fixture
def made():
    """A command whose calls are recorded, and a function that runs it."""
    calls = []
    kitchen = new_app()

    @kitchen.command()
    @with_settings
    def cook(
        *,
        given: Annotated[frozenset[str], GIVEN],
        where: Annotated[str, typer.Argument()],
        recipe: Annotated[Recipe, Options("Kitchen")],
        often: int = 1,
    ) -> None:
        calls.append((given, where, recipe, often))

    def run(*arguments):
        calls.clear()
        kitchen(list(arguments), standalone_mode=False)
        return calls[0]

    return run, typer.main.get_command(kitchen)


def test_values_of_options_arrive_in_an_instance_of_the_settings(made):
    run, _ = made
    given, where, recipe, often = run("home", "--cook", "Ann")
    assert (where, recipe, often) == ("home", Recipe("Ann"), 1)
    assert given == {"where", "cook"}
    arguments = ("--grams", "20", "--heat", "high", "--is-sweet", "--no-is-baked", "--salt", ".5")
    given, _, recipe, often = run("home", "--cook", "Bo", *arguments, "--often", "1")
    assert recipe == Recipe("Bo", 20, "high", True, False, 0.5)
    assert given == {"where", "often", "cook", "grams", "heat", "is_sweet", "is_baked", "salt"}


def test_a_text_with_an_automatic_default_can_be_left_out_given_or_removed(made):
    run, _ = made
    assert run("home", "--cook", "Ann")[2].title is ...
    assert run("home", "--cook", "Ann", "--title", "Bread")[2].title == "Bread"
    assert run("home", "--cook", "Ann", "--title", "")[2].title is None


def test_options_say_what_is_required_and_allowed(made):
    _, command = made
    options = {parameter.name: parameter for parameter in command.params}
    assert options["cook"].required
    assert options["cook"].help == "Who cooks."
    assert options["grams"].help == "Of flour, with `--cook` and `--is-sweet`."
    assert options["heat"].help == "`low` or `high`."
    assert {options[field.name].rich_help_panel for field in dataclasses.fields(Recipe)} == {
        "Kitchen"
    }


def test_other_defaults_are_those_of_an_instance():
    calls = []
    base = FrameSampling(frames=7, fps=2.0)
    kitchen = new_app()

    @kitchen.command()
    @with_settings
    def sample(*, sampling: Annotated[FrameSampling, Options(omit=("fps",))] = base) -> None:
        calls.append(sampling)

    assert [option.name for option in typer.main.get_command(kitchen).params] == ["frames"]
    kitchen([], standalone_mode=False)
    kitchen(["--frames", "9"], standalone_mode=False)
    assert calls == [base, FrameSampling(9, 2.0)]


def test_names_of_options_may_begin_with_more_than_those_of_the_fields():
    """As where settings of two kinds have fields of one name."""
    calls = []
    kitchen = new_app()

    @kitchen.command()
    @with_settings
    def bake(
        *,
        recipe: Annotated[Recipe, Options(omit=("cook",))] = Recipe("Ann"),
        side: Annotated[Recipe, Options(prefix="side_")],
    ) -> None:
        calls.append((recipe, side))

    options = {one.name: one for one in typer.main.get_command(kitchen).params}
    assert options["side_is_baked"].opts == ["--side-is-baked"]
    assert options["side_is_baked"].secondary_opts == ["--no-side-is-baked"]
    assert options["side_grams"].help == "Of flour, with `--side-cook` and `--side-is-sweet`."
    arguments = ["--side-cook", "Bo", "--side-grams", "3", "--side-is-sweet", "--grams", "2"]
    kitchen(arguments, standalone_mode=False)
    assert calls == [(Recipe("Ann", 2), Recipe("Bo", 3, is_sweet=True))]


def test_a_field_without_description_is_an_error_when_the_command_is_defined():
    @dataclass(frozen=True)
    class Half:
        """Describes one of two.

        Attributes:
            first: described.
        """

        first: int = 0
        second: int = 0

    def command(*, half: Annotated[Half, Options()]) -> None: ...

    with pytest.raises(TypeError, match="Half: the docstring does not describe second"):
        with_settings(command)


def test_two_options_of_one_name_are_an_error_when_the_command_is_defined():
    def command(*, sampling: Annotated[FrameSampling, Options()], fps: int = 1) -> None: ...

    with pytest.raises(TypeError, match="command: there are two options named fps"):
        with_settings(command)
