"""Second pre-training stage: linear probes predict the contents of a scene from visual tokens.

Answers are few and say little about a clip of hundreds of tokens, so a model that learns from
answers alone needs many steps to learn to follow a thing. Here the first layers of the language
model learn it directly. From the state of a visual token after these layers, linear probes predict
the token's row and column, the colour and shape of the thing in its cell, the directions in which
the thing has moved so far, its place in the order of appearance, the colour of the thing that it
has met, and, in an empty cell, the colour of the brief thing that was there before. The stage takes
a quarter of an hour on two CPU cores.

Fine-tuning alone would undo this within some hundred steps, because the first answers hardly depend
on it. So the probe loss goes on in fine-tuning as an auxiliary loss on the same states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dycoke_jax.config import LlavaConfig
from dycoke_jax.generation.assemble import all_rows, place_newlines
from dycoke_jax.generation.walk import walk
from dycoke_jax.model import Model
from dycoke_jax.models.llava import Params
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
"""Path of the probes among the weights."""
WEIGHT = 0.5
"""Weight of the probe loss relative to the loss of the answers, in fine-tuning."""
STEPS = 1500
"""Number of training steps of this stage in the recipe."""
DEPTH = 3
"""Number of layers, from the first, after which the probes read the states."""
_CLIPS = 16
"""Clips of a step."""
_LEARNING_RATE = 2e-3
"""Highest learning rate."""
_MOVED_WEIGHT = 4.0
"""Weight of a direction in the loss, above 1 because directions are rare and hardest to learn."""
_PROBED = ("row", "column", "colour", "shape", "first way", "second way", "order", "met", "gone")
"""What the probes predict, in the order of the axis ``probes``."""
_COLOUR, _GONE = _PROBED.index("colour"), _PROBED.index("gone")
_IS_COLOUR, _IS_GONE = np.arange(len(_PROBED)) == _COLOUR, np.arange(len(_PROBED)) == _GONE
_IS_WAY = np.array([name.endswith("way") for name in _PROBED])
_VALUES = 1 + max(len(COLOURS), len(SHAPES))
"""Number of values of a probe: "none" and the largest set of names."""
_WAYS = {(0, -1): 1, (0, 1): 2, (-1, 0): 3, (1, 0): 4}
"""Numbers of the directions, by the signs of their changes of row and column."""

Targets = Int[np.ndarray, "F N probes"]
"""Probe targets of a clip, int32, see ``probe_targets``."""


def train_probes(
    model: Model,
    progress: Progress | None = None,
    steps: int = STEPS,
    depth: int = DEPTH,
) -> Model:
    """Trains the probes, and all weights but the later layers of the language model, on clips.

    Args:
        model: the model after ``align``, with float32 weights. Its frames have one visual token for
            each cell of a scene's grid, and its visual segment ends in its only newline.
        progress: called after each step.
        steps: number of training steps, at least 1, each on new clips.
        depth: number of layers of the language model, from the first, that are trained; in
            1..layers.

    Returns:
        The model after the last step; its float32 weights hold the probes too, under ``PROBES``.
        The layers from ``depth`` on are unchanged.
    """
    config = model.config
    upper = tuple(f"language_model.layers.{i}." for i in range(depth, config.text.num_layers))
    frozen = {p: x for p, x in model.params.items() if p.startswith(upper)}
    trained = {p: x for p, x in model.params.items() if p not in frozen}
    probes = probes_shape(config)
    trained[PROBES] = jnp.zeros(probes.shape, probes.dtype)

    def loss(
        trained: Params,
        frames: UInt8[Array, "B F height width 3"],
        targets: Int[Array, "B F N probes"],
    ) -> Float[Array, ""]:
        network = replace(model, params={**trained, **frozen}).bind()
        features = network.encode(frames.reshape(-1, *frames.shape[2:]))
        features = features.reshape(*targets.shape[:3], -1)
        kept = all_rows(features, jnp.full(features.shape[0], features.shape[1]))
        newline = network.image_newline[...]
        visual = place_newlines(features, kept, newline, config.newline, config.frame_grid)
        x, rope = visual.embeds, network.language_model.rope(positions_of(visual.valid))
        x, _ = walk(
            network.language_model,
            x,
            lambda _, layer, x: (layer.prefill(x, rope, visual.valid)[0], None),
            stop=depth,
        )
        targets = targets.reshape(targets.shape[0], -1, len(_PROBED))
        # The norm makes the loss independent of the scale of the states.
        x = network.language_model.norm(x[:, : targets.shape[1]])
        return probe_loss(x, trained[PROBES], targets)

    def batch(step: int) -> tuple[np.ndarray, ...]:
        numbers = range(step * _CLIPS, (step + 1) * _CLIPS)
        scenes = [task_clip("train", number, SceneSettings()).scene for number in numbers]
        targets = np.stack([probe_targets(scene) for scene in scenes])
        frames = np.stack([draw(scene, config.vision.image_size) for scene in scenes])
        return frames, targets

    fitted = fit(trained, loss, batch, steps, _LEARNING_RATE, "training probes", progress)
    return replace(model, params={**frozen, **fitted})


@dataclass(frozen=True)
class ProbeLoss:
    """The probe loss as an auxiliary loss (see ``training.loss.AuxiliaryLoss``).

    Attributes:
        depth: number of layers, from the first, after which the probes read the states; in
            1..layers-1.
    """

    depth: int = DEPTH

    def read(
        self, number: int, layer: Qwen2Layer, x: Float[Array, "B T D"], forward: Forward
    ) -> Float[Array, "B M D"] | None:
        """The normalised states of the kept visual tokens after ``depth`` layers, else None."""
        if number != self.depth:
            return None
        first = forward.visual_slots.start
        # The tiny model has a single newline, which comes after the visual tokens.
        tokens = forward.visual.valid.shape[1] - 1
        return forward.network.language_model.norm(x[:, first : first + tokens])

    def loss(
        self,
        reads: Sequence[Float[Array, "B M D"]],
        forward: Forward,
        targets: Int[Array, "B F N probes"],
    ) -> Float[Array, ""]:
        """The probe loss of the kept tokens times ``WEIGHT``; ``targets`` cover all tokens."""
        targets = targets.reshape(targets.shape[0], -1, targets.shape[-1])
        targets = jnp.take_along_axis(targets, forward.kept[:, :, None], axis=1)
        return WEIGHT * probe_loss(reads[0], forward.params[PROBES], targets)


def probes_shape(config: LlavaConfig) -> jax.ShapeDtypeStruct:
    """Shape [D, probes, values] and dtype float32 of the weights under ``PROBES``."""
    return jax.ShapeDtypeStruct((config.text.hidden_size, len(_PROBED), _VALUES), jnp.float32)


def probe_loss(
    states: Float[Array, "B M D"],
    probes: Float[Array, "D probes values"],
    targets: Int[Array, "B M probes"],
) -> Float[Array, ""]:
    """Weighted mean of the probes' cross entropies, in nats.

    Row, column, shape, directions, order and met have weight 1 where a thing is (a direction that
    is not "none" has more) and 0 elsewhere. Colour has weight 1 where a thing is, gone has weight 1
    where a brief thing was, and both have ``EMPTY_WEIGHT`` elsewhere.

    Args:
        states: states of visual tokens after the final norm of the language model.
        probes: linear maps from a state to the logits of the values of each probe.
        targets: the right value of each probe, in 0..values-1, see ``probe_targets``.

    Returns:
        The loss as a scalar.
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
    """Probe targets for each cell of each frame, from that frame and the frames before it.

    Returns:
        An int32 array with, for each cell: row, column, colour, shape, first and second direction,
        order of appearance, colour met, and colour of the brief thing that is gone. Each is a
        number from 1, or 0 for none. N counts the cells of the grid in raster order.
    """
    targets = np.zeros((scene.frames, GRID, GRID, len(_PROBED)), np.int32)
    targets[..., 0] = np.arange(1, GRID + 1)[:, None]
    targets[..., 1] = np.arange(1, GRID + 1)
    for order, thing in enumerate(scene.things, start=1):
        named = COLOURS.index(thing.colour) + 1, SHAPES.index(thing.shape) + 1
        for since, cell in enumerate(thing.cells):
            ways = _ways(thing, since)
            met = COLOURS.index(thing.meets) + 1 if thing.meets and cell == thing.cells[-1] else 0
            # A thing half-way between two cells covers both. A later thing hides an earlier one.
            rows, columns = (slice(int(np.floor(value)), int(np.ceil(value)) + 1) for value in cell)
            targets[thing.appears + since, rows, columns, 2:8] = (*named, *ways, order, met)
        if thing.is_brief:
            row, column = map(int, thing.cells[0])
            after = thing.appears + len(thing.cells)
            targets[after:, row, column, _GONE] = named[0]
    return targets.reshape(scene.frames, GRID * GRID, len(_PROBED))


def _ways(thing: Thing, since: int) -> tuple[int, int]:
    """First and second direction of a thing up to ``since`` frames after its appearance."""
    ways: list[int] = []
    for before, after in pairwise(thing.cells[: since + 1]):
        moved = int(np.sign(after.row - before.row)), int(np.sign(after.column - before.column))
        if moved in _WAYS and _WAYS[moved] not in ways:
            ways.append(_WAYS[moved])
    return (*ways, 0, 0)[0], (*ways, 0, 0)[1]
