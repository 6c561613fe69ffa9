"""HoliTom (Shao et al., NeurIPS 2025, arXiv 2505.21334): merges over time, over space, and inside.

The steps are those of the paper and of github.com/cokeshao/HoliTom at e9b2972 (Apache-2.0), of
which no code is used.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.checks import choice, number, whole_number
from dycoke_jax.compression.budget import check_budget, kept_of, lookup, share_of
from dycoke_jax.compression.clustering import density_peaks
from dycoke_jax.compression.protocol import Compression, Rows, TokenStage, check_layer
from dycoke_jax.compression.ranking import rank_in_row
from dycoke_jax.compression.similarity import cosine, most_similar
from dycoke_jax.config import LlavaConfig
from dycoke_jax.models.signals import Signal

NEIGHBOURS = 7
"""Nearest tokens by which the density of a token is measured, at most."""

Mean = Literal["halves", "equal"]


@dataclass(frozen=True)
class HoliTom:
    """Merges what stands still, keeps what is attended to, and merges again inside prefill.

    Before the language model:

    1. A token stands still from one frame to the next if the cosine similarity of the two tokens at
       its place is above ``threshold``, in float32. The clip is divided into segments of successive
       frames so that as many tokens as possible are merged by step 2: exactly, by dynamic
       programming. Of equally good divisions, the one with the shortest last segment is taken, and
       so on for the frames before it.
    2. In a segment of two or more frames, the tokens at a place that stands still throughout become
       one, their mean, in its first frame. These are the static tokens, and all others the dynamic
       ones.
    3. If more are left than the budget allows, all frames and segments keep the same share of their
       dynamic and of their static tokens, in whole numbers whose sum is the budget.
    4. Of the dynamic tokens of a frame those go on that receive the most attention in the last
       layer of the vision tower, as the mean over heads and queries.
    5. The static tokens of a segment are clustered around density peaks (``clustering``), with 7
       neighbours at most. Each cluster becomes one token: ``beta`` times its centre plus 1 -
       ``beta`` times the mean of the others, and the centre itself if there are none.

    Inside prefill, before ``layer``, the tokens are merged again, see ``HoliTomMerge``.

    Static tokens and clusters are new rows, at the place of their centre in the first frame of
    their segment; dynamic tokens are as they were. The cost of a clip is the attention of one layer
    of the tower, a comparison of each frame with the next, and sums of order N^2 * D for every
    segment of two or more frames, of which there are F / 2 at most.

    The published code differs in these points: step 3 rounds the number of dynamic tokens up in
    each frame, and that of static ones half to even in each segment, so that the sum is not
    exactly the budget; a segment has at most 1024 frames; random numbers decide between tokens of
    equal density in step 5; where the model has one newline, the static tokens of a segment stand
    before all of its dynamic ones. Here tokens are in raster order.

    Attributes:
        budget: share of the visual tokens that go on, at most, in (0, 1]. Fewer do only if
            step 2 leaves fewer.
        threshold: cosine similarity above which a token stands still, in [-1, 1]. The authors use
            0.8, and 0.65 at a budget of 0.1.
        beta: weight of the centre of a cluster, in [0, 1].
        layer: first layer of the language model that reads the tokens merged again, counted from 0,
            in 1..layers-1; 0 merges nothing inside prefill.
        r: share of the visual tokens that is merged into the others there, in [0, 1).
        mean: how they are merged, as ``HoliTomMerge.mean``.

    Raises:
        ConfigError: naming the setting and its range.
    """

    budget: float = 0.25
    threshold: float = 0.8
    beta: float = 0.6
    layer: int = 18
    r: float = 0.5
    mean: Mean = "halves"

    def __post_init__(self) -> None:
        # The settings of the merge inside prefill are its own, but for the layer 0.
        layer = whole_number("HoliTom: layer", self.layer, 0, allowed="lie in 0..layers-1")
        merge = HoliTomMerge(max(layer, 1), self.r, self.mean)
        checked = {
            "budget": check_budget("HoliTom", self.budget),
            "threshold": number("HoliTom: threshold", self.threshold, -1, 1, with_high=True),
            "beta": number("HoliTom: beta", self.beta, 0, 1, with_high=True),
            "layer": layer,
            "r": merge.r,
            "mean": merge.mean,
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def stages(self) -> Compression:
        """A token stage, and a prompt stage unless ``layer`` or ``r`` is 0."""
        merges = self.layer > 0 and self.r > 0
        return Compression(
            tokens=HoliTomTokens(self.budget, self.threshold, self.beta),
            prompt=HoliTomMerge(self.layer, self.r, self.mean) if merges else None,
        )


@dataclass(frozen=True)
class HoliTomTokens(TokenStage):
    """The part of ``HoliTom`` before the language model, as a token stage.

    Attributes:
        budget: as ``HoliTom.budget``.
        threshold: as ``HoliTom.threshold``.
        beta: as ``HoliTom.beta``.
    """

    budget: float
    threshold: float
    beta: float

    @property
    def stages(self) -> Compression:
        """A token stage."""
        return Compression(tokens=self)

    @property
    def signals(self) -> tuple[Signal, ...]:
        """What ranks dynamic tokens."""
        return (Signal("attention"),)

    def most_rows(self, frames: int, tokens: int) -> int:
        """The budget of a clip in tokens, at least 1."""
        return share_of(frames * tokens, self.budget)

    def select(
        self,
        features: Float[Array, "B F N D"],
        frames: Int[Array, "B"],
        signals: tuple[Float[Array, "B F N ..."], ...],
    ) -> Rows:
        """The dynamic tokens and the clusters of static ones that go on, in raster order.

        Args:
            features: as in ``protocol.TokenStage``.
            frames: likewise.
            signals: the attention that each token receives.

        Returns:
            New embeddings of the dtype of ``features``. The valid rows come first; the empty ones
            behind them stand at the last place.
        """
        length, tokens = features.shape[1:3]
        most = self.most_rows(length, tokens)
        budgets = lookup(lambda count: self.most_rows(count, tokens), length, frames)
        (attention,) = signals
        similarity = cosine(features[:, :-1], features[:, 1:])
        is_still = similarity > self.threshold

        def of_clip(
            features: Float[Array, "F N D"],
            attention: Float[Array, "F N"],
            is_still: Bool[Array, "pairs N"],
            frames: Int[Array, ""],
            budget: Int[Array, ""],
        ) -> Rows:
            clip = _divide(is_still, frames)
            dynamic, static = _quotas(clip, budget)
            scores = jnp.where(clip.is_dynamic, attention, -jnp.inf)
            is_kept = rank_in_row(scores) < dynamic[:, None]
            is_centre, values = _merge_static(features, clip, static, self.beta)
            is_kept |= is_centre
            return _rows(features, is_kept, is_centre, values, clip.slot, most)

        return jax.vmap(of_clip)(features, attention, is_still, frames, budgets)


@dataclass(frozen=True)
class HoliTomMerge:
    """Merges the visual tokens that are attended to least into others, inside prefill.

    The layers below ``layer`` read all visual tokens. The attention of the prompt's last token in
    the layer before it, as the mean over heads, ranks them. The best go on, in their order and at
    their rotary positions, and each of the others is merged into the one of them whose state has
    the highest cosine similarity with its own. Newlines take no part, and go on.

    Second part of HoliTom (arXiv 2505.21334); see ``HoliTom`` for sources. The published code
    rounds the number that goes on half to even, here it is rounded down; it counts the newline
    as a visual token, and averages in the dtype of the states, here in float32. The cost is one
    row of attention weights, and two products of order r * (1 - r) * M^2 * D.

    Attributes:
        layer: first layer that reads fewer tokens, counted from 0, in 1..layers-1.
        r: share of the visual tokens that is merged into the others, in [0, 1).
        mean: what a token becomes into which others are merged. ``halves``: as published, the mean
            of itself and the first of them, then the mean of that and the second, and so on, so
            that the last has the largest weight. ``equal``: the mean of itself and all of them.

    Raises:
        ConfigError: naming the setting and its range.
    """

    layer: int = 18
    r: float = 0.5
    mean: Mean = "halves"

    def __post_init__(self) -> None:
        layer = whole_number("HoliTom: layer", self.layer, 1, allowed="lie in 1..layers-1")
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "r", number("HoliTom: r", self.r, 0, 1))
        object.__setattr__(self, "mean", choice("HoliTom: mean", self.mean, get_args(Mean)))

    @property
    def stages(self) -> Compression:
        """A prompt stage."""
        return Compression(prompt=self)

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Refuses a layer that the model does not have."""
        check_layer("HoliTom", self.layer, config)

    def most_rows(self, tokens: int) -> int:
        """Number of visual tokens that go on, of this many; at least 1 of any."""
        return min(tokens, max(1, kept_of(tokens, self.r)))

    def select(
        self,
        states: Float[Array, "B visual D"],
        scores: Float[Array, "B visual"],
        is_token: Bool[Array, "B visual"],
        tokens: int,
    ) -> Rows:
        """Merges the tokens with the lowest scores into others; see ``protocol.PromptStage``."""
        most = self.most_rows(tokens)
        counts = lookup(self.most_rows, tokens, is_token.sum(1))[:, None]
        is_kept = rank_in_row(jnp.where(is_token, scores, -jnp.inf)) < counts
        places, valid, kept = _gather(states, is_kept, most)
        _, is_merged, merged = _gather(states, is_token & ~is_kept, tokens - most)
        target = jnp.where(is_merged, most_similar(_cosines(merged, kept), valid), most)

        joins = target[:, :, None] == jnp.arange(most)
        total = joins.sum(1)[:, :, None]
        if self.mean == "equal":
            embeds = (kept + _product("Bmk,BmD->BkD", joins, merged)) / (1 + total)
        else:
            # Each token that is merged halves the weights of all that came before it.
            index = jnp.arange(tokens - most)
            is_later = (target[:, :, None] == target[:, None]) & (index > index[:, None])
            weights = joins * jnp.ldexp(1.0, -1 - is_later.sum(-1))[:, :, None]
            sums = _product("Bmk,BmD->BkD", weights, merged)
            embeds = jnp.ldexp(1.0, -total) * kept + sums
        return Rows(places, valid, embeds.astype(states.dtype))


