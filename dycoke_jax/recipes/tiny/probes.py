"""Second pre-training stage: linear probes read from visual tokens what the scene holds.

Answers are few and say little about a clip of hundreds of tokens, so learning from answers alone to
follow a thing takes long. Here the first layers of the language model learn it directly. A linear
probe must be able to read from the state of a visual token after them which thing is there, which
way it has moved so far, as which one it appeared, what it has met, and, where nothing is any more,
what was there briefly. It takes a quarter of an hour on two CPU cores.

What this stage teaches would be forgotten within some hundred steps of fine-tuning, because the
first answers hardly depend on it. So the probe loss goes on there as an auxiliary loss, on the same
states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dycoke_jax.config import LlavaConfig
from dycoke_jax.generation.assemble import place_newlines
from dycoke_jax.models.llava import Params, bind
from dycoke_jax.models.qwen2 import Qwen2Layer, positions_of
from dycoke_jax.progress import Progress
from dycoke_jax.recipes.tiny.alignment import EMPTY_WEIGHT
from dycoke_jax.recipes.tiny.fit import fit
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
from dycoke_jax.training.loss import Forward

PROBES = "recipe_probes"
"""The path of the probes among the weights."""
WEIGHT = 0.5
"""Of the probe loss beside that of the answers."""
STEPS = 1500
DEPTH = 3
"""Number of layers, from the first, whose output the probes read."""
_CLIPS = 16
_LEARNING_RATE = 2e-3
_MOVED_WEIGHT = 4.0
"""Weight of a direction in the loss: what is hardest to learn is also rare."""
_PROBED = ("row", "column", "colour", "shape", "first way", "second way", "order", "met", "gone")
_COLOUR, _GONE = _PROBED.index("colour"), _PROBED.index("gone")
_IS_COLOUR, _IS_GONE = np.arange(len(_PROBED)) == _COLOUR, np.arange(len(_PROBED)) == _GONE
_IS_WAY = np.array([name.endswith("way") for name in _PROBED])
_VALUES = 1 + max(len(COLOURS), len(SHAPES))
_WAYS = {(0, -1): 1, (0, 1): 2, (-1, 0): 3, (1, 0): 4}
"""Directions by the signs of their rows and columns."""

Targets = Int[np.ndarray, "F N probes"]


def train_probes(
    config: LlavaConfig,
    params: Params,
    progress: Progress | None = None,
    steps: int = STEPS,
    depth: int = DEPTH,
) -> Params:
    """Trains aligned weights, and probes, to follow the things of clips.

    Args:
        config: a model whose frames have one visual token for each cell of a scene's grid.
        params: float32 weights, see ``align``.
        progress: called after each step.
        steps: number of training steps, each on fresh clips.
        depth: number of layers of the language model that are trained.

    Returns:
        The weights after it, and the probes under ``PROBES``. The layers above are not touched.
    """
    upper = tuple(f"language_model.layers.{i}." for i in range(depth, config.text.num_layers))
    frozen = {p: x for p, x in params.items() if p.startswith(upper)}
    trained = {p: x for p, x in params.items() if p not in frozen}
    probes = probes_shape(config)
    trained[PROBES] = jnp.zeros(probes.shape, probes.dtype)

    def loss(
        trained: Params,
        frames: UInt8[Array, "B F height width 3"],
        targets: Int[Array, "B F N probes"],
    ) -> Float[Array, ""]:
        model = bind(config, {**trained, **frozen})
        features = model.encode(frames.reshape(-1, *frames.shape[2:]))
        features = features.reshape(*targets.shape[:3], -1)
        visual = place_newlines(
            features, None, model.image_newline[...], config.newline, config.frame_grid
        )
        x, rope = visual.embeds, model.language_model.rope(positions_of(visual.valid))
        for layer in model.language_model.layers[:depth]:
            x = layer.prefill(x, rope, visual.valid)[0]
        targets = targets.reshape(targets.shape[0], -1, len(_PROBED))
        # The norm keeps the probes from seeing how large the states have grown.
        x = model.language_model.norm(x[:, : targets.shape[1]])
        return probe_loss(x, trained[PROBES], targets)

    def batch(step: int) -> tuple[np.ndarray, ...]:
        numbers = range(step * _CLIPS, (step + 1) * _CLIPS)
        scenes = [task_clip("train", number, SceneSettings()).scene for number in numbers]
        targets = np.stack([probe_targets(scene) for scene in scenes])
        frames = np.stack([draw(scene, config.vision.image_size) for scene in scenes])
        return frames, targets

    return {
        **frozen,
        **fit(trained, loss, batch, steps, _LEARNING_RATE, "following things", progress),
    }


@dataclass(frozen=True)
class ProbeLoss:
    """The probe loss as an auxiliary loss (see ``training.loss.AuxiliaryLoss``).

    Attributes:
        depth: number of layers, from the first, whose output the probes read.
    """

    depth: int = DEPTH

    def read(
        self, number: int, layer: Qwen2Layer, x: Float[Array, "B T D"], forward: Forward
    ) -> Float[Array, "B M D"] | None:
        """The normed states of the visual tokens."""
        if number != self.depth:
            return None
        first = forward.visual_slots.start
        # In the layout of the tiny model the newline comes last.
        tokens = forward.visual.valid.shape[1] - 1
        return forward.model.language_model.norm(x[:, first : first + tokens])

    def loss(
        self,
        reads: Sequence[Float[Array, "B M D"]],
        forward: Forward,
        targets: Int[Array, "B F N probes"],
    ) -> Float[Array, ""]:
        """The weighted loss of the tokens that were kept; ``targets`` are of all tokens."""
        targets = targets.reshape(targets.shape[0], -1, targets.shape[-1])
        if forward.kept is not None:
            targets = jnp.take_along_axis(targets, forward.kept[:, :, None], axis=1)
        return WEIGHT * probe_loss(reads[0], forward.params[PROBES], targets)


def probes_shape(config: LlavaConfig) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the weights under ``PROBES``: [D, probes, values]."""
    return jax.ShapeDtypeStruct((config.text.hidden_size, len(_PROBED), _VALUES), jnp.float32)


