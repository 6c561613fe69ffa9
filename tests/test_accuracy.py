"""Evaluation: what baselines keep, how answers are judged, and clips as files."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny_model

from dycoke_jax import DyCoke, DycokeError
from dycoke_jax.compression.baselines import RandomTokens, WholeFrames
from dycoke_jax.compression.methods import parse_compression
from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.compression.ttm import TokenMerging
from dycoke_jax.config import TINY, LlavaConfig
from dycoke_jax.engine.requests import Answer, Piece, Seconds, TokenCounts, failure
from dycoke_jax.errors import VideoError
from dycoke_jax.evaluation import accuracy
from dycoke_jax.evaluation.accuracy import Tally, evaluate
from dycoke_jax.inputs import FrameSampling
from dycoke_jax.inputs.frames import resize
from dycoke_jax.inputs.video import read_clip
from dycoke_jax.tasks.clip_files import write_clip
from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.tasks.task import task_clip


def kept_places(method, features, frames):
    """The places that a token stage keeps of each clip, which has so many frames."""
    rows = jax.jit(method.select)(jnp.asarray(features), jnp.asarray(frames, jnp.int32))
    assert rows.places.shape == (len(frames), method.most_rows(*features.shape[1:3]))
    return [np.asarray(p)[np.asarray(v)] for p, v in zip(rows.places, rows.valid, strict=True)]


@pytest.mark.parametrize("frames", [1, 3, 16, 18])
@pytest.mark.parametrize("k", [0.0, 0.3, 0.7, 0.9])
def test_baselines_keep_what_merging_keeps(frames, k):
    features = np.random.default_rng(0).normal(size=(2, frames, 16, 8)).astype(np.float32)
    count = len(kept_places(TokenMerging(k), features, [frames] * 2)[0])
    for kept in kept_places(RandomTokens(k), features, [frames] * 2):
        assert len(kept) == count
        assert (np.diff(kept) > 0).all()
        assert kept[-1] < frames * 16
    whole = kept_places(WholeFrames(k), features, [frames] * 2)[0]
    assert whole.size == max(1, count // 16) * 16
    assert (whole.reshape(-1, 16) % 16 == np.arange(16)).all()
    assert (np.diff(whole) > 0).all()


@pytest.mark.parametrize(
    ("budget", "frames", "tokens", "whole_frames"),
    [(0.05, 16, 12, 1), (0.1, 16, 25, 1), (0.29, 25, 116, 7), (0.5, 3, 24, 1), (1, 5, 80, 5)],
)
def test_baselines_keep_what_a_budget_allows(budget, frames, tokens, whole_frames):
    """Of 16 tokens a frame. Whole frames keep one at least, even where the budget is smaller."""
    features = np.zeros((2, frames, 16, 2), np.float32)
    for kept in kept_places(RandomTokens(budget=budget), features, [frames] * 2):
        assert len(kept) == tokens
        assert (np.diff(kept) > 0).all()
    whole = kept_places(WholeFrames(budget=budget), features, [frames] * 2)[0]
    assert whole.size == whole_frames * 16
    assert (whole.reshape(-1, 16) % 16 == np.arange(16)).all()


@pytest.mark.parametrize(
    "method",
    [RandomTokens(0.6), WholeFrames(0.6), RandomTokens(budget=0.3), WholeFrames(budget=0.3)],
    ids=["random", "frames", "random, budget", "frames, budget"],
)
def test_baselines_see_no_empty_frames(method):
    """Clips of all lengths in one batch keep what each keeps alone."""
    features = np.zeros((8, 8, 6, 4), np.float32)
    together = kept_places(method, features, range(1, 9))
    for length, kept in enumerate(together, start=1):
        alone = kept_places(method, features[:1, :length], [length])[0]
        np.testing.assert_array_equal(kept, alone)


def test_random_places_depend_on_the_seed_alone():
    features = np.zeros((1, 16, 16, 8), np.float32)
    first, again, other = (
        kept_places(RandomTokens(seed=seed), features, [16])[0] for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("method", [RandomTokens, WholeFrames])
def test_baselines_are_compressors(method):
    assert isinstance(method(), Compressor)
    with pytest.raises(DycokeError, match=r"k is 1; it must lie in"):
        method(k=1)
    with pytest.raises(DycokeError, match=r"budget is 0; it must lie in \(0, 1\]"):
        method(budget=0)
    with pytest.raises(DycokeError, match=r"k is 0.5 and budget is 0.25; give one of them"):
        method(k=0.5, budget=0.25)


def test_interval_of_a_share():
    """Wilson's interval; figures worked out with an independent calculator."""
    low, high = Tally(90, 100).interval
    assert (low, high) == (pytest.approx(0.8256, abs=1e-4), pytest.approx(0.9448, abs=1e-4))
    assert Tally(0, 10).interval[0] == pytest.approx(0, abs=1e-9)


