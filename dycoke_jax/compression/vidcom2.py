"""VidCom2 (Liu et al., EMNLP 2025, arXiv 2505.14454): keeps the tokens unlike the rest of the clip.

Frames that are unlike the rest of the clip keep more tokens than others. The steps are those of the
published code (github.com/xuyang-liu16/VidCom2 at 944a17d, Apache-2.0), with the exact number of
tokens of its port in vLLM (0f17ee0, Apache-2.0); no code of either is used.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dycoke_jax.compression.budget import check_budget, lookup, share_of
from dycoke_jax.compression.protocol import Compression, Rows, TokenStage
from dycoke_jax.compression.ranking import exact_k, rank_in_row

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
"""Variances of the Gaussian functions that are added up as the similarity of two tokens."""

TEMPERATURE = 0.01
"""Temperature of the softmax that shares the budget over the frames."""


@dataclass(frozen=True)
class VidCom2(TokenStage):
    """Shares the budget over the frames by how unlike the clip they are, and keeps unlike tokens.

    1. Of the channels, the half with the lowest variance over the tokens of the clip is looked at.
       Tokens are normalised to length 1 over these channels.
    2. The similarity of a token x to a centre c is the sum of exp(-|x - c|^2 / (2 a)) over a = 1/8,
       1/4, 1/2, 1, 2. There are two centres: the mean token of the clip, and that of the frame.
    3. A frame is as unlike as its tokens' mean similarity to the clip is low. The softmax of that,
       at temperature 0.01, is p. The frame keeps the share budget * (1 + p - 1/F) of its tokens,
       rounded half to even, but one at least: at most one frame keeps twice the mean share.
    4. Each frame keeps the tokens whose two similarities have the lowest sum. If these are more
       than the budget of the clip, those with the highest sums are dropped, in whatever frame; if
       they are fewer, the other tokens with the lowest sums are added.

    Tokens are dropped and none are merged, and those that go on stay at their places. The cost of a
    clip is a few passes of order F * N * D, and sorting F * N numbers.

    The published code ends before the number is made exact in step 4, which is that of vLLM's port.
    The port keeps as many tokens as the clip has frames, at least; here the budget alone counts.
    Newlines go on as with every method here, where the published code keeps those of rows without
    tokens too. All is computed in float32; in the model's own dtype, as published, step 3 may round
    otherwise.

    Attributes:
        budget: share of the visual tokens that go on, in (0, 1]. Exactly as many go on.

    Raises:
        ConfigError: with the allowed range.
    """

    budget: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", check_budget("VidCom2", self.budget))

    @property
    def stages(self) -> Compression:
        """A token stage."""
        return Compression(tokens=self)

    def most_rows(self, frames: int, tokens: int) -> int:
        """The budget of a clip in tokens, at least 1."""
        return share_of(frames * tokens, self.budget)

    def select(
        self,
        features: Float[Array, "B F N D"],
        frames: Int[Array, "B"],
        signals: tuple[Float[Array, "B F N ..."], ...] = (),
    ) -> Rows:
        """Keeps the tokens that are most unlike, in raster order; see ``protocol.TokenStage``."""
        batch, length, tokens, _ = features.shape
        exists = jnp.arange(length) < frames[:, None]
        to_clip, to_frame = _similarities(features, exists)
        share = _tokens_of_frames(to_clip.mean(-1), exists, self.budget, tokens)

        unlike = jnp.where(exists[:, :, None], -(to_clip + to_frame), -jnp.inf)
        in_mask = exists[:, :, None] & (rank_in_row(unlike) < share[:, :, None])
        k = lookup(lambda n: self.most_rows(n, tokens), length, frames)
        flat = (batch, length * tokens)
        return exact_k(
            unlike.reshape(flat), in_mask.reshape(flat), k, self.most_rows(length, tokens)
        )


def _similarities(
    features: Float[Array, "B F N D"], exists: Bool[Array, "B F"]
) -> tuple[Float[Array, "B F N"], Float[Array, "B F N"]]:
    """Similarity of each token to the centres of its clip and of its frame. Steps 1 and 2."""
    is_token = exists[:, :, None, None]
    count = jnp.maximum(exists.sum(1), 1)[:, None] * features.shape[2]

    def mean_of_clip(x: Float[Array, "B F N D"]) -> Float[Array, "B 1 1 D"]:
        return (jnp.where(is_token, x, 0).sum((1, 2)) / count)[:, None, None]

    # As the difference to the first token, a channel that does not vary has no variance at all, so
    # that rounding does not decide which of such channels are looked at.
    x = features.astype(jnp.float32)
    change = x - x[:, :1, :1]
    variance = mean_of_clip((change - mean_of_clip(change)) ** 2)
    x = jnp.where(rank_in_row(-variance) < x.shape[-1] // 2, x, 0)
    length = jnp.sqrt((x * x).sum(-1, keepdims=True))
    x = x / jnp.maximum(length, 1e-12)

    def to(centre: Float[Array, "B frames 1 D"]) -> Float[Array, "B F N"]:
        squared = ((x - centre) ** 2).sum(-1)
        return jnp.stack([jnp.exp(-squared / (2 * width)) for width in WIDTHS]).sum(0)

    return to(mean_of_clip(x)), to(x.mean(2, keepdims=True))


def _tokens_of_frames(
    similarity: Float[Array, "B F"], exists: Bool[Array, "B F"], budget: float, tokens: int
) -> Int[Array, "B F"]:
    """Number of tokens that each frame keeps before their sum is made exact. Step 3.

    Args:
        similarity: mean similarity of the tokens of each frame to the clip.
        exists: frames that are not empty; the result at others means nothing.
        budget: mean share of the tokens of a frame.
        tokens: visual tokens of a frame (N).
    """
    p = jax.nn.softmax(-similarity / TEMPERATURE, axis=1, where=exists)
    mean = 1 / jnp.maximum(exists.sum(1, keepdims=True), 1)
    share = tokens * jnp.minimum(1, budget * (1 + p - mean))
    # Equal frames have equal parts, often half a token, which must round alike in every batch.
    share = jnp.round(share * 1024) / 1024
    return jnp.maximum(1, jnp.round(share)).astype(jnp.int32)
