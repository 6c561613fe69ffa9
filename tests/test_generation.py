"""From clips and questions to answers: batches, counts, limits, streaming, compilations."""

import os
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from support.reference import Qwen2, paper_merge
from support.tiny import tiny_model, video

from dycoke_jax import Decoding, DyCoke, LlavaVideo, Prompting
from dycoke_jax.compression import kv_pruning, ttm
from dycoke_jax.errors import CheckpointError, ConfigError, RequestError, VideoError
from dycoke_jax.generation.encode import encode
from dycoke_jax.generation.prefill import prefill
from dycoke_jax.inputs.prompts import build_prompt
from dycoke_jax.model import Model

QUESTIONS = [
    "What?",
    "Which of the many things that can be seen moves first, and where does it end?",
    "Describe the clip.",
]
METHODS = [None, DyCoke(layer=2), DyCoke(layer=2, mode="official")]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("compression", METHODS, ids=["plain", "paper", "official"])
def test_a_row_of_a_mixed_batch_equals_the_request_alone(model, compression):
    """Different clips, lengths, questions, limits, settings; one without a clip."""
    videos = [video(0, 8), video(1, 8), None, video(2, 5), video(3, 8)]
    conversation = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look at this first: "},
                {"type": "video"},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "And its colour?"},
    ]
    prompts = [*QUESTIONS, "How many?", conversation]
    decodings = [Decoding(20), Decoding(7), Decoding(12), Decoding(20), Decoding(16, 0.9, seed=11)]
    together = model.generate(
        videos, prompts, compression=compression, batch_size=5, decoding=decodings
    )
    for index, answer in enumerate(together):
        alone = model.generate(
            [videos[index]],
            [prompts[index]],
            compression=compression,
            decoding=decodings[index],
        )[0]
        assert answer.token_ids == alone.token_ids
        assert (answer.text, answer.finish_reason) == (alone.text, alone.finish_reason)
        assert answer.tokens == alone.tokens
        assert len(answer.token_ids) == decodings[index].max_new_tokens


@pytest.mark.parametrize("newline", ["grid", "frame", "no_token"])
@pytest.mark.parametrize(
    "compression", [None, DyCoke(k=0.9, layer=1, p=0.5)], ids=["plain", "paper"]
)
def test_rows_in_the_layouts_of_llava_video(newline, compression):
    """Rows whose clips lose different rows of their grids still equal themselves alone."""
    model = tiny_model(newline, "average")
    videos = [video(0, 6, 0.02), video(1, 6, 0.9), video(2, 6, 0.1)]
    together = model.generate(videos, QUESTIONS, compression=compression, decoding=Decoding(10))
    for clip, question, answer in zip(videos, QUESTIONS, together, strict=True):
        alone = model.generate([clip], [question], compression=compression, decoding=Decoding(10))[
            0
        ]
        assert (answer.token_ids, answer.tokens) == (alone.token_ids, alone.tokens)
    newlines = {"grid": 6 * 3, "frame": 6, "no_token": 0}[newline]
    if compression is None:
        assert all(answer.tokens.newlines == newlines for answer in together)
    elif newline == "grid":
        # f0 and f4 keep their 3 rows each; a compared frame keeps int(0.1 * 9) = 0 tokens, no row.
        assert all(answer.tokens.newlines == 2 * 3 for answer in together)


@pytest.mark.parametrize("compression", METHODS[1:], ids=["paper", "official"])
def test_compression_changes_what_the_model_says(model, compression):
    clips = [video(seed, 8, 0.8) for seed in range(4)]
    plain = model.generate(clips, ["What?"] * 4, compression=None, decoding=Decoding(12))
    pruned = model.generate(clips, ["What?"] * 4, compression=compression, decoding=Decoding(12))
    assert [a.token_ids for a in plain] != [a.token_ids for a in pruned]


def test_each_stage_alone_does_something(model):
    def run(compression):
        answers = model.generate(
            [video(s, 8, 0.8) for s in range(3)], QUESTIONS, compression=compression,
            decoding=Decoding(12),
        )  # fmt: skip
        return [answer.token_ids for answer in answers], answers[0].tokens

    plain, _ = run(None)
    nothing, counts = run(DyCoke(k=0, p=0, layer=2))
    assert nothing == plain
    assert counts.attended == (128,) * 11
    merged, counts = run(DyCoke(p=0, layer=2))
    assert merged != plain
    assert (counts.merged, set(counts.attended), counts.refreshes) == (56, {56}, 0)
    pruned, counts = run(DyCoke(k=0, layer=2))
    assert pruned != plain
    assert (counts.merged, set(counts.attended)) == (128, {38})
    assert counts.refreshes >= 1


