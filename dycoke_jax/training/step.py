"""One step of training: a pure function of state and batch."""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError
from dycoke_jax.models.llava import Params
from dycoke_jax.training.batches import Batch
from dycoke_jax.training.loss import Scores, Thinning, score_answers


class Course(NamedTuple):
    """Some steps in which the learning rate rises and falls to zero again."""

    start: int
    """The first step."""
    learning_rate: float
    """The highest."""


@dataclass(frozen=True)
class Optimisation:
    """How weights are changed: AdamW with clipping, warm-up and a cosine to zero.

    Attributes:
        steps: steps of the whole run.
        learning_rate: the highest, of the language model.
        projector: learning rate of projector and newline, relative to the language model's; 0
            freezes them.
        tower: likewise, of the vision tower.
        language: likewise, of the language model; 0 freezes it.
        frozen_layers: layers of the language model, from the first, that stay as they are. What is
            frozen has no moments and costs no gradient.
        warm_up: steps in which the learning rate rises.
        courses: further courses of the learning rate, each with such a warm-up and cosine; the one
            before it then ends where it starts.
        weight_decay: of matrices; biases, norms and the newline have none.
        clip: largest norm of the gradient.
        dtype: of the computation; weights and moments are float32.
        rematerialise: compute layers again for the gradient instead of storing them.
    """

    steps: int
    learning_rate: float = 1e-3
    language: float = 1.0
    projector: float = 1.0
    tower: float = 1.0
    frozen_layers: int = 0
    warm_up: int = 100
    courses: tuple[Course, ...] = ()
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
        starts = [0, *(course.start for course in self.courses), self.steps]
        if starts != sorted(set(starts)):
            raise ConfigError(
                f"courses start at {starts[1:-1]}; give ascending steps within the run"
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
    courses = [Course(0, settings.learning_rate), *settings.courses]
    ends = [*(course.start for course in settings.courses), settings.steps]
    warm_up = settings.warm_up
    return optax.join_schedules(
        [
            optax.warmup_cosine_decay_schedule(
                0.0, course.learning_rate, warm_up, max(end - course.start, warm_up + 1)
            )
            for course, end in zip(courses, ends, strict=True)
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


@partial(
    jax.jit, static_argnames=("config", "settings", "thinning", "seed"), donate_argnames="state"
)
def train_step(
    config: LlavaConfig,
    settings: Optimisation,
    state: TrainState,
    batch: Batch,
    *,
    thinning: Thinning | None = None,
    seed: int = 0,
) -> tuple[TrainState, Metrics]:
    """Changes the weights once, by the gradient of the mean over all answer tokens of a batch.

    Args:
        config: the model (static).
        settings: of the optimisation (static).
        state: before the step; its buffers are given away.
        batch: with one axis before B, over which gradients are accumulated.
        thinning: visual tokens to leave out (static).
        seed: of random thinning (static).
    """
    trained = _trained(settings, state.params)

    def loss(trained: Params, part: Batch, key: Array) -> tuple[Float[Array, ""], Scores]:
        scores = score_answers(
            config,
            {**state.params, **trained},
            part,
            thinning=thinning,
            key=key,
            dtype=settings.dtype,
            rematerialise=settings.rematerialise,
        )
        # The sum over tokens is divided by their number below; so must this be.
        return scores.loss + scores.beside * scores.tokens, scores

    def accumulate(total: tuple, part_and_key: tuple[Batch, Array]) -> tuple[tuple, None]:
        (_, scores), gradient = jax.value_and_grad(loss, has_aux=True)(trained, *part_and_key)
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
    (gradient, counts), _ = jax.lax.scan(accumulate, nothing, (batch, keys))
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