def probe_loss(
    states: Float[Array, "B M D"],
    probes: Float[Array, "D probes values"],
    targets: Int[Array, "B M probes"],
) -> Float[Array, ""]:
    """Weighted mean of the probes' cross entropies, in nats.

    Args:
        states: normed states of visual tokens.
        probes: a linear map from a state to scores of the values of each probe.
        targets: the right value of each probe, see ``probe_targets``. Places where a thing is or
            was have weight 1, directions more, empty places little.
    """
    is_thing = targets[..., _COLOUR, None] > 0
    weights = jnp.where(is_thing, 1.0, 0.0)
    weights = jnp.where(is_thing & _IS_WAY & (targets > 0), _MOVED_WEIGHT, weights)
    weights = jnp.where(~is_thing & _IS_COLOUR, EMPTY_WEIGHT, weights)
    gone = jnp.where(targets[..., _GONE, None] > 0, 1.0, EMPTY_WEIGHT)
    weights = jnp.where(_IS_GONE, gone, weights)
    scores = jax.nn.log_softmax(jnp.einsum("bmd,dpc->bmpc", states, probes))
    likely = jnp.take_along_axis(scores, targets[..., None], axis=3)[..., 0]
    return -(likely * weights).sum() / weights.sum()


def probe_targets(scene: Scene) -> Targets:
    """What is known of each place of each frame from that frame and the frames before it.

    Returns:
        For each of row, column, colour, shape, first and second direction, order of appearance,
        colour met, and colour of the brief thing that is gone: a number from 1, or 0 for none.
    """
    targets = np.zeros((scene.frames, GRID, GRID, len(_PROBED)), np.int32)
    targets[..., 0] = np.arange(1, GRID + 1)[:, None]
    targets[..., 1] = np.arange(1, GRID + 1)
    for order, thing in enumerate(scene.things, start=1):
        named = COLOURS.index(thing.colour) + 1, SHAPES.index(thing.shape) + 1
        for since, cell in enumerate(thing.cells):
            ways = _ways(thing, since)
            met = COLOURS.index(thing.meets) + 1 if thing.meets and cell == thing.cells[-1] else 0
            # Half-way between two cells a thing lies on both; the later one lies on top.
            rows, columns = (slice(int(np.floor(value)), int(np.ceil(value)) + 1) for value in cell)
            targets[thing.appears + since, rows, columns, 2:8] = (*named, *ways, order, met)
        if thing.is_brief:
            row, column = map(int, thing.cells[0])
            after = thing.appears + len(thing.cells)
            targets[after:, row, column, _GONE] = named[0]
    return targets.reshape(scene.frames, GRID * GRID, len(_PROBED))


def _ways(thing: Thing, since: int) -> tuple[int, int]:
    """First and second direction of a thing until some frames after it appeared."""
    ways: list[int] = []
    for before, after in pairwise(thing.cells[: since + 1]):
        moved = int(np.sign(after.row - before.row)), int(np.sign(after.column - before.column))
        if moved in _WAYS and _WAYS[moved] not in ways:
            ways.append(_WAYS[moved])
    return (*ways, 0, 0)[0], (*ways, 0, 0)[1]
