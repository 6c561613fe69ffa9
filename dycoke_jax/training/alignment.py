"""First lessons of the eyes: a visual token learns to read as the words for what it shows.

Learning shapes and colours through a language model that knows nothing yet takes thousands of
steps. Here the tower and the projector learn them directly, from single pictures: scored like the
last state of the language model, a token at a thing's place should predict the thing's colour and
shape, any other the full stop, and all of them in which half of the picture they lie, by height and
by width. Words and visual tokens then share one space, in which attention finds "the red thing"
easily. It takes two minutes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError
from dycoke_jax.evaluation.pictures import draw
from dycoke_jax.evaluation.scenes import GRID, SceneSettings, draw_scene
from dycoke_jax.inputs.prompts import Tokenizer
from dycoke_jax.models.llava import Params, bind

STEPS = 500
_PICTURES = 48
_RATE = 3e-3
_EMPTY_WEIGHT = 0.2
"""Of a place without a thing in the loss; there are many of them."""

Words = Int[Array, "C N 4"]


def align(config: LlavaConfig, params: Params, tokenizer: Tokenizer, steps: int = STEPS) -> Params:
    """Teaches single pictures to untrained weights.

    Args:
        config: a model whose frames have one visual token for each cell of a scene's grid.
        params: float32 weights.
        tokenizer: one with single tokens for the names of shapes and colours.
        steps: of training, each on fresh pictures.

    Returns:
        The weights after it. The language model's layers are not touched.

    Raises:
        ConfigError: if the frames have another number of tokens, or a name is no single token.
    """
    if config.frame_grid != (GRID, GRID):
        raise ConfigError(f"alignment needs frames of {GRID} x {GRID} visual tokens")
    rate = optax.warmup_cosine_decay_schedule(0.0, _RATE, steps // 15, steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01)
    )
    seen = {p: x for p, x in params.items() if not p.startswith("language_model.layers")}
    rest = {p: x for p, x in params.items() if p not in seen}
    moments = optimiser.init(seen)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        seen: Params, moments: optax.OptState, frames: Array, words: Words, shown: Array
    ) -> tuple[Params, optax.OptState]:
        gradient = jax.grad(lambda seen: _loss(config, {**seen, **rest}, frames, words, shown))(
            seen
        )
        updates, moments = optimiser.update(gradient, moments, seen)
        return optax.apply_updates(seen, updates), moments

    ids = _Ids(tokenizer)
    seen = {path: jnp.array(x) for path, x in seen.items()}  # given away at the first step
    for number in range(steps):
        pictures = [_picture(config, ids, 2 * (number * _PICTURES + i)) for i in range(_PICTURES)]
        frames, words, shown = map(np.stack, zip(*pictures, strict=True))
        seen, moments = step(seen, moments, frames, words, shown)
    return {path: seen.get(path, x) for path, x in params.items()}


def _loss(
    config: LlavaConfig,
    params: Params,
    frames: UInt8[Array, "C height width 3"],
    words: Words,
    shown: Array,
) -> Float[Array, ""]:
    model = bind(config, params)
    states = model.language_model.norm(model.encode(frames))
    scores = jax.nn.log_softmax(model.logits(states))
    likely = jnp.take_along_axis(scores, words, axis=2).mean(-1)
    weights = jnp.where(shown, 1.0, _EMPTY_WEIGHT)
    return -(likely * weights).sum() / weights.sum()


class _Ids:
    """The token of each word, as it is written in answers: the first of a text has no space."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend_tokenizer

    def of(self, text: str) -> int:
        ids = self._backend.encode(text).ids
        if len(ids) != 1:
            raise ConfigError(f"alignment needs a tokenizer with a single token for {text!r}")
        return ids[0]


def _picture(
    config: LlavaConfig, ids: _Ids, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture, the words for each place, and where things are."""
    scene = draw_scene(seed, SceneSettings(1, 1, 6))
    words = np.full((GRID * GRID, 4), ids.of("."), np.int32)
    for place in range(GRID * GRID):
        row, column = divmod(place, GRID)
        words[place, 2] = ids.of("top" if row < GRID / 2 else "bottom")
        words[place, 3] = ids.of(" left" if column < GRID / 2 else " right")
    shown = np.zeros(GRID * GRID, bool)
    for thing in scene.things:
        row, column = map(int, thing.cells[0])
        words[row * GRID + column, :2] = ids.of(f" {thing.colour}"), ids.of(f" {thing.shape}")
        shown[row * GRID + column] = True
    return draw(scene, config.vision.image_size)[0], words, shown
