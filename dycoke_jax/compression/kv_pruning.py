"""Dynamic KV pruning, stage 2 of DyCoke (paper, sec. 3.2), on caches of fixed shape.

At each decode step the attention weights of the layer before ``layer`` score the visual tokens. The
layers from ``layer`` on attend to the tokens with the highest scores and to all that is not visual.
There are three forms of the cache, each a cache stage (``protocol.CacheStage``):

``WorkingSet`` (mode paper) copies the chosen keys and values into a small buffer, and only on steps
where the attention has changed:

    all slots       prefix | visual            | question | generated     layers < layer
    parked                   visual                                       layers >= layer, all of it
    working set     chosen | prefix | question | generated                layers >= layer, attended

``OneShot`` is the working set without the parked part: it chooses once and drops the rest.

``MaskedCache`` leaves all slots where they are and hides what is not chosen. It moves more bytes,
but everything can become visible again at any step, as in the published code (mode official).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.cache import KV, Slots
from dycoke_jax.compression.budget import kept_of, lookup
from dycoke_jax.compression.protocol import Compression, check_layer
from dycoke_jax.compression.view import View
from dycoke_jax.config import LlavaConfig
from dycoke_jax.errors import ConfigError


class Parked(NamedTuple):
    """All visual slots, from which the chosen ones are copied, and the last choice."""

    caches: list[KV]
    valid: Bool[Array, "B visual"]
    is_token: Bool[Array, "B visual"]
    places: Int[Array, "B visual"]
    chosen: Int[Array, "B chosen"]
    """The chosen slots, best first; newlines come before visual tokens."""
    chosen_valid: Bool[Array, "B chosen"]
    scores: Float[Array, "B visual"]
    """Scores of the last step."""


@dataclass(frozen=True)
class WorkingSet:
    """Pruning by a compact buffer that is refilled when the attention changes (mode paper).

    The chosen set of a row is used again while the cosine similarity of its scores with those of
    the step before is at or above ``threshold``. Rows are independent: each has its own scores,
    similarity and set. Newlines are no candidates: their slots are always among the chosen.

    Attributes:
        layer: first layer that attends to the working set.
        p: share of the visual tokens that is not chosen, in [0, 1).
        threshold: similarity below which a row chooses anew, in (0, 1].
        on_host: whether what is parked is kept in the host's memory.
    """

    layer: int
    p: float
    threshold: float
    on_host: bool = False

    @property
    def stages(self) -> Compression:
        """KV pruning alone."""
        return Compression(cache=self)

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Refuses a layer that the model does not have, and a memory that the device cannot use."""
        check_layer("DyCoke", self.layer, config)
        if self.on_host:
            _check_host_memory()

    def start(self, view: View, slots: Slots, scores: Float[Array, "B visual"]) -> View:
        """Parks the visual slots, and makes working sets whose chosen part is still empty."""
        visual, batch = slots.visual_range, view.visible.shape[0]
        chosen = jnp.zeros((batch, kept_of(slots.tokens, self.p) + slots.newlines), jnp.int32)
        waiting = [cache.part(visual.start, visual.stop) for cache in view.caches]
        if self.on_host:
            waiting = [cache.to_host() for cache in waiting]
        parked = Parked(
            caches=waiting,
            valid=view.visible[:, visual],
            is_token=view.is_token[:, visual],
            places=view.places[:, visual],
            chosen=chosen,
            chosen_valid=jnp.zeros(chosen.shape, bool),
            scores=jnp.zeros(scores.shape, jnp.float32),
        )
        return replace(_compact(view, slots, chosen, parked.chosen_valid), memory=parked)

    def update(
        self, view: View, slots: Slots, scores: Float[Array, "B visual"], active: Bool[Array, "B"]
    ) -> View:
        """Chooses anew in rows whose attention has changed, and refills their working sets."""
        parked: Parked = view.memory
        scores = jnp.where(parked.is_token, scores, 0.0)
        # Before the first step all scores are zero, and so is the similarity: it always chooses.
        # Written so that scores that are no numbers choose too, instead of never.
        refreshed = ~(_similarity(scores, parked.scores) >= self.threshold) & active
        best, best_valid = _best(scores, parked.valid, parked.is_token, slots, self.p)
        chosen = jnp.where(refreshed[:, None], best, parked.chosen)
        chosen_valid = jnp.where(refreshed[:, None], best_valid, parked.chosen_valid)

        def refill(working: list[KV]) -> list[KV]:
            # Rows that were not refreshed get what they have: their chosen set is the old one.
            filled: list[KV] = []
            for cache, of_all in zip(working, parked.caches, strict=True):
                # After the layer before, so that a single layer is held besides at a time.
                of_all, filled = jax.lax.optimization_barrier((of_all, filled))
                if self.on_host:
                    of_all = of_all.to_device()
                filled.append(cache.write(of_all.take(chosen), 0))
            return filled

        caches = _where_any(refreshed, refill, view.caches)

        def with_chosen(of_slots: Array, of_chosen: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(of_slots, of_chosen, 0, axis=1)

        # What holds a token is read from the arrays that were parked, so that counts are counted.
        visible = chosen_valid & jnp.take_along_axis(parked.valid, chosen, axis=1)
        is_token = jnp.take_along_axis(parked.is_token, chosen, axis=1)
        places = jnp.take_along_axis(parked.places, chosen, axis=1)
        return View(
            caches=caches,
            visible=with_chosen(view.visible, visible),
            is_token=with_chosen(view.is_token, is_token),
            places=with_chosen(view.places, places),
            refreshed=refreshed,
            memory=parked._replace(chosen=chosen, chosen_valid=chosen_valid, scores=scores),
        )


@dataclass(frozen=True)
class OneShot:
    """One-shot pruning: what is not chosen is dropped before the first step and frees its memory.

    The prompt's last token chooses. This is not dynamic: what a later token would have attended to
    cannot be chosen any more.

    Attributes:
        layer: first layer that attends to what was chosen.
        p: share of the visual tokens that is dropped, in [0, 1).
    """

    layer: int
    p: float

    @property
    def stages(self) -> Compression:
        """KV pruning alone."""
        return Compression(cache=self)

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Refuses a layer that the model does not have."""
        check_layer("DyCoke", self.layer, config)

    def start(self, view: View, slots: Slots, scores: Float[Array, "B visual"]) -> View:
        """Chooses, and drops all other visual slots."""
        visual = slots.visual_range
        valid, is_token = view.visible[:, visual], view.is_token[:, visual]
        return _compact(view, slots, *_best(scores, valid, is_token, slots, self.p))

    def update(
        self, view: View, slots: Slots, scores: Float[Array, "B visual"], active: Bool[Array, "B"]
    ) -> View:
        """Changes nothing: the choice is made."""
        return view


class Hidden(NamedTuple):
    """Which visual slots hold a token, visible or not, and the last scores."""

    valid: Bool[Array, "B visual"]
    scores: Float[Array, "B visual"]
    similarity: Float[Array, "B"]


@dataclass(frozen=True)
class MaskedCache:
    """Pruning by a mask on the full cache (mode official).

    A step whose scores are similar to those of the step before attends to the full cache; any other
    attends to the visual tokens with the highest scores. The last visual token of a prompt is never
    a candidate: it is attended to always, and has score 0 in the similarity.

    Attributes:
        layer: first layer that is pruned.
        p: share of the candidates that is hidden, in [0, 1).
        threshold: similarity below which a step chooses, in (0, 1].
    """

    layer: int
    p: float
    threshold: float

    @property
    def stages(self) -> Compression:
        """KV pruning alone."""
        return Compression(cache=self)

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Refuses a layer that the model does not have."""
        check_layer("DyCoke", self.layer, config)

    def kept(self, tokens: int) -> int:
        """Number of candidates to choose in a prompt with this many visual tokens."""
        # The published code leaves the last visual token out of its candidates.
        return int((1 - self.p) * max(tokens - 1, 0))

    def start(self, view: View, slots: Slots, scores: Float[Array, "B visual"]) -> View:
        """Hides nothing yet."""
        nothing = jnp.zeros(scores.shape, jnp.float32)
        similarity = jnp.zeros(scores.shape[0], jnp.float32)
        memory = Hidden(view.visible[:, slots.visual_range], nothing, similarity)
        return replace(view, memory=memory)

    def update(
        self, view: View, slots: Slots, scores: Float[Array, "B visual"], active: Bool[Array, "B"]
    ) -> View:
        """Makes all slots visible, or hides all candidates but the best of this step."""
        memory: Hidden = view.memory
        visual = slots.visual_range
        is_token = view.is_token[:, visual]
        after = jnp.cumsum(is_token[:, ::-1], axis=1)[:, ::-1]
        candidate = is_token & (after > 1)
        scores = jnp.where(candidate, scores, 0.0)
        similarity = _similarity(scores, memory.scores)
        refreshed = ~(similarity >= self.threshold)
        ranked = jnp.where(candidate, scores, -jnp.inf)
        _, best = jax.lax.top_k(ranked, self.kept(slots.tokens))
        count = lookup(self.kept, slots.tokens, is_token.sum(1))
        among_best = jnp.arange(best.shape[1]) < count[:, None]
        rows = jnp.arange(best.shape[0])[:, None]
        of_best = jnp.zeros(candidate.shape, bool).at[rows, best].set(among_best)
        chosen = ~candidate | jnp.where(refreshed[:, None], of_best, True)
        return replace(
            view,
            visible=view.visible.at[:, visual].set(memory.valid & chosen),
            refreshed=refreshed & active,
            memory=memory._replace(scores=scores, similarity=similarity),
        )


def _check_host_memory() -> None:
    """Refuses a device whose programs cannot use the memory of its host.

    Raises:
        ConfigError: with the kinds of memory that there are.
    """
    device = jax.local_devices()[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if "pinned_host" not in kinds:
        raise ConfigError(
            f"DyCoke: parked host needs memory of the kind pinned_host, which {device} does not "
            f"have (it has {', '.join(kinds)}); use parked device or drop"
        )


def _where_any(
    rows: Bool[Array, "B"], refill: Callable[[list[KV]], list[KV]], caches: list[KV]
) -> list[KV]:
    """Refills caches if that is due in any row, in place."""
    return jax.lax.platform_dependent(
        rows.any(),
        caches,
        # XLA for GPUs copies all that a conditional returns, twice in each step, and other
        # compilers do not. What a loop carries is updated in place.
        cuda=lambda due, caches: _by_loop(due, refill, caches),
        default=lambda due, caches: jax.lax.cond(due, refill, lambda same: same, caches),
    )


def _by_loop(
    due: Bool[Array, ""], refill: Callable[[list[KV]], list[KV]], caches: list[KV]
) -> list[KV]:
    """A conditional as a loop that runs once or not at all."""

    def body(state: tuple[Array, list[KV]]) -> tuple[Array, list[KV]]:
        return jnp.zeros((), bool), refill(state[1])

    return jax.lax.while_loop(lambda state: state[0], body, (due, caches))[1]


def _similarity(a: Float[Array, "B visual"], b: Float[Array, "B visual"]) -> Float[Array, "B"]:
    """Cosine similarity of the scores of each row; 0 where one of them is all zero."""
    # Where a token hardly attends to the video, the squares of the scores would underflow.
    tiny = jnp.finfo(jnp.float32).tiny
    a, b = (x / jnp.maximum(x.max(1, keepdims=True, initial=0), tiny) for x in (a, b))
    norms = jnp.sqrt((a * a).sum(1)) * jnp.sqrt((b * b).sum(1))
    return (a * b).sum(1) / jnp.maximum(norms, tiny)


def _best(
    scores: Float[Array, "B visual"],
    valid: Bool[Array, "B visual"],
    is_token: Bool[Array, "B visual"],
    slots: Slots,
    p: float,
) -> tuple[Int[Array, "B chosen"], Bool[Array, "B chosen"]]:
    """The slots of all newlines and of the visual tokens with the highest scores, best first.

    Returns:
        As many slots as the longest prompt of this layout chooses, and which of them count: a row
        with fewer visual tokens chooses fewer.
    """
    is_newline = valid & ~is_token
    ranked = jnp.where(is_newline, jnp.inf, jnp.where(is_token, scores, -jnp.inf))
    _, chosen = jax.lax.top_k(ranked, kept_of(slots.tokens, p) + slots.newlines)
    count = lookup(lambda tokens: kept_of(tokens, p), slots.tokens, is_token.sum(1))
    count += is_newline.sum(1)
    return chosen.astype(jnp.int32), jnp.arange(chosen.shape[1]) < count[:, None]


def _compact(
    view: View, slots: Slots, chosen: Int[Array, "B chosen"], chosen_valid: Bool[Array, "B chosen"]
) -> View:
    """A view of the chosen visual slots, then all slots that are not visual."""
    visual = slots.visual_range

    def compact(cache: KV) -> KV:
        of_visual = cache.part(visual.start, visual.stop)
        before, after = cache.part(0, visual.start), cache.part(visual.stop, cache.slots)
        return KV.join([of_visual.take(chosen), before, after])

    def of_slots(x: Any) -> Any:
        of_visual = jnp.take_along_axis(x[:, visual], chosen, axis=1)
        return jnp.concatenate([of_visual, x[:, : visual.start], x[:, visual.stop :]], axis=1)

    visible = of_slots(view.visible)
    return replace(
        view,
        caches=[compact(cache) for cache in view.caches],
        visible=visible.at[:, : chosen.shape[1]].set(visible[:, : chosen.shape[1]] & chosen_valid),
        is_token=of_slots(view.is_token),
        places=of_slots(view.places),
    )
