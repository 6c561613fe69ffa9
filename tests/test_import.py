"""Importing is cheap and touches no device: several hosts must initialise before any backend."""

import json
import subprocess
import sys
import time

import pytest

PROGRAM = """
import json, time
start = time.perf_counter()
import jax
jax_done = time.perf_counter()
import dycoke_jax
package_done = time.perf_counter()
from dycoke_jax import DyCoke, LlavaVideo, LlavaConfig
from dycoke_jax import cli
from jax._src import xla_bridge
names_done = time.perf_counter()
import sys
print(json.dumps({
    "package": package_done - jax_done,
    "names": names_done - jax_done,
    "backends": len(xla_bridge._backends),
    "torch": "torch" in sys.modules,
}))
"""


def run_program():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    )
    return json.loads(result.stdout)


def test_import_starts_no_backend_and_no_torch():
    report = run_program()
    assert report["backends"] == 0
    assert not report["torch"]


def test_import_takes_under_two_seconds_beyond_jax():
    # The fastest of a few: a busy machine says nothing about the package.
    reports = [run_program() for _ in range(3)]
    assert min(report["package"] for report in reports) < 0.5
    assert min(report["names"] for report in reports) < 2


def test_version_answers_at_once():
    start = time.perf_counter()
    program = "from dycoke_jax.cli import main; main(['--version'])"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], []], ids=["help", "version", "none"]
)
def test_help_and_version_need_no_jax(arguments):
    program = f"""
import contextlib, io, sys
from dycoke_jax.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main({arguments})
print([name for name in ("jax", "flax", "av", "transformers") if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert result.stdout == "[]\n"


def test_parsing_the_command_line_starts_no_backend():
    """Nor does looking for other processes where there are none."""
    program = """
import contextlib, io
from dycoke_jax.cli import main
from dycoke_jax.cli.app import COMMANDS
lines = [[name, "--help"] for name in COMMANDS]
lines.append(["generate", "--distributed", "--model", "none", "--prompt", "?"])
for arguments in lines:
    errors = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        with contextlib.redirect_stderr(errors):
            main(arguments)
from jax._src import xla_bridge
print(len(xla_bridge._backends), "--coordinator" in errors.getvalue())
"""
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert result.stdout == "0 True\n"
