"""How the checkpoint that ships was made: its sizes, its tokenizer, its lessons."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dycoke_jax.checkpoint.untrained import save_byte_tokenizer
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.config import TINY
from dycoke_jax.inputs.prompts import DEFAULT_SYSTEM, Tokenizer
from dycoke_jax.models.llava import Params, random_params
from dycoke_jax.progress import Progress
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.tasks.task import task_clip
from dycoke_jax.training import watching
from dycoke_jax.training.alignment import align
from dycoke_jax.training.sources import BatchShape, Stage, TaskSource, ThinningMix
from dycoke_jax.training.step import Course, Optimisation

# After the lessons of the eyes: short questions about every thing of a clip, of pictures and clips
# in turn, and then the whole task. Most tokens of the whole task's answers are those of its long
# ones, so what the short ones need is practised first; only in pictures, where there is less to
# look at, things are soon found by their shape. Afterwards the directions of several moving things
# are still taken for each other, so everything is practised once more, in turns. At last the layer
# that chooses for KV pruning learns to look at what the others read (see ``foresight``).
_GAPS = ThinningMix(merged=0.3, random=0.3, k=0.7)
_MERGED = ThinningMix(merged=0.5, random=0.1, k=0.7)
_PRUNED = replace(_MERGED, pruned_layer=DyCoke().layer)
_CLIPS = BatchShape(rows=2, accumulate=8, width=224)
_PICTURES = Stage(0, SceneSettings(1, 2, 6), BatchShape(24, accumulate=1, width=200), drill=True)
STAGES = (
    Stage(500, SceneSettings(16, 1, 5), _CLIPS, drill=True),
    Stage(400, SceneSettings(16, 1, 5), _CLIPS, drill=True, other=_PICTURES),
    Stage(2100, SceneSettings(16, 2, 5), _CLIPS, _GAPS),
    Stage(
        800,
        SceneSettings(16, 2, 5),
        _CLIPS,
        _MERGED,
        other=Stage(0, SceneSettings(16, 2, 5), _CLIPS, _MERGED, drill=True),
    ),
    Stage(800, SceneSettings(16, 2, 5), _CLIPS, _PRUNED),
)
OPTIMISATION = Optimisation(
    steps=sum(stage.steps for stage in STAGES),
    learning_rate=2e-3,
    courses=(Course(3000, 1e-3), Course(3800, 1e-3)),
    tower=0,
    projector=0,
)


def source(tokenizer: Tokenizer, seed: int = 0) -> TaskSource:
    """The batches of all stages."""
    return TaskSource(tokenizer, TINY.vision.image_size, STAGES, seed, with_facts=True)


def initial(tokenizer: Tokenizer, seed: int = 0, progress: Progress | None = None) -> Params:
    """Weights to start from: random ones after the lessons of the eyes.

    Args:
        tokenizer: see ``save_tokenizer``.
        seed: of the random weights.
        progress: told of each lesson's steps.
    """
    params = {}
    for path, weight in random_params(TINY, seed).items():
        # Wider than large models begin: layers as narrow as these would learn slowly at first.
        is_matrix = weight.ndim > 1 and "embed" not in path
        scale = 0.7 * weight[0].size ** -0.5 / 0.02 if is_matrix else 1.0
        params[path] = weight * scale
    return watching.watch(TINY, align(TINY, params, tokenizer, progress), progress)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes and the words of the task."""
    save_byte_tokenizer(folder, _texts(), TINY.text.vocab_size)


def _texts() -> Iterator[str]:
    for number in range(500):
        yield f"system\n{DEFAULT_SYSTEM}"
        yield "user\n"
        yield "assistant\n"
        for question in task_clip("train", number).questions:
            yield question.text
            yield question.answer
