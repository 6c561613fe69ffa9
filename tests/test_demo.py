"""The README's first command: real answers, counts and times of its own run."""

import json
import time

import pytest
from PIL import Image
from support.clips import real_clip
from support.command_line import run_main

from dycoke_jax import DyCoke, LlavaVideo, demo
from dycoke_jax.assets import TINY
from dycoke_jax.compression.baselines import RandomTokens
from dycoke_jax.errors import ConfigError


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    picture = tmp_path_factory.mktemp("demo") / "demo.png"
    began = time.perf_counter()
    code, out, _ = run_main("demo", "--picture", picture, "--json")
    assert code == 0
    return json.loads(out), picture, time.perf_counter() - began


def test_verdicts_follow_from_the_answers(shown):
    result, _, _ = shown
    known = [question["known"] for question in result["questions"]]
    assert len(known) >= 7
    for side in result["sides"].values():
        texts = [answer["text"].strip() for answer in side["answers"]]
        right = sum(text == answer for text, answer in zip(texts, known, strict=True))
        assert (side["right"], side["of"]) == (right, len(known))
        assert right >= 0.7 * len(known)


def test_counts_and_times_are_of_this_run(shown):
    result, _, wall = shown
    plain, dycoke = result["sides"]["plain"], result["sides"]["DyCoke"]
    for answer in plain["answers"]:
        assert answer["tokens"]["visual"] == answer["tokens"]["merged"] == 256
    for answer in dycoke["answers"]:
        assert answer["tokens"]["merged"] == 112
        assert set(answer["tokens"]["attended"]) == {33}
    total = 0.0
    for side in (plain, dycoke):
        assert all(seconds > 0 for seconds in side["seconds"].values())
        assert side["first_run"] > sum(side["seconds"].values())
        total += side["first_run"] + 2 * sum(side["seconds"].values())
    assert total < wall < 60


def test_answers_are_what_the_model_says(shown):
    result, _, _ = shown
    model = LlavaVideo.from_pretrained(TINY)
    asked = demo.made_up(model.config.vision.image_size)
    assert [a.question for a in asked] == [q["question"] for q in result["questions"]]
    alone = model.generate([asked[-1].video], [asked[-1].question], compression=None)[0]
    assert alone.text == result["sides"]["plain"]["answers"][-1]["text"]


def test_picture_shows_every_clip(shown):
    result, picture, _ = shown
    assert result["picture"] == str(picture)
    with Image.open(picture) as image:
        assert image.height > 3 * 2 * 128


def test_tables_name_all_that_the_run_measured(tmp_path):
    code, out, err = run_main(
        "demo", "--video", real_clip(), "--prompt", "What happens?", "--frames", 8,
        "--picture", tmp_path / "own.png",
    )  # fmt: skip
    assert code == 0
    for label in ("visual tokens of a clip", "after merging", "prefill, seconds", "bunny.mp4"):
        assert label in out
    assert "right answers" not in out, "of an own clip no answer is known"
    assert "own.png" in err
    assert (tmp_path / "own.png").exists()


def test_compress_names_what_is_compared_with_the_plain_model(tmp_path, monkeypatch):
    compared = []

    def answer_all(model, asked, compressions, **settings):
        compared.append(compressions)
        raise ConfigError("seen enough")

    monkeypatch.setattr(demo, "answer_all", answer_all)
    picture = ("--picture", tmp_path / "demo.png")
    for options in (("--compress", "random(k=0.5)"), ("--k", 0.5, "--mode", "official")):
        assert "seen enough" in run_main("demo", *picture, *options)[2]
    assert compared == [
        {"plain": None, "random(k=0.5)": RandomTokens(0.5)},
        {"plain": None, "DyCoke": DyCoke(0.5, mode="official")},
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--video", "clip.mp4"), "--video and --prompt go together"),
        (("--prompt", "What?"), "--video and --prompt go together"),
        (("--model", "folder"), "give --video as well"),
        (("--video", "missing.mp4", "--prompt", "What?"), "missing.mp4"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments, says, tmp_path):
    code, out, err = run_main("demo", *arguments, "--picture", tmp_path / "demo.png")
    assert (code, out) == (2, "")
    assert says in err
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    code, out, err = run_main("demo", "--picture", tmp_path / "missing" / "demo.png")
    assert (code, out) == (2, "")
    assert "there is no folder" in err
