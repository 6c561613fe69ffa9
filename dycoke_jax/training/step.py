"""One step of training: a pure function of state and batch."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError
from dycoke_jax.models.llava import Params
from dycoke_jax.training.batches import Batch
from dycoke_jax.training.loss import AuxiliaryLoss, Scores, score_answers
from dycoke_jax.training.token_dropping import TokenDropping


class Cycle(NamedTuple):
    """A cycle of the learning rate: a linear warm-up and a cosine decay to zero."""

    start: int
    """The first step of the cycle."""
    learning_rate: float
    """The highest learning rate of the cycle."""


@dataclass(frozen=True)
class Optimisation:
    """How weights are changed: AdamW with clipping, warm-up and cosine decay to zero.

    Attributes:
        steps: steps of the run, at least 1.
        learning_rate: highest learning rate of the language model in the first cycle, above 0.
        language: learning rate of the language model's layers relative to ``learning_rate``; 0
            freezes them.
        projector: learning rate of projector and newline relative to ``learning_rate``; 0 freezes
            them.
        tower: learning rate of the vision tower relative to ``learning_rate``; 0 freezes it.
        frozen_layers: number of layers of the language model, from the first, that are frozen.
            Frozen weights have no moments and cost no gradient.
        warm_up: steps of linear warm-up of each cycle.
        cycles: further learning-rate cycles, each with such a warm-up and a cosine decay; a cycle
            ends where the next one starts.
        weight_decay: AdamW weight decay, on matrices only.
        clip: largest global norm of the gradient.
        dtype: dtype of the computation; weights and moments are float32.
        rematerialise: compute layers again for the gradient instead of storing their results.
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
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; it must be at least 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        modules = "language", "projector", "tower", "frozen_layers"
        for name in (*modules, "warm_up", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        starts = [0, *(cycle.start for cycle in self.cycles), self.steps]
        if starts != sorted(set(starts)):
            raise ConfigError(
                f"cycles start at {starts[1:-1]}; give ascending steps within the run"
            )
        if not (self.language or self.projector or self.tower):
            raise ConfigError("everything is frozen: language, projector and tower are all 0")


class TrainState(NamedTuple):
    """What a run carries from step to step."""

    step: Int[Array, ""]
    params: Params
    """In float32."""
    optimiser: optax.OptState


class Metrics(NamedTuple):
    """Of one step."""

    loss: Float[Array, ""]
    """Mean cross entropy of an answer's token, in nats."""
    token_accuracy: Float[Array, ""]
    answer_accuracy: Float[Array, ""]
    """Share of answers of which every token was the most likely one."""
    gradient: Float[Array, ""]
    """Norm before clipping."""
    learning_rate: Float[Array, ""]


def schedule(settings: Optimisation) -> optax.Schedule:
    """Learning rate of the language model by step."""
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
    """The chain of transformations, for the weights that are trained."""
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
    """Whether a weight changes."""
    match path.split("."):
        case ["language_model", "layers", number, *_] if int(number) < settings.frozen_layers:
            return False
    return getattr(settings, module_of(path)) > 0


def _trained(settings: Optimisation, params: Params) -> Params:
    return {path: x for path, x in params.items() if is_trained(settings, path)}


def module_of(path: str) -> str:
    """Which of tower, projector and language a weight belongs to, for learning rates."""
    match path.split(".")[0]:
        case "vision_tower":
            return "tower"
        case "projector" | "image_newline":
            return "projector"
        case _:
            return "language"


def start(settings: Optimisation, params: Params) -> TrainState:
    """The state before the first step; weights become float32."""
    # Copies, because the first step gives its state's buffers away.
    params = {path: jnp.array(x, jnp.float32) for path, x in params.items()}
    return TrainState(jnp.int32(0), params, optimiser(settings).init(_trained(settings, params)))


@jax.jit(static_argnames=("config", "settings", "dropping", "auxiliary"), donate_argnames="state")
def train_step(
    config: LlavaConfig,
    settings: Optimisation,
    state: TrainState,
    batch: Batch,
    targets: Any = None,
    *,
    dropping: TokenDropping | None = None,
    auxiliary: tuple[AuxiliaryLoss, ...] = (),
    seed: Int[Array, ""] | int = 0,
) -> tuple[TrainState, Metrics]:
    """Changes the weights once, by the gradient of the mean over all answer tokens of a batch.

    Args:
        config: the model (static).
        settings: of the optimisation (static).
        state: before the step; its buffers are donated.
        batch: with one axis before B, over which gradients are accumulated.
        targets: a pytree for the auxiliary losses, with the batch's two leading axes.
        dropping: visual tokens to drop (static).
        auxiliary: losses to be added to that of the answers (static).
        seed: of dropping at random.
    """
    trained = _trained(settings, state.params)

    def loss(
        trained: Params, part: Batch, targets: Any, key: Array
    ) -> tuple[Float[Array, ""], Scores]:
        scores = score_answers(
            config,
            {**state.params, **trained},
            part,
            dropping=dropping,
            key=key,
            auxiliary=auxiliary,
            targets=targets,
            dtype=settings.dtype,
            rematerialise=settings.rematerialise,
        )
        # The sum over tokens is divided by their number below; so must this be.
        return scores.loss + scores.auxiliary * scores.tokens, scores

    def accumulate(total: tuple, part: tuple[Batch, Any, Array]) -> tuple[tuple, None]:
        (_, scores), gradient = jax.value_and_grad(loss, has_aux=True)(trained, *part)
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
    zero = jax.tree.map(jnp.zeros_like, trained)
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
    params = {**state.params, **optax.apply_updates(trained, updates)}
    return TrainState(state.step + 1, params, moments), metrics
