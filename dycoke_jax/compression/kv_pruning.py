"""Dynamic KV pruning, stage 2 of DyCoke (paper, sec. 3.2), on caches of fixed shape.

At each decode step the attention weights of the layer before ``layer`` score the visual tokens. The
layers from ``layer`` on attend to the tokens with the highest scores and to all that is not visual.
There are three forms of the cache:

``WorkingSet`` (mode paper) copies the chosen keys and values into a small buffer, and only on steps
where the attention has changed:

    all slots       prefix | visual            | question | generated     layers < layer
    parked                   visual                                       layers >= layer, all of it
    working set     chosen | prefix | question | generated                layers >= layer, attended

``OneShot`` is the working set without the parked part: it chooses once and drops the rest.

``MaskedCache`` leaves all slots where they are and hides what is not chosen. It moves more bytes,
but everything can become visible again at any step, as in the published code (mode official).
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.cache import KV, Slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WorkingSetState:
    """State of ``WorkingSet``; ``protocol.PrunedCache`` describes the common fields."""

    caches: list[KV]
    visible: Bool[Array, "B S"]
    attended: Int[Array, "B"]
    refreshed: Bool[Array, "B"]
    parked: list[KV]
    """Keys and values of all visual slots, from which the chosen ones are copied."""
    parked_valid: Bool[Array, "B visual"]
    is_visual: Bool[Array, "B visual"]
    chosen: Int[Array, "B chosen"]
    scores: Float[Array, "B visual"]
    """Scores of the last step."""

    def chosen_slots(self) -> Bool[Array, "B visual"]:
        """Visual slots that are chosen; see ``protocol.PrunedCache``."""
        return _mark(self.chosen, self.is_visual.shape)


@dataclass(frozen=True)
class WorkingSet:
    """Pruning by a compact buffer that is refilled when the attention changes (mode paper).

    The chosen set of a row is used again while the cosine similarity of its scores with those of
    the step before is at or above ``threshold``. Rows are independent: each has its own scores,
    similarity and set. Newlines are no candidates: their slots are always among the chosen.

    Attributes:
        layer: first layer that attends to the working set.
        kept: number of visual tokens to choose.
        protected: number of visual slots that are always chosen (newlines).
        threshold: similarity below which a row chooses anew, in (0, 1].
        slots: the layout of the full cache.
    """

    layer: int
    kept: int
    protected: int
    threshold: float
    slots: Slots

    def start(
        self,
        caches: list[KV],
        valid: Bool[Array, "B S"],
        is_visual: Bool[Array, "B visual"],
        scores: Float[Array, "B visual"],
    ) -> WorkingSetState:
        """Parks the visual slots, and makes working sets whose chosen part is still empty."""
        batch, visual = valid.shape[0], self.slots.visual_range
        chosen = jnp.zeros((batch, self.kept + self.protected), jnp.int32)
        nothing = jnp.zeros(chosen.shape, bool)
        working, visible = _compact(caches, valid, chosen, nothing, visual)
        return WorkingSetState(
            caches=working,
            visible=visible,
            attended=jnp.zeros(batch, jnp.int32),
            refreshed=jnp.zeros(batch, bool),
            parked=[cache.part(visual.start, visual.stop) for cache in caches],
            parked_valid=valid[:, visual],
            is_visual=is_visual,
            chosen=chosen,
            scores=jnp.zeros(is_visual.shape, jnp.float32),
        )

    def update(
        self,
        state: WorkingSetState,
        scores: Float[Array, "B visual"],
        step: Int[Array, ""],
        active: Bool[Array, "B"],
    ) -> WorkingSetState:
        """Chooses anew in rows whose attention has changed, and refills their working sets."""
        scores = jnp.where(state.is_visual, scores, 0.0)
        # Before the first step all scores are zero, and so is the similarity: it always chooses.
        # Written so that scores that are no numbers choose too, instead of never.
        refreshed = ~(_similarity(scores, state.scores) >= self.threshold) & active
        best = _best(scores, state.is_visual, self.kept + self.protected)
        chosen = jnp.where(refreshed[:, None], best, state.chosen)

        def refill(working: list[KV]) -> list[KV]:
            # Rows that were not refreshed get what they have: their chosen set is the old one.
            return [
                cache.write(parked.take(chosen), 0)
                for cache, parked in zip(working, state.parked, strict=True)
            ]

        caches = jax.lax.cond(refreshed.any(), refill, lambda working: working, state.caches)
        chosen_valid, attended = _count(chosen, state.parked_valid, state.is_visual)
        visible = jax.lax.dynamic_update_slice_in_dim(state.visible, chosen_valid, 0, axis=1)
        return replace(
            state,
            caches=caches,
            visible=_with_current(visible, self.slots.generated, step),
            attended=attended,
            refreshed=refreshed,
            chosen=chosen,
            scores=scores,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OneShotState:
    """State of ``OneShot``; ``protocol.PrunedCache`` describes the fields."""

    caches: list[KV]
    visible: Bool[Array, "B S"]
    attended: Int[Array, "B"]
    refreshed: Bool[Array, "B"]
    is_visual: Bool[Array, "B visual"]
    chosen: Int[Array, "B chosen"]

    def chosen_slots(self) -> Bool[Array, "B visual"]:
        """Visual slots that are chosen; see ``protocol.PrunedCache``."""
        return _mark(self.chosen, self.is_visual.shape)


@dataclass(frozen=True)
class OneShot:
    """One-shot pruning: what is not chosen is dropped before the first step and frees its memory.

    The prompt's last token chooses. This is not dynamic: what a later token would have attended to
    cannot be chosen any more.

    Attributes:
        layer: first layer that attends to what was chosen.
        kept: number of visual tokens to choose.
        protected: number of visual slots that are always chosen (newlines).
        slots: the layout of the full cache.
    """

    layer: int
    kept: int
    protected: int
    slots: Slots

    def start(
        self,
        caches: list[KV],
        valid: Bool[Array, "B S"],
        is_visual: Bool[Array, "B visual"],
        scores: Float[Array, "B visual"],
    ) -> OneShotState:
        """Chooses, and drops all other visual slots."""
        visual = self.slots.visual_range
        chosen = _best(scores, is_visual, self.kept + self.protected)
        chosen_valid, attended = _count(chosen, valid[:, visual], is_visual)
        working, visible = _compact(caches, valid, chosen, chosen_valid, visual)
        return OneShotState(
            caches=working,
            visible=visible,
            attended=attended,
            refreshed=jnp.zeros(valid.shape[0], bool),
            is_visual=is_visual,
            chosen=chosen,
        )

    def update(
        self,
        state: OneShotState,
        scores: Float[Array, "B visual"],
        step: Int[Array, ""],
        active: Bool[Array, "B"],
    ) -> OneShotState:
        """Makes the current token visible."""
        visible = _with_current(state.visible, self.slots.generated, step)
        return replace(state, visible=visible)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaskedCacheState:
    """State of ``MaskedCache``; ``protocol.PrunedCache`` describes the common fields."""

    caches: list[KV]
    visible: Bool[Array, "B S"]
    attended: Int[Array, "B"]
    refreshed: Bool[Array, "B"]
    valid: Bool[Array, "B S"]
    """Slots that hold a token, visible or not."""
    is_visual: Bool[Array, "B visual"]
    chosen: Bool[Array, "B visual"]
    """Visual slots that are not hidden."""
    scores: Float[Array, "B visual"]
    similarity: Float[Array, "B"]

    def chosen_slots(self) -> Bool[Array, "B visual"]:
        """Visual slots that are chosen; see ``protocol.PrunedCache``."""
        return self.chosen


@dataclass(frozen=True)
class MaskedCache:
    """Pruning by a mask over the full cache, as the published code decides (mode official).

    A step whose scores are similar (``threshold`` or above) to those of the step before attends to
    all tokens. Any other step attends to the ``kept`` candidates with the highest scores of its
    own. The last visual token is no candidate (the published code does not count it), and neither
    are newlines: both are always visible.

    Attributes:
        layer: first layer that is pruned.
        kept: number of visual tokens to choose.
        threshold: similarity below which a step chooses, in (0, 1].
        slots: the layout of the full cache.
    """

    layer: int
    kept: int
    threshold: float
    slots: Slots

    def start(
        self,
        caches: list[KV],
        valid: Bool[Array, "B S"],
        is_visual: Bool[Array, "B visual"],
        scores: Float[Array, "B visual"],
    ) -> MaskedCacheState:
        """Hides nothing yet."""
        batch = valid.shape[0]
        return MaskedCacheState(
            caches=caches,
            visible=valid,
            attended=jnp.zeros(batch, jnp.int32),
            refreshed=jnp.zeros(batch, bool),
            valid=valid,
            is_visual=is_visual,
            chosen=jnp.ones(is_visual.shape, bool),
            scores=jnp.zeros(is_visual.shape, jnp.float32),
            similarity=jnp.zeros(batch, jnp.float32),
        )

    def update(
        self,
        state: MaskedCacheState,
        scores: Float[Array, "B visual"],
        step: Int[Array, ""],
        active: Bool[Array, "B"],
    ) -> MaskedCacheState:
        """Makes all slots visible, or hides all candidates but the best of this step."""
        after = jnp.cumsum(state.is_visual[:, ::-1], axis=1)[:, ::-1]
        candidate = state.is_visual & (after > 1)
        scores = jnp.where(candidate, scores, 0.0)
        similarity = _similarity(scores, state.scores)
        refreshed = ~(similarity >= self.threshold)
        ranked = jnp.where(candidate, scores, -jnp.inf)
        _, best = jax.lax.top_k(ranked, self.kept)
        rows = jnp.arange(best.shape[0])[:, None]
        of_best = jnp.zeros(candidate.shape, bool).at[rows, best].set(True)
        chosen = ~candidate | jnp.where(refreshed[:, None], of_best, True)

        visual = self.slots.visual_range
        valid = _with_current(state.valid, self.slots.generated, step)
        visible = valid.at[:, visual].set(valid[:, visual] & chosen)
        return replace(
            state,
            visible=visible,
            attended=(visible[:, visual] & state.is_visual).sum(1, dtype=jnp.int32),
            refreshed=refreshed & active,
            valid=valid,
            chosen=chosen,
            scores=scores,
            similarity=similarity,
        )


def _similarity(a: Float[Array, "B visual"], b: Float[Array, "B visual"]) -> Float[Array, "B"]:
    """Cosine similarity of the scores of each row; 0 where one of them is all zero."""
    # Where a token hardly attends to the video, the squares of the scores would underflow.
    tiny = jnp.finfo(jnp.float32).tiny
    a, b = (x / jnp.maximum(x.max(1, keepdims=True), tiny) for x in (a, b))
    norms = jnp.sqrt((a * a).sum(1)) * jnp.sqrt((b * b).sum(1))
    return (a * b).sum(1) / jnp.maximum(norms, tiny)


def _best(
    scores: Float[Array, "B visual"], is_visual: Bool[Array, "B visual"], count: int
) -> Int[Array, "B chosen"]:
    """The slots of all newlines, and of the visual tokens with the highest scores."""
    return jax.lax.top_k(jnp.where(is_visual, scores, jnp.inf), count)[1].astype(jnp.int32)


def _count(
    chosen: Int[Array, "B chosen"],
    valid: Bool[Array, "B visual"],
    is_visual: Bool[Array, "B visual"],
) -> tuple[Bool[Array, "B chosen"], Int[Array, "B"]]:
    """Which of the chosen slots are valid, and how many of these hold visual tokens."""
    chosen_valid = jnp.take_along_axis(valid, chosen, axis=1)
    attended = jnp.take_along_axis(is_visual, chosen, axis=1) & chosen_valid
    return chosen_valid, attended.sum(1, dtype=jnp.int32)


def _compact(
    caches: list[KV],
    valid: Bool[Array, "B S"],
    chosen: Int[Array, "B chosen"],
    chosen_valid: Bool[Array, "B chosen"],
    visual: slice,
) -> tuple[list[KV], Bool[Array, "B working"]]:
    """Working sets (the chosen visual slots, then all that is not visual), and what is visible."""

    def compact(cache: KV) -> KV:
        of_visual = cache.part(visual.start, visual.stop)
        before, after = cache.part(0, visual.start), cache.part(visual.stop, cache.slots)
        return KV.join([of_visual.take(chosen), before, after])

    visible = [chosen_valid, valid[:, : visual.start], valid[:, visual.stop :]]
    return [compact(cache) for cache in caches], jnp.concatenate(visible, axis=1)


def _mark(chosen: Int[Array, "B chosen"], shape: tuple[int, ...]) -> Bool[Array, "B visual"]:
    rows = jnp.arange(shape[0])[:, None]
    return jnp.zeros(shape, bool).at[rows, chosen].set(True)


def _with_current(
    slots: Bool[Array, "B S"], generated: int, step: Int[Array, ""]
) -> Bool[Array, "B S"]:
    """Marks the slot of the current token: number ``step`` of the generated ones at the end."""
    mark = jnp.ones((slots.shape[0], 1), bool)
    start = slots.shape[1] - generated
    return jax.lax.dynamic_update_slice_in_dim(slots, mark, start + step, axis=1)
