"""A stream of requests: full batches, failures as items, bounded memory, nothing compiled anew."""

import errno
import gc
import logging
import os
import threading
import time
import weakref
from dataclasses import replace
from itertools import chain, count, repeat
from pathlib import Path

import jax
import numpy as np
import pytest
from support.clips import cut, textured, write_clip
from support.tiny import SIDE, tiny_model

from dycoke_jax import Decoding, DyCoke, Failure, FrameSampling, Piece, Prompting, Request
from dycoke_jax.engine.prepare import CLIP_THREADS, Ahead
from dycoke_jax.engine.schedule import PATIENCE, form_batches
from dycoke_jax.errors import ConfigError, PromptError, RequestError, VideoError
from dycoke_jax.inputs import read_clip
from dycoke_jax.inputs.any_video import read_video

BATCH = 8
METHOD = DyCoke(layer=1)
FRAMES = (1, 2, 3, 4, 7)
UNREADABLE = (3, 77, 198)


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=2)


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    shape = (SIDE, SIDE, 3)
    return {n: rng.integers(0, 256, (5, n, *shape), dtype=np.uint8) for n in FRAMES}


def mixed(clips, seed=0, unreadable=()):
    """200 requests of mixed clips, questions, limits and ways of sampling, one by one."""
    rng = np.random.default_rng(seed)
    for index in range(200):
        frames, words = rng.choice([0, *clips]), rng.choice([1, 2, 40])
        video = clips[frames][rng.integers(5)] if frames else None
        decoding = Decoding(int(rng.integers(1, 33)), rng.choice([0.0, 0.9]), seed=index)
        yield Request("Why? " * words, "none.mp4" if index in unreadable else video, decoding)


def batches_of(model, requests, batch_size=BATCH):
    """The numbers of the requests of each batch."""
    formed = form_batches(model.config, model.prepare, requests, METHOD, batch_size=batch_size)
    return [[one.index for one in batch] for batch in formed]


def test_a_mixed_stream_runs_in_full_batches_and_compiles_nothing(model, clips, compilations):
    """With unreadable clips among it; and every request gets the answer that it gets alone."""

    clips = {frames: clips[frames] for frames in (3, 4)}  # of one layout

    def run(seed):
        reports, stream = [], mixed(clips, seed, UNREADABLE)
        results = [*model.run(stream, compression=METHOD, on_batch=reports.append)]
        return results, reports, compilations()

    # What is left at the end of these two streams fills more than half a batch. Fewer rows than
    # that would run in programs for so many rows.
    _, _, warm = run(seed=6)
    results, reports, after = run(seed=7)
    assert min(len(report.indices) for report in reports) > BATCH // 2
    assert after == warm > 0
    assert np.mean([report.fill for report in reports]) >= 0.85
    assert sorted(result.index for result in results) == [*range(200)]

    failures = [result for result in results if isinstance(result, Failure)]
    assert sorted(failure.index for failure in failures) == [*UNREADABLE]
    for failure in failures:
        assert failure.kind == "video"
        assert isinstance(failure.error, VideoError)
        assert failure.message == str(failure.error)
        assert "none.mp4" in failure.message
        assert "\n" not in failure.message

    answers = {one.index: one.answer for one in results if isinstance(one, Piece)}
    # In batches of one.
    for alone in model.run(mixed(clips, 7, UNREADABLE), compression=METHOD, batch_size=1):
        if isinstance(alone, Piece):
            assert answers[alone.index].token_ids == alone.answer.token_ids
            assert answers[alone.index].tokens == alone.answer.tokens


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_over_a_long_stream(model, clips):
    """Live arrays and resident memory: at most 2 % above those of the first 50 requests."""
    page = os.sysconf("SC_PAGE_SIZE")
    clips = {frames: clips[frames] for frames in (3, 4)}

    def run(seed):
        live, resident = [], []
        results = model.run(mixed(clips, seed), compression=METHOD)
        for number, _ in enumerate(results, 1):
            if number > 50:
                live.append(sum(array.nbytes for array in jax.live_arrays()))
                resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
        return live, resident

    run(seed=6)  # compiles
    gc.collect()
    live, resident = run(seed=7)
    assert len(live) == 150
    assert max(live) <= 1.02 * max(live[:20])
    assert max(resident) <= 1.02 * max(resident[:20])


@pytest.mark.parametrize("seed", range(6))
def test_batches_are_full_in_whatever_order_the_requests_come(model, clips, seed):
    batches = batches_of(model, mixed(clips, seed))
    assert np.mean([len(batch) for batch in batches]) >= 0.85 * BATCH
    assert sorted(chain(*batches)) == [*range(200)]


def test_batches_do_not_depend_on_how_long_clips_take_to_read(model, clips):
    plain = batches_of(model, mixed(clips))
    rng = np.random.default_rng(0)

    def slow(request):
        time.sleep(rng.uniform(0, 0.01))
        return model.prepare(request)

    formed = form_batches(model.config, slow, mixed(clips), METHOD, batch_size=BATCH)
    assert [[one.index for one in batch] for batch in formed] == plain


