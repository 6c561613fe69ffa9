"""UniComp (Yuan et al., CVPR 2026, arXiv 2512.03575): keeps what is unique, merges what is alike.

Alike frames in succession become one, the budget is shared over these fused frames by how unlike
the others each is, and in each of them alike tokens become one. There is no training and no
attention map. The steps are those of the paper and of github.com/TimeMarker-LLM/UniComp at 1904269
(Apache-2.0), of which no code is used. The cost of a clip is of order F * N^2 * D.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.checks import number
from dycoke_jax.compression.budget import check_budget, lookup, share_of
from dycoke_jax.compression.protocol import Compression, Rows, TokenStage
from dycoke_jax.compression.similarity import ROUNDING, equal_pairs
from dycoke_jax.models.signals import Signal


@dataclass(frozen=True)
class UniComp(TokenStage):
    """Fuses frames, shares the budget over them, and merges the alike tokens of each.

    The distance of two vectors is 1 minus their cosine similarity, in float32 throughout.

    1. A frame is described by the mean of its tokens. It joins the group of the frames before it if
       it is within ``frame_threshold`` of the group's first frame, and begins a new group
       otherwise. A group becomes one fused frame: the mean of its features and keys.
    2. The uniqueness of a fused frame is the mean similarity of all pairs of fused frames minus the
       mean of its own similarities, times the square root of their number. The softmax of it shares
       the budget, rounded down, at most twice the mean share (but one token) for each. What is left
       goes in equal parts to the frames below that bound, until less than one token for each is
       left: these go to the most unique.
    3. The tokens of a fused frame are visited in ascending order of the mean similarity of their
       keys. A token is kept unless one that is kept is nearer than ``token_threshold``, and becomes
       the mean of itself and the mean of all tokens nearer than that, itself among them. The first
       of the kept tokens go on, as many as the frame's share.

    The published code differs in these points: step 2 describes a frame by the mean of each token
    over its channels; a group has the keys of its first frame, and not more than about 1 / budget
    frames; the mean share is rounded down before it is doubled; what is left of less than one token
    for each frame is not spent; shares that step 3 does not use up go in equal parts to the other
    frames; a clip whose fused frames fit into the budget skips step 3; and a line break follows
    each fused frame.

    Attributes:
        budget: share of the visual tokens that go on at most, in (0, 1].
        frame_threshold: largest distance at which a frame joins a group, in [0, 2]. At 0 only
            frames that are the same to rounding are fused.
        token_threshold: distance below which tokens are merged, in (0, 2].

    Raises:
        ConfigError: naming the setting and its range.
    """

    budget: float = 0.25
    frame_threshold: float = 0.005
    token_threshold: float = 0.2

    def __post_init__(self) -> None:
        checked = {
            "budget": check_budget("UniComp", self.budget),
            "frame_threshold": number(
                "UniComp: frame_threshold", self.frame_threshold, 0, 2, with_high=True
            ),
            "token_threshold": number(
                "UniComp: token_threshold",
                self.token_threshold,
                0,
                2,
                with_low=False,
                with_high=True,
            ),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def stages(self) -> Compression:
        """A token stage."""
        return Compression(tokens=self)

    @property
    def signals(self) -> tuple[Signal, ...]:
        """The keys of the last layer of the tower, by which tokens are compared."""
        return (Signal("keys"),)

    def most_rows(self, frames: int, tokens: int) -> int:
        """The budget of a clip in tokens, at least 1."""
        return share_of(frames * tokens, self.budget)

    def select(
        self,
        features: Float[Array, "B F N D"],
        frames: Int[Array, "B"],
        signals: tuple[Float[Array, "B F N ..."], ...],
    ) -> Rows:
        """The merged tokens, in raster order of fused frames; each stands at its group's first.

        The sums of a clip are computed for that clip alone, one clip after the other, so that their
        last bits, by which a token may be kept or not, do not depend on the batch.

        Args:
            features: as in ``protocol.TokenStage``.
            frames: likewise. A row with 0 frames has no valid row.
            signals: the keys.

        Returns:
            New embeddings of the dtype of ``features``. The valid rows come first; the empty ones
            behind them are zeros at the last place.
        """
        batch, most, tokens, _ = features.shape
        budgets = lookup(lambda count: self.most_rows(count, tokens), most, frames)
        (keys,) = signals

        def merge(clip: tuple[Array, Array, Array, Array]) -> _Merged:
            features, keys, frames, budget = clip
            thresholds = self.frame_threshold, self.token_threshold
            return _merge(features, keys, frames, budget, *thresholds)

        merged = lax.map(merge, (features, keys, frames, budgets))
        kept = _independent_set(merged.alike)
        kept &= jnp.cumsum(kept, axis=-1) <= merged.share[:, :, None]
        kept = jnp.put_along_axis(kept, merged.order, kept, axis=-1, inplace=False)

        kept = kept.reshape(batch, most * tokens)
        rows = jnp.argsort(~kept, axis=-1)[:, : self.most_rows(most, tokens)]
        valid = jnp.take_along_axis(kept, rows, axis=-1)
        embeds = merged.values.reshape(batch, most * tokens, -1)
        embeds = jnp.take_along_axis(embeds, rows[:, :, None], axis=1)
        first_frame = jnp.take_along_axis(merged.first_frame, rows // tokens, axis=-1)
        places = jnp.where(valid, first_frame * tokens + rows % tokens, most * tokens - 1)
        return Rows(places.astype(jnp.int32), valid, jnp.where(valid[:, :, None], embeds, 0))


class _Merged(NamedTuple):
    """A clip whose frames are fused. A fused frame stands at the last frame of its group.

    At the other frames of a group stand values that do not go on: their share is 0.
    """

    first_frame: Int[Array, "F"]
    """The first frame of the group."""
    share: Int[Array, "F"]
    """Tokens that may go on."""
    order: Int[Array, "F N"]
    """The tokens in ascending order of their mean similarity."""
    alike: Bool[Array, "F N N"]
    """Whether two tokens are nearer than the threshold, both counted in that order."""
    values: Float[Array, "F N D"]
    """What each token becomes if it is kept, in raster order."""


def _merge(
    features: Float[Array, "F N D"],
    keys: Float[Array, "F N channels"],
    frames: Int[Array, ""],
    budget: Int[Array, ""],
    frame_threshold: float,
    token_threshold: float,
) -> _Merged:
    """Steps 1 to 3 up to the choice of tokens, for one clip."""
    most, tokens, _ = features.shape
    # Frame by frame, here and below, so that sums do not depend on empty frames either.
    frame_means = lax.map(lambda frame: frame.astype(jnp.float32).mean(0), features)
    similarities, _ = _similarities(frame_means)

    def step(group: tuple[Array, Array, Any], frame: tuple[Array, Any]) -> tuple[Any, Any]:
        head, count, total = group
        index, content = frame
        content = jax.tree.map(lambda x: x.astype(jnp.float32), content)
        is_near = 1 - similarities[index, head] <= frame_threshold
        joins = (index > 0) & (index < frames) & is_near
        head, count = jnp.where(joins, head, index), jnp.where(joins, count + 1, 1)
        total = jax.tree.map(lambda s, x: jnp.where(joins, s + x, x), total, content)
        mean_features, mean_keys, frame_mean = jax.tree.map(lambda s: s / count, total)
        order, alike, values = _merge_tokens(mean_features, mean_keys, token_threshold)
        values = values.astype(features.dtype)
        return (head, count, total), (head, frame_mean, order, alike, values)

    contents = (features, keys, frame_means)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], jnp.float32), contents)
    index = jnp.arange(most, dtype=jnp.int32)
    start = (jnp.int32(0), jnp.int32(0), nothing)
    _, (first_frame, frame_means, order, alike, values) = lax.scan(step, start, (index, contents))
    is_last = (index < frames) & (jnp.append(first_frame[1:], most) != first_frame)
    share = _shares(frame_means, is_last, budget, tokens)
    return _Merged(first_frame, share, order, alike, values)


def _shares(
    frame_means: Float[Array, "F D"], fused: Bool[Array, "F"], budget: Int[Array, ""], tokens: int
) -> Int[Array, "F"]:
    """Tokens that may go on of each fused frame; 0 where there is none. Step 2.

    Args:
        frame_means: the mean token of each fused frame.
        fused: where there is a fused frame.
        budget: tokens of the whole clip that may go on.
        tokens: tokens of a frame (N).
    """
    count = jnp.maximum(fused.sum(), 1)
    similarities, same = _similarities(frame_means)
    own = (jnp.where(fused, similarities, 0).sum(-1) / count)[same]
    uniqueness = jnp.sqrt(count) * (jnp.where(fused, own, 0).sum() / count - own)
    weight = jax.nn.softmax(uniqueness, where=fused)
    bound = jnp.where(fused, jnp.clip(2 * budget // count, 1, tokens), 0)

    # Frames that take turns have equal parts of the budget, often whole numbers of tokens, which
    # rounding must not make one less. The sum of what is added stays below one token.
    whole = jnp.floor(weight * budget + jnp.minimum(1e-3, 0.5 / count)).astype(jnp.int32)

    def left(share: Int[Array, "F"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        return budget - share.sum(), (share < bound).sum()

    def more(share: Int[Array, "F"]) -> Bool[Array, ""]:
        rest, open_frames = left(share)
        return (open_frames > 0) & (rest >= open_frames)

    def add(share: Int[Array, "F"]) -> Int[Array, "F"]:
        rest, open_frames = left(share)
        return jnp.minimum(share + rest // open_frames, bound)

    share = lax.while_loop(more, add, jnp.minimum(whole, bound))
    # Again equal parts must be equal, so that the lower index decides.
    order = jnp.argsort(jnp.where(share < bound, -jnp.round(weight * count * 1024), 1))
    rest, open_frames = left(share)
    return share.at[order].add(jnp.arange(len(share)) < jnp.minimum(rest, open_frames))


def _merge_tokens(
    features: Float[Array, "N D"], keys: Float[Array, "N channels"], threshold: float
) -> tuple[Int[Array, "N"], Bool[Array, "N N"], Float[Array, "N D"]]:
    """``order``, ``alike`` and ``values`` of ``_Merged`` for one fused frame."""
    similarities, same = _similarities(keys)
    order = jnp.argsort(similarities.mean(-1)[same])
    alike = 1 - similarities < threshold
    around = jnp.matmul(alike.astype(jnp.float32), features, precision="highest")
    values = (features + around / alike.sum(-1, keepdims=True)) / 2
    return order, alike[order][:, order], values


def _independent_set(alike: Bool[Array, "B F N N"]) -> Bool[Array, "B F N"]:
    """Visits tokens in order, and keeps each unless an earlier one that is kept is alike."""

    def visit(token: Int[Array, ""], kept: Bool[Array, "B F N"]) -> Bool[Array, "B F N"]:
        return kept.at[:, :, token].set(~(kept & alike[:, :, token]).any(-1))

    return lax.fori_loop(0, alike.shape[-1], visit, jnp.zeros(alike.shape[:-1], bool))


def _similarities(
    vectors: Float[Array, "vectors channels"],
) -> tuple[Float[Array, "vectors vectors"], Int[Array, "vectors"]]:
    """Cosine similarity of all pairs, and for each vector the first that is the same as it.

    The similarity of identical vectors is exactly 1, of two zeros too, and they have the same
    similarities to all others: else the last bits of sums would say which of them comes first.
    Other vectors have similarity 0 to a zero vector.
    """
    norms = jnp.sqrt((vectors * vectors).sum(-1, keepdims=True))
    unit = vectors / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
    similarities = jnp.matmul(unit, unit.T, precision="highest")
    near = (similarities > 1 - ROUNDING) | ((norms == 0) & (norms.T == 0))
    is_same = equal_pairs(vectors, near)
    same = jnp.argmax(is_same, axis=-1)
    return jnp.where(is_same, 1.0, similarities)[same][:, same], same
