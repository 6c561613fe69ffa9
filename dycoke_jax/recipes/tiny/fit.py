"""The training loop of the pre-training stages: fresh batches, one loss, AdamW."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dycoke_jax.models.llava import Params
from dycoke_jax.progress import Progress

Loss = Callable[..., Float[Array, ""]]
Batches = Callable[[int], tuple]


def fit(
    params: Params,
    loss: Loss,
    batch: Batches,
    steps: int,
    learning_rate: float,
    what: str,
    progress: Progress | None = None,
) -> Params:
    """Minimises a loss over weights.

    Args:
        params: the weights to train; frozen ones belong into the closure of ``loss``.
        loss: function of the weights and the arrays of a batch.
        batch: gives the arrays of a step, counted from 0.
        steps: number of training steps.
        learning_rate: the highest; linear warm-up for a fifteenth of the steps, then cosine decay
            to zero.
        what: name of the stage for ``progress``.
        progress: called after each step.

    Returns:
        The weights after the last step.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 15, steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )

    @jax.jit(donate_argnums=(0, 1))
    def step(
        params: Params, moments: optax.OptState, arrays: tuple
    ) -> tuple[Params, optax.OptState]:
        gradient = jax.grad(loss)(params, *arrays)
        updates, moments = optimiser.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments

    params = {path: jnp.array(x) for path, x in params.items()}  # donated at the first step
    moments = optimiser.init(params)
    for number in range(steps):
        params, moments = step(params, moments, batch(number))
        if progress:
            progress(what, number + 1, steps)
    return params
