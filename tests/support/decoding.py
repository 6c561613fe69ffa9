"""Language models and prompts of random weights, decoded step by step, for tests of compression."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dycoke_jax.cache import Slots
from dycoke_jax.config import LlavaConfig, TextConfig, VisionConfig
from dycoke_jax.generation.assemble import TextIds, Visual
from dycoke_jax.generation.decode import decode_step
from dycoke_jax.generation.layout import Layout, group_layers
from dycoke_jax.generation.prefill import read_prompt, start
from dycoke_jax.generation.state import Limits, take_token
from dycoke_jax.model import Model
from dycoke_jax.models.llava import random_params

PREFIX, QUESTION = 6, 9
"""Text slots of a prompt. Rows fill some of them; one size for all tests saves compilations."""
NO_VISION = VisionConfig(8, 8, 1, 1, patch_size=14, image_size=56)
step = jax.jit(
    lambda model, state, layout: decode_step(model.bind(), state, layout), static_argnums=2
)


def lay_out(model, slots, method, rows=1):
    """The layout of a batch whose visual embeddings are given."""
    layers = model.config.text.num_layers
    return Layout(rows, 0, None, group_layers(layers, slots, method.stages))


@functools.partial(jax.jit, static_argnames="layout")
def read(model, visual, text, layout):
    """The state before the first token, of prompts that may have empty slots."""
    views = read_prompt(model.bind(), visual, text, layout).views
    return start(visual, text, views, limits(layout.rows), layout.slots.generated)


def limits(rows):
    return Limits(jnp.full(rows, 1000), jnp.full((rows, 1), -1))


def segment_of(embeds, is_visual=None, valid=None):
    """Visual slots with these embeddings, all of them visual tokens unless it is said."""
    shape = embeds.shape[:2]
    everything = np.ones(shape, bool)
    return Visual(
        jnp.asarray(embeds),
        jnp.asarray(everything if valid is None else valid),
        jnp.asarray(everything if is_visual is None else is_visual),
        jnp.broadcast_to(jnp.arange(shape[1]), shape),
    )


def chosen_of(state, row):
    """Numbers of the visual tokens that the last layers attend to."""
    view = state.views[-1]
    return set(np.asarray(view.places[row])[np.asarray(view.visible[row] & view.is_token[row])])


def random_model(seed, layers=4, scale=8.0):
    """Weights large enough that attention is uneven and changes from step to step."""
    text = TextConfig(64, 32, 48, layers, 4, 2, 8, tie_word_embeddings=True)
    config = LlavaConfig(NO_VISION, text)
    params = random_params(config, seed)
    scaled = {n: w * scale if w.ndim == 2 else w for n, w in params.items()}
    return Model(scaled, config)


def ragged_prompts(model, seed, lengths, visual):
    """Rows (prefix, question) of different lengths around ``visual`` random visual embeddings."""
    rng = np.random.default_rng(seed)
    rows = len(lengths)
    text = TextIds(
        rng.integers(0, 64, (rows, PREFIX)),
        np.array([prefix for prefix, _ in lengths]),
        rng.integers(0, 64, (rows, QUESTION)),
        np.array([question for _, question in lengths]),
    )
    embeds = rng.normal(size=(rows, visual, model.config.text.hidden_size)).astype(np.float32)
    table = np.asarray(model.params["language_model.embed_tokens.weight"])
    alone = [
        np.concatenate([table[text.prefix[row, :p]], embeds[row], table[text.question[row, :q]]])
        for row, (p, q) in enumerate(lengths)
    ]
    slots = Slots(PREFIX, visual, QUESTION, 16)
    text = TextIds(*map(jnp.asarray, text))
    return text, segment_of(embeds), slots, alone


def run_steps(model, text, visual, slots, method, fed):
    """Logits [steps, B, L], refreshed [steps, B] and the states of feeding given tokens."""
    rows = len(text.prefix)
    layout = lay_out(model, slots, method, rows)
    state = read(model, visual, text, layout)
    logits, refreshed, states = [], [], []
    for tokens in fed:
        state = take_token(state, jnp.asarray(tokens, jnp.int32), limits(rows))
        out, state = step(model, state, layout)
        logits.append(np.asarray(out))
        refreshed.append(np.asarray(state.views[-1].refreshed))
        states.append(state)
    return np.stack(logits), np.stack(refreshed), states
