"""Efficient video sampling: keeps the tokens that changed most from one frame to the next.

From the formulas of EVS (Bagrov et al., arXiv 2510.14624), with the threshold of differential token
dropping (DTD, Yao et al., TimeChat-Online, arXiv 2504.17343) as a setting. No code of either is
used: EVS in vLLM is Apache-2.0 with a further notice of NVIDIA, and DTD is BSD-3-Clause.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dycoke_jax.checks import choice, number
from dycoke_jax.compression.budget import check_budget, lookup, share_of
from dycoke_jax.compression.protocol import Compression, Rows, TokenStage
from dycoke_jax.compression.ranking import exact_k
from dycoke_jax.compression.similarity import cosine

FirstFrame = Literal["whole", "budget"]


@dataclass(frozen=True)
class EVS(TokenStage):
    """Keeps tokens of the first frame, and those that differ most from the frame before them.

    Each token is compared with the one at the same place in the frame before, kept or not, by
    cosine similarity in float32. The least similar ones of the whole clip go on, as many as the
    budget allows; of equal ones the earlier goes first. Tokens are dropped and none are merged, and
    those that go on stay at their places. The cost of a clip is one pass of order F * N * D, and
    sorting F * N numbers.

    The paper compares pixels, and cuts at a quantile of their differences. Followed is vLLM's form
    of it, which compares visual tokens and keeps a fixed number. Only where the budget is smaller
    than a frame, vLLM keeps the whole first frame all the same; here no more tokens go on than the
    budget allows, all of them of the first frame and evenly spread over it.

    With ``max_similarity`` below 1 it is DTD: each token that is more similar than this to the one
    before it is dropped. The published code has no budget, and uses 0.5 on tokens of Qwen2.5-VL;
    here the least similar go on if more are left than the budget allows.

    Attributes:
        budget: share of the visual tokens that go on, at most, in (0, 1]; 1 minus the pruning rate
            of the paper. With ``max_similarity`` at 1 exactly as many go on.
        first_frame: ``whole``: the first frame goes on whole and takes its tokens from the budget.
            ``budget``: only its share of the budget, evenly spread over the frame, so that more
            is left for the other frames; of short clips at small budgets the whole first frame
            would leave nothing.
        max_similarity: largest cosine similarity to the token before at which a token goes on, in
            [-1, 1]. At 1 all go on that the budget allows.

    Raises:
        ConfigError: naming the setting and its range.
    """

    budget: float = 0.25
    first_frame: FirstFrame = "whole"
    max_similarity: float = 1.0

    def __post_init__(self) -> None:
        similarity = number("EVS: max_similarity", self.max_similarity, -1, 1, with_high=True)
        checked = {
            "budget": check_budget("EVS", self.budget),
            "first_frame": choice("EVS: first_frame", self.first_frame, get_args(FirstFrame)),
            "max_similarity": similarity,
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def stages(self) -> Compression:
        """A token stage."""
        return Compression(tokens=self)

    def most_rows(self, frames: int, tokens: int) -> int:
        """The budget of a clip in tokens, at least 1."""
        return share_of(frames * tokens, self.budget)

    def of_first_frame(self, frames: int, tokens: int) -> int:
        """Number of tokens of the first frame that go on, of a clip of so many frames."""
        own = tokens if self.first_frame == "whole" else share_of(tokens, self.budget)
        return min(own, self.most_rows(frames, tokens))

    def select(
        self,
        features: Float[Array, "B F N D"],
        frames: Int[Array, "B"],
        signals: tuple[Float[Array, "B F N ..."], ...] = (),
    ) -> Rows:
        """Keeps what changed, in raster order; see ``protocol.TokenStage``."""
        batch, length, tokens, _ = features.shape
        budget = lookup(lambda n: self.most_rows(n, tokens), length, frames)
        own = lookup(lambda n: self.of_first_frame(n, tokens), length, frames)

        # Sums may be a little off 1, which stands for no threshold.
        similarity = jnp.minimum(cosine(features[:, 1:], features[:, :-1]), 1)
        exists = jnp.arange(1, length) < frames[:, None]
        may_go_on = exists[:, :, None] & (similarity <= self.max_similarity)
        scores = jnp.where(may_go_on, -similarity, -jnp.inf).reshape(batch, -1)
        first = jnp.asarray(_order_of_spread(tokens)) < own[:, None]

        scores = jnp.concatenate([jnp.full((batch, tokens), -jnp.inf), scores], axis=1)
        in_mask = jnp.concatenate([first, jnp.zeros((batch, (length - 1) * tokens), bool)], axis=1)
        k = jnp.minimum(budget, own + may_go_on.sum((1, 2)))
        return exact_k(scores, in_mask, k, self.most_rows(length, tokens))


def _order_of_spread(tokens: int) -> Int[np.ndarray, "N"]:
    """The turn at which each token of a frame is taken, so that any number is spread evenly.

    The fractional parts of multiples of the golden ratio fill an interval evenly. Every n-th token
    in raster order would be a single column wherever n is the width of a frame.
    """
    fractions = np.arange(tokens) * (np.sqrt(5) - 1) / 2 % 1
    return np.argsort(np.argsort(fractions)).astype(np.int32)
