"""Consoles that cannot show everything, and outputs that cannot be written."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import run_main

from dycoke_jax import Decoding, LlavaVideo, cli

QUESTION, SAMPLING = "What?", {"temperature": 1.0, "seed": 3, "max_new_tokens": 16}
FULL = Path("/dev/full")

needs_full_disk = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("console") / "tiny"
    assert run_main("init", folder)[0] == 0
    return folder


@pytest.fixture(scope="module")
def asking(model):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SAMPLING.items()]
    return ["generate", f"--model={model}", f"--prompt={QUESTION}", *options]


@pytest.fixture(scope="module")
def answer(model):
    llava, decoding = LlavaVideo.from_pretrained(model), Decoding(**SAMPLING)
    text = llava.generate(None, [QUESTION], decoding=decoding)[0].text
    assert not text.isascii(), "random bytes"
    return text


def console(encoding):
    """A stream that, like Python's own, refuses characters that its encoding lacks."""
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="")


def run(arguments, stdout, stderr):
    """The exit code of the command line in this process, with these streams."""
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        return end.value.code


def run_program(arguments, **streams):
    """The command line in a process of its own."""
    program = [sys.executable, "-c", "from dycoke_jax.cli import main; main()"]
    return subprocess.run([*program, *arguments], check=False, **streams)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8", "utf-16"])
def test_an_answer_prints_in_every_encoding(asking, answer, encoding):
    out, err = console(encoding), console("ascii")
    assert run(asking, out, err) == 0
    shown = out.buffer.getvalue().decode(encoding)
    assert shown == f"{answer}\n".encode(encoding, "replace").decode(encoding)
    assert b"tokens:" in err.buffer.getvalue()


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16"])
def test_json_is_whole_in_every_encoding(asking, answer, encoding):
    out = console(encoding)
    assert run([*asking, "--json"], out, io.StringIO()) == 0
    assert json.loads(out.buffer.getvalue().decode(encoding))["text"] == answer


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize("name", [b"\xff.mp4", "\u65e5\u672c.mp4".encode()])
def test_any_file_name_can_be_named_in_an_error(asking, encoding, name):
    out, err = console("ascii"), console(encoding)
    assert run([*asking, f"--video={os.fsdecode(name)}"], out, err) == 2
    said = err.buffer.getvalue()
    assert said.startswith(b"error: ")
    assert said.count(b"\n") == 1
    assert b".mp4: no such file" in said
    assert out.buffer.getvalue() == b""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["eval", "--help"]])
def test_help_prints_in_every_encoding(encoding, arguments):
    out = console(encoding)
    assert run(arguments, out, io.StringIO()) == 0
    assert b"Usage" in out.buffer.getvalue()


def test_a_wrong_command_is_named_in_every_encoding():
    err = console("ascii")
    assert run([os.fsdecode(b"\xff")], console("ascii"), err) == 2
    assert rb"No such command '\udcff'" in err.buffer.getvalue()


@needs_full_disk
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_an_answer_to_a_full_disk_ends_in_one_line(asking, more):
    """The text is written out piece by piece; JSON is held back until the end."""
    err = io.StringIO()
    with FULL.open("w") as out:
        assert run([*asking, *more], out, err) == 2
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("seconds")]
    assert lines == ["error: cannot write to standard output: No space left on device"]


@needs_full_disk
def test_an_answer_is_given_though_its_remarks_cannot_be_written(asking, answer):
    out = io.StringIO()
    with FULL.open("w") as err:
        assert run(asking, out, err) == 0
    assert out.getvalue() == f"{answer}\n"


@needs_full_disk
@pytest.mark.parametrize("arguments", [["--version"], ["train", "--help"]])
def test_a_full_disk_leaves_no_traceback_at_the_exit(arguments):
    with FULL.open("w") as full:
        done = run_program(arguments, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == b"error: cannot write to standard output: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="SIGPIPE is of POSIX")
@pytest.mark.parametrize("arguments", [["--version"], ["train", "--help"]])
def test_a_closed_pipe_ends_the_process_silently_as_sigpipe_does(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = run_program(arguments, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 128 + 13
    assert done.stderr == b""


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_a_closed_pipe_is_found_when_an_answer_is_written_out(asking, more):
    reader, writer = os.pipe()
    os.close(reader)
    err = io.StringIO()
    with os.fdopen(writer, "w") as out:
        assert run([*asking, *more], out, err) == 128 + 13
    assert err.getvalue() == ""


def test_an_error_handler_that_the_user_has_chosen_stays(asking, answer):
    """As with PYTHONIOENCODING=ascii:xmlcharrefreplace."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="xmlcharrefreplace", newline="")
    assert run(asking, out, io.StringIO()) == 0
    assert out.buffer.getvalue() == f"{answer}\n".encode("ascii", "xmlcharrefreplace")


LONG = "y" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", LONG, "--prompt", QUESTION],
        ["convert", LONG, "out"],
        ["demo", "--picture", LONG],
        ["init", LONG],
        ["eval", LONG],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_name_that_is_too_long_is_said_in_one_line(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_main(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert LONG in err


def test_a_clip_whose_name_is_too_long_is_refused_in_one_line(asking):
    code, out, err = run_main(*asking, "--video", LONG)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert LONG in err
