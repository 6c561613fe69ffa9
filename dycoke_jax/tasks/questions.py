"""Questions about a scene whose answers need the video, and what a blind guesser would score."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dycoke_jax.tasks.scenes import GRID, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")

KINDS = (
    "shape",
    "colour",
    "count",
    "direction",
    "first",
    "brief",
    "where",
    "meets",
    "list",
    "describe",
)
"""Kinds of questions; the answers of the last two are long."""


@dataclass(frozen=True)
class Question:
    """A question about a clip, its one right answer, and its kind (one of ``KINDS``)."""

    kind: str
    text: str
    answer: str


def ask(scene: Scene, random: np.random.Generator) -> list[Question]:
    """One question of each kind that makes sense for the scene, in the order of ``KINDS``.

    Which thing is asked about is drawn at random, so that answers are balanced where the scene
    leaves a choice.
    """
    things = scene.things
    is_clip = scene.frames > 1
    lasting = [thing for thing in things if not (is_clip and thing.is_brief)]
    asked = [_shape(_any(random, things)), _colour(_any(random, things)), _count(scene)]
    if is_clip:
        moving = [thing for thing in lasting if thing.motion]
        of_moving = moving and random.random() < 0.85
        asked.append(_direction(_any(random, moving if of_moving else lasting), random))
        if len(things) > 1:
            asked.append(_first(things, random))
        # Clips without a brief thing, or without a meeting, are three and four in ten; asking
        # all of them would make "none" the best guess by far.
        if len(lasting) < len(things) or random.random() < 0.3:
            asked.append(_brief(things))
    asked.append(_where(_any(random, lasting), random))
    if is_clip:
        meeting = [thing for thing in lasting if thing.meets]
        others = [thing for thing in moving if not thing.meets]
        if meeting:
            asked.append(_meets(meeting[0], random))
        elif others and random.random() < 0.3:
            asked.append(_meets(_any(random, others), random))
        asked += [_list(things), _describe(things)]
    else:
        asked += _read(things)
    return asked


def short_questions(scene: Scene, random: np.random.Generator) -> list[Question]:
    """Short questions about every thing of a scene, in random order.

    They practise what ``ask`` asks once: a thing's colour and where it is in the end; its shape in
    a still picture; in a clip which way it moves and, of moving ones, which colour it meets. Most
    name the thing by its shape, which is harder to find than a colour.
    """
    asked = []
    for thing in scene.things:
        asked.append(_colour(thing))
        if scene.frames == 1:
            asked += [_where(thing, random), _shape(thing)]
        elif not thing.is_brief:
            asked += [_where(thing, random), _direction(thing, random)]
            asked += [_meets(thing, random)] if thing.motion else []
    return [asked[i] for i in random.permutation(len(asked))]


def blind_score(questions: Iterable[Question]) -> dict[str, float]:
    """Per kind, the share of right answers of the best guesser who never sees a clip.

    The guesser knows how often each answer is right for the kind of question; where the question
    names candidates, answers count as "the first that is named" and so on.
    """
    answers: Mapping[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.kind][_without_names(question)] += 1
    return {
        kind: count.most_common(1)[0][1] / count.total() for kind, count in sorted(answers.items())
    }


def _without_names(question: Question) -> str:
    words = question.text.replace("?", "").replace(",", "").split()
    return " ".join(
        f"<{words.index(word)}>" if word in words else word for word in question.answer.split()
    )


def _any(random: np.random.Generator, things: Sequence[Thing]) -> Thing:
    return things[int(random.integers(len(things)))]


def _name(thing: Thing, random: np.random.Generator) -> str:
    return f"the {thing.colour} thing" if random.random() < 0.5 else f"the {thing.shape}"


def _shape(thing: Thing) -> Question:
    return Question("shape", f"What shape is the {thing.colour} thing?", thing.shape)


def _colour(thing: Thing) -> Question:
    return Question("colour", f"What colour is the {thing.shape}?", thing.colour)


def _count(scene: Scene) -> Question:
    return Question("count", "How many things are there in all?", NUMBERS[len(scene.things)])


def _direction(thing: Thing, random: np.random.Generator) -> Question:
    answer = " then ".join(thing.motion) or "nowhere"
    return Question("direction", f"Which way does {_name(thing, random)} move?", answer)


def _first(things: tuple[Thing, ...], random: np.random.Generator) -> Question:
    early, late = np.sort(random.choice(len(things), 2, replace=False))
    named = [things[early].colour, things[late].colour]
    if random.random() < 0.5:
        named.reverse()
    text = f"Which came first, {named[0]} or {named[1]}?"
    return Question("first", text, things[early].colour)


def _brief(things: tuple[Thing, ...]) -> Question:
    answer = next((thing.colour for thing in things if thing.is_brief), "none")
    return Question("brief", "Which colour is there only briefly?", answer)


def _where(thing: Thing, random: np.random.Generator) -> Question:
    row, column = thing.cells[-1]
    answer = f"{'top' if row < GRID / 2 else 'bottom'} {'left' if column < GRID / 2 else 'right'}"
    return Question("where", f"Where is {_name(thing, random)} in the end?", answer)


def _meets(thing: Thing, random: np.random.Generator) -> Question:
    text = f"Which colour does {_name(thing, random)} meet?"
    return Question("meets", text, thing.meets or "none")


def _list(things: tuple[Thing, ...]) -> Question:
    answer = ", ".join(thing.colour for thing in things)
    return Question("list", "Name the colours in order of appearance.", answer)


def _describe(things: tuple[Thing, ...]) -> Question:
    sentences = []
    for thing in things:
        does = f"moves {' then '.join(thing.motion)}" if thing.motion else "stays"
        does = "shows up briefly" if thing.is_brief else does
        sentences.append(f"The {thing.colour} {thing.shape} {does}.")
    return Question("describe", "Describe every thing in order of appearance.", " ".join(sentences))


def _read(things: Sequence[Thing]) -> list[Question]:
    """The long questions about a still picture."""
    things = sorted(things, key=lambda thing: thing.cells[0])
    colours = ", ".join(thing.colour for thing in things)
    sentences = " ".join(f"The {thing.colour} {thing.shape} stays." for thing in things)
    return [
        Question("list", "Name the colours row by row.", colours),
        Question("describe", "Describe every thing row by row.", sentences),
    ]
