"""Checkpoints made to do harm: each gives one clear error, in bounded time and memory."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import tiny_llava_hf
from support.hostile_checkpoints import KINDS
from support.tokenizers import tiny_tokenizer

SECONDS, BYTES = 5, 2**30
LONGEST = 30_000  # characters of a message: 200 lines of a report

# Opens the folders that it reads from its standard input, with no more memory than BYTES beyond
# what opening a good folder takes. Its own seconds count, since other tests run beside it; a folder
# at which it waits ends it.
CHILD = f"""
import json, resource, signal, sys, time, warnings
from dycoke_jax.checkpoint import CheckpointWarning, open_checkpoint
from dycoke_jax.errors import DycokeError
warnings.simplefilter("error", CheckpointWarning)
open_checkpoint(sys.argv[1]).load()
status = open("/proc/self/status").read().split()
most = int(status[status.index("VmSize:") + 1]) * 1024 + {BYTES}
resource.setrlimit(resource.RLIMIT_AS, (most, most))
print(flush=True)
for line in sys.stdin:
    begin = time.process_time()
    signal.alarm(10 * {SECONDS})
    kind, message = None, None
    try:
        open_checkpoint(json.loads(line)).load()
    except (DycokeError, CheckpointWarning) as error:
        message = str(error)
    except BaseException as error:
        kind = repr(error)
    signal.alarm(0)
    print(json.dumps([message, kind, time.process_time() - begin]), flush=True)
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llava_hf(tmp_path_factory.mktemp("checkpoint") / "good")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opened(good: Path) -> Iterator[Callable[[Path], tuple[str | None, str | None, float]]]:
    """Opens a folder in another process: the message, an unexpected error, and the seconds."""
    child: Any = None

    def start() -> Any:
        command = [sys.executable, "-c", CHILD, str(good)]
        pipe = subprocess.PIPE
        started = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert started.stdout is not None
        assert started.stdout.readline() == "\n", "the good folder cannot be opened"
        return started

    def ask(folder: Path) -> tuple[str | None, str | None, float]:
        nonlocal child
        child = start() if child is None or child.poll() is not None else child
        child.stdin.write(json.dumps(str(folder)) + "\n")
        child.stdin.flush()
        answer = child.stdout.readline()
        if not answer:
            return None, f"the process has ended ({child.wait()})", 0.0
        message, error, seconds = json.loads(answer)
        return message, error, seconds

    yield ask
    if child is not None:
        child.communicate()


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_checkpoint_gives_one_clear_error(
    good: Path, tmp_path: Path, opened: Callable[[Path], Any], kind: str
) -> None:
    change, says = KINDS[kind]
    folder = shutil.copytree(good, tmp_path / "model")
    change(folder)
    message, error, seconds = opened(folder)
    assert error is None
    assert message is not None, "it was opened"
    assert re.search(says, message), message[:500]
    assert all(line.isprintable() for line in message.split("\n"))
    assert len(message) <= LONGEST
    assert seconds < SECONDS
