"""First pre-training stage: visual tokens predict the words for what they show.

Learning shapes and colours through an untrained language model takes thousands of steps. Here the
tower and the projector learn them directly, from single pictures: scored like the last state of the
language model, a token at a thing's place predicts the thing's colour and shape, any other token
the full stop, and all of them in which half of the picture they lie, by height and by width. Words
and visual tokens then share one space, in which attention easily finds "the red thing". It takes
two minutes on two CPU cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.models.llava import Params, bind
from dycoke_jax.progress import Progress
from dycoke_jax.recipes.tiny.fit import fit
from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.scenes import GRID, SceneSettings, draw_scene

STEPS = 500
EMPTY_WEIGHT = 0.2
"""Weight in the loss of a place without a thing; there are many of them."""
_PICTURES = 48
_LEARNING_RATE = 3e-3

_Words = Int[np.ndarray, "N words"]
_Shown = Bool[np.ndarray, "N"]


def align(
    config: LlavaConfig,
    params: Params,
    tokenizer: Tokenizer,
    progress: Progress | None = None,
    steps: int = STEPS,
) -> Params:
    """Trains untrained weights on single pictures.

    Args:
        config: a model whose frames have one visual token for each cell of a scene's grid.
        params: float32 weights.
        tokenizer: one with single tokens for the names of shapes and colours.
        progress: called after each step.
        steps: number of training steps, each on fresh pictures.

    Returns:
        The weights after it. The language model's layers are not touched.

    Raises:
        ConfigError: if the frames have another number of tokens, or a name is no single token.
    """
    if config.frame_grid != (GRID, GRID):
        raise ConfigError(f"alignment needs frames of {GRID} x {GRID} visual tokens")
    frozen = {p: x for p, x in params.items() if p.startswith("language_model.layers")}
    trained = {p: x for p, x in params.items() if p not in frozen}

    def loss(
        trained: Params,
        frames: UInt8[Array, "C height width 3"],
        words: Int[Array, "C N words"],
        shown: Bool[Array, "C N"],
    ) -> Float[Array, ""]:
        model = bind(config, {**trained, **frozen})
        states = model.language_model.norm(model.encode(frames))
        scores = jax.nn.log_softmax(model.logits(states))
        likely = jnp.take_along_axis(scores, words, axis=2).mean(-1)
        weights = jnp.where(shown, 1.0, EMPTY_WEIGHT)
        return -(likely * weights).sum() / weights.sum()

    def batch(step: int) -> tuple[np.ndarray, ...]:
        seeds = range(2 * step * _PICTURES, 2 * (step + 1) * _PICTURES, 2)
        pictures = [_picture(config, tokenizer, seed) for seed in seeds]
        return tuple(map(np.stack, zip(*pictures, strict=True)))

    return {
        **frozen,
        **fit(trained, loss, batch, steps, _LEARNING_RATE, "naming pictures", progress),
    }


def _picture(
    config: LlavaConfig, tokenizer: Tokenizer, seed: int
) -> tuple[UInt8[np.ndarray, "height width 3"], _Words, _Shown]:
    """A picture, the words for each place, and where things are."""
    scene = draw_scene(seed, SceneSettings(1, 1, 6))
    shown = np.zeros(GRID * GRID, bool)
    words = [[_id(tokenizer, ".")] * 4 for _ in shown]
    for thing in scene.things:
        row, column = map(int, thing.cells[0])
        place = row * GRID + column
        shown[place] = True
        # The first word of a text has no space, and is another token than with one.
        named = (thing.colour, f" {thing.colour}", thing.shape, f" {thing.shape}")
        words[place] = [_id(tokenizer, word) for word in named]
    for place, of_place in enumerate(words):
        row, column = divmod(place, GRID)
        of_place.append(_id(tokenizer, "top" if row < GRID / 2 else "bottom"))
        of_place.append(_id(tokenizer, " left" if column < GRID / 2 else " right"))
    return draw(scene, config.vision.image_size)[0], np.array(words, np.int32), shown


def _id(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.backend_tokenizer.encode(text).ids
    if len(ids) != 1:
        raise ConfigError(f"alignment needs a tokenizer with a single token for {text!r}")
    return ids[0]