@pytest.mark.parametrize(("batch_size", "requests"), [(1, 5), (3, 3), (8, 5), (8, 8)])
def test_what_fits_into_one_batch_runs_as_one(model, clips, batch_size, requests):
    """Questions and system turns of different lengths, which alone would have other shapes."""
    for words, in_system in ((13, 0), (0, 2), (13, 2)):
        stream = [
            Request(
                "Why? " * (1 + words * n),
                clips[2][n % 5],
                prompting=Prompting("Be kind. " * (1 + in_system * n)),
            )
            for n in range(requests)
        ]
        batches = batches_of(model, stream, batch_size)
        assert len(batches) == -(-requests // batch_size)


def test_text_alone_and_clips_do_not_share_a_batch(model, clips):
    asked = [("Why?", None), ("Why? " * 40, clips[2][0])]
    stream = [Request(*asked[n % 2]) for n in range(6)]
    assert sorted(map(sorted, batches_of(model, stream))) == [[0, 2, 4], [1, 3, 5]]


def test_a_rare_request_is_not_overtaken_for_ever(model, clips):
    def stream():
        yield Request("Rare.")
        for _ in count():
            yield Request("Why?", clips[2][0])

    formed = form_batches(model.config, model.prepare, stream(), METHOD, batch_size=2)
    for number, batch in enumerate(formed):
        if batch[0].index == 0:
            break
        assert number < PATIENCE + 1
    formed.close()


def test_the_look_ahead_is_bounded(model, clips):
    """Four batches of requests are taken from an endless stream, the one that runs included."""
    taken = []

    def stream():
        for index in count():
            taken.append(index)
            yield Request("Why? " * (1 + 39 * (index % 2)), clips[2][0], Decoding(2))

    results = model.run(stream(), compression=METHOD, batch_size=BATCH)
    assert not taken, "nothing is read before the first result is asked for"
    for finished in range(6 * BATCH):
        next(results)
        assert len(taken) <= finished + 4 * BATCH
    results.close()


def test_a_reader_may_stop_at_any_time(model, clips):
    """Then the threads end."""

    def reading():
        return sum(thread.name.startswith("clips") for thread in threading.enumerate())

    before, request = reading(), Request("Why?", clips[2][0], Decoding(2))
    for stop in (0, 1, BATCH + 3):
        results = model.run(repeat(request), compression=METHOD, batch_size=BATCH)
        for _ in range(stop):
            next(results)
        assert reading() - before <= CLIP_THREADS
        results.close()
        assert reading() == before
        assert not [*results]


def test_each_kind_of_failure_is_an_item_and_the_others_are_answered(model, clips):
    """Each in the place of its request, with the message of the error that it stands for."""
    good = Request("Why?", decoding=Decoding(2))
    bad = {
        "video": (Request("Why?", "none.mp4"), VideoError, "no such file"),
        "prompt": (Request([], clips[3][0]), PromptError, "the conversation is empty"),
        "request": (Request("Why?", decoding=Decoding(40_000)), RequestError, "32768 positions"),
        "config": (Request("Why?", clips[2][0]), ConfigError, "at least 5 frames"),
    }

    requests = [good, *(request for request, _, _ in bad.values()), good]
    results = [*model.run(requests, compression=DyCoke(layer=1, mode="official"))]
    failures = {one.index: one for one in results if isinstance(one, Failure)}
    for index, (kind, (_, error, message)) in enumerate(bad.items(), start=1):
        assert failures[index].kind == kind
        assert type(failures[index].error) is error
        assert message in failures[index].message
    assert {one.index for one in results} - failures.keys() == {0, 5}


def test_failures_are_returned_on_request_and_otherwise_raised(model, clips):
    videos, prompts = [clips[2][0], "none.mp4", None], ["Why?", "Why?", "Why?"]
    ask = {"compression": METHOD, "decoding": Decoding(3)}
    first, failure, last = model.generate(videos, prompts, failures="return", **ask)
    assert [len(answer.token_ids) for answer in (first, last)] == [3, 3]
    assert (failure.index, failure.kind) == (1, "video")
    requests = [
        Request(prompt, clip, Decoding(3)) for clip, prompt in zip(videos, prompts, strict=True)
    ]
    items = [*model.run(requests, compression=METHOD, stream_every=1)]
    assert [one.index for one in items if isinstance(one, Failure)] == [1]
    pieces = [one for one in items if isinstance(one, Piece)]
    texts = {n: "".join(one.text for one in pieces if one.index == n) for n in (0, 2)}
    assert texts == {0: first.text, 2: last.text}
    with pytest.raises(VideoError, match=r"none\.mp4"):
        model.generate(videos, prompts, **ask)
    with pytest.raises(VideoError, match=r"none\.mp4"):
        list(model.stream(videos, prompts, **ask))


def test_failures_hold_no_frames():
    """A list of them would otherwise fill the memory with clips that were read in part."""
    held = []

    def prepare(_):
        def decode():
            frames = np.zeros(1000)
            held.append(weakref.ref(frames))
            raise OSError(len(frames))

        clip = np.zeros(1000)
        held.append(weakref.ref(clip))
        try:
            decode()
        except OSError as error:
            raise VideoError("broken") from error
        return clip

    ahead = Ahead([Request("?")], prepare)
    ahead.extend(1)
    taken = ahead.take()
    ahead.close()
    assert taken.message == "broken"
    assert isinstance(taken.error.__cause__, OSError)
    assert [one() for one in held] == [None, None]


class Broken(os.PathLike):
    """A path whose use raises an exception."""

    def __init__(self, error):
        self.error = error

    def __fspath__(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ZeroDivisionError("in\nparts"), "(ZeroDivisionError: in parts)"),
        (MemoryError(), "(MemoryError)"),
        (OSError(errno.EIO, "Input/output error"), "(OSError: [Errno 5] Input/output error)"),
        (RuntimeError("\x1b[31m" + "x" * 10_000), "(RuntimeError: \\x1b[31mxxx"),
    ],
    ids=["program", "memory", "device", "long"],
)
def test_an_unexpected_error_of_one_request_is_its_failure(model, clips, error, told, caplog):
    def read(video, *arguments, **options):
        if isinstance(video, str):
            raise error
        return read_video(video, *arguments, **options)

    caplog.set_level(logging.DEBUG, "dycoke_jax")
    requests = [Request("Why?", video, Decoding(2)) for video in (clips[2][0], "a.mp4", None)]
    items = [*model.run(requests, compression=METHOD, read=read)]
    failures = [one for one in items if isinstance(one, Failure)]
    assert {one.index for one in items if isinstance(one, Piece)} == {0, 2}
    assert [(one.index, one.kind, one.error) for one in failures] == [(1, "internal", error)]
    assert told in failures[0].message
    assert failures[0].message.isprintable()
    assert len(failures[0].message) < 500
    (record,) = [one for one in caplog.records if one.name.startswith("dycoke_jax")]
    assert record.levelname == "DEBUG"
    assert record.exc_info[1] is error


