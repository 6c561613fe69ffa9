"""The loop of lessons that come before the questions: fresh batches, one loss, AdamW."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dycoke_jax.models.llava import Params
from dycoke_jax.progress import Progress

Loss = Callable[..., Float[Array, ""]]
Batches = Callable[[int], tuple]


def teach(
    params: Params,
    loss: Loss,
    batch: Batches,
    steps: int,
    rate: float,
    what: str,
    progress: Progress | None = None,
) -> Params:
    """Minimises a loss over weights.

    Args:
        params: the weights to train; those left as they are belong into ``loss``.
        loss: of weights and the arrays of a batch.
        batch: gives a step's arrays.
        steps: of training.
        rate: the highest learning rate; it rises for a fifteenth of the steps and then falls to
            zero as a cosine does.
        what: name of this training for ``progress``.
        progress: called after each step.

    Returns:
        The weights after the last step.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 15, steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: Params, moments: optax.OptState, arrays: tuple
    ) -> tuple[Params, optax.OptState]:
        gradient = jax.grad(loss)(params, *arrays)
        updates, moments = optimiser.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments

    params = {path: jnp.array(x) for path, x in params.items()}  # given away at the first step
    moments = optimiser.init(params)
    for number in range(steps):
        params, moments = step(params, moments, batch(number))
        if progress:
            progress(what, number + 1, steps)
    return params
