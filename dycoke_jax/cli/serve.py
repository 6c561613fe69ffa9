"""The command that answers requests over HTTP: serve."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from dycoke_jax.cli.app import new_app
from dycoke_jax.cli.clips import AllowDamaged
from dycoke_jax.cli.compilation import compiles
from dycoke_jax.cli.compress import Compress, NoDycoke, chosen
from dycoke_jax.cli.console import progress_bars, say, say_notes
from dycoke_jax.cli.loading import ComputedIn, Fsdp, KeysValues, MeshSizes, Pooling, Weights
from dycoke_jax.cli.options import GIVEN, Options, with_settings
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.engine.requests import Decoding
from dycoke_jax.errors import ConfigError
from dycoke_jax.inputs import DecodingLimits, FrameSampling, Prompting
from dycoke_jax.serving.settings import Serving

app = new_app()

# Titles of the groups of options in the help text.
_SERVER, _CLIP, _COMPRESSION, _DECODING, _PROMPT = (
    *("Server", "Clips", "Compression", "Decoding", "Prompt and model"),
)

_LIMITS = DecodingLimits(seconds=60.0)
"""A client waits."""

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@app.command(
    epilog="Example: `dycoke-jax serve --model ov-0.5b`, and a client of the OpenAI API with the "
    "base URL `http://127.0.0.1:8000/v1`. SIGTERM or Ctrl-C: requests that are here are answered, "
    "then the command ends with exit code 0; after a second one it waits no longer."
)
@compiles
@with_settings
def serve(
    *,
    given: Annotated[frozenset[str], GIVEN],
    model: Annotated[str, typer.Option(help="Checkpoint: folder or hub id.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(help="Port to listen on; 0 for any that is free.", rich_help_panel=_SERVER),
    ] = 8000,
    served_name: Annotated[
        str | None,
        typer.Option(
            help="Name of the model in the API. Default: the last part of --model.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="DYCOKE_JAX_API_KEY",
            help="What clients must send as their API key; other users of this machine can see "
            "the option, not the variable. Default: none is asked for.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    serving: Annotated[Serving, Options(_SERVER)],
    sampling: Annotated[FrameSampling, Options(_CLIP)],
    allow_damaged: AllowDamaged = False,
    limits: Annotated[DecodingLimits, Options(_CLIP, prefix="clip_")] = _LIMITS,
    dycoke: Annotated[DyCoke, Options(_COMPRESSION)],
    no_dycoke: NoDycoke = False,
    compress: Compress = None,
    decoding: Annotated[Decoding, Options(_DECODING, omit=("seed",))],
    prompting: Annotated[Prompting, Options(_PROMPT)],
    pool_mode: Pooling = None,
    dtype: ComputedIn = None,
    weights: Weights = None,
    kv: KeysValues = None,
    mesh: MeshSizes = None,
    fsdp: Fsdp = False,
) -> None:
    """Answer requests over HTTP, in the form of the OpenAI API."""
    for name in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(name) is None:
            raise ConfigError(f"{name} is not installed; pip install 'dycoke_jax[serve]'")
    from dycoke_jax.checkpoint import open_checkpoint
    from dycoke_jax.checkpoint.chat_template import find_chat_template
    from dycoke_jax.inputs.chat_template import check_template
    from dycoke_jax.inputs.decoding_pool import DecodingPool
    from dycoke_jax.llava_video import LlavaVideo
    from dycoke_jax.serving.protocol import Defaults
    from dycoke_jax.serving.run import Server, bind

    # Bad settings are refused before a large checkpoint is read.
    compression = chosen(given, compress, None if no_dycoke else dycoke)
    if api_key is not None and not api_key.strip():
        raise ConfigError("the API key is empty; give a key, or leave it out")
    for setting, value, limit, most in (
        ("--frames", sampling.frames, "--max-frames", serving.max_frames),
        ("--max-new-tokens", decoding.max_new_tokens, "--max-tokens", serving.max_tokens),
    ):
        if value > most:
            raise ConfigError(f"{setting} is {value}, above {limit}, which is {most}")
    name = served_name or Path(model).name
    defaults = Defaults(name, decoding, sampling, prompting, compression, allow_damaged)
    taken = bind(host, port)
    checkpoint = open_checkpoint(model, pool_mode=pool_mode)
    say_notes(checkpoint.notes)
    if prompting.prompt_format == "checkpoint":
        check_template(find_chat_template(checkpoint.folder.path, checkpoint.tokenizer))
    with progress_bars() as progress:
        llava = LlavaVideo.from_checkpoint(
            checkpoint,
            dtype=dtype,
            weights=weights,
            kv=kv,
            mesh=mesh,
            fsdp=fsdp,
            progress=progress,
        )
    # A file that crashes or blocks its decoder costs no more than its own answer.
    with DecodingPool(limits) as pool:
        server = Server(llava, defaults, serving, api_key=api_key, read=pool.read)
        if host not in _LOOPBACK and api_key is None:
            say_notes([f"anyone who can reach {host} may ask: no API key is set"])
        address = f"[{host}]" if ":" in host else host
        say(f"{name} is served on http://{address}:{taken.getsockname()[1]}/v1")
        server.run([taken])
        say("the server has ended")
    if not server.worker.join(0):
        # A program still runs on the device, and nothing can end it but the end of the process.
        sys.stderr.flush()
        os._exit(0)
