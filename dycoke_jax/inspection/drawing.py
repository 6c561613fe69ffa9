"""Draws traces: all frames of a clip, with dropped tokens dimmed and attended tokens marked."""

import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from dycoke_jax.files import write_file
from dycoke_jax.inspection.tracing import Trace

_FRAME = 128
"""Height and width of a frame in the picture, in pixels."""
_COLUMNS = 8
"""Frames in a row of the picture, at most."""
_GAP = 6
"""Space between two frames, in pixels."""
_DIMMED = 0.25
"""Factor of the brightness of dropped tokens."""
_MARK = np.array([255, 220, 0])
"""Colour of the border of attended tokens, as RGB in 0..255."""
_LINE = 130
"""Characters of text that fit above eight frames."""
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def paint_frames(
    frames: UInt8[np.ndarray, "F height width 3"],
    grid: tuple[int, int],
    kept: Bool[np.ndarray, "F N"],
    attended: Float[np.ndarray, "F N"],
    size: int = _FRAME,
) -> UInt8[np.ndarray, "F {size} {size} 3"]:
    """Paints frames so that dropped tokens are dark and attended tokens have a yellow border.

    Args:
        frames: frames as the model reads them, RGB.
        grid: numbers of rows and columns of the visual tokens of a frame.
        kept: whether each visual token was kept.
        attended: share of the decode steps that attended to each visual token, in [0, 1]; it
            sets how opaque the token's border is.
        size: height and width of a painted frame, in pixels.
    """
    images = [Image.fromarray(frame).resize((size, size)) for frame in frames]
    painted = np.stack([np.asarray(image, np.float32) for image in images])
    # The token that each pixel belongs to, and whether the pixel lies on the token's border.
    rows, row_edge = _cells(size, grid[0])
    columns, column_edge = _cells(size, grid[1])
    token = rows[:, None] * grid[1] + columns
    edge = row_edge[:, None] | column_edge
    painted *= np.where(kept[:, token], 1.0, _DIMMED)[..., None]
    mark = (attended[:, token] * edge)[..., None]
    return np.rint(painted * (1 - mark) + _MARK * mark).astype(np.uint8)


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

    Args:
        traces: the traces, each with the text to print above its frames and token counts.
    """
    blocks = [_block(title, trace) for title, trace in traces]
    width = max(block.width for block in blocks)
    height = sum(block.height for block in blocks)
    image = Image.new("RGB", (width, height), _PAPER)
    top = 0
    for block in blocks:
        image.paste(block, (0, top))
        top += block.height
    return image


def save(image: Image.Image, path: Path) -> None:
    """Writes a picture as a PNG file; if that fails, an existing file is left as it is.

    Raises:
        OutputError: if the file cannot be written.
    """
    png = BytesIO()
    image.save(png, format="PNG", optimize=True)
    write_file(path, png.getvalue())


def _block(title: str, trace: Trace) -> Image.Image:
    """Draws one trace: lines of text, and the painted frames below them."""
    steps = len(trace.attended)
    share = trace.attended.mean(0) if steps else np.zeros(trace.kept.shape)
    painted = paint_frames(trace.frames, trace.grid, trace.kept, share)
    font = ImageFont.load_default(15)
    texts = [*title.splitlines(), f"tokens: {trace.tokens}"]
    lines = [line for text in texts for line in textwrap.wrap(text, _LINE)]
    columns = min(_COLUMNS, len(painted))
    rows = -(-len(painted) // columns)
    pitch = _FRAME + _GAP
    text_height = 22 * len(lines) + _GAP
    # The frames of a short clip may be narrower than the text.
    width = max(columns * pitch + _GAP, *(int(font.getlength(line)) + 2 * _GAP for line in lines))
    block = Image.new("RGB", (width, text_height + rows * pitch + 2 * _GAP), _PAPER)
    pen = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        pen.text((_GAP, _GAP + 22 * number), line, fill=_INK, font=font)
    for number, frame in enumerate(painted):
        row, column = divmod(number, columns)
        place = (_GAP + column * pitch, text_height + _GAP + row * pitch)
        block.paste(Image.fromarray(frame), place)
    return block