def test_generate_raises_an_unexpected_error_where_it_was(model):
    error = ZeroDivisionError()
    for ask in (model.generate, lambda *args: [*model.stream(*args)]):
        with pytest.raises(ZeroDivisionError) as caught:
            ask([Broken(error)], ["Why?"])
        assert caught.value is error
        assert "__fspath__" in [one.name for one in caught.traceback]


def test_an_end_of_the_process_in_a_preparation_ends_the_run(model):
    for end in (KeyboardInterrupt, SystemExit):
        with pytest.raises(end):
            list(model.run([Request("Why?", Broken(end()))]))


def test_an_error_of_the_stream_or_of_a_program_ends_the_run(model, monkeypatch):
    def stream():
        yield Request("Why?", decoding=Decoding(1))
        raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        list(model.run(stream()))
    monkeypatch.setattr("dycoke_jax.engine.schedule.run_batch", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(model.run([Request("Why?")]))


def test_a_clip_that_was_read_before_is_answered_as_its_file(model, tmp_path):
    """With its times and notes, and whatever the sampling of the request is."""
    path = cut(write_clip(tmp_path / "cut.mkv", textured(40)), 0.6)
    asked = {"sampling": FrameSampling(4), "allow_damaged": True}
    settings = {"decoding": Decoding(3), "prompting": Prompting(time_text=True)}
    clip = read_clip(path, asked["sampling"], SIDE, allow_damaged=True)
    (expected,) = model.generate([path], ["Why?"], compression=METHOD, **asked, **settings)
    (answer,) = model.generate([clip], ["Why?"], compression=METHOD, **settings)
    assert replace(answer, seconds=expected.seconds) == expected
    assert expected.notes == clip.notes != ()
    for small in (read_clip(path, FrameSampling(4), SIDE // 2, allow_damaged=True), empty(clip)):
        with pytest.raises(RequestError, match=rf"at least one, of shape \[{SIDE}, {SIDE}, 3\]"):
            model.generate([small], ["Why?"], compression=METHOD)


def empty(clip):
    return replace(clip, frames=clip.frames[:0], times=())


def test_no_requests_give_no_results(model):
    assert [*model.run(iter(()))] == []
    assert model.generate([], [], failures="return") == []


def test_requests_do_not_wait_for_a_full_batch_when_no_other_waits(model, clips):
    """None in the stream says so, as often as it is asked, until all requests are answered."""
    answered, unanswered_when_asked = [], []

    def stream():
        for burst in (1, 3, BATCH + 2):
            first = len(answered)
            for _ in range(burst):
                yield Request("Why?", clips[2][0], Decoding(2))
            while len(answered) < first + burst:  # a server's queue is empty so long
                unanswered_when_asked.append(first + burst - len(answered))
                assert len(unanswered_when_asked) < 100, "the requests do not run"
                yield None
        yield None  # with all requests answered it does no harm

    reports = []
    for result in model.run(
        stream(), compression=METHOD, batch_size=BATCH, on_batch=reports.append
    ):
        answered.append(result.index)
    assert answered == [*range(4 + BATCH + 2)]
    assert [len(report.indices) for report in reports] == [1, 3, BATCH, 2]
    assert unanswered_when_asked
