"""The command that shows what methods keep of a clip: inspect."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dycoke_jax.cli.app import new_app
from dycoke_jax.cli.clips import AllowDamaged
from dycoke_jax.cli.compilation import compiles
from dycoke_jax.cli.compress import FORM
from dycoke_jax.cli.console import progress_bars, say, say_notes
from dycoke_jax.cli.loading import Pooling
from dycoke_jax.cli.options import Options, with_settings
from dycoke_jax.compression.methods import described, parse_compression
from dycoke_jax.compression.protocol import Compression
from dycoke_jax.files import check_writable
from dycoke_jax.inputs import FrameSampling, check_clip

app = new_app()

_CLIP, _COMPRESSION, _MODEL = "Clip", "Compression", "Prompt and model"

_DEFAULT = "dycoke"
"""The method that is shown where none is named."""

_DEMO = "`dycoke-jax demo --video ... --prompt ... --compress ...` draws what is attended to"


@app.command(
    epilog="Examples: `dycoke-jax inspect clip.mp4`; "
    '`dycoke-jax inspect clip.mp4 --compress "vidcom2(budget=0.25)" --compress evs`'
)
@compiles
@with_settings
def inspect(
    *,
    video: Annotated[Path, typer.Argument(help="Video file.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint: folder or hub id. Default: the tiny model that ships with the "
            "package, which is trained on made-up clips only.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    pool_mode: Pooling = None,
    sampling: Annotated[FrameSampling, Options(_CLIP)],
    allow_damaged: AllowDamaged = False,
    compress: Annotated[
        list[str] | None,
        typer.Option(
            help="Method of token compression to show; given several times, they are below each "
            f"other. Default: `{_DEFAULT}`. {FORM}",
            rich_help_panel=_COMPRESSION,
        ),
    ] = None,
    picture: Annotated[
        Path,
        typer.Option(help="PNG file to write; it shows the dropped tokens and the merged ones."),
    ] = Path("dycoke-inspect.png"),
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print places, which of them are merged, and counts as one JSON object."
        ),
    ] = False,
) -> None:
    """Show which visual tokens of a clip methods keep, as a picture."""
    from dycoke_jax.assets import TINY
    from dycoke_jax.checkpoint import open_checkpoint
    from dycoke_jax.inputs.any_video import read_video
    from dycoke_jax.inspection import listing
    from dycoke_jax.inspection.drawing import save, sheet_of_kept
    from dycoke_jax.inspection.keeping import kept_of_clip, with_token_stage

    methods = {
        text: with_token_stage(parse_compression(text), text) for text in compress or [_DEFAULT]
    }
    check_writable(picture)
    check_clip(video, allow_damaged=allow_damaged)
    checkpoint = open_checkpoint(model or TINY, pool_mode=pool_mode)
    say_notes(checkpoint.notes)
    with progress_bars() as progress:
        clip = read_video(
            video,
            sampling,
            checkpoint.config.vision.image_size,
            allow_damaged=allow_damaged,
            progress=progress,
        )
        for method in methods.values():
            Compression(tokens=method.stages.tokens).check(checkpoint.config, len(clip.frames))
        loaded = checkpoint.load(progress=progress)
        found = {}
        for number, (text, method) in enumerate(methods.items()):
            found[text] = kept_of_clip(loaded, clip.frames, method)
            progress("methods", number + 1, len(methods))
        save(sheet_of_kept(found), picture)
    if as_json:
        settings = {text: described(method) for text, method in methods.items()}
        run = {"video": str(video), "picture": str(picture), "notes": clip.notes}
        print(json.dumps(run | listing.as_json(found, settings)))
        return
    console = Console(highlight=False)
    console.width = max(console.width, listing.WIDTH)
    console.print(listing.table(found))
    say_notes(clip.notes)
    for text, kept in found.items():
        if kept.not_shown:
            say(f"{text}: not shown: {kept.not_shown}, which depends on the question; {_DEMO}")
    say(f"wrote {picture}: dropped tokens are dark, merged ones have a blue border")
