"""Dynamic KV pruning, stage 2 of DyCoke (paper, sec. 3.2), on caches of fixed shape.

At each decoding step the layer before ``layer`` scores the visual tokens by the attention that the
current token pays them. The layers from ``layer`` on attend to the best of them and to everything
else. Two forms of the cache:

``WorkingSet`` (mode paper) moves the chosen keys and values into a small buffer, and only on steps
where the attention has changed:

    all slots       prefix | visual            | question | generated     layers < layer
    parked                   visual                                       layers >= layer, as it was
    working set     chosen | prefix | question | generated                layers >= layer, attended

``OneShot`` is the working set without the parked part: chosen once, the rest is dropped.

``MaskedCache`` keeps every layer's slots as they are and hides what is not chosen. It moves more
bytes, but can show everything again at any step, as the published code does (mode official).
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.cache import KV, Slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WorkingSetState:
    """State of ``WorkingSet``; see ``protocol.PrunedCache`` for the shared fields."""

    caches: list[KV]
    valid: Bool[Array, "B S"]
    attended: Int[Array, "B"]
    refreshed: Bool[Array, "B"]
    parked: list[KV]
    """Keys and values of all visual slots, from which chosen ones come back."""
    parked_valid: Bool[Array, "B V"]
    is_visual: Bool[Array, "B V"]
    chosen: Int[Array, "B R"]
    scores: Float[Array, "B V"]
    """Of the last step."""

    def seen(self) -> Bool[Array, "B V"]:
        """See ``protocol.PrunedCache``."""
        return _mark(self.chosen, self.is_visual.shape)


@dataclass(frozen=True)
class WorkingSet:
    """Pruning by a compact buffer that is refilled when the attention changes (mode paper).

    The chosen set of a row is used again while the cosine similarity of its scores with those of
    the step before is at or above ``threshold``. Rows are independent: each has its own scores,
    gate and set. Newlines are never candidates: their slots are always among the chosen.

    Attributes:
        layer: first layer that attends to the working set.
        kept: visual tokens to choose.
        protected: visual slots that are no candidates (newlines).
        threshold: see above.
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
        is_visual: Bool[Array, "B V"],
        scores: Float[Array, "B V"],
    ) -> WorkingSetState:
        """Parks the visual slots and makes working sets whose chosen part is still empty."""
        batch, visual = valid.shape[0], self.slots.visual_range
        chosen = jnp.zeros((batch, self.kept + self.protected), jnp.int32)
        working, shown = _compact(caches, valid, chosen, jnp.zeros(chosen.shape, bool), visual)
        return WorkingSetState(
            caches=working,
            valid=shown,
            attended=jnp.zeros(batch, jnp.int32),
            refreshed=jnp.zeros(batch, bool),
            parked=[KV(*(x[:, :, visual] for x in cache)) for cache in caches],
            parked_valid=valid[:, visual],
            is_visual=is_visual,
            chosen=chosen,
            scores=jnp.zeros(is_visual.shape, jnp.float32),
        )

    def update(
        self,
        state: WorkingSetState,
        scores: Float[Array, "B V"],
        step: Int[Array, ""],
        active: Bool[Array, "B"],
    ) -> WorkingSetState:
        """Chooses anew in rows whose attention changed, and refills their working sets."""
        scores = jnp.where(state.is_visual, scores, 0.0)
        # Before the first step all scores are zero, and so is the similarity: it always chooses.
        # Written so that scores that are no numbers choose too, instead of never.
        refreshed = ~(_similarity(scores, state.scores) >= self.threshold) & active
        best = _best(scores, state.is_visual, self.kept + self.protected)
        chosen = jnp.where(refreshed[:, None], best, state.chosen)

        def refill(working: list[KV]) -> list[KV]:
            # Rows that were not refreshed get what they have: their chosen set is the old one.
            return [
                KV(*(_fill(x, _take(y, chosen)) for x, y in zip(cache, parked, strict=True)))
                for cache, parked in zip(working, state.parked, strict=True)
            ]

        caches = jax.lax.cond(refreshed.any(), refill, lambda working: working, state.caches)
        chosen_valid, attended = _count(chosen, state.parked_valid, state.is_visual)
        valid = jax.lax.dynamic_update_slice_in_dim(state.valid, chosen_valid, 0, axis=1)
        return replace(
            state,
            caches=caches,
            valid=_show(valid, self.slots.generated, step),
            attended=attended,
            refreshed=refreshed,
            chosen=chosen,
            scores=scores,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OneShotState:
    """State of ``OneShot``; see ``protocol.PrunedCache``."""

    caches: list[KV]
    valid: Bool[Array, "B S"]
    attended: Int[Array, "B"]
    refreshed: Bool[Array, "B"]
    is_visual: Bool[Array, "B V"]
    chosen: Int[Array, "B R"]

    def seen(self) -> Bool[Array, "B V"]:
        """See ``protocol.PrunedCache``."""
        return _mark(self.chosen, self.is_visual.shape)


@dataclass(frozen=True)
class OneShot:
    """Pruning for good: what is not chosen is dropped before the first step and frees its memory.

    The prompt's last token chooses. This is not dynamic: what a later token would have looked at
    cannot return.

    Attributes:
        layer: first layer that attends to what was chosen.
        kept: visual tokens to choose.
        protected: visual slots that are no candidates (newlines).
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
        is_visual: Bool[Array, "B V"],
        scores: Float[Array, "B V"],
    ) -> OneShotState:
        """Chooses, and keeps nothing else of the visual slots."""
        visual = self.slots.visual_range
        chosen = _best(scores, is_visual, self.kept + self.protected)
        chosen_valid, attended = _count(chosen, valid[:, visual], is_visual)
        working, shown = _compact(caches, valid, chosen, chosen_valid, visual)
        return OneShotState(
            caches=working,
            valid=shown,
            attended=attended,
            refreshed=jnp.zeros(valid.shape[0], bool),
            is_visual=is_visual,
            chosen=chosen,
        )

    def update(
        self,
        state: OneShotState,
        scores: Float[Array, "B V"],
        step: Int[Array, ""],
        active: Bool[Array, "B"],
    ) -> OneShotState:
        """Shows the current token."""
        return replace(state, valid=_show(state.valid, self.slots.generated, step))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MaskedCacheState:
    """State of ``MaskedCache``; see ``protocol.PrunedCache`` for the shared fields."""

    caches: list[KV]
    valid: Bool[Array, "B S"]
    attended: Int[Array, "B"]
    refreshed: Bool[Array, "B"]
    present: Bool[Array, "B S"]
    """Slots that hold a token, chosen or not."""
    is_visual: Bool[Array, "B V"]
    shown: Bool[Array, "B V"]
    scores: Float[Array, "B V"]
    similarity: Float[Array, "B"]

    def seen(self) -> Bool[Array, "B V"]:
        """See ``protocol.PrunedCache``."""
        return self.shown


@dataclass(frozen=True)
class MaskedCache:
    """Pruning by a mask over the full cache, as the published code decides (mode official).

    A step whose scores are similar (``threshold`` or above) to those of the step before attends to
    everything; any other attends to the ``kept`` best candidates, chosen from its own scores. The
    last visual token is no candidate (it was left out of the published code's count), and neither
    are newlines.
    """

    layer: int
    kept: int
    threshold: float
    slots: Slots

    def start(
        self,
        caches: list[KV],
        valid: Bool[Array, "B S"],
        is_visual: Bool[Array, "B V"],
        scores: Float[Array, "B V"],
    ) -> MaskedCacheState:
        """Nothing is hidden yet."""
        batch = valid.shape[0]
        return MaskedCacheState(
            caches=caches,
            valid=valid,
            attended=jnp.zeros(batch, jnp.int32),
            refreshed=jnp.zeros(batch, bool),
            present=valid,
            is_visual=is_visual,
            shown=jnp.ones(is_visual.shape, bool),
            scores=jnp.zeros(is_visual.shape, jnp.float32),
            similarity=jnp.zeros(batch, jnp.float32),
        )

    def update(
        self,
        state: MaskedCacheState,
        scores: Float[Array, "B V"],
        step: Int[Array, ""],
        active: Bool[Array, "B"],
    ) -> MaskedCacheState:
        """Shows everything, or the best candidates of this step."""
        after = jnp.cumsum(state.is_visual[:, ::-1], axis=1)[:, ::-1]
        candidate = state.is_visual & (after > 1)
        scores = jnp.where(candidate, scores, 0.0)
        similarity = _similarity(scores, state.scores)
        refreshed = ~(similarity >= self.threshold)
        ranked = jnp.where(candidate, scores, -jnp.inf)
        _, best = jax.lax.top_k(ranked, self.kept)
        rows = jnp.arange(best.shape[0])[:, None]
        chosen = jnp.zeros(candidate.shape, bool).at[rows, best].set(True)
        shown = ~candidate | jnp.where(refreshed[:, None], chosen, True)

        visual = self.slots.visual_range
        present = _show(state.present, self.slots.generated, step)
        valid = present.at[:, visual].set(present[:, visual] & shown)
        return replace(
            state,
            valid=valid,
            attended=(valid[:, visual] & state.is_visual).sum(1, dtype=jnp.int32),
            refreshed=refreshed & active,
            present=present,
            shown=shown,
            scores=scores,
            similarity=similarity,
        )


def _similarity(a: Float[Array, "B V"], b: Float[Array, "B V"]) -> Float[Array, "B"]:
    """Cosine similarity of each row's scores; 0 where one of them is all zero."""
    # Attention that hardly looks at the video is small enough for its squares to vanish.
    tiny = jnp.finfo(jnp.float32).tiny
    a, b = (x / jnp.maximum(x.max(1, keepdims=True), tiny) for x in (a, b))
    norms = jnp.sqrt((a * a).sum(1)) * jnp.sqrt((b * b).sum(1))
    return (a * b).sum(1) / jnp.maximum(norms, tiny)


def _best(
    scores: Float[Array, "B V"], is_visual: Bool[Array, "B V"], count: int
) -> Int[Array, "B R"]:
    """The slots of all newlines and of the visual tokens with the highest scores."""
    return jax.lax.top_k(jnp.where(is_visual, scores, jnp.inf), count)[1].astype(jnp.int32)


def _count(
    chosen: Int[Array, "B R"], valid: Bool[Array, "B V"], is_visual: Bool[Array, "B V"]
) -> tuple[Bool[Array, "B R"], Int[Array, "B"]]:
    """Which of the chosen slots hold a token, and how many of these are visual tokens."""
    chosen_valid = jnp.take_along_axis(valid, chosen, axis=1)
    attended = jnp.take_along_axis(is_visual, chosen, axis=1) & chosen_valid
    return chosen_valid, attended.sum(1, dtype=jnp.int32)


def _compact(
    caches: list[KV],
    valid: Bool[Array, "B S"],
    chosen: Int[Array, "B R"],
    chosen_valid: Bool[Array, "B R"],
    visual: slice,
) -> tuple[list[KV], Bool[Array, "B W"]]:
    """Working sets: the chosen visual slots, then all others; and which of them may be seen."""

    def compact(x: Float[Array, "B J S E"]) -> Array:
        before, of_visual, after = jnp.split(x, [visual.start, visual.stop], axis=2)
        return jnp.concatenate([_take(of_visual, chosen), before, after], axis=2)

    shown = [chosen_valid, valid[:, : visual.start], valid[:, visual.stop :]]
    working = [KV(*(compact(x) for x in cache)) for cache in caches]
    return working, jnp.concatenate(shown, axis=1)


def _mark(chosen: Int[Array, "B R"], shape: tuple[int, ...]) -> Bool[Array, "B V"]:
    rows = jnp.arange(shape[0])[:, None]
    return jnp.zeros(shape, bool).at[rows, chosen].set(True)


def _take(x: Float[Array, "B J V E"], chosen: Int[Array, "B R"]) -> Float[Array, "B J R E"]:
    return jnp.take_along_axis(x, chosen[:, None, :, None], axis=2)


def _fill(working: Float[Array, "B J S E"], rows: Float[Array, "B J R E"]) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(working, rows, 0, axis=2)


def _show(valid: Bool[Array, "B S"], generated: int, step: Int[Array, ""]) -> Bool[Array, "B S"]:
    """Marks the slot of the current token, ``step`` into the generated slots at the end."""
    mark = jnp.ones((valid.shape[0], 1), bool)
    start = valid.shape[1] - generated
    return jax.lax.dynamic_update_slice_in_dim(valid, mark, start + step, axis=1)
