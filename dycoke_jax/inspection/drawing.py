"""Draws what became of the tokens of a clip: all its frames, with dropped tokens dimmed.

A border is around the tokens that a trace says are attended to (yellow), or around those at whose
place a merged row stands (blue).
"""

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from dycoke_jax.files import write_file
from dycoke_jax.inspection.keeping import Kept
from dycoke_jax.inspection.tracing import Trace

_FRAME = 128
"""Least height and width of a frame in the picture, in pixels."""
_COLUMNS = 8
"""Frames in a row of the picture, at most."""
_GAP = 6
"""Space between two frames, in pixels."""
_DIMMED = 0.25
"""Factor of the brightness of dropped tokens."""
ATTENDED, MERGED = (255, 220, 0), (0, 170, 255)
"""Colours of the borders of attended tokens and of merged rows, as RGB in 0..255."""
_LINE = 130
"""Characters of text that fit above eight frames."""
_CAPTION = 18
"""Height of the line of text below a frame, in pixels."""
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def paint_frames(
    frames: UInt8[np.ndarray, "F height width 3"],
    grid: tuple[int, int],
    kept: Bool[np.ndarray, "F N"],
    marked: Float[np.ndarray, "F N"],
    size: int,
    colour: tuple[int, int, int] = ATTENDED,
) -> UInt8[np.ndarray, "F {size} {size} 3"]:
    """Paints frames so that dropped tokens are dark and marked tokens have a border.

    Args:
        frames: frames whose tokens share them evenly, RGB.
        grid: numbers of rows and columns of the visual tokens of a frame.
        kept: whether each visual token was kept.
        marked: how opaque the border of each visual token is, in [0, 1].
        size: height and width of a painted frame, in pixels.
        colour: colour of the borders, as RGB in 0..255.
    """
    images = [Image.fromarray(frame).resize((size, size)) for frame in frames]
    painted = np.stack([np.asarray(image, np.float32) for image in images])
    # The token that each pixel belongs to, and whether the pixel lies on the token's border.
    rows, row_edge = _cells(size, grid[0])
    columns, column_edge = _cells(size, grid[1])
    token = rows[:, None] * grid[1] + columns
    edge = row_edge[:, None] | column_edge
    painted *= np.where(kept[:, token], 1.0, _DIMMED)[..., None]
    mark = (marked[:, token] * edge)[..., None]
    return np.rint(painted * (1 - mark) + np.array(colour) * mark).astype(np.uint8)


def _cells(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel along a side, the number of its token and whether it lies on its border.

    Args:
        size: length of the side, in pixels.
        count: number of tokens along the side.
    """
    of_pixel = np.arange(size) * count // size
    thick = max(1, size // count // 12)
    near = np.concatenate([np.full(thick, -1), of_pixel, np.full(thick, -1)])
    edge = (near[: -2 * thick] != of_pixel) | (near[2 * thick :] != of_pixel)
    return of_pixel, edge


def sheet(traces: Sequence[tuple[str, Trace]]) -> Image.Image:
    """Draws several traces below each other.

    The more of the decode steps attended to a token, the more opaque its border is.

    Args:
        traces: the traces, each with the text to print above its frames and token counts.
    """
    blocks = []
    for title, trace in traces:
        steps = len(trace.attended)
        share = trace.attended.mean(0) if steps else np.zeros(trace.kept.shape)
        painted = paint_frames(trace.frames, trace.grid, trace.kept, share, _side(trace.grid))
        blocks.append(_block([*title.splitlines(), f"tokens: {trace.tokens}"], painted))
    return _below_each_other(blocks)


def sheet_of_kept(methods: Mapping[str, Kept]) -> Image.Image:
    """Draws what several methods keep of a clip below each other, with the numbers of each frame.

    Args:
        methods: what each method keeps, by its name.
    """
    blocks = []
    for name, kept in methods.items():
        size, marked = _side(kept.grid), kept.merged.astype(np.float32)
        painted = paint_frames(kept.frames, kept.grid, kept.kept, marked, size, MERGED)
        texts = [name, f"visual tokens: {kept.counts()}"]
        if kept.not_shown:
            texts.append(f"not shown: {kept.not_shown}")
        blocks.append(_block(texts, painted, kept.counts_of_frames()))
    return _below_each_other(blocks)


def save(image: Image.Image, path: Path) -> None:
    """Writes a picture as a PNG file; if that fails, an existing file is left as it is.

    Raises:
        OutputError: if the file cannot be written.
    """
    png = BytesIO()
    image.save(png, format="PNG", optimize=True)
    write_file(path, png.getvalue())


def _side(grid: tuple[int, int]) -> int:
    """Height and width of a frame in the picture, in which all tokens have the same size."""
    return -(-_FRAME // grid[0]) * grid[0]


def _below_each_other(blocks: Sequence[Image.Image]) -> Image.Image:
    width = max(block.width for block in blocks)
    height = sum(block.height for block in blocks)
    image = Image.new("RGB", (width, height), _PAPER)
    top = 0
    for block in blocks:
        image.paste(block, (0, top))
        top += block.height
    return image


def _block(
    texts: Sequence[str],
    painted: UInt8[np.ndarray, "F size size 3"],
    captions: Sequence[str] = (),
) -> Image.Image:
    """Draws lines of text, and the painted frames below them.

    Args:
        texts: the lines; long ones are wrapped.
        painted: the frames.
        captions: a line of text below each frame; none if there are no captions.
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(11)
    lines = [line for text in texts for line in textwrap.wrap(text, _LINE)]
    columns = min(_COLUMNS, len(painted))
    rows = -(-len(painted) // columns)
    across = painted.shape[1] + _GAP
    down = across + _CAPTION if captions else across
    text_height = 22 * len(lines) + _GAP
    # The frames of a short clip may be narrower than the text.
    width = max(columns * across + _GAP, *(int(font.getlength(line)) + 2 * _GAP for line in lines))
    block = Image.new("RGB", (width, text_height + rows * down + 2 * _GAP), _PAPER)
    pen = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        pen.text((_GAP, _GAP + 22 * number), line, fill=_INK, font=font)
    for number, frame in enumerate(painted):
        row, column = divmod(number, columns)
        left, top = _GAP + column * across, text_height + _GAP + row * down
        block.paste(Image.fromarray(frame), (left, top))
        if captions:
            pen.text((left, top + len(frame) + 1), captions[number], fill=_INK, font=small)
    return block
