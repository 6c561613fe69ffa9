"""Second lesson of the eyes: what became of a thing until now, known at each of its tokens.

Answers are few and say little about a clip of hundreds of tokens, so learning from them alone to
follow a thing takes long. Here the first layers of the language model learn it directly, from what
the scene is known to hold: the state of a visual token after them should tell which thing is there,
which way it has moved so far, as which one it appeared, what it has met, and, where nothing is any
more, what was there briefly. Linear maps read it from the states. It takes a quarter of an hour.

What is learned here would be forgotten within some hundred steps of questions, because the first
answers hardly depend on it. So ``fact_loss`` goes on beside the questions, on the same states.
"""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dycoke_jax.config import LlavaConfig
from dycoke_jax.generation.assemble import place_newlines
from dycoke_jax.models.llava import Params, bind
from dycoke_jax.models.qwen2 import positions_of
from dycoke_jax.progress import Progress
from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.scenes import (
    COLOURS,
    GRID,
    SHAPES,
    Scene,
    SceneSettings,
    Thing,
)
from dycoke_jax.tasks.task import task_clip
from dycoke_jax.training.alignment import EMPTY_WEIGHT
from dycoke_jax.training.lessons import teach

READERS = "readers"
"""The path of the linear maps among the weights."""
STEPS = 1500
DEPTH = 3
"""Layers, from the first, that learn to follow things."""
_CLIPS = 16
_RATE = 2e-3
_MOVED_WEIGHT = 4.0
"""Of a direction in the loss: what is hardest to learn is also rare."""
_FACTS = ("row", "column", "colour", "shape", "first way", "second way", "order", "met", "gone")
_COLOUR, _GONE = _FACTS.index("colour"), _FACTS.index("gone")
_IS_COLOUR, _IS_GONE = np.arange(len(_FACTS)) == _COLOUR, np.arange(len(_FACTS)) == _GONE
_IS_WAY = np.array([name.endswith("way") for name in _FACTS])
_VALUES = 1 + max(len(COLOURS), len(SHAPES))
_WAYS = {(0, -1): 1, (0, 1): 2, (-1, 0): 3, (1, 0): 4}
"""Directions by the signs of their rows and columns."""

Facts = Int[np.ndarray, "F N facts"]


def watch(
    config: LlavaConfig,
    params: Params,
    progress: Progress | None = None,
    steps: int = STEPS,
    depth: int = DEPTH,
) -> Params:
    """Teaches aligned weights to follow the things of clips.

    Args:
        config: a model whose frames have one visual token for each cell of a scene's grid.
        params: float32 weights, see ``align``.
        progress: told after each step.
        steps: of training, each on fresh clips.
        depth: layers of the language model that learn it.

    Returns:
        The weights after it, and the readers under ``READERS``. The layers above are not touched.
    """
    upper = tuple(f"language_model.layers.{i}." for i in range(depth, config.text.num_layers))
    rest = {p: x for p, x in params.items() if p.startswith(upper)}
    lower = {p: x for p, x in params.items() if p not in rest}
    readers = readers_shape(config)
    lower[READERS] = jnp.zeros(readers.shape, readers.dtype)

    def loss(
        lower: Params,
        frames: UInt8[Array, "B F height width 3"],
        facts: Int[Array, "B F N facts"],
    ) -> Float[Array, ""]:
        model = bind(config, {**lower, **rest})
        features = model.encode(frames.reshape(-1, *frames.shape[2:]))
        features = features.reshape(*facts.shape[:3], -1)
        visual = place_newlines(
            features, None, model.image_newline[...], config.newline, config.frame_grid
        )
        x, rope = visual.embeds, model.language_model.rope(positions_of(visual.valid))
        for layer in model.language_model.layers[:depth]:
            x = layer.prefill(x, rope, visual.valid)[0]
        facts = facts.reshape(facts.shape[0], -1, len(_FACTS))
        # The norm keeps the readers from seeing how large the states have grown.
        x = model.language_model.norm(x[:, : facts.shape[1]])
        return fact_loss(x, lower[READERS], facts)

    def batch(step: int) -> tuple[np.ndarray, ...]:
        numbers = range(step * _CLIPS, (step + 1) * _CLIPS)
        scenes = [task_clip("train", number, SceneSettings()).scene for number in numbers]
        facts = np.stack([facts_of(scene) for scene in scenes])
        frames = np.stack([draw(scene, config.vision.image_size) for scene in scenes])
        return frames, facts

    return {**rest, **teach(lower, loss, batch, steps, _RATE, "following things", progress)}


def readers_shape(config: LlavaConfig) -> jax.ShapeDtypeStruct:
    """Of the weights under ``READERS``: a linear map to the values of each fact."""
    return jax.ShapeDtypeStruct((config.text.hidden_size, len(_FACTS), _VALUES), jnp.float32)


def fact_loss(
    states: Float[Array, "B V D"],
    readers: Float[Array, "D facts values"],
    facts: Int[Array, "B V facts"],
) -> Float[Array, ""]:
    """Cross entropy of what the readers tell of visual tokens, in nats.

    Full weight where a thing is or was, more where it has moved; little where nothing is.
    """
    is_thing = facts[..., _COLOUR, None] > 0
    weights = jnp.where(is_thing, 1.0, 0.0)
    weights = jnp.where(is_thing & _IS_WAY & (facts > 0), _MOVED_WEIGHT, weights)
    weights = jnp.where(~is_thing & _IS_COLOUR, EMPTY_WEIGHT, weights)
    gone = jnp.where(facts[..., _GONE, None] > 0, 1.0, EMPTY_WEIGHT)
    weights = jnp.where(_IS_GONE, gone, weights)
    scores = jax.nn.log_softmax(jnp.einsum("bvd,dqc->bvqc", states, readers))
    likely = jnp.take_along_axis(scores, facts[..., None], axis=3)[..., 0]
    return -(likely * weights).sum() / weights.sum()


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
            facts[after:, row, column, _GONE] = named[0]
    return facts.reshape(scene.frames, GRID * GRID, len(_FACTS))


def _ways(thing: Thing, since: int) -> tuple[int, int]:
    """First and second direction of a thing until some frames after it appeared."""
    ways: list[int] = []
    for before, after in pairwise(thing.cells[: since + 1]):
        moved = int(np.sign(after.row - before.row)), int(np.sign(after.column - before.column))
        if moved in _WAYS and _WAYS[moved] not in ways:
            ways.append(_WAYS[moved])
    return (*ways, 0, 0)[0], (*ways, 0, 0)[1]