class _Clip(NamedTuple):
    """A clip in segments. A slot is for a segment of two or more frames; some may be empty."""

    is_dynamic: Bool[Array, "F N"]
    is_static: Bool[Array, "slots N"]
    is_member: Bool[Array, "slots F"]
    """The frames of each segment."""
    first_frame: Int[Array, "slots"]
    """F in an empty slot."""
    slot: Int[Array, "F"]
    """The slot of each frame's segment; meaningless in a segment of one frame."""


def _divide(is_still: Bool[Array, "pairs N"], frames: Int[Array, ""]) -> _Clip:
    """Divides a clip into segments, and its tokens into static and dynamic ones. Steps 1 and 2.

    Args:
        is_still: tokens of each frame but the last that stand still up to the next frame.
        frames: number of frames of the clip; those that follow are empty.
    """
    length = len(is_still) + 1
    index = jnp.arange(length)
    # The frame since which each place has stood still.
    moved_at = jnp.where(jnp.pad(is_still, ((1, 0), (0, 0))), 0, index[:, None])
    since = lax.cummax(moved_at, axis=0)
    is_first = _best_division(since)[frames] | (index >= frames)
    first = lax.cummax(jnp.where(is_first, index, 0))
    is_last = jnp.append(is_first[1:], True)
    last = lax.cummin(jnp.where(is_last, index, length - 1), reverse=True)

    is_long = last > first
    is_static = is_long[:, None] & (since[last] <= first[:, None])
    is_head = is_long & is_first
    slots = max(1, length // 2)
    (first_frame,) = jnp.nonzero(is_head, size=slots, fill_value=length)
    slot = jnp.cumsum(is_head) - 1
    return _Clip(
        is_dynamic=(index < frames)[:, None] & ~is_static,
        is_static=is_static.at[first_frame].get(mode="fill", fill_value=False),
        is_member=is_long & (slot == jnp.arange(slots)[:, None]),
        first_frame=first_frame,
        slot=slot,
    )


def _best_division(since: Int[Array, "F N"]) -> Bool[Array, "_F F"]:
    """The best division into segments of the first 0, 1, .. F frames of a clip.

    A segment is worth the number of tokens by which merging makes it smaller: the number of places
    that stand still throughout, times the number of its frames minus one.

    Args:
        since: for each frame and place, the frame since which the place has stood still.

    Returns:
        The first frames of the segments of each division.
    """
    length = len(since)
    index = jnp.arange(length)
    still = (since[:, None] <= index[:, None]).sum(-1)  # [last, first]: places, from first to last
    worth = (index[:, None] - index) * still

    def step(carry: tuple[Array, Array], of_last: tuple[Array, Array]) -> tuple[Any, None]:
        best, is_first = carry
        last, worth = of_last
        total = jnp.where(index <= last, best[:-1] + worth, -1)
        first = length - 1 - jnp.argmax(total[::-1])  # of equally good segments the shortest
        best = best.at[last + 1].set(total[first])
        return (best, is_first.at[last + 1].set(is_first[first] | (index == first))), None

    start = (jnp.zeros(length + 1, worth.dtype), jnp.zeros((length + 1, length), bool))
    (_, is_first), _ = lax.scan(step, start, (index, worth))
    return is_first


def _quotas(clip: _Clip, budget: Int[Array, ""]) -> tuple[Int[Array, "F"], Int[Array, "slots"]]:
    """Numbers of dynamic tokens of frames and of static tokens of segments that go on. Step 3.

    All have the same share, rounded down; the tokens that are left by rounding go to those that
    lost the most by it, of equal ones the dynamic and the earlier ones first.
    """
    sizes = jnp.concatenate([clip.is_dynamic.sum(1), clip.is_static.sum(1)])
    left = jnp.maximum(sizes.sum(), 1)
    budget = jnp.minimum(budget, sizes.sum())
    # The products are below N * F * N, and what is lost is exact in float32 below 2 ** 24.
    quotas, lost = sizes * budget // left, sizes * budget % left
    quotas += rank_in_row(lost.astype(jnp.float32)) < budget - quotas.sum()
    return quotas[: len(clip.is_dynamic)], quotas[len(clip.is_dynamic) :]


def _merge_static(
    features: Float[Array, "F N D"], clip: _Clip, quotas: Int[Array, "slots"], beta: float
) -> tuple[Bool[Array, "F N"], Float[Array, "slots N D"]]:
    """Centres of clusters of static tokens, and what becomes of each if it is one. Steps 2 and 5.

    Args:
        features: the visual tokens.
        clip: the segments.
        quotas: number of clusters of each segment.
        beta: weight of the centre.
    """
    sums = _product("sF,FND->sND", clip.is_member, features)
    frames = jnp.maximum(clip.is_member.sum(1), 1)
    means = (sums / frames[:, None, None]).astype(features.dtype)
    cluster = jax.vmap(partial(density_peaks, neighbours=NEIGHBOURS))
    is_centre, centre = cluster(means, clip.is_static, quotas)

    joins = (clip.is_static & ~is_centre)[:, None] & (
        centre[:, None] == jnp.arange(centre.shape[1])[:, None]
    )
    sums = _product("scN,sND->scD", joins, means)
    count = joins.sum(-1)[:, :, None]
    mixed = beta * means + (1 - beta) * sums / jnp.maximum(count, 1)
    values = jnp.where(count > 0, mixed, means).astype(features.dtype)
    nothing = jnp.zeros(clip.is_dynamic.shape, bool)
    return nothing.at[clip.first_frame].set(is_centre, mode="drop"), values


def _rows(
    features: Float[Array, "F N D"],
    is_kept: Bool[Array, "F N"],
    is_centre: Bool[Array, "F N"],
    values: Float[Array, "slots N D"],
    slot: Int[Array, "F"],
    most: int,
) -> Rows:
    """The kept tokens, of which centres have new values."""
    (places,) = jnp.nonzero(is_kept.reshape(-1), size=most, fill_value=is_kept.size - 1)
    frame, token = jnp.divmod(places, is_kept.shape[1])
    merged = is_centre[frame, token][:, None]
    embeds = jnp.where(merged, values[slot[frame], token], features[frame, token])
    return Rows(places.astype(jnp.int32), jnp.arange(most) < is_kept.sum(), embeds)


def _gather(
    states: Float[Array, "B visual D"], mask: Bool[Array, "B visual"], most: int
) -> tuple[Int[Array, "B rows"], Bool[Array, "B rows"], Float[Array, "B rows D"]]:
    """Places, validity and states of the slots of a mask, in order; zeros behind them."""
    places = jnp.argsort(~mask, axis=1)[:, :most].astype(jnp.int32)
    valid = jnp.arange(most) < mask.sum(1)[:, None]
    gathered = jnp.take_along_axis(states, places[:, :, None], axis=1)
    return places, valid, jnp.where(valid[:, :, None], gathered, 0)


def _cosines(
    a: Float[Array, "B merged D"], b: Float[Array, "B kept D"]
) -> Float[Array, "B merged kept"]:
    """Cosine similarity of all pairs in float32; 0 where a vector is zero."""
    products = _product("BmD,BkD->Bmk", a, b)
    norms = [jnp.sqrt((x.astype(jnp.float32) ** 2).sum(-1)) for x in (a, b)]
    both = norms[0][:, :, None] * norms[1][:, None]
    return products / jnp.maximum(both, jnp.finfo(jnp.float32).tiny)


def _product(equation: str, weights: Array, x: Array) -> Array:
    """A product in float32 without a copy of ``x`` in float32.

    Args:
        equation: as in ``einsum``.
        weights: numbers that are exact in the dtype of ``x``: of that dtype, or zeros, ones and
            powers of two.
        x: values of any float dtype.
    """
    weights = weights.astype(x.dtype)
    return jnp.einsum(equation, weights, x, precision="highest", preferred_element_type=jnp.float32)
