"""Made-up clips as plain descriptions: which things there are, where they are, and when.

A scene is drawn at random from a seed. Its things lie on a grid of four by four cells and differ in
shape and in colour, so that either names one. They appear at different frames; they stay, move
straight, turn once, meet another thing, or show up for one or two frames only. Much of a clip is
the same from frame to frame, as in real video, and what happens is over in few of them.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
GRID = 4

_STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
_FRAMES_PER_CELL = 2
_LEAST_SHOWN = 5
"""Frames that a thing which is not brief can be seen, at least."""
_LATEST_START = 8
"""The last frame at which a thing appears that is not brief, in a clip of 16 frames."""
_TRIES = 20
"""Places tried for one thing before the whole scene is tried anew."""


class Cell(NamedTuple):
    """A place of the grid, from 0; fractions are places between two cells."""

    row: float
    column: float


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        shape: one of ``SHAPES``.
        colour: one of ``COLOURS``.
        appears: the first frame that shows it.
        cells: where it is in that frame and the following ones; as many as show it.
        motion: the directions in which it moves, one after the other: none, one or two.
        meets: colour of the thing on whose cell it ends, or None.
    """

    shape: str
    colour: str
    appears: int
    cells: tuple[Cell, ...]
    motion: tuple[str, ...]
    meets: str | None = None

    @property
    def is_brief(self) -> bool:
        """Whether it shows up for one or two frames only."""
        return len(self.cells) <= 2


@dataclass(frozen=True)
class Scene:
    """A clip: its things in order of appearance, its length, and a seed for its looks."""

    things: tuple[Thing, ...]
    frames: int
    seed: int


@dataclass(frozen=True)
class SceneSettings:
    """What scenes are drawn from.

    Attributes:
        frames: of a clip; 1 gives still pictures, whose things neither move nor meet.
        least: things of a scene, at least.
        most: things of a scene, at most.
    """

    frames: int = 16
    least: int = 2
    most: int = 5


def draw_scene(seed: int, settings: SceneSettings | None = None) -> Scene:
    """A random scene; the same seed and settings give the same one on every machine."""
    settings = settings or SceneSettings()
    random = np.random.default_rng(seed)
    count = int(random.integers(settings.least, settings.most + 1))
    names = list(zip(random.permutation(SHAPES), random.permutation(COLOURS), strict=False))
    roles = _draw_roles(random, count, settings.frames)
    # The roles stand before places are tried, so that what fits easily is not drawn more often.
    things = None
    while things is None:
        things = _place(random, names, roles, settings.frames)
    things.sort(key=lambda thing: thing.appears)
    return Scene(tuple(things), settings.frames, seed)


class _Role(NamedTuple):
    """What a thing does."""

    motion: tuple[str, ...] = ()
    is_brief: bool = False
    is_met: bool = False
    meets: bool = False


def _draw_roles(random: np.random.Generator, count: int, frames: int) -> list[_Role]:
    """Roles in the order in which places are sought: the met thing, moving ones, others."""
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
    first = str(random.choice(list(_STEPS)))
    if random.random() < 0.5:
        return (first,)
    across = ("up", "down") if first in ("left", "right") else ("left", "right")
    return first, str(random.choice(across))


def _place(
    random: np.random.Generator, names: list[tuple[str, str]], roles: list[_Role], frames: int
) -> list[Thing] | None:
    """One attempt; None where the things would be in each other's way."""
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
    """The frame at which each thing appears, all different."""
    if frames == 1:
        return [0] * len(roles)
    lasting = sum(not role.is_brief for role in roles)
    starts = random.permutation(max(_LATEST_START * frames // 16 + 1, lasting))[:lasting]
    free = np.setdiff1d(np.arange(frames - 1), starts)
    return [*map(int, starts), int(random.choice(free))]


def _draw_cells(
    random: np.random.Generator, role: _Role, appears: int, frames: int, met: Thing | None
) -> tuple[Cell, ...]:
    """Where a thing is in each frame that shows it; empty if it would leave grid or clip."""
    corners = [Cell(int(random.integers(GRID)), int(random.integers(GRID)))]
    if frames == 1:
        return (corners[0],)
    if role.is_brief:
        return (corners[0],) * int(random.integers(1, 3))
    for direction in role.motion:
        length = int(random.integers(2, 4) if len(role.motion) == 1 else random.integers(1, 3))
        row, column = _STEPS[direction]
        corners.append(Cell(corners[-1].row + row * length, corners[-1].column + column * length))
    if met is not None:  # moved as a whole, so that it ends on the other's cell
        down, across = (a - b for a, b in zip(met.cells[0], corners[-1], strict=True))
        corners = [Cell(cell.row + down, cell.column + across) for cell in corners]
    if not all(0 <= value < GRID for cell in corners for value in cell):
        return ()
    cells = [corners[0]] * int(random.integers(1, 3))
    for start, stop in pairwise(corners):
        cells += _between(start, stop)
    if met is not None and appears + len(cells) <= met.appears + 2:
        return ()  # the other must have been seen before
    shown = frames - appears
    least = max(len(cells) + 1, min(_LEAST_SHOWN, frames))
    if shown < least:
        return ()
    if not role.is_met and random.random() < 0.3:
        shown = int(random.integers(least, shown + 1))
    return tuple(cells + [corners[-1]] * (shown - len(cells)))


def _between(start: Cell, stop: Cell) -> list[Cell]:
    """The places after ``start`` on the straight way to ``stop``, this one included."""
    rows, columns = stop.row - start.row, stop.column - start.column
    steps = int(abs(rows) + abs(columns)) * _FRAMES_PER_CELL
    parts = [step / steps for step in range(1, steps + 1)]
    return [Cell(start.row + rows * part, start.column + columns * part) for part in parts]