def test_counts_are_what_was_promised(model):
    answer = model.generate(
        [video(0, 8)], ["What?"], compression=DyCoke(layer=2), decoding=Decoding(6)
    )
    counts = answer[0].tokens
    assert (counts.visual, counts.merged, counts.newlines) == (8 * 16, 2 * 16 + 6 * 4, 1)
    assert counts.attended == (16,) * 5
    assert counts.generated == 6
    assert str(counts) == "128 visual -> 56 after merging -> 16 attended per step"
    official = DyCoke(layer=2, mode="official")
    counts = model.generate([video(0, 8)], ["What?"], compression=official, decoding=Decoding(6))[
        0
    ].tokens
    # The last window's third frame stays whole; the last visual token is always attended to.
    assert counts.merged == 3 * 16 + 5 * 4
    assert set(counts.attended) <= {int(67 * 0.3) + 1, 68}


def test_counts_are_read_from_the_arrays(model, monkeypatch):
    """A mask that hides more than planned shows in the counts: they are no formula."""
    original = kv_pruning.WorkingSet.start

    def hide_some(self, *given):
        view = original(self, *given)
        valid = view.memory.valid.at[:, ::2].set(False)
        return replace(view, memory=view.memory._replace(valid=valid))

    monkeypatch.setattr(kv_pruning.WorkingSet, "start", hide_some)
    prefill.clear_cache()
    method = DyCoke(layer=2, threshold=0.87)
    answer = model.generate([video(0, 8)], ["What?"], compression=method, decoding=Decoding(4))[0]
    monkeypatch.undo()
    prefill.clear_cache()
    assert all(count < 16 for count in answer.tokens.attended)


def test_plain_model_traces_no_compression(monkeypatch):
    def never(*_, **__):
        raise AssertionError("compression was traced")

    for module, name in ((ttm, "select"), (kv_pruning, "_similarity")):
        monkeypatch.setattr(module, name, never)
    for name in ("start", "update"):
        monkeypatch.setattr(kv_pruning.WorkingSet, name, never)
        monkeypatch.setattr(kv_pruning.MaskedCache, name, never)
        monkeypatch.setattr(kv_pruning.OneShot, name, never)
    model = tiny_model(layers=3)
    model.generate([video(0, 4)], ["What?"], compression=None, decoding=Decoding(3))
    # Each stage alone would have been caught.
    for method in (DyCoke(p=0, layer=1), DyCoke(k=0, layer=1)):
        with pytest.raises(AssertionError, match="traced"):
            model.generate([video(0, 4)], ["What?"], compression=method, decoding=Decoding(3))


def test_mixed_stream_compiles_nothing_after_warm_up(model, compilations):
    """Rows, lengths, seeds, limits, sampling and stop ids are data; only buckets are shapes."""
    method = DyCoke(layer=2)

    def run(rows, **settings):
        questions = [("Who" + "?" * (row + rows))[:9] for row in range(rows)]
        settings = {"decoding": Decoding(32)} | settings  # one bucket
        videos = [video(rows + row, 8) for row in range(rows)]
        ask = model.stream if settings.pop("stream", False) else model.generate
        answers = ask(videos, questions, compression=method, **settings)
        assert len(list(answers)) >= rows
        return compilations()

    run(1)
    warm = run(4)
    assert warm > 0
    variants = [
        {"decoding": [Decoding(20), Decoding(3), Decoding(9)]},
        {"decoding": [Decoding(32, 0.7, seed=5), Decoding(32, seed=6), Decoding(32, 1.1, seed=7)]},
        {"decoding": Decoding(32, 1.2, top_k=5, top_p=0.9)},
        {"decoding": Decoding(1)},
        {"decoding": Decoding(9), "stream": True},
        {"prompting": Prompting("Be kind to the person who asks.")},
    ]
    for settings in variants:
        assert run(3, **settings) == warm
    stopping = LlavaVideo(model.model, model.tokenizer)
    stopping.stop_ids = (1, 2, 3)
    stopping.generate([video(9, 8)], ["So?"], compression=method, decoding=Decoding(30))
    assert compilations() == warm


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_rows_of_short_and_still_clips(model, frames):
    """Alone, these are encoded in smaller chunks; a still clip makes all similarities equal."""
    videos = [video(s, frames) for s in range(4)] + [video(9, frames, moving=0.0)]
    settings = {"compression": DyCoke(layer=2), "decoding": Decoding(8)}
    together = model.generate(videos, ["What?"] * 5, **settings)
    for clip, answer in zip(videos, together, strict=True):
        alone = model.generate([clip], ["What?"], **settings)[0]
        assert (answer.token_ids, answer.tokens) == (alone.token_ids, alone.tokens)


