"""Questions about a scene, and the score of the best guess without the clip."""

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
"""Kinds of questions; the answers to the last two are long."""


@dataclass(frozen=True)
class Question:
    """A question about a clip.

    Attributes:
        kind: kind of the question, one of ``KINDS``.
        text: text of the question.
        answer: the only right answer.
    """

    kind: str
    text: str
    answer: str


def ask(scene: Scene, random: np.random.Generator) -> list[Question]:
    """Makes one question of each kind that suits the scene, in the order of ``KINDS``.

    The thing that a question is about is drawn at random, so that answers are balanced as far as
    the scene allows.

    Args:
        scene: the scene.
        random: random generator; its state advances.
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
        # Three clips in ten have no brief thing, and four in ten no meeting. If the question were
        # asked about all of them, "none" would be the best guess by far.
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
        asked += _list_and_describe_picture(things)
    return asked


def short_questions(scene: Scene, random: np.random.Generator) -> list[Question]:
    """Makes short questions about every thing of a scene, in random order.

    ``ask`` makes at most one question of each kind; this function makes one for each thing. A
    thing's colour is always asked. A still picture adds its place and its shape. A clip adds, for
    things that are not brief, their place in the end, their direction and, if they move, the colour
    they meet. Many questions name the thing by its shape, which is harder to find than a colour.

    Args:
        scene: the scene.
        random: random generator; its state advances.
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
    """The share of right answers of the best guess without the clip, by kind of question.

    The best guess is the most frequent answer of each kind. A word of an answer that also occurs in
    the question is replaced by its position there, so that "the colour named first" is one answer.
    """
    answers: Mapping[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.kind][_without_names(question)] += 1
    return {
        kind: count.most_common(1)[0][1] / count.total() for kind, count in sorted(answers.items())
    }


def _without_names(question: Question) -> str:
    """The answer, with words that occur in the question replaced by their positions there."""
    words = question.text.replace("?", "").replace(",", "").split()
    return " ".join(
        f"<{words.index(word)}>" if word in words else word for word in question.answer.split()
    )


def _any(random: np.random.Generator, things: Sequence[Thing]) -> Thing:
    """Draws one of the things."""
    return things[int(random.integers(len(things)))]


def _name(thing: Thing, random: np.random.Generator) -> str:
    """Names a thing by its colour or by its shape, at random."""
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


def _list_and_describe_picture(things: Sequence[Thing]) -> list[Question]:
    """The questions with long answers about a still picture, in raster order of the things."""
    things = sorted(things, key=lambda thing: thing.cells[0])
    colours = ", ".join(thing.colour for thing in things)
    sentences = " ".join(f"The {thing.colour} {thing.shape} stays." for thing in things)
    return [
        Question("list", "Name the colours row by row.", colours),
        Question("describe", "Describe every thing row by row.", sentences),
    ]
