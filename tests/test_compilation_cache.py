"""Compiled programs are kept on disk by the command line, and by the library when it is asked."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import typer
from support.clips import real_clip
from typer.testing import CliRunner

from dycoke_jax import use_compilation_cache
from dycoke_jax.assets import TINY
from dycoke_jax.cli.app import COMMANDS, app, new_app
from dycoke_jax.cli.compilation import VARIABLE, compiles
from dycoke_jax.compilation import MAX_BYTES, counted, default_folder
from dycoke_jax.errors import OutputError

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
VARIABLES = [name.upper() for name in SETTINGS]


def settings():
    return [getattr(jax.config, name) for name in SETTINGS]


@pytest.fixture
def as_new(monkeypatch):
    """The settings of jax are its own defaults, as where a user has set none."""
    before = settings()
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for name, value in zip(SETTINGS, (None, -1, 1.0, 0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(SETTINGS, before, strict=True):
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("platform", "variable", "below_home"),
    [
        ("linux", "XDG_CACHE_HOME", ".cache"),
        ("darwin", None, "Library/Caches"),
        ("win32", "LOCALAPPDATA", "AppData/Local"),
    ],
)
def test_the_folder_is_where_the_system_keeps_caches(
    monkeypatch, tmp_path, platform, variable, below_home
):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "me")
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    assert default_folder() == tmp_path / "me" / below_home / "dycoke_jax"
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "caches"))
        assert default_folder() == tmp_path / "caches" / "dycoke_jax"


@pytest.mark.usefixtures("as_new")
def test_small_programs_are_kept_too_and_the_folder_is_bounded_and_private(tmp_path):
    folder = tmp_path / "a" / "b"
    assert use_compilation_cache(folder) == folder
    assert settings() == [str(folder), MAX_BYTES, 0.0, -1]
    if os.name == "posix":
        assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("as_new")
def test_a_folder_that_the_user_has_set_stays_and_gets_no_limit(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert use_compilation_cache(tmp_path / "other") == tmp_path / "own"
    assert settings() == [str(tmp_path / "own"), -1, 0.0, -1]
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("as_new")
def test_other_settings_that_the_user_has_set_stay(tmp_path, monkeypatch):
    for variable in VARIABLES[1:]:
        monkeypatch.setenv(variable, "7")
    use_compilation_cache(tmp_path)
    assert settings() == [str(tmp_path), -1, 1.0, 0]


@pytest.mark.usefixtures("as_new")
def test_a_folder_that_cannot_be_written_is_refused_in_one_line_and_changes_nothing(tmp_path):
    before = settings()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"^cannot keep compiled programs in \S+: .+$") as error:
        use_compilation_cache(tmp_path / "file" / "folder")
    assert "\n" not in str(error.value)
    assert settings() == before


@pytest.mark.usefixtures("as_new")
def test_programs_that_were_not_written_to_the_end_are_removed(tmp_path):
    """jax would warn about each of them for ever, and write no others when it makes room."""
    for name in ("whole-cache", "whole-atime", "broken-cache"):
        (tmp_path / name).touch()
    use_compilation_cache(tmp_path)
    assert {path.name for path in tmp_path.glob("*-*")} == {"whole-cache", "whole-atime"}


def test_programs_are_counted_and_so_are_those_that_were_found():
    def shifted(x):
        return x + 2.5

    x = jnp.zeros(3)  # an array of a shape may take a program
    with counted() as first:
        jax.jit(shifted)(x)
    with counted() as again:
        jax.jit(shifted)(x)
    jax.jit(shifted).clear_cache()
    with counted() as found:
        jax.jit(shifted)(x)
    assert first.programs == 1
    assert first.seconds > 0
    assert again.programs == 0
    assert (found.programs, found.found, found.compiled) == (1, 1, 0)


def command():
    """A command that does nothing but compile."""
    made = new_app()

    @made.command()
    @compiles
    def run(number: int = 1) -> None:
        typer.echo(f"ran with {number}")

    return made


@pytest.mark.usefixtures("as_new")
def test_commands_use_the_folder_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr("dycoke_jax.compilation.default_folder", lambda: tmp_path)
    before = settings()
    for arguments, variables in ((["--no-compilation-cache"], {}), ([], {VARIABLE: "1"})):
        result = CliRunner().invoke(command(), ["--number", "3", *arguments], env=variables)
        assert result.output == "ran with 3\n"
        assert settings() == before
    assert CliRunner().invoke(command(), []).output == "ran with 1\n"
    assert settings()[0] == str(tmp_path)


@pytest.mark.usefixtures("as_new")
def test_a_command_says_once_that_the_folder_cannot_be_written_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("dycoke_jax.compilation.default_folder", lambda: tmp_path / "file")
    result = CliRunner().invoke(command(), [])
    assert result.exit_code == 0
    assert result.stdout == "ran with 1\n"
    assert result.stderr.startswith("note: cannot keep compiled programs in ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"convert", "init", "warmup", "compile"}))
def test_every_command_that_compiles_has_the_option(name):
    group = typer.main.get_group(app)
    context = typer.Context(group)
    _, of_command, _ = group.resolve_command(context, [name])
    assert "no_compilation_cache" in {parameter.name for parameter in of_command.params}


PROGRAM = f"""
import time
from dycoke_jax.cli import main
from dycoke_jax.compilation import counted
with counted() as count:
    try:
        main(["generate", "--model", {str(TINY)!r}, "--video", {str(real_clip())!r},
              "--prompt", "What happens?", "--frames", "8", "--max-new-tokens", "6"])
    finally:
        print("compiled", count.compiled, count.found, time.process_time())
"""


def start(folder):
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=kept | {"XDG_CACHE_HOME": str(folder), "LOCALAPPDATA": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    """The answer; how many programs were compiled and found; and seconds of processors."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "warning" not in err.lower()
    answer, _, counts = out.rpartition("compiled")
    compiled, found, seconds = counts.split()
    return answer, int(compiled), int(found), float(seconds)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="its folder of caches cannot be moved")
def test_after_two_processes_at_once_a_third_compiles_nothing_and_answers_in_ten_seconds(tmp_path):
    (first, compiled, *_), (second, *_) = map(ended, [start(tmp_path), start(tmp_path)])
    assert compiled > 0
    third, compiled, found, seconds = ended(start(tmp_path))
    assert compiled == 0
    assert found > 0
    assert third == first == second
    # On a machine with nothing else to do it takes no longer than its processors work for it.
    assert seconds < 10
