"""FastV: drops visual tokens after the first layers of prefill (Chen et al., ECCV 2024)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dycoke_jax.checks import number, whole_number
from dycoke_jax.compression.budget import kept_of, lookup
from dycoke_jax.compression.protocol import Compression, Rows, check_layer
from dycoke_jax.config import LlavaConfig


@dataclass(frozen=True)
class FastV:
    """Drops the visual tokens that the last token of the prompt attends to least.

    The layers below ``layer`` read all visual tokens. The attention of the layer before it, as the
    mean over heads, ranks them; the best go on, in their order and at their rotary positions, and
    all layers from ``layer`` on read only these. So prefill and decoding cost less, and the
    key/value cache of those layers is smaller. It drops tokens and makes no new ones. Newlines are
    no candidates and always go on.

    From the text of the paper (arXiv 2403.06764, sec. 4.1); the published code is not used, it has
    no licence. The cost is one row of attention weights, since no other row is looked at.

    Attributes:
        layer: first layer that reads fewer tokens, counted from 0, in 1..layers-1 (K in the paper).
        r: share of the visual tokens that is dropped, in [0, 1) (R in the paper).

    Raises:
        ConfigError: naming the setting and its range.
    """

    layer: int = 2
    r: float = 0.5

    def __post_init__(self) -> None:
        layer = whole_number("FastV: layer", self.layer, 1, allowed="lie in 1..layers-1")
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "r", number("FastV: r", self.r, 0, 1))

    @property
    def stages(self) -> Compression:
        """A prompt stage."""
        return Compression(prompt=self)

    def check(self, config: LlavaConfig, frames: int) -> None:
        """Refuses a layer that the model does not have."""
        check_layer("FastV", self.layer, config)

    def most_rows(self, tokens: int) -> int:
        """Number of visual tokens that go on, of this many."""
        return kept_of(tokens, self.r)

    def select(
        self,
        states: Float[Array, "B visual D"],
        scores: Float[Array, "B visual"],
        is_token: Bool[Array, "B visual"],
        tokens: int,
    ) -> Rows:
        """Keeps the tokens with the highest scores; see ``protocol.PromptStage``."""
        _, places = jax.lax.top_k(jnp.where(is_token, scores, -jnp.inf), self.most_rows(tokens))
        counts = lookup(self.most_rows, tokens, is_token.sum(1))
        return Rows(places, jnp.arange(places.shape[1]) < counts[:, None])
