"""The built-in task: reproducible clips, disjoint splits, true and balanced answers."""

from collections import Counter

import numpy as np
import pytest

from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.questions import KINDS, Question, blind_score
from dycoke_jax.tasks.scenes import GRID, Scene, SceneSettings, draw_scene
from dycoke_jax.tasks.task import task_clip

CLIPS = [task_clip("test", number) for number in range(1000)]


def test_the_same_number_gives_the_same_clip():
    for number in (0, 7, 10**9):
        again = task_clip("train", number)
        assert task_clip("train", number) == again
        np.testing.assert_array_equal(draw(again.scene), draw(task_clip("train", number).scene))


def test_splits_share_no_scene():
    seeds = {split: {task_clip(split, n).scene.seed for n in range(50)} for split in SPLITS}
    assert not seeds["train"] & seeds["test"]


SPLITS = ("train", "test")


def test_scenes_keep_their_rules():
    """Things differ in shape, colour and first frame, stay on the grid, overlap only to meet."""
    for clip in CLIPS[:300]:
        things = clip.scene.things
        for values in zip(*((t.shape, t.colour, t.appears) for t in things), strict=True):
            assert len(set(values)) == len(things)
        assert [t.appears for t in things] == sorted(t.appears for t in things)
        for thing in things:
            assert thing.appears + len(thing.cells) <= clip.scene.frames
            assert all(0 <= value <= GRID - 1 for cell in thing.cells for value in cell)
        for frame in range(clip.scene.frames):
            seen = [
                (thing.cells[frame - thing.appears], thing)
                for thing in things
                if 0 <= frame - thing.appears < len(thing.cells)
            ]
            for i, (place, thing) in enumerate(seen):
                for other_place, other in seen[:i]:
                    near = max(abs(a - b) for a, b in zip(place, other_place, strict=True)) < 1
                    assert not near or thing.meets == other.colour or other.meets == thing.colour


def test_answers_are_true_of_the_scene():
    """Answers are computed again from the cells of things, not from the scene's description."""
    for clip in CLIPS[:300]:
        things, scene = clip.scene.things, clip.scene
        for question in clip.questions:
            assert question.answer in answers(question, things, scene), question


def answers(question: Question, things, scene: Scene) -> list[str]:
    asked = [t for t in things if f"the {t.colour} thing" in question.text]
    asked += [t for t in things if f"the {t.shape} " in question.text.replace("?", " ")]
    match question.kind:
        case "shape":
            return [t.shape for t in asked]
        case "colour":
            return [t.colour for t in asked]
        case "count":
            return [["two", "three", "four", "five"][len(things) - 2]]
        case "first":
            named = question.text[:-1].split(", ")[1].split(" or ")
            return [next(t.colour for t in things if t.colour in named)]
        case "brief":
            return [t.colour for t in things if len(t.cells) <= 2] or ["none"]
        case "where":
            rows = {True: "top", False: "bottom"}
            columns = {True: "left", False: "right"}
            row, column = asked[0].cells[-1]
            return [f"{rows[row <= 1.5]} {columns[column <= 1.5]}"]
        case "meets":
            (thing,) = asked
            met = [t.colour for t in things if t is not thing and t.cells[-1] == thing.cells[-1]]
            return met or ["none"]
        case "direction":
            return [" then ".join(directions(asked[0])) or "nowhere"]
        case "list":
            return [", ".join(t.colour for t in sorted(things, key=lambda t: t.appears))]
        case "describe":
            return [" ".join(map(sentence, sorted(things, key=lambda t: t.appears)))]


def directions(thing) -> list[str]:
    found: list[str] = []
    for before, after in zip(thing.cells, thing.cells[1:], strict=False):
        down, right = after.row - before.row, after.column - before.column
        if down or right:
            way = ("down" if down > 0 else "up") if down else ("right" if right > 0 else "left")
            if way not in found[-1:]:
                found.append(way)
    return found


def sentence(thing) -> str:
    does = f"moves {' then '.join(directions(thing))}" if directions(thing) else "stays"
    does = "shows up briefly" if len(thing.cells) <= 2 else does
    return f"The {thing.colour} {thing.shape} {does}."


def test_every_kind_occurs_and_is_hard_to_guess():
    """The best guess without the video scores little more than one in the number of choices."""
    questions = [question for clip in CLIPS for question in clip.questions]
    counts = Counter(question.kind for question in questions)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) > 500
    most = {"first": 0.55, "count": 0.3, "where": 0.3, "meets": 0.27, "shape": 0.22}
    for kind, score in blind_score(questions).items():
        assert score < most.get(kind, 0.16), kind


def test_blind_score_considers_the_order_of_names():
    """One way to guess without the video is to name the first candidate of the question."""
    asked = [
        Question("first", "Which came first, red or blue?", "red"),
        Question("first", "Which came first, blue or red?", "blue"),
        Question("first", "Which came first, white or red?", "red"),
    ]
    assert blind_score(asked) == {"first": pytest.approx(2 / 3)}


def test_pictures_show_the_things_where_they_are():
    lasts = ((clip.scene, clip.scene.things[-1]) for clip in CLIPS)
    scene, thing = next((s, t) for s, t in lasts if t.motion and not t.meets)
    row, column = (int((value + 0.5) * 32) for value in thing.cells[-1])
    frame = thing.appears + len(thing.cells) - 1
    without = Scene(scene.things[:-1], scene.frames, scene.seed)
    shown, empty = (draw(each, 128).astype(int)[frame] for each in (scene, without))
    changed = abs(shown - empty).sum(-1) > 60
    assert changed.sum() > 50
    rows, columns = np.nonzero(changed)
    assert abs(rows - row).max() < 20
    assert abs(columns - column).max() < 20


def test_most_of_a_clip_repeats():
    """Temporal token merging relies on it: few cells change much from one frame to the next."""
    changes = []
    for clip in CLIPS[:50]:
        frames = draw(clip.scene).astype(float).mean(-1)
        cells = frames.reshape(16, GRID, 16, GRID, 16).mean((2, 4))
        changes.append((abs(np.diff(cells, axis=0)) > 8).mean())
    assert 0.02 < np.mean(changes) < 0.25


@pytest.mark.parametrize("settings", [SceneSettings(1, 1, 5), SceneSettings(8, 1, 3)])
def test_other_lengths(settings):
    for seed in range(50):
        scene = draw_scene(seed, settings)
        assert draw(scene).shape == (settings.frames, 64, 64, 3)
        assert settings.least <= len(scene.things) <= settings.most
