"""What every method of compression must hold to, whatever it does, and alone or combined."""

import re

import jax
import numpy as np
import pytest
from support.tiny import tiny_model, video

from dycoke_jax import Decoding, DyCoke
from dycoke_jax.compression.baselines import RandomTokens, WholeFrames
from dycoke_jax.compression.dycoke import DyCokeKV
from dycoke_jax.compression.evs import EVS
from dycoke_jax.compression.fastv import FastV
from dycoke_jax.compression.holitom import HoliTom, HoliTomMerge
from dycoke_jax.compression.methods import METHODS, parse_compression
from dycoke_jax.compression.protocol import Compression, Compressor, combine
from dycoke_jax.compression.ttm import TokenMerging
from dycoke_jax.compression.unicomp import UniComp
from dycoke_jax.compression.vidcom2 import VidCom2
from dycoke_jax.compression.visionzip import VisionZip
from dycoke_jax.engine.batch import frame_bucket
from dycoke_jax.errors import ConfigError
from dycoke_jax.generation.layout import PROMPT_MULTIPLE, plan
from dycoke_jax.models.signals import Signal

COMBINED = {
    "unicomp": UniComp(0.4),
    "unicomp+dycoke-kv": combine(UniComp(0.4), DyCokeKV(layer=2)),
    "fastv": FastV(1, 0.6),
    "fastv+dycoke-kv": combine(FastV(1, 0.4), DyCokeKV(layer=2, p=0.5)),
    "dycoke+fastv": combine(TokenMerging(0.6), FastV(1, 0.5), DyCokeKV(layer=2, parked="drop")),
    "random": RandomTokens(0.6),
    "frames+dycoke-kv": combine(WholeFrames(0.5), DyCokeKV(layer=2)),
    "evs": EVS(0.9, "budget", max_similarity=0.6),
    "vidcom2": VidCom2(0.25),
    "visionzip": VisionZip(0.3),
    "holitom+dycoke-kv": combine(HoliTom(0.4, layer=1), DyCokeKV(layer=2, p=0.5)),
    "dycoke+holitom-merge": combine(TokenMerging(0.6), HoliTomMerge(1, 0.6, "equal")),
}
LENGTHS = (1, 7, 8, 5)
"""Frames of clips that run in one batch; alone, the first has programs of its own."""


@pytest.mark.parametrize("newline", ["one_token", "grid"])
@pytest.mark.parametrize("method", COMBINED.values(), ids=COMBINED.keys())
def test_a_row_of_any_batch_equals_the_request_alone(method, newline, compilations):
    """Clips of different lengths, one of a single frame; other values compile nothing."""
    model = tiny_model(newline, layers=3)
    clips = [video(seed, frames, 0.5) for seed, frames in enumerate(LENGTHS)]
    prompts = ["What?", "Which of them moves first?", "And then?", "Why?"]
    settings = {"compression": method, "decoding": Decoding(6)}
    together = model.generate(clips, prompts, **settings)
    plain = model.generate(clips, prompts, compression=None, decoding=Decoding(6))
    assert [a.token_ids for a in together] != [a.token_ids for a in plain]
    for clip, prompt, answer in zip(clips, prompts, together, strict=True):
        alone = model.generate([clip], [prompt], **settings)[0]
        assert (answer.token_ids, answer.tokens) == (alone.token_ids, alone.tokens)
        assert answer.tokens.visual == len(clip) * 16 >= answer.tokens.merged
        assert 0 < max(answer.tokens.attended) <= answer.tokens.merged

    warm = compilations()
    others = [video(seed + 50, frames, 0.1) for seed, frames in enumerate((2, 6, 8, 5))]
    prompts = ["Who?", "What is it that moves first?", "Why?", "Where to?"]
    model.generate(others, prompts, **settings)
    assert compilations() == warm


def test_what_is_counted_is_what_was_promised():
    model = tiny_model(layers=3)

    def counts(method):
        settings = {"compression": method, "decoding": Decoding(4)}
        return model.generate([video(0, 8)], ["What?"], **settings)[0].tokens

    fastv = counts(FastV(1, 0.75))
    assert (fastv.visual, fastv.merged, set(fastv.attended)) == (128, 128, {32})
    both = counts(combine(TokenMerging(0.7), FastV(1, 0.5), DyCokeKV(layer=2, p=0.5)))
    assert (both.visual, both.merged, set(both.attended)) == (128, 56, {14})
    assert str(both) == "128 visual -> 56 after merging -> 14 attended per step"
    assert counts(UniComp(0.25)).merged <= 32
    assert counts(RandomTokens(0.7)).merged == 56
    assert counts(WholeFrames(0.7)).merged == 48
    assert counts(EVS(0.05)).merged == 6
    assert counts(VidCom2(0.9)).merged == 115
    assert counts(VisionZip(0.15)).merged == 19
    assert counts(HoliTom(0.25, layer=0)).merged == 32
    holitom = counts(HoliTom(0.25, layer=1))
    assert (holitom.merged, set(holitom.attended)) == (32, {16})
    both = counts(parse_compression("vidcom2(budget=.25)+dycoke-kv(layer=2, p=.7)"))
    assert str(both) == "128 visual -> 32 after merging -> 9 attended per step"


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_hashable_and_have_stages(name):
    """Programs are compiled for a method: equal settings must be the same method."""
    method = METHODS[name]()
    assert isinstance(method, Compressor)
    assert isinstance(method.stages, Compression)
    assert any((method.stages.tokens, method.stages.prompt, method.stages.cache))
    assert hash(method) == hash(METHODS[name]())
    assert hash(method.stages) == hash(METHODS[name]().stages)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]().stages.tokens])
