"""The built-in task: a clip and its questions for every number, training and test numbers apart."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dycoke_jax.tasks.questions import Question, ask
from dycoke_jax.tasks.scenes import Scene, SceneSettings, draw_scene

Split = Literal["train", "test"]

MONITORED = 64
"""The first test clips, by which training runs are watched; what is published is measured on those
after them."""


@dataclass(frozen=True)
class TaskClip:
    """A scene and what is asked about it, one question of a kind, in random order."""

    scene: Scene
    questions: tuple[Question, ...]


def task_clip(split: Split, number: int, settings: SceneSettings | None = None) -> TaskClip:
    """Clip ``number`` (from 0) of a split; the same on every machine."""
    seed = 2 * number + (split == "test")  # so no number of one split is a scene of the other
    scene = draw_scene(seed, settings)
    random = np.random.default_rng([seed, 2])
    questions = ask(scene, random)
    return TaskClip(scene, tuple(questions[i] for i in random.permutation(len(questions))))
