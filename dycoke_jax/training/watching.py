"""Second lesson of the eyes: what became of a thing until now, known at each of its tokens.

Answers are few and say little about a clip of hundreds of tokens, so learning from them alone to
follow a thing takes long. Here the lower half of the language model learns it directly, from what
the scene is known to hold: the state of a visual token after half of the layers should tell which
thing is there, which way it has moved so far, as which one it appeared, what it has met, and, where
nothing is any more, what was there briefly. The states are read by linear maps, which are thrown
away after the lesson. It takes a quarter of an hour.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dycoke_jax.config import LlavaConfig
from dycoke_jax.engine import Progress
from dycoke_jax.evaluation.pictures import draw
from dycoke_jax.evaluation.scenes import (
    COLOURS,
    GRID,
    SHAPES,
    Scene,
    SceneSettings,
    Thing,
)
from dycoke_jax.evaluation.task import task_clip
from dycoke_jax.generation.assemble import place_newlines
from dycoke_jax.models.llava import Params, bind
from dycoke_jax.models.qwen2 import positions_of
from dycoke_jax.training.alignment import EMPTY_WEIGHT
from dycoke_jax.training.lessons import teach

STEPS = 1500
_CLIPS = 16
_RATE = 2e-3
_MOVED_WEIGHT = 4.0
"""Of a direction in the loss: what is hardest to learn is also rare."""
_FACTS = ("row", "column", "colour", "shape", "first way", "second way", "order", "met", "gone")
_VALUES = 1 + max(len(COLOURS), len(SHAPES))
_WAYS = {(0, -1): 1, (0, 1): 2, (-1, 0): 3, (1, 0): 4}
"""Directions by the signs of their rows and columns."""

Facts = Int[np.ndarray, "F N facts"]


def watch(
    config: LlavaConfig,
    params: Params,
    progress: Progress | None = None,
    steps: int = STEPS,
) -> Params:
    """Teaches aligned weights to follow the things of clips.

    Args:
        config: a model whose frames have one visual token for each cell of a scene's grid.
        params: float32 weights, see ``align``.
        progress: told after each step.
        steps: of training, each on fresh clips.

    Returns:
        The weights after it. The upper half of the language model's layers is not touched.
    """
    depth = config.text.num_layers // 2
    upper = tuple(f"language_model.layers.{i}." for i in range(depth, config.text.num_layers))
    rest = {p: x for p, x in params.items() if p.startswith(upper)}
    lower = {p: x for p, x in params.items() if p not in rest}
    lower[_READERS] = jnp.zeros((config.text.hidden_size, len(_FACTS), _VALUES))

    def loss(
        lower: Params,
        frames: UInt8[Array, "B F height width 3"],
        facts: Int[Array, "B F N facts"],
        weights: Float[Array, "B F N facts"],
    ) -> Float[Array, ""]:
        readers = lower[_READERS]
        model = bind(config, {**{p: x for p, x in lower.items() if p != _READERS}, **rest})
        features = model.encode(frames.reshape(-1, *frames.shape[2:]))
        features = features.reshape(*facts.shape[:3], -1)
        visual = place_newlines(
            features, None, model.image_newline[...], config.newline, config.frame_grid
        )
        x, rope = visual.embeds, model.language_model.rope(positions_of(visual.valid))
        for layer in model.language_model.layers[:depth]:
            x = layer.prefill(x, rope, visual.valid)[0]
        # The norm keeps the readers from seeing how large the states have grown.
        x = model.language_model.norm(x[:, : facts[0, :, :, 0].size])
        scores = jax.nn.log_softmax(jnp.einsum("bvd,dqc->bvqc", x, readers))
        right = facts.reshape(*scores.shape[:3], 1)
        likely = jnp.take_along_axis(scores, right, axis=3)[..., 0]
        weights = weights.reshape(likely.shape)
        return -(likely * weights).sum() / weights.sum()

    def batch(step: int) -> tuple[np.ndarray, ...]:
        numbers = range(step * _CLIPS, (step + 1) * _CLIPS)
        scenes = [task_clip("train", number, SceneSettings()).scene for number in numbers]
        facts = np.stack([facts_of(scene) for scene in scenes])
        frames = np.stack([draw(scene, config.vision.image_size) for scene in scenes])
        return frames, facts, _weights(facts)

    told = (lambda done: progress("following things", done, steps)) if progress else None
    trained = teach(lower, loss, batch, steps, _RATE, told)
    return {**rest, **{path: x for path, x in trained.items() if path != _READERS}}


_READERS = "readers"


def facts_of(scene: Scene) -> Facts:
    """What can be told at each place of each frame from it and the frames before.

    Returns:
        For each of row, column, colour, shape, first and second direction, order of appearance,
        colour met, and colour of the brief thing that is gone: a number from 1, or 0 for none.
    """
    facts = np.zeros((scene.frames, GRID, GRID, len(_FACTS)), np.int32)
    facts[..., 0] = np.arange(1, GRID + 1)[:, None]
    facts[..., 1] = np.arange(1, GRID + 1)
    for order, thing in enumerate(scene.things, start=1):
        named = COLOURS.index(thing.colour) + 1, SHAPES.index(thing.shape) + 1
        for since, cell in enumerate(thing.cells):
            ways = _ways(thing, since)
            met = COLOURS.index(thing.meets) + 1 if thing.meets and cell == thing.cells[-1] else 0
            # Half-way between two cells a thing lies on both; the later one lies on top.
            rows, columns = (slice(int(np.floor(value)), int(np.ceil(value)) + 1) for value in cell)
            facts[thing.appears + since, rows, columns, 2:8] = (*named, *ways, order, met)
        if thing.is_brief:
            row, column = map(int, thing.cells[0])
            after = thing.appears + len(thing.cells)
            facts[after:, row, column, _FACTS.index("gone")] = named[0]
    return facts.reshape(scene.frames, GRID * GRID, len(_FACTS))


def _ways(thing: Thing, since: int) -> tuple[int, int]:
    """First and second direction of a thing until some frames after it appeared."""
    ways: list[int] = []
    for before, after in pairwise(thing.cells[: since + 1]):
        moved = int(np.sign(after.row - before.row)), int(np.sign(after.column - before.column))
        if moved in _WAYS and _WAYS[moved] not in ways:
            ways.append(_WAYS[moved])
    return (*ways, 0, 0)[0], (*ways, 0, 0)[1]


def _weights(facts: Int[np.ndarray, "B F N facts"]) -> Float[np.ndarray, "B F N facts"]:
    """Full weight where a thing is or was, more where it has moved; little where nothing is."""
    weights = np.zeros(facts.shape, np.float32)
    colour, gone = _FACTS.index("colour"), _FACTS.index("gone")
    weights[..., [colour, gone]] = EMPTY_WEIGHT
    weights[..., :gone][facts[..., colour] > 0] = 1.0
    weights[..., gone][facts[..., gone] > 0] = 1.0
    for way in (_FACTS.index("first way"), _FACTS.index("second way")):
        weights[..., way][facts[..., way] > 0] = _MOVED_WEIGHT
    return weights
