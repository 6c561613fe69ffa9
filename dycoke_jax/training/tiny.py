"""How the checkpoint that ships was made: its sizes, its tokenizer, its lessons."""

from collections.abc import Iterator
from pathlib import Path

from dycoke_jax.checkpoint.untrained import save_byte_tokenizer
from dycoke_jax.config import LlavaConfig, TextConfig, VisionConfig
from dycoke_jax.evaluation.scenes import SceneSettings
from dycoke_jax.evaluation.task import task_clip
from dycoke_jax.inputs.prompts import DEFAULT_SYSTEM, Tokenizer
from dycoke_jax.models.llava import Params, random_params
from dycoke_jax.training.alignment import align
from dycoke_jax.training.batches import pack
from dycoke_jax.training.scoring import HeldOut
from dycoke_jax.training.sources import BatchShape, Stage, TaskSource, ThinningMix, task_example
from dycoke_jax.training.step import Optimisation
from dycoke_jax.training.watching import watch

SIZES = LlavaConfig(
    vision=VisionConfig(
        hidden_size=64,
        intermediate_size=160,
        num_layers=3,
        num_heads=4,
        patch_size=8,
        image_size=64,
    ),
    text=TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=352,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        rope_theta=1e4,
        max_positions=4096,
    ),
)
"""1.3 million weights: 16 visual tokens a frame, 256 for a clip of 16 frames."""

# After the lessons of the eyes: questions about pictures, short questions about every thing of a
# clip, and the whole task. Most tokens of the whole task's answers are those of its long ones, so
# what the short ones need is practised first.
_GAPS = ThinningMix(merged=0.3, random=0.3, k=0.7)
_CLIPS = BatchShape(rows=2, accumulate=8, width=224)
STAGES = (
    Stage(300, SceneSettings(1, 1, 4), BatchShape(rows=32, accumulate=1, width=120)),
    Stage(600, SceneSettings(16, 1, 5), _CLIPS, drill=True),
    Stage(1600, SceneSettings(16, 2, 5), _CLIPS, _GAPS),
)
OPTIMISATION = Optimisation(
    steps=sum(stage.steps for stage in STAGES), learning_rate=2e-3, warm_up=100
)
HELD_OUT_CLIPS = 64


def source(tokenizer: Tokenizer, seed: int = 0) -> TaskSource:
    """The batches of all stages."""
    return TaskSource(tokenizer, SIZES.vision.image_size, STAGES, seed)


def held_out(tokenizer: Tokenizer, size: int, frames: int = 16) -> HeldOut:
    """The first clips of the test split, in batches of eight, with all their questions."""
    scenes = SceneSettings(frames)
    batches, kinds = [], []
    for first in range(0, HELD_OUT_CLIPS, 8):
        numbers = range(first, first + 8)
        examples = [task_example("test", number, scenes, size) for number in numbers]
        batches.append(pack(tokenizer, examples, 256))
        clips = [task_clip("test", number, scenes) for number in numbers]
        kinds.append([[question.kind for question in clip.questions] for clip in clips])
    return HeldOut(batches, kinds)


def initial(tokenizer: Tokenizer, seed: int = 0) -> Params:
    """Weights to start from: random ones after the lessons of the eyes."""
    params = {}
    for path, weight in random_params(SIZES, seed).items():
        # Wider than large models begin: layers as narrow as these would learn slowly at first.
        is_matrix = weight.ndim > 1 and "embed" not in path
        scale = 0.7 * weight[0].size ** -0.5 / 0.02 if is_matrix else 1.0
        params[path] = weight * scale
    return watch(SIZES, align(SIZES, params, tokenizer))


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes and the words of the task."""
    save_byte_tokenizer(folder, _texts(), SIZES.text.vocab_size)


def _texts() -> Iterator[str]:
    for number in range(500):
        yield f"system\n{DEFAULT_SYSTEM}"
        yield "user\n"
        yield "assistant\n"
        for question in task_clip("train", number).questions:
            yield question.text
            yield question.answer