def test_the_whole_path_equals_the_text_of_the_paper(model):
    """Frames to ids, merged and pruned, against plain NumPy behind the vision tower."""
    clips = [video(seed, 7, 0.5) for seed in range(2)]
    settings = {"k": 0.6, "layer": 2, "p": 0.7}
    answers = model.generate(
        clips, QUESTIONS[:2], compression=DyCoke(**settings), decoding=Decoding(9)
    )
    features = np.asarray(encode(model.model, clips, 2, 7).tokens)
    table = np.asarray(model.params["language_model.embed_tokens.weight"])
    newline = np.asarray(model.params["image_newline"])[None]
    for clip, question, answer in zip(features, QUESTIONS, answers, strict=False):
        kept = paper_merge(clip, settings["k"])
        prompt = build_prompt(model.tokenizer, question, has_video=True)
        before, after = table[list(prompt.before)], table[list(prompt.after)]
        embeds = np.concatenate([before, clip.reshape(-1, clip.shape[-1])[kept], newline, after])
        candidates = list(range(len(before), len(before) + len(kept)))
        logits, sets, refreshes = Qwen2(model.config.text, model.params).generate(
            embeds, candidates, answer.token_ids[:-1], layer=2, p=settings["p"]
        )
        assert tuple(logits.argmax(-1)) == answer.token_ids
        assert answer.tokens.attended == tuple(len(chosen) for chosen in sets)
        assert answer.tokens.refreshes == sum(refreshes)
        assert answer.tokens.merged == len(kept)


def test_stop_tokens_end_a_row_alone(model):
    videos, prompts = [video(s, 8) for s in range(3)], QUESTIONS
    free = model.generate(videos, prompts, compression=None, decoding=Decoding(20))
    stopping = LlavaVideo(model.model, model.tokenizer)
    # A token that the first row says early, and another row not at that place.
    stop = free[0].token_ids[4]
    stopping.stop_ids = (stop,)
    answers = stopping.generate(videos, prompts, compression=None, decoding=Decoding(20))
    for before, after in zip(free, answers, strict=True):
        ids = before.token_ids
        cut = ids.index(stop) + 1 if stop in ids else len(ids)
        assert after.token_ids == ids[:cut]
        assert after.finish_reason == ("stop" if stop in ids else "length")
        assert len(after.tokens.attended) == cut - 1
    assert answers[0].finish_reason == "stop"


def test_streamed_pieces_make_up_the_answers(model):
    videos, prompts = [video(0, 8), None, video(1, 8)], QUESTIONS
    decodings = [Decoding(most, temperature=1.0) for most in (18, 5, 9)]
    settings = {"compression": DyCoke(layer=2), "decoding": decodings}
    whole = model.generate(videos, prompts, **settings)
    texts, answers, pieces = [""] * 3, {}, 0
    for piece in model.stream(videos, prompts, **settings):
        assert piece.index not in answers, "nothing comes after the last piece"
        texts[piece.index] += piece.text
        pieces += 1
        if piece.answer is not None:
            answers[piece.index] = piece.answer
    assert pieces > 6
    for index, answer in enumerate(whole):
        assert texts[index] == answer.text == answers[index].text
        assert answers[index].token_ids == answer.token_ids
        assert answers[index].tokens == answer.tokens


def test_streams_whole_characters_only(model):
    """Every id is a byte here: the bytes of one character must not come apart."""
    from dycoke_jax.engine.requests import Generated, Seconds, TokenCounts
    from dycoke_jax.engine.text import GrowingText

    ids = model.tokenizer.backend_tokenizer.encode("a né 日本 🙂!").ids
    text, shown, counts = GrowingText(model.tokenizer), [], TokenCounts(1, 0, 0, 0, (), 0, 1)
    for end in range(1, len(ids) + 1):
        reason = "length" if end == len(ids) else None
        shown.append(text.extend(Generated(tuple(ids[:end]), reason, counts, Seconds())))
    assert "".join(shown) == "a né 日本 🙂!"
    assert not any("�" in piece for piece in shown)


