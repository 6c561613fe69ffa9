"""The command that answers a file of requests: batch."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dycoke_jax import checks
from dycoke_jax.cli.app import new_app
from dycoke_jax.cli.clips import AllowDamaged
from dycoke_jax.cli.compilation import compiles
from dycoke_jax.cli.compress import Compress, NoDycoke, chosen
from dycoke_jax.cli.console import progress_bars, say, say_notes
from dycoke_jax.cli.interrupts import INTERRUPTED, interruptible
from dycoke_jax.cli.loading import (
    ComputedIn,
    Fsdp,
    KeysValues,
    MeshSizes,
    Pooling,
    Weights,
    connect,
)
from dycoke_jax.cli.options import GIVEN, Options, with_settings
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.engine.requests import Decoding
from dycoke_jax.errors import RequestError
from dycoke_jax.hosts import Hosts, is_first
from dycoke_jax.inputs import DecodingLimits, FrameSampling, Prompting
from dycoke_jax.progress import Progress

app = new_app()

# Titles of the groups of options in the help text.
_JOB, _CLIP, _COMPRESSION, _DECODING, _PROMPT, _HOSTS = (
    *("Job", "Clips", "Compression", "Decoding", "Prompt and model", "Several hosts"),
)

SOME_FAILED = 3
"""Exit code of a job that is complete, in which a request has failed."""

LOG_EVERY = 60.0
"""Seconds between two lines of progress where stderr is no terminal."""


@app.command(
    epilog="Example: `dycoke-jax batch requests.jsonl results.jsonl --model ov-0.5b`, where a line "
    'of requests.jsonl is `{"id": "1", "video": "clip.mp4", "prompt": "What happens?"}`. Exit '
    "codes: 0 if every request has an answer; 3 if any has failed; 130 after an interrupt; 2 for "
    "bad usage."
)
@compiles
@with_settings
def batch(
    *,
    given: Annotated[frozenset[str], GIVEN],
    requests: Annotated[
        Path,
        typer.Argument(
            help="JSON Lines file of requests: `id`, `video`, `prompt` or `messages`, and "
            "`decoding` and `sampling` with settings of their own; relative paths start at its "
            "folder."
        ),
    ],
    results: Annotated[
        Path,
        typer.Argument(
            help="JSON Lines file of results, one for each request; if it is there, the job in it "
            "is completed."
        ),
    ],
    model: Annotated[str, typer.Option(help="Checkpoint: folder or hub id.")],
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Part of the requests to answer, from 1/N to N/N: every N-th line. Each part "
            "needs a file of results of its own.",
            rich_help_panel=_JOB,
        ),
    ] = "1/1",
    batch_size: Annotated[
        int,
        typer.Option(
            help="Largest number of requests that run together, at least 1.", rich_help_panel=_JOB
        ),
    ] = 8,
    max_retries: Annotated[
        int,
        typer.Option(
            help="How often requests are tried again whose file could not be read for a reason "
            "that may pass, such as a file server that does not answer.",
            rich_help_panel=_JOB,
        ),
    ] = 2,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Complete a job although its model, settings or requests have changed; results "
            "that are there stay as they are.",
            rich_help_panel=_JOB,
        ),
    ] = False,
    sampling: Annotated[FrameSampling, Options(_CLIP)],
    allow_damaged: AllowDamaged = False,
    limits: Annotated[DecodingLimits, Options(_CLIP, prefix="clip_")],
    dycoke: Annotated[DyCoke, Options(_COMPRESSION)],
    no_dycoke: NoDycoke = False,
    compress: Compress = None,
    decoding: Annotated[Decoding, Options(_DECODING)],
    prompting: Annotated[Prompting, Options(_PROMPT)],
    pool_mode: Pooling = None,
    dtype: ComputedIn = None,
    weights: Weights = None,
    kv: KeysValues = None,
    mesh: MeshSizes = None,
    fsdp: Fsdp = False,
    hosts: Annotated[Hosts, Options(_HOSTS)],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as one JSON object.")
    ] = False,
) -> None:
    """Answer a file of requests about videos; a job that was killed is completed."""
    from dycoke_jax.checkpoint import open_checkpoint
    from dycoke_jax.checkpoint.chat_template import find_chat_template
    from dycoke_jax.inputs.chat_template import check_template
    from dycoke_jax.inputs.decoding_pool import DecodingPool
    from dycoke_jax.jobs.result_file import open_results_together
    from dycoke_jax.jobs.run import Job, check_compression, check_requests, run_job
    from dycoke_jax.jobs.settings import JobSettings, parse_shard
    from dycoke_jax.llava_video import LlavaVideo

    # Bad settings and requests are refused before a large checkpoint is read.
    checks.whole_number("--batch-size", batch_size, 1, error=RequestError)
    checks.whole_number("--max-retries", max_retries, 0, error=RequestError)
    compression = chosen(given, compress, None if no_dycoke else dycoke)
    settings = JobSettings(compression, decoding, sampling, prompting, allow_damaged)
    job = Job(requests, settings, parse_shard(shard))
    sizes = connect(hosts, mesh)
    with open_results_together(results) as written:
        checked = check_requests(job, written, force=force)
        checkpoint = open_checkpoint(model, pool_mode=pool_mode)
        say_notes(checkpoint.notes)
        if prompting.prompt_format == "checkpoint":
            check_template(find_chat_template(checkpoint.folder.path, checkpoint.tokenizer))
        check_compression(compression, checkpoint.config, checked)
        with progress_bars() as progress:
            llava = LlavaVideo.from_checkpoint(
                checkpoint,
                dtype=dtype,
                weights=weights,
                kv=kv,
                mesh=sizes,
                fsdp=fsdp,
                progress=progress,
            )
            # A file that crashes or blocks its decoder costs no more than its own answer.
            with DecodingPool(limits) as pool, interruptible(_say_stopping) as stop:
                summary = run_job(
                    llava,
                    job,
                    written,
                    checked,
                    batch_size=batch_size,
                    max_retries=max_retries,
                    force=force,
                    read=pool.read,
                    stop=stop,
                    progress=progress if sys.stderr.isatty() else _logged(),
                )
    if hosts.several and not is_first():
        pass  # the first process says it
    elif as_json:
        print(json.dumps(asdict(summary) | {"rate": summary.rate}))
    else:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(summary.errors.items()))
        left = summary.requests - summary.answered - summary.failed
        say(
            f"{results}: {summary.answered} of {summary.requests} requests answered, "
            f"{summary.failed} failed{f' ({kinds})' if kinds else ''}, {left} left; "
            f"{summary.computed} results in {summary.seconds:.1f} seconds "
            f"({summary.rate:.2f} a second)"
        )
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)
    if summary.failed:
        raise typer.Exit(SOME_FAILED)


def _say_stopping() -> None:
    say("stopping after the batch that runs; press Ctrl-C once more to stop at once")


def _logged(clock: Callable[[], float] = time.monotonic) -> Progress:
    """A progress callback that prints a line from time to time."""
    last = clock()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if clock() - last >= LOG_EVERY:
            last = clock()
            say(f"{done} of {total} {what}")

    return show
