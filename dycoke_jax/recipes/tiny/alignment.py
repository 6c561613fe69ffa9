"""First pre-training stage: visual tokens predict the words for what they depict.

Learning shapes and colours through an untrained language model takes thousands of steps. Here the
vision tower, the projector and the token embeddings learn them directly, from single pictures. The
features of visual tokens go straight into the final norm and the output head of the language model.
The token of a cell with a thing in it predicts the words for the thing's colour and shape, any
other token the full stop. Each token also predicts whether it lies in the top or the bottom half of
the picture, and in the left or the right half. Words and visual tokens then share one space, in
which attention easily finds "the red thing". The stage takes two minutes on two CPU cores.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.model import Model
from dycoke_jax.models.llava import Params
from dycoke_jax.progress import Progress
from dycoke_jax.recipes.tiny.fit import fit
from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.scenes import GRID, SceneSettings, draw_scene

STEPS = 500
"""Number of training steps of this stage in the recipe."""
EMPTY_WEIGHT = 0.2
"""Weight of an empty cell in the loss, below 1 because most cells are empty."""
_PICTURES = 48
"""Pictures of a step."""
_LEARNING_RATE = 3e-3
"""Highest learning rate."""

_Words = Int[np.ndarray, "N words"]
_HasThing = Bool[np.ndarray, "N"]


def align(
    model: Model,
    tokenizer: Tokenizer,
    progress: Progress | None = None,
    steps: int = STEPS,
) -> Model:
    """Trains all weights but the layers of the language model on single pictures.

    Args:
        model: an untrained model with float32 weights, whose frames have one visual token for each
            cell of a scene's grid.
        tokenizer: a tokenizer that has single tokens for the words to predict: the names of colours
            and shapes, the full stop, "top", "bottom", " left" and " right".
        progress: called after each step.
        steps: number of training steps, at least 1, each on new pictures.

    Returns:
        The model after the last step, with float32 weights; the language model's layers are
        unchanged.

    Raises:
        ConfigError: if a frame has another grid of tokens, or a word is not a single token.
    """
    if model.config.frame_grid != (GRID, GRID):
        raise ConfigError(f"alignment needs frames of {GRID} x {GRID} visual tokens")
    frozen = {p: x for p, x in model.params.items() if p.startswith("language_model.layers")}
    trained = {p: x for p, x in model.params.items() if p not in frozen}

    def loss(
        trained: Params,
        frames: UInt8[Array, "C height width 3"],
        words: Int[Array, "C N words"],
        has_thing: Bool[Array, "C N"],
    ) -> Float[Array, ""]:
        network = replace(model, params={**trained, **frozen}).bind()
        states = network.language_model.norm(network.encode(frames))
        scores = jax.nn.log_softmax(network.logits(states))
        likely = jnp.take_along_axis(scores, words, axis=2).mean(-1)
        weights = jnp.where(has_thing, 1.0, EMPTY_WEIGHT)
        return -(likely * weights).sum() / weights.sum()

    def batch(step: int) -> tuple[np.ndarray, ...]:
        seeds = range(2 * step * _PICTURES, 2 * (step + 1) * _PICTURES, 2)
        pictures = [_picture(model.config, tokenizer, seed) for seed in seeds]
        return tuple(map(np.stack, zip(*pictures, strict=True)))

    fitted = fit(trained, loss, batch, steps, _LEARNING_RATE, "aligning visual tokens", progress)
    return replace(model, params={**frozen, **fitted})


def _picture(
    config: LlavaConfig, tokenizer: Tokenizer, seed: int
) -> tuple[UInt8[np.ndarray, "height width 3"], _Words, _HasThing]:
    """A uint8 RGB picture, the ids of the words for each cell, and which cells hold a thing."""
    scene = draw_scene(seed, SceneSettings(1, 1, 6))
    has_thing = np.zeros(GRID * GRID, bool)
    words = [[_id(tokenizer, ".")] * 4 for _ in has_thing]
    for thing in scene.things:
        row, column = map(int, thing.cells[0])
        place = row * GRID + column
        has_thing[place] = True
        # A word at the start of a text is another token than the same word after a space.
        named = (thing.colour, f" {thing.colour}", thing.shape, f" {thing.shape}")
        words[place] = [_id(tokenizer, word) for word in named]
    for place, of_place in enumerate(words):
        row, column = divmod(place, GRID)
        of_place.append(_id(tokenizer, "top" if row < GRID / 2 else "bottom"))
        of_place.append(_id(tokenizer, " left" if column < GRID / 2 else " right"))
    return draw(scene, config.vision.image_size)[0], np.array(words, np.int32), has_thing


def _id(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.backend_tokenizer.encode(text).ids
    if len(ids) != 1:
        raise ConfigError(f"alignment needs a tokenizer with a single token for {text!r}")
    return ids[0]
