"""Draws random descriptions of made-up clips: which things there are, where they are, and when.

A scene follows from a seed. Its things lie on a grid of four by four cells. All differ in shape and
in colour, so that either of the two names a thing. They appear in different frames; they stay, move
straight, turn once, meet another thing, or are there for one or two frames only. As in real video,
most of a clip is the same from frame to frame, and an event takes few frames.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
GRID = 4
"""Number of rows and of columns of the grid."""

_STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Rows and columns that a thing moves by one cell in each direction."""
_FRAMES_PER_CELL = 2
"""Frames in which a moving thing moves by one cell."""
_MIN_DURATION = 5
"""Least number of frames that contain a thing that is not brief."""
_LATEST_START = 8
"""Last frame, from 0, in which a thing that is not brief may appear, in a clip of 16 frames."""
_TRIES = 20
"""Number of places that are tried for a thing before all things are placed anew."""


class Cell(NamedTuple):
    """A place on the grid, counted from 0; fractions are places between two cells."""

    row: float
    column: float


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        shape: one of ``SHAPES``.
        colour: one of ``COLOURS``.
        appears: number of the first frame that contains it, from 0.
        cells: its place in each frame that contains it; these frames follow each other.
        motion: the directions in which it moves, in order: none, one or two.
        meets: colour of the thing on whose cell it ends; None if it meets no other thing.
    """

    shape: str
    colour: str
    appears: int
    cells: tuple[Cell, ...]
    motion: tuple[str, ...]
    meets: str | None = None

    @property
    def is_brief(self) -> bool:
        """Whether it is there for one or two frames only."""
        return len(self.cells) <= 2


@dataclass(frozen=True)
class Scene:
    """The description of a clip.

    Attributes:
        things: its things, in order of appearance.
        frames: its number of frames.
        seed: seed of background, noise, exact colours and small shifts.
    """

    things: tuple[Thing, ...]
    frames: int
    seed: int


@dataclass(frozen=True)
class SceneSettings:
    """The distribution that scenes are drawn from.

    Attributes:
        frames: number of frames of a clip, at least 1. 1 gives still pictures, in which things
            neither move nor meet. Clips of 2 to 8 frames have room for few things only: lower
            ``most``, or ``draw_scene`` may fail or never return.
        least: least number of things of a scene, at least 1.
        most: greatest number of things of a scene, at most 6.
    """

    frames: int = 16
    least: int = 2
    most: int = 5


def draw_scene(seed: int, settings: SceneSettings | None = None) -> Scene:
    """Draws a scene; the same seed and settings give the same scene on every machine.

    Args:
        seed: seed of the scene, 0 or more.
        settings: the distribution; None: ``SceneSettings()``.
    """
    settings = settings or SceneSettings()
    random = np.random.default_rng(seed)
    count = int(random.integers(settings.least, settings.most + 1))
    names = list(zip(random.permutation(SHAPES), random.permutation(COLOURS), strict=False))
    roles = _draw_roles(random, count, settings.frames)
    # Roles are fixed before places are tried; otherwise roles that fit easily would be more
    # frequent.
    things = None
    while things is None:
        things = _place(random, names, roles, settings.frames)
    things.sort(key=lambda thing: thing.appears)
    return Scene(tuple(things), settings.frames, seed)


class _Role(NamedTuple):
    """What a thing does.

    Attributes:
        motion: the directions in which it moves, as ``Thing.motion``.
        is_brief: whether it is there for one or two frames only.
        is_met: whether another thing ends on its cell.
        meets: whether it ends on the cell of another thing.
    """

    motion: tuple[str, ...] = ()
    is_brief: bool = False
    is_met: bool = False
    meets: bool = False


def _draw_roles(random: np.random.Generator, count: int, frames: int) -> list[_Role]:
    """Draws roles, in the order in which things are placed: met, moving, still and brief ones."""
    if frames == 1:
        return [_Role()] * count
    brief = [_Role(is_brief=True)] if count > 1 and random.random() < 0.7 else []
    lasting = count - len(brief)
    has_meeting = lasting >= 2 and random.random() < 0.6
    moving = max(int(random.choice(3, p=(0.1, 0.45, 0.45))), has_meeting)
    moving = min(moving, lasting - has_meeting)
    roles = [_Role(is_met=True)] * has_meeting
    roles += [_Role(_draw_motion(random), meets=has_meeting and i == 0) for i in range(moving)]
    return roles + [_Role()] * (lasting - len(roles)) + brief


def _draw_motion(random: np.random.Generator) -> tuple[str, ...]:
    """Draws one direction, or two that form a turn."""
    first = str(random.choice(list(_STEPS)))
    if random.random() < 0.5:
        return (first,)
    across = ("up", "down") if first in ("left", "right") else ("left", "right")
    return first, str(random.choice(across))


def _place(
    random: np.random.Generator, names: list[tuple[str, str]], roles: list[_Role], frames: int
) -> list[Thing] | None:
    """Tries once to place all things; None if a thing finds no path that is free."""
    starts = _draw_starts(random, roles, frames)
    taken: set[Cell] = set()
    things: list[Thing] = []
    for (shape, colour), role, appears in zip(names, roles, starts, strict=False):
        met = things[0] if role.meets else None
        for _ in range(_TRIES):
            cells = _draw_cells(random, role, appears, frames, met)
            path = {cell for cell in cells if cell.row % 1 == 0 and cell.column % 1 == 0}
            if cells and not (path - {met.cells[0]} if met else path) & taken:
                break
        else:
            return None
        taken |= path
        meets = met.colour if met else None
        things.append(Thing(str(shape), str(colour), appears, cells, role.motion, meets))
    return things


def _draw_starts(random: np.random.Generator, roles: list[_Role], frames: int) -> list[int]:
    """Draws the frame in which each thing appears; in a clip, all are different."""
    if frames == 1:
        return [0] * len(roles)
    lasting = sum(not role.is_brief for role in roles)
    starts = random.permutation(max(_LATEST_START * frames // 16 + 1, lasting))[:lasting]
    free = np.setdiff1d(np.arange(frames - 1), starts)
    return [*map(int, starts), int(random.choice(free))]


def _draw_cells(
    random: np.random.Generator, role: _Role, appears: int, frames: int, met: Thing | None
) -> tuple[Cell, ...]:
    """Draws the place of a thing in each frame that contains it; empty if the draw does not fit."""
    corners = [Cell(int(random.integers(GRID)), int(random.integers(GRID)))]
    if frames == 1:
        return (corners[0],)
    if role.is_brief:
        return (corners[0],) * int(random.integers(1, 3))
    for direction in role.motion:
        length = int(random.integers(2, 4) if len(role.motion) == 1 else random.integers(1, 3))
        row, column = _STEPS[direction]
        corners.append(Cell(corners[-1].row + row * length, corners[-1].column + column * length))
    if met is not None:  # The whole path is shifted, so that it ends on the cell of the met thing.
        down, across = (a - b for a, b in zip(met.cells[0], corners[-1], strict=True))
        corners = [Cell(cell.row + down, cell.column + across) for cell in corners]
    if not all(0 <= value < GRID for cell in corners for value in cell):
        return ()
    cells = [corners[0]] * int(random.integers(1, 3))
    for start, stop in pairwise(corners):
        cells += _between(start, stop)
    if met is not None and appears + len(cells) <= met.appears + 2:
        return ()  # The met thing must have appeared earlier.
    duration = frames - appears
    least = max(len(cells) + 1, min(_MIN_DURATION, frames))
    if duration < least:
        return ()
    if not role.is_met and random.random() < 0.3:
        duration = int(random.integers(least, duration + 1))
    return tuple(cells + [corners[-1]] * (duration - len(cells)))


def _between(start: Cell, stop: Cell) -> list[Cell]:
    """The places on the straight line from ``start`` (excluded) to ``stop`` (included)."""
    rows, columns = stop.row - start.row, stop.column - start.column
    steps = int(abs(rows) + abs(columns)) * _FRAMES_PER_CELL
    parts = [step / steps for step in range(1, steps + 1)]
    return [Cell(start.row + rows * part, start.column + columns * part) for part in parts]
