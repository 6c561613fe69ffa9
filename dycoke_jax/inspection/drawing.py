"""Pictures of a trace: every frame, its dropped tokens dimmed and the attended ones marked."""

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
"""Pixels a side of a frame in the picture."""
_COLUMNS = 8
_GAP = 6
_DIMMED = 0.25
_MARK = np.array([255, 220, 0])
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
    """Frames whose dropped tokens are dark and whose attended tokens have a yellow border.

    Args:
        frames: as the model saw them.
        grid: rows and columns of a frame's tokens.
        kept: tokens that entered the language model.
        attended: share of the decoding steps that attended to a token, 0..1: how bright its
            border is.
        size: pixels a side of the result.
    """
    images = [Image.fromarray(frame).resize((size, size)) for frame in frames]
    painted = np.stack([np.asarray(image, np.float32) for image in images])
    # Which token each pixel belongs to, and whether it lies on that token's border.
    rows, row_edge = _cells(size, grid[0])
    columns, column_edge = _cells(size, grid[1])
    token = rows[:, None] * grid[1] + columns
    edge = row_edge[:, None] | column_edge
    painted *= np.where(kept[:, token], 1.0, _DIMMED)[..., None]
    mark = (attended[:, token] * edge)[..., None]
    return np.rint(painted * (1 - mark) + _MARK * mark).astype(np.uint8)


def _cells(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel along a side the number of its token, and whether it is on its border."""
    of_pixel = np.arange(size) * count // size
    thick = max(1, size // count // 12)
    near = np.concatenate([np.full(thick, -1), of_pixel, np.full(thick, -1)])
    edge = (near[: -2 * thick] != of_pixel) | (near[2 * thick :] != of_pixel)
    return of_pixel, edge


def sheet(traces: Sequence[tuple[str, Trace]]) -> Image.Image:
    """All frames of some traces, each under lines of text and its counts of tokens."""
    blocks = [_block(title, trace) for title, trace in traces]
    width = max(block.width for block in blocks)
    height = sum(block.height for block in blocks)
    whole = Image.new("RGB", (width, height), _PAPER)
    top = 0
    for block in blocks:
        whole.paste(block, (0, top))
        top += block.height
    return whole


def save(image: Image.Image, path: Path) -> None:
    """Writes a picture as PNG, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    png = BytesIO()
    image.save(png, format="PNG", optimize=True)
    write_file(path, png.getvalue())


def _block(title: str, trace: Trace) -> Image.Image:
    steps = len(trace.attended)
    share = trace.attended.mean(0) if steps else np.zeros(trace.kept.shape)
    painted = paint_frames(trace.frames, trace.grid, trace.kept, share)
    font = ImageFont.load_default(15)
    said = [*title.splitlines(), f"tokens: {trace.tokens}"]
    lines = [line for text in said for line in textwrap.wrap(text, _LINE)]
    columns = min(_COLUMNS, len(painted))
    rows = -(-len(painted) // columns)
    pitch = _FRAME + _GAP
    text_height = 22 * len(lines) + _GAP
    # Wide enough for the text, should the clip be short.
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