def test_windows_of_a_long_list_keep_the_order(model):
    videos = [video(seed, 4 + seed % 3) for seed in range(7)]
    prompts = [f"{n}?" for n in range(7)]
    small = model.generate(videos, prompts, compression=None, decoding=Decoding(4), batch_size=2)
    large = model.generate(videos, prompts, compression=None, decoding=Decoding(4), batch_size=7)
    assert [a.token_ids for a in small] == [a.token_ids for a in large]


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 7])
def test_every_number_of_frames_works_in_paper_mode(model, frames):
    answer = model.generate(
        [video(0, frames)], ["?"], compression=DyCoke(layer=2), decoding=Decoding(3)
    )[0]
    compared = frames - -(-frames // 4)
    assert answer.tokens.merged == 16 * -(-frames // 4) + 4 * compared
    assert len(answer.token_ids) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 1.0}, r"k is 1.0; it must lie in \[0, 1\)"),
        ({"k": -0.1}, r"\[0, 1\)"),
        ({"p": 1.0}, r"p is 1.0; it must lie in \[0, 1\)"),
        ({"k": float("nan")}, "k is nan"),
        ({"layer": 1.5}, "layer is 1.5"),
        ({"layer": 0}, r"layer is 0; it must lie in 1..layers-1"),
        ({"threshold": 0.0}, r"\(0, 1\]"),
        ({"threshold": 1.5}, r"\(0, 1\]"),
        ({"mode": "fast"}, "paper or official"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_dycoke_settings_outside_their_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        DyCoke(**settings)


@pytest.mark.parametrize(
    ("newline", "frames", "settings", "message"),
    [
        ("one_token", 8, {"layer": 4}, r"must lie in 1\.\.3"),
        ("one_token", 4, {"layer": 2, "mode": "official"}, "at least 5 frames"),
        ("grid", 8, {"layer": 2, "mode": "official"}, "one_token"),
    ],
)
def test_dycoke_settings_that_a_model_or_clip_cannot_take(newline, frames, settings, message):
    model = tiny_model(newline)
    with pytest.raises(ConfigError, match=message):
        model.generate([video(0, frames)], ["What?"], compression=DyCoke(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_of_decoding_outside_their_range(settings, message):
    with pytest.raises(RequestError, match=message):
        Decoding(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"videos": [None], "prompts": ["a", "b"]}, "1 videos but 2 prompts"),
        ({"prompts": "What?"}, "lists"),
        ({"decoding": [Decoding(1), Decoding(2)]}, "2 values for 1 requests"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"decoding": Decoding(40_000)}, "32768 positions"),
        (
            {
                "videos": [np.zeros((2, 9, 9, 3), np.uint8)],
                "prompting": Prompting(time_text=True),
            },
            "needs files",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_requests_that_make_no_sense(model, arguments, message):
    arguments = {"videos": None, "prompts": ["What?"]} | arguments
    with pytest.raises(RequestError, match=message):
        model.generate(**arguments)


def test_nothing_to_do_is_no_error(model):
    assert model.generate([], []) == []


def test_bfloat16_weights_give_bfloat16_caches(model):
    """Half-width weights must not silently widen what is kept and moved."""
    from dycoke_jax.generation.assemble import TextIds, no_visual
    from dycoke_jax.generation.layout import plan
    from dycoke_jax.generation.prefill import read_prompt

    weights = {name: weight.astype(jnp.bfloat16) for name, weight in model.params.items()}
    half = Model(weights, model.config, "bfloat16")
    layout = plan(model.config, 1, 0, 4, 4, 1, None)
    length = jnp.array([4])
    prefix, question = (
        jnp.zeros((1, n), jnp.int32) for n in (layout.slots.prefix, layout.slots.question)
    )
    text = TextIds(prefix, length, question, length)
    x, _, views = read_prompt(half.bind(), no_visual(model.config, 1), text, layout)
    caches = views[0].caches
    assert {a.dtype for cache in caches for a in cache} | {x.dtype} == {jnp.dtype(jnp.bfloat16)}
    low = LlavaVideo(half, model.tokenizer)
    low.stop_ids = ()
    method, decoding = DyCoke(layer=2), Decoding(5)
    answer = low.generate([video(0, 8)], ["?"], compression=method, decoding=decoding)[0]
    assert answer.tokens.attended == (16,) * 4


def test_each_request_may_have_settings_of_its_own(model):
    both = model.generate([None] * 2, ["a", "b"], decoding=[Decoding(2), Decoding(3)])
    assert [len(answer.token_ids) for answer in both] == [2, 3]


def test_a_bad_clip_ends_the_run_without_reading_the_others(model, tmp_path):
    """The error names the clip, and clips that nobody has begun to read are left alone."""
    read = []

    class Noted:
        def __init__(self, index):
            self.index = index

        def __fspath__(self):
            read.append(self.index)
            return str(tmp_path / "missing.mp4")

    os.PathLike.register(Noted)
    with pytest.raises(VideoError, match="no such file"):
        model.generate([Noted(n) for n in range(200)], ["?"] * 200, batch_size=200)
    assert len(set(read)) < 200


def test_tokenizer_of_another_model_is_refused(model):
    small = replace(model.config, text=replace(model.config.text, vocab_size=200))
    with pytest.raises(CheckpointError, match="ids up to 260"):
        LlavaVideo(Model(model.params, small), model.tokenizer)
