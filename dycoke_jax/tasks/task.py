"""The clips of the built-in task and their questions, by split and number."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dycoke_jax.tasks.questions import Question, ask
from dycoke_jax.tasks.scenes import Scene, SceneSettings, draw_scene

Split = Literal["train", "test"]

MONITORED = 64
"""Number of clips, the first of the test split, that training runs are evaluated on.

Published results are measured on the clips after them, so that they are held out.
"""


@dataclass(frozen=True)
class TaskClip:
    """A clip of the task.

    Attributes:
        scene: the scene.
        questions: at most one question of each kind, in random order.
    """

    scene: Scene
    questions: tuple[Question, ...]


def task_clip(split: Split, number: int, settings: SceneSettings | None = None) -> TaskClip:
    """The clip of a number in a split; the same on every machine.

    Args:
        split: the split; no scene is in both.
        number: number of the clip, from 0.
        settings: the distribution of scenes; None: ``SceneSettings()``.
    """
    seed = 2 * number + (split == "test")  # Even seeds are training scenes, odd seeds test scenes.
    scene = draw_scene(seed, settings)
    random = np.random.default_rng([seed, 2])
    questions = ask(scene, random)
    return TaskClip(scene, tuple(questions[i] for i in random.permutation(len(questions))))