def test_files_show_what_was_drawn(tmp_path):
    """Every frame comes back, at its place, up to the encoder's losses."""
    frames = draw(task_clip("test", 0).scene, 256)
    write_clip(tmp_path / "clip.mp4", frames)
    clip = read_clip(tmp_path / "clip.mp4", FrameSampling(16), 64)
    small = np.stack([resize(frame, 64) for frame in frames]).astype(int)
    assert clip.duration == 16 / 8
    assert abs(clip.frames - small).mean() < 4


WHOLE = TokenCounts(300, 256, 256, 1, (256, 256), 0, 3)


@dataclass
class StandIn:
    """A model that answers nothing right, with these counts, and notes what it is asked."""

    tokens: TokenCounts
    config: LlavaConfig = TINY
    asked: list = field(default_factory=list)
    failure: Exception | None = None

    def run(self, requests, **settings):
        for index, request in enumerate(requests):
            self.asked.append(request)
            if self.failure:
                yield failure(index, self.failure)
            else:
                yield Piece(index, "", Answer("", (1, 2), "stop", self.tokens, Seconds()))


@pytest.mark.usefixtures("unchecked_types")
def test_sampled_frames_are_spread_evenly_over_the_clip():
    clip = task_clip("test", 5, SceneSettings(40))
    model = StandIn(WHOLE)
    evaluate(model, [clip], "some", None, frames=14)
    # Every third frame of 0..39.
    wanted = draw(clip.scene, 64)[::3]
    assert len(model.asked) == len(clip.questions)
    for request in model.asked:
        np.testing.assert_array_equal(request.video, wanted)
    with_files = StandIn(WHOLE)
    evaluate(with_files, [clip], "some", None, frames=14, through_files=True)
    assert {request.sampling for request in with_files.asked} == {FrameSampling(14)}


@pytest.mark.usefixtures("unchecked_types")
def test_clips_are_drawn_once_and_questions_of_a_kind_follow_each_other(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        accuracy, "draw", lambda scene, size: drawn.append(scene.seed) or draw(scene, size)
    )
    clips = [task_clip("test", number) for number in range(5)]
    model = StandIn(WHOLE)
    result = evaluate(model, clips, "some", None, batch_size=2)
    assert sorted(drawn) == sorted(clip.scene.seed for clip in clips)
    questions = {question.text: question.kind for clip in clips for question in clip.questions}
    kinds = [questions[request.prompt] for request in model.asked]
    assert result.whole.asked == len(kinds) == sum(len(clip.questions) for clip in clips)
    # Two clips, two clips and one clip.
    changes = sum(a != b for a, b in pairwise(kinds))
    assert changes <= 3 * len(set(kinds)) - 1


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("method", "attended", "read"),
    [
        pytest.param("none", 256, 256, id="plain"),
        # Layers 0 and 1 read 256 of the tokens, layers 2 to 5 what goes on.
        pytest.param("fastv(layer=2, r=0.75)", 64, 128, id="inside prefill"),
        pytest.param("fastv(layer=2, r=0.75)", 256, 256, id="counted and not computed"),
        pytest.param("fastv(layer=2, r=0.75)+dycoke-kv", 20, 128, id="with a pruned cache"),
    ],
)
def test_what_layers_read_is_counted_as_their_mean(method, attended, read):
    tokens = TokenCounts(300, 256, 256, 1, (attended, attended), 0, 3)
    model = StandIn(tokens)
    result = evaluate(model, [task_clip("test", 0)], "some", parse_compression(method))
    assert (result.visual, result.merged) == (256, 256)
    assert (result.read, result.attended) == (read, attended)


@pytest.mark.usefixtures("unchecked_types")
def test_a_clip_that_cannot_be_read_ends_the_evaluation():
    with pytest.raises(VideoError, match="no clip"):
        evaluate(StandIn(WHOLE, failure=VideoError("no clip")), [task_clip("test", 0)], "a", None)


@pytest.mark.slow
def test_answers_are_judged_by_the_known_ones(monkeypatch):
    """A model that knows the answers scores all; one that gets half of a kind wrong, half."""
    model = tiny_model()
    clips = [task_clip("test", number) for number in range(2)]
    result = evaluate(model, clips, "noise", DyCoke(), batch_size=8)
    assert result.whole.asked == sum(len(clip.questions) for clip in clips)
    assert result.whole.right == 0
    assert (result.visual, result.merged) == (pytest.approx(256), pytest.approx(112))
    assert result.attended == pytest.approx(33)

    known = {question.text: question.answer for question in clips[0].questions}
    run = model.run

    def knowing(requests, **settings):
        asked = []
        requests = (asked.append(request.prompt) or request for request in requests)
        for piece in run(requests, **settings):
            text = known.get(asked[piece.index], "no idea")
            yield replace(piece, answer=replace(piece.answer, text=f" {text}\n"))

    monkeypatch.setattr(model, "run", knowing)
    result = evaluate(model, clips[:1], "knows", None, batch_size=8)
    assert result.whole.accuracy == 1
    known["Name the colours in order of appearance."] = "red"
    result = evaluate(model, clips[:1], "knows", None, through_files=True, batch_size=8)
    assert result.kinds["list"].right == 0
    assert result.whole.right == result.whole.asked - 1