def test_token_stages_are_made_for_tpus_without_callbacks_or_dynamic_shapes(name):
    """A callback cannot be lowered for a platform that is not there."""
    shape = jax.ShapeDtypeStruct
    width = {"keys": (16,), "mean_keys": (4,), "attention": ()}
    stage = METHODS[name]().stages.tokens
    signals = tuple(shape((2, 8, 16, *width[s.kind]), np.float32) for s in stage.signals)
    features, frames = shape((2, 8, 16, 24), "bfloat16"), shape((2,), np.int32)
    traced = jax.jit(stage.select).trace(features, frames, signals)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert not re.search(r"tensor<[^>]*\?", program)


def test_two_methods_for_one_stage_are_refused():
    with pytest.raises(ConfigError, match="both act before the language model"):
        combine(UniComp(), RandomTokens())
    with pytest.raises(ConfigError, match="both act while decoding"):
        combine(DyCoke(), DyCokeKV())
    assert combine(DyCoke()) == DyCoke().stages


def test_frame_counts_share_a_handful_of_layouts():
    """13 and 29 sampled frames run the programs of 16 and 32; few frames are added to any."""
    assert [frame_bucket(n) for n in (0, 1, 2, 3, 13, 16, 17, 24, 29, 32, 33, 64, 65)] == [
        0, 1, 2, 4, 16, 16, 24, 24, 32, 32, 48, 64, 96,
    ]  # fmt: skip
    assert len({frame_bucket(n) for n in range(1, 33)}) == 7
    for frames in range(1, 500):
        assert frames <= frame_bucket(frames) <= max(2 * frames - 1, 1)


@pytest.mark.parametrize("newline", ["one_token", "grid", "frame", "no_token"])
@pytest.mark.parametrize("compression", [None, DyCoke(layer=2), FastV(1)], ids=str)
def test_prompts_fill_whole_blocks_of_the_attention_kernels(newline, compression):
    config = tiny_model(newline).config
    for frames, question in ((0, 32), (8, 32), (16, 64)):
        layout = plan(config, 2, frames, 16, question, 32, compression)
        assert layout.slots.prompt % PROMPT_MULTIPLE == 0
        assert question <= layout.slots.question < question + PROMPT_MULTIPLE


@pytest.mark.parametrize("frames", [13, 11], ids=str)
@pytest.mark.parametrize(
    "method", [None, DyCoke(layer=2), DyCoke(layer=2, mode="official")],
    ids=["plain", "paper", "official"],
)  # fmt: skip
def test_empty_frames_of_a_bucket_change_no_answer(method, frames, monkeypatch):
    """The answer is that of programs made for exactly these frames, up to the last token."""
    clips = [video(seed, frames, 0.5) for seed in range(3)]
    settings = {"compression": method, "decoding": Decoding(8)}
    model = tiny_model(layers=3)
    bucketed = model.generate(clips, ["What?"] * 3, **settings)
    monkeypatch.setattr("dycoke_jax.engine.batch.frame_bucket", lambda frames: frames)
    exact = model.generate(clips, ["What?"] * 3, **settings)
    for ours, theirs in zip(bucketed, exact, strict=True):
        assert (ours.token_ids, ours.tokens) == (theirs.token_ids, theirs.tokens)


def test_what_nobody_asks_for_is_not_computed(monkeypatch):
    """Of the vision tower, UniComp wants keys, HoliTom attention, and VisionZip both."""
    asked = []
    original = jax.tree_util.Partial(tiny_model().model.bind().__class__.encode_with_signals)

    def noted(self, frames, signals):
        asked.append(signals)
        return original(self, frames, signals)

    monkeypatch.setattr("dycoke_jax.models.llava.Llava.encode_with_signals", noted)
    model = tiny_model(layers=3, seed=3)
    for method, wanted in (
        (None, ()),
        (DyCoke(layer=2), ()),
        (UniComp(), (Signal("keys"),)),
        (HoliTom(layer=2), (Signal("attention"),)),
        (VisionZip(), (Signal("attention"), Signal("mean_keys"))),
    ):
        asked.clear()
        jax.clear_caches()
        settings = {"compression": method, "decoding": Decoding(1)}
        model.generate([np.zeros((2, 98, 98, 3), np.uint8)], ["?"], **settings)
        assert set(asked) == {wanted}
