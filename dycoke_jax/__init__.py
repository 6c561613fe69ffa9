"""Fast video language models in JAX: DyCoke token compression for LLaVA-OneVision and LLaVA-Video.

    from dycoke_jax import LlavaVideo, DyCoke

    model = LlavaVideo.from_pretrained("path-or-hub-id")
    answers = model.generate(videos=["clip.mp4"], prompts=["What happens?"], compression=DyCoke())
    print(answers[0].text, answers[0].tokens)

How a clip becomes an answer, and where: ``inputs`` (file to frames, question to ids), ``models``
(tower, projector, language model), ``compression`` (which visual tokens are kept), ``generation``
(prefill and decoding, compiled), ``engine`` (requests to batches), ``llava_video`` (all of it
behind one class), ``checkpoint`` (weights on disk). ``axes`` explains the shape annotations.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dycoke_jax.compilation import use_compilation_cache as use_compilation_cache
    from dycoke_jax.compression.dycoke import DyCoke as DyCoke
    from dycoke_jax.config import LlavaConfig as LlavaConfig
    from dycoke_jax.engine.requests import Answer as Answer
    from dycoke_jax.engine.requests import Decoding as Decoding
    from dycoke_jax.engine.requests import Failure as Failure
    from dycoke_jax.engine.requests import Piece as Piece
    from dycoke_jax.engine.requests import Request as Request
    from dycoke_jax.engine.requests import TokenCounts as TokenCounts
    from dycoke_jax.errors import DycokeError as DycokeError
    from dycoke_jax.inputs.prompts import Prompting as Prompting
    from dycoke_jax.inputs.sampling import FrameSampling as FrameSampling
    from dycoke_jax.llava_video import LlavaVideo as LlavaVideo

# Imported on first use, so that importing the package (or asking the command line for its version)
# does not load flax, PyAV and transformers.
_HOMES = {
    "Answer": "dycoke_jax.engine.requests",
    "Decoding": "dycoke_jax.engine.requests",
    "DyCoke": "dycoke_jax.compression.dycoke",
    "DycokeError": "dycoke_jax.errors",
    "Failure": "dycoke_jax.engine.requests",
    "FrameSampling": "dycoke_jax.inputs.sampling",
    "LlavaConfig": "dycoke_jax.config",
    "LlavaVideo": "dycoke_jax.llava_video",
    "Piece": "dycoke_jax.engine.requests",
    "Prompting": "dycoke_jax.inputs.prompts",
    "Request": "dycoke_jax.engine.requests",
    "TokenCounts": "dycoke_jax.engine.requests",
    "use_compilation_cache": "dycoke_jax.compilation",
}

__all__ = [
    "Answer",
    "Decoding",
    "DyCoke",
    "DycokeError",
    "Failure",
    "FrameSampling",
    "LlavaConfig",
    "LlavaVideo",
    "Piece",
    "Prompting",
    "Request",
    "TokenCounts",
    "use_compilation_cache",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
