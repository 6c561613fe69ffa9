"""The training loop of the pre-training stages: AdamW on one loss, with a new batch each step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dycoke_jax.models.llava import Params
from dycoke_jax.progress import Progress

Loss = Callable[..., Float[Array, ""]]
"""Called as ``loss(params, *arrays)`` with the weights and the arrays of a batch."""
Batches = Callable[[int], tuple]
"""Called as ``batch(step)``, with steps counted from 0; returns the arrays of the batch."""


def fit(
    params: Params,
    loss: Loss,
    batch: Batches,
    steps: int,
    learning_rate: float,
    what: str,
    progress: Progress | None = None,
) -> Params:
    """Minimises a loss with AdamW.

    The learning rate rises linearly over the first fifteenth of the steps and then decays to zero
    along a cosine. Gradients are clipped to a global norm of 1.

    Args:
        params: the weights to train, in float32. Frozen weights belong in the closure of ``loss``.
        loss: differentiable function of the weights and the arrays of a batch; it is compiled.
        batch: returns the arrays of a step; their shapes are the same at every step.
        steps: number of training steps, at least 1.
        learning_rate: highest learning rate, above 0.
        what: name of the stage for ``progress``.
        progress: called after each step.

    Returns:
        The weights after the last step, in float32.
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

    # The weights are copied, because the first step donates its arguments.
    params = {path: jnp.array(x) for path, x in params.items()}
    moments = optimiser.init(params)
    for number in range(steps):
        params, moments = step(params, moments, batch(number))
        if progress:
            progress(what, number + 1, steps)
    return params
