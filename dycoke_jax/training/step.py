"""One training step, as a pure function of the state and the batch."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dycoke_jax.checks import choice, flag, number, whole_number
from dycoke_jax.errors import ConfigError
from dycoke_jax.model import Model
from dycoke_jax.models.llava import Params
from dycoke_jax.models.quantisation import is_int8
from dycoke_jax.training.batches import Batch
from dycoke_jax.training.loss import AuxiliaryLoss, Scores, score_answers
from dycoke_jax.training.placement import (
    as_weights,
    check_rows,
    constrain_as_weights,
    constrain_steps,
)
from dycoke_jax.training.token_dropping import TokenSelection


class Cycle(NamedTuple):
    """A learning-rate cycle: linear warm-up from zero, then cosine decay to zero."""

    start: int
    """First step of the cycle, counted from the first step of the run."""
    learning_rate: float
    """Highest learning rate of the cycle, above 0."""


@dataclass(frozen=True)
class Optimisation:
    """Settings of the optimiser: AdamW with gradient clipping and learning-rate cycles.

    The learning rate of a module is that of the schedule times the module's factor (``language``,
    ``projector``, ``tower``). Frozen weights have no moments, and no gradient is computed for them.

    Attributes:
        steps: number of steps of the run, at least 1.
        learning_rate: highest learning rate of the first cycle, above 0.
        language: learning-rate factor of the language model, its embeddings and output head
            included, and of weights of auxiliary losses; 0 or more, and 0 freezes them.
        projector: learning-rate factor of the projector and the newline vector; 0 or more, and 0
            freezes them.
        tower: learning-rate factor of the vision tower; 0 or more, and 0 freezes it.
        frozen_layers: number of layers of the language model, from the first, that are frozen; 0 or
            more.
        warm_up: number of steps of linear learning-rate warm-up of each cycle, 0 or more.
        cycles: further learning-rate cycles, with ascending first steps in 1..steps-1. A cycle ends
            where the next one starts.
        weight_decay: AdamW weight decay, on matrices only; 0 or more.
        clip: largest global norm of the gradient, above 0.
        dtype: dtype of the computation; weights and moments are float32.
        rematerialise: compute the results of layers again for the gradient instead of storing them.

    Raises:
        ConfigError: if a setting is out of its range, or if all modules are frozen.
    """

    steps: int
    learning_rate: float = 1e-3
    language: float = 1.0
    projector: float = 1.0
    tower: float = 1.0
    frozen_layers: int = 0
    warm_up: int = 100
    cycles: tuple[Cycle, ...] = ()
    weight_decay: float = 0.01
    clip: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    rematerialise: bool = False

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {"steps": whole_number("steps", self.steps, 1)}
        for name in ("learning_rate", "clip"):
            checked[name] = number(name, getattr(self, name), 0, with_low=False)
        for name in ("language", "projector", "tower", "weight_decay"):
            checked[name] = number(name, getattr(self, name), 0)
        for name in ("frozen_layers", "warm_up"):
            checked[name] = whole_number(name, getattr(self, name), 0)
        checked["dtype"] = choice("dtype", self.dtype, ("float32", "bfloat16"))
        checked["rematerialise"] = flag("rematerialise", self.rematerialise)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        starts = [0, *(cycle.start for cycle in self.cycles), self.steps]
        if starts != sorted(set(starts)):
            raise ConfigError(
                f"cycles start at {starts[1:-1]}; give ascending steps within the run"
            )
        if not (self.language or self.projector or self.tower):
            raise ConfigError("everything is frozen: language, projector and tower are all 0")


class TrainState(NamedTuple):
    """The state of a run between two steps."""

    step: Int[Array, ""]
    """Number of steps done, int32."""
    model: Model
    """The model with all its weights in float32, frozen ones included; its ``dtype`` is that of the
    computation (``Optimisation.dtype``)."""
    optimiser: optax.OptState
    """State of the optimiser for the weights that are trained; moments are float32."""


class Metrics(NamedTuple):
    """Metrics of one step, as float32 scalars, with the weights before the step."""

    loss: Float[Array, ""]
    """Mean cross entropy of an answer token in nats, without auxiliary losses."""
    token_accuracy: Float[Array, ""]
    """Share of answer tokens that have the highest logit, in [0, 1]."""
    answer_accuracy: Float[Array, ""]
    """Share of questions and conversations of which every answer token has the highest logit, in
    [0, 1]."""
    gradient: Float[Array, ""]
    """Global norm of the gradient before clipping, auxiliary losses included."""
    learning_rate: Float[Array, ""]
    """Learning rate of the schedule in this step, before the factors of the modules."""


def schedule(settings: Optimisation) -> optax.Schedule:
    """The learning rate as a function of the step (from 0), before the factors of the modules."""
    cycles = [Cycle(0, settings.learning_rate), *settings.cycles]
    ends = [*(cycle.start for cycle in settings.cycles), settings.steps]
    warm_up = settings.warm_up
    return optax.join_schedules(
        [
            optax.warmup_cosine_decay_schedule(
                0.0, cycle.learning_rate, warm_up, max(end - cycle.start, warm_up + 1)
            )
            for cycle, end in zip(cycles, ends, strict=True)
        ],
        ends[:-1],
    )


def optimiser(settings: Optimisation) -> optax.GradientTransformation:
    """The Optax optimiser for the weights that are trained: clipping, then AdamW by module."""
    rates = {
        "language": settings.language,
        "projector": settings.projector,
        "tower": settings.tower,
    }
    rate = schedule(settings)

    def of_module(share: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda step: share * rate(step),
            b2=0.98,
            weight_decay=settings.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        )

    modules = optax.multi_transform(
        {name: of_module(share) for name, share in rates.items()},
        lambda params: {path: module_of(path) for path in params},
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip), modules)


def is_trained(settings: Optimisation, path: str) -> bool:
    """Whether the weight at a path is trained, that is, not frozen."""
    match path.split("."):
        case ["language_model", "layers", number, *_] if int(number) < settings.frozen_layers:
            return False
    return getattr(settings, module_of(path)) > 0


def _trained(settings: Optimisation, params: Params) -> Params:
    return {path: x for path, x in params.items() if is_trained(settings, path)}


def module_of(path: str) -> str:
    """Module of the weight at a path, for its learning rate: tower, projector or language.

    Weights outside the vision tower, the projector and the newline vector belong to "language".
    """
    match path.split(".")[0]:
        case "vision_tower":
            return "tower"
        case "projector" | "image_newline":
            return "projector"
        case _:
            return "language"


def start(settings: Optimisation, model: Model) -> TrainState:
    """The state before the first step, with weights copied to float32.

    Args:
        settings: settings of the optimiser.
        model: the model; its weights are in any float dtype and hold those of auxiliary losses too.
            Moments are spread as they are.

    Raises:
        ConfigError: if weights are int8.
    """
    if is_int8(model.params):
        raise ConfigError(
            "int8 weights cannot be trained; use the checkpoint that they were converted from"
        )
    # The weights are copied, because the first step donates the buffers of its state.
    params = {path: jnp.array(x, jnp.float32) for path, x in model.params.items()}
    step, make_moments = jnp.int32(0), optimiser(settings).init
    if model.mesh is not None:
        place = partial(as_weights, config=model.config, mesh=model.mesh, fsdp=model.fsdp)
        step, params = jax.device_put((step, params), place((step, params)))
        # Made where they lie: on one device there may be no room for them.
        shapes = jax.eval_shape(make_moments, _trained(settings, params))
        make_moments = jax.jit(make_moments, out_shardings=place(shapes))
    moments = make_moments(_trained(settings, params))
    return TrainState(step, replace(model, params=params, dtype=settings.dtype), moments)


@jax.jit(static_argnames=("settings", "dropping", "auxiliary"), donate_argnames="state")
def train_step(
    settings: Optimisation,
    state: TrainState,
    batch: Batch,
    targets: Any = None,
    *,
    dropping: TokenSelection | None = None,
    auxiliary: tuple[AuxiliaryLoss, ...] = (),
    seed: Int[Array, ""] | int = 0,
) -> tuple[TrainState, Metrics]:
    """Updates the weights once.

    The loss is the mean cross entropy of the answer tokens of the whole batch, plus the mean of the
    auxiliary losses over the accumulation axis, weighted by the number of answer tokens.

    On a mesh the rows are spread over ``data``, and every device updates the weights that it holds.

    Args:
        settings: settings of the optimiser (static).
        state: the state before the step; its buffers are donated.
        batch: a batch with one axis before B, over which gradients are accumulated.
        targets: pytree of targets for the auxiliary losses, with leading axes of accumulation and
            rows.
        dropping: which visual tokens are dropped (static). None: all are kept.
        auxiliary: auxiliary losses (static).
        seed: seed of random token dropping, 0 or more.

    Returns:
        The state after the step, and the metrics of the step.

    Raises:
        ConfigError: if the mesh cannot divide the rows.
    """
    model = state.model
    check_rows(batch.ids.shape[1], model.mesh)
    batch, targets = constrain_steps((batch, targets), model.mesh)
    spread = partial(constrain_as_weights, config=model.config, mesh=model.mesh, fsdp=model.fsdp)
    trained = _trained(settings, model.params)

    def loss(
        trained: Params, model: Model, part: Batch, targets: Any, key: Array
    ) -> tuple[Float[Array, ""], Scores]:
        scores = score_answers(
            replace(model, params={**model.params, **trained}),
            part,
            dropping=dropping,
            key=key,
            auxiliary=auxiliary,
            targets=targets,
            rematerialise=settings.rematerialise,
        )
        # The summed gradient is divided by the number of answer tokens below. The auxiliary loss
        # is a mean already, so it is multiplied by that number here.
        return scores.loss + scores.auxiliary * scores.tokens, scores

    def accumulate(total: tuple, part: tuple[Batch, Any, Array]) -> tuple[tuple, None]:
        own, part = model.in_step(part)
        of_part = jax.value_and_grad(loss, has_aux=True)
        (_, scores), gradient = of_part(_trained(settings, own.params), own, *part)
        gradient = spread(gradient)
        counts = (
            scores.loss,
            scores.tokens,
            scores.right_tokens,
            scores.right.sum(),
            scores.asked.sum(),
        )
        return jax.tree.map(jnp.add, total, (gradient, counts)), None

    steps = batch.ids.shape[0]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), steps)
    zero = spread(jax.tree.map(jnp.zeros_like, trained))
    nothing = (zero, (jnp.float32(0), *(jnp.int32(0),) * 4))
    (gradient, counts), _ = jax.lax.scan(accumulate, nothing, (batch, targets, keys))
    summed, tokens, right_tokens, right, asked = counts
    gradient = jax.tree.map(lambda x: x / jnp.maximum(tokens, 1), gradient)
    updates, moments = optimiser(settings).update(gradient, state.optimiser, trained)
    metrics = Metrics(
        loss=summed / jnp.maximum(tokens, 1),
        token_accuracy=right_tokens / jnp.maximum(tokens, 1),
        answer_accuracy=right / jnp.maximum(asked, 1),
        gradient=optax.tree.norm(gradient),
        learning_rate=schedule(settings)(state.step),
    )
    params = {**model.params, **optax.apply_updates(trained, updates)}
    step, params, moments = spread((state.step + 1, params, moments))
    return TrainState(step, replace(model, params=params), moments), metrics
