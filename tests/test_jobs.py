"""Batch jobs: every request ends with exactly one result, however often the job is killed."""

import errno
import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from threading import Event

import pytest
from support.clips import cut, textured, write_clip
from support.command_line import run_main
from support.jobs import (
    job_arguments,
    kill_often,
    read_results,
    start_job,
    wait_for_lines,
    without_times,
    write_job,
    write_lines,
)

from dycoke_jax import Decoding, DyCoke, FrameSampling, LlavaVideo
from dycoke_jax.assets import TINY
from dycoke_jax.cli.batch import _logged
from dycoke_jax.engine import schedule
from dycoke_jax.errors import ConfigError, EngineError, OutputError, RequestError, VideoError
from dycoke_jax.inputs import container
from dycoke_jax.inputs.any_video import read_video
from dycoke_jax.inputs.system_errors import may_pass
from dycoke_jax.jobs import run as running
from dycoke_jax.jobs.request_file import LONGEST_LINE, read_requests
from dycoke_jax.jobs.result_file import open_results
from dycoke_jax.jobs.run import Job, check_compression, check_requests, run_job
from dycoke_jax.jobs.settings import JobSettings, Shard, parse_shard

SETTINGS = JobSettings(decoding=Decoding(max_new_tokens=6), sampling=FrameSampling(4))


@pytest.fixture(scope="module")
def model():
    return LlavaVideo.from_pretrained(TINY)


def run(model, requests, results, settings=SETTINGS, shard=Shard(), force=False, **options):  # noqa: B008
    job = Job(requests, settings, shard)
    with open_results(results) as written:
        checked = check_requests(job, written, force=force)
        return run_job(model, job, written, checked, batch_size=4, force=force, **options)


def questions(count):
    return [{"id": f"q{number}", "prompt": "Why? " * number} for number in range(1, count + 1)]


@pytest.fixture
def asked(monkeypatch):
    """The prompts of the requests that are prepared, in their order."""
    seen = []
    prepare = LlavaVideo.prepare

    def noted(self, request, **options):
        seen.append(request.prompt)
        return prepare(self, request, **options)

    monkeypatch.setattr(LlavaVideo, "prepare", noted)
    return seen


def test_results_hold_what_generate_gives(model, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 24)
    cut(write_clip(tmp_path / "cut.mp4", textured(20)), 0.6)
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]},
    ]
    sampled = {"temperature": 1.5, "seed": 7, "max_new_tokens": 9}
    requests = write_lines(
        tmp_path / "requests.jsonl",
        [
            {"id": "clip", "video": "clip.mp4", "prompt": "What?"},
            {"id": "text", "prompt": "Hello"},
            {"id": "turns", "video": str(clip), "messages": turns, "decoding": sampled},
            {"id": "fps", "video": "clip.mp4", "prompt": "What?", "sampling": {"fps": 2}},
            {"id": "cut", "video": "cut.mp4", "prompt": "What?"},
            {"id": "wrong", "prompt": "What?", "decoding": {"top_p": 2}},
            {"id": "long", "prompt": "why " * 5000},
        ],
    )
    results = tmp_path / "results.jsonl"
    settings = ("--frames", 4, "--max-new-tokens", 6, "--p", 0.5, "--seed", 3)
    command = ("batch", requests, results, "--model", TINY, *settings)
    code, out, err = run_main(*command, "--json")
    assert code == 3
    summary = json.loads(out)
    assert (summary["requests"], summary["answered"], summary["computed"]) == (7, 4, 7)
    assert summary["errors"] == {"video": 1, "bad_request": 1, "request": 1}
    assert (summary["failed"], summary["interrupted"]) == (3, False)
    found = read_results(results)
    decoding = Decoding(6, seed=3)
    own = replace(decoding, **sampled)
    wanted = {
        "clip": (clip, "What?", decoding, FrameSampling(4)),
        "text": (None, "Hello", decoding, FrameSampling(4)),
        "turns": (clip, turns, own, FrameSampling(4)),
        "fps": (clip, "What?", decoding, FrameSampling(4, 2.0)),
    }
    for name, (video, prompt, decoding, sampling) in wanted.items():
        (answer,) = model.generate(
            [video], [prompt], compression=DyCoke(p=0.5), decoding=decoding, sampling=sampling
        )
        result = found.pop(name)
        as_json = json.loads(json.dumps(asdict(answer)))
        del as_json["seconds"]
        assert {key: result[key] for key in as_json} == as_json
        assert set(result["seconds"]) == {"vision", "prefill", "decode"}
        used = result["settings"]
        assert used["decoding"] == asdict(decoding)
        assert used["sampling"] == asdict(sampling)
        compression = used["compression"]
        assert compression is None if video is None else compression["p"] == 0.5
    assert {name: result["error"]["kind"] for name, result in found.items()} == {
        "cut": "video",
        "wrong": "bad_request",
        "long": "request",
    }
    assert "get the file again" in found["cut"]["error"]["message"]
    assert found["wrong"]["error"]["message"].startswith("line 6: decoding: top_p is 2")
    # All of it is there: the same command does nothing, and says the same of the job.
    code, out, err = run_main(*command)
    assert (code, out) == (3, "")
    assert "4 of 7 requests answered, 3 failed (bad_request 1, request 1, video 1), 0 left" in err
    assert "0 results in" in err


def test_limits_of_clips_are_options(tmp_path):
    write_clip(tmp_path / "clip.mp4", 8)
    line = {"id": "clip", "video": "clip.mp4", "prompt": "?"}
    requests = write_lines(tmp_path / "requests.jsonl", [line])
    results = tmp_path / "results.jsonl"
    options = ("--model", TINY, "--frames", 4, "--max-new-tokens", 4)
    code, _, err = run_main("batch", requests, results, *options, "--clip-seconds", 0)
    assert code == 2
    assert "--clip-seconds) is 0" in err
    assert run_main("batch", requests, results, *options, "--clip-frames", 7)[0] == 3
    message = read_results(results)["clip"]["error"]["message"]
    assert "has more frames than the limit of 7" in message
    assert message.endswith("(--clip-frames)")
    results.unlink()
    assert run_main("batch", requests, results, *options, "--clip-frames", 8)[0] == 0


def test_a_job_without_failures_exits_with_0(tmp_path):
    requests = write_lines(tmp_path / "requests.jsonl", questions(2))
    results = tmp_path / "results.jsonl"
    code, out, err = run_main("batch", requests, results, "--model", TINY, "--max-new-tokens", 4)
    assert (code, out) == (0, "")
    assert "2 of 2 requests answered, 0 failed, 0 left" in err


BAD = {
    "{": "not JSON",
    "[]": "not an object",
    '{"id": "a", "prompt": "?", "prompt": "!"}': "the key 'prompt' is given twice",
    '{"id": "a", "prompt": "?", "fps": 1}': "a request has no key 'fps'; it has id, video,",
    '{"id": "a", "prompt": "?", "decoding": {"beams": 2}}': "decoding has no key 'beams'; it has",
    '{"id": "a", "prompt": "?", "decoding": {"top_k": 1.0}}': "decoding: top_k is 1.0",
    '{"id": "a", "prompt": "?", "decoding": 3}': "decoding must be an object",
    '{"id": "a", "prompt": "?", "sampling": {"fps": NaN}}': "NaN is no JSON value",
    '{"id": "a", "prompt": "?", "sampling": {"frames": 0}}': "sampling: frames is 0",
    '{"id": "a", "video": "clip.mp4"}': "has neither prompt and messages",
    '{"id": "a", "prompt": "?", "messages": []}': "has both prompt and messages",
    '{"id": "a", "prompt": 3}': "prompt is 3; it must be a text",
    '{"id": "a", "messages": "?"}': "messages must be a list of objects",
    '{"id": "a", "prompt": "?", "video": ["b.mp4"]}': "it must be a text",
    '{"id": "a", "prompt": "?", "video": " "}': "video is empty",
    '{"id": 3, "prompt": "?"}': "id is 3; it must be a text",
    '{"id": "", "prompt": "?"}': "has no id",
    '{"prompt": "?"}': "has no id",
    '{"id": "a", "prompt": ' + "[" * 100_000: "nested too deeply",
    '{"id": "a", "prompt": ' + "9" * 5000 + "}": "digits",
    '{"id": "a", "x": "\udcff"}': "not UTF-8",
}


@pytest.mark.usefixtures("unchecked_types")
def test_bad_lines_are_told_by_number_and_do_not_stop_the_job(model, tmp_path):
    requests, results = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    # Each has an id of its own, and an empty line before it, which counts.
    texts = [text.replace('"id": "a"', f'"id": "a{n}"') for n, text in enumerate(BAD)]
    content = "".join(f"\n{text}\r\n" for text in texts)
    last = json.dumps({"id": "good", "prompt": "Hello"})
    requests.write_bytes(b"\xef\xbb\xbf" + content.encode(errors="surrogateescape") + last.encode())
    summary = run(model, requests, results)
    assert summary.errors == {"bad_request": len(BAD)}
    assert summary.answered == 1
    found = read_results(results)
    assert "text" in found.pop("good")
    for number, (text, says) in enumerate(BAD.items()):
        line = 2 * number + 2
        readable = text.startswith('{"id": "a"') and says[:8] not in ("the key ", "NaN is n")
        readable &= not any(words in says for words in ("nested", "digits", "UTF-8"))
        result = found.pop(f"a{number}" if readable else f"line {line}")
        assert result["error"]["kind"] == "bad_request"
        message = result["error"]["message"]
        assert message.startswith(f"line {line}: ")
        assert says in message
        assert message.isprintable()
    assert not found


def test_an_endless_line_is_a_bad_line_and_the_next_is_read(tmp_path):
    requests = tmp_path / "requests.jsonl"
    start = b'{"id": "a", "prompt": "'
    with requests.open("wb") as file:
        file.write(start + b"x" * (2 * LONGEST_LINE) + b'"}\n')
        file.write(start + b"x" * (LONGEST_LINE - len(start) - 3) + b'"}\n')  # as long as allowed
        file.write(b'{"id": "b", "prompt": "?"}')
    long, whole, short = read_requests(requests, SETTINGS)
    assert str(long.request) == "line 1: longer than 16 MiB"
    assert (whole.number, len(whole.request.prompt)) == (2, LONGEST_LINE - len(start) - 3)
    assert (short.number, short.id, short.request.prompt) == (3, "b", "?")


def test_duplicate_ids_are_refused_before_anything_is_done(tmp_path):
    requests = write_lines(
        tmp_path / "requests.jsonl", [*questions(3), {"id": "q2", "prompt": "again"}]
    )
    results = tmp_path / "results.jsonl"
    code, _, err = run_main("batch", requests, results, "--model", "none", "--shard", "1/2")
    assert code == 2
    assert f"{requests}: lines 2 and 4 have the same id 'q2'" in err
    assert results.read_bytes() == b""


@pytest.mark.parametrize(
    ("name", "says"),
    [("none.jsonl", "is missing"), (".", "is no regular file"), ("results.jsonl", "both")],
)
def test_what_is_no_file_of_requests_is_refused(tmp_path, name, says):
    (tmp_path / "results.jsonl").touch()
    code, _, err = run_main("batch", tmp_path / name, tmp_path / "results.jsonl", "--model", "none")
    assert code == 2
    assert err.startswith("error: ")
    assert says in err


def test_results_cut_at_any_byte_are_resumed_behind_the_last_whole_line(tmp_path):
    results = tmp_path / "results.jsonl"
    with open_results(results) as file:
        for number in range(2):
            file.add({"id": f"é{number}\n", "model": "m", "request": str(number)})
    whole = results.read_bytes()
    ends = [0] + [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 3
    for size in range(len(whole) + 1):
        for lost in (b"", b"\0" * 5):  # what a loss of power leaves
            results.write_bytes(whole[:size] + (lost if size not in ends[1:] else b""))
            with open_results(results) as file:
                count = sum(end <= size for end in ends) - 1
                assert list(file.digests.values()) == ["0", "1"][:count]
            assert results.read_bytes() == whole[: ends[count]]


@pytest.mark.parametrize(
    "content",
    [
        "a text",
        "a text\n",
        '{"id": "a"}\n',
        '{"id": "a", "model": "m", "request": "r"}\n' * 2,
        '{"id": "a", "model": "m", "request": "r"}\n{"id": "b", "te\n{"id": "b"',
        '[{"id": "a"}',
    ],
    ids=["torn text", "text", "no result", "twice", "torn inside", "array"],
)
def test_a_file_that_holds_no_results_is_left_as_it_is(tmp_path, content):
    results = tmp_path / "results.jsonl"
    results.write_text(content)
    with pytest.raises(OutputError, match=r"line \d is no result of a job"), open_results(results):
        pass
    assert results.read_text() == content


def test_results_that_cannot_be_written_are_an_error_of_one_line(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_results(tmp_path / "results.jsonl") as file:
        file.add({"id": "a", "model": "m", "request": "r"})
        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match=r"cannot write .*results.jsonl: No space left"):
            file.commit()
    monkeypatch.undo()
    with pytest.raises(OutputError, match="there is no folder"), open_results(tmp_path / "a" / "b"):
        pass


def test_two_jobs_do_not_write_one_file(tmp_path):
    results, other = tmp_path / "results.jsonl", tmp_path / "other.jsonl"
    requests = write_lines(tmp_path / "requests.jsonl", questions(1))
    with open_results(results):
        other.symlink_to(results)
        for name in (results, other):
            code, _, err = run_main("batch", requests, name, "--model", TINY)
            assert code == 2
            assert "another job is writing" in err
    with open_results(other):
        pass


def test_what_has_a_result_is_not_computed_again(model, tmp_path, asked):
    requests = write_lines(tmp_path / "requests.jsonl", questions(10))
    results = tmp_path / "results.jsonl"
    run(model, requests, results)
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:3] + lines[6:]) + lines[3][:40])
    whole = {json.loads(line)["id"] for line in lines}
    assert len(whole) == 10
    missing = {json.loads(line)["id"] for line in lines[3:6]}
    asked.clear()
    summary = run(model, requests, results)
    assert sorted(asked) == sorted("Why? " * int(own[1:]) for own in missing)
    assert (summary.computed, summary.answered) == (3, 10)
    results.with_name("again").write_bytes(b"".join(lines))
    again = read_results(results.with_name("again"))
    assert without_times(read_results(results)) == without_times(again)


def test_a_job_can_be_extended_by_further_lines(model, tmp_path, asked):
    requests = write_lines(tmp_path / "requests.jsonl", questions(2))
    results = tmp_path / "results.jsonl"
    run(model, requests, results)
    write_lines(requests, ["", *reversed(questions(3))])
    asked.clear()
    assert run(model, requests, results).answered == 3
    assert asked == ["Why? Why? Why? "]


def test_changed_settings_and_requests_are_refused_unless_forced(model, tmp_path, asked):
    requests = write_lines(tmp_path / "requests.jsonl", questions(3))
    results = tmp_path / "results.jsonl"
    stop = Event()
    run(model, requests, results)
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(lines[0])
    first = json.loads(lines[0])["id"]
    asked.clear()
    changed = replace(SETTINGS, decoding=Decoding(max_new_tokens=5))
    refused = rf"1 requests or their settings have changed .*the first in line {first[1:]}, "
    with pytest.raises(RequestError, match=refused):
        run(model, requests, results, changed, stop=stop)
    other = write_lines(tmp_path / "other.jsonl", [{"id": first, "prompt": "Another"}])
    with pytest.raises(RequestError, match="have changed since their results were written"):
        run(model, other, results)
    assert not asked
    assert results.read_bytes() == lines[0]
    assert run(model, requests, results, changed, force=True).computed == 2
    found = read_results(results)
    lengths = {name: one["settings"]["decoding"]["max_new_tokens"] for name, one in found.items()}
    assert lengths == {"q1": 5, "q2": 5, "q3": 5} | {first: 6}
    # The settings of the job that a request does not use are not compared.
    own = {"max_new_tokens": 6, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    line = next(one for one in questions(3) if one["id"] == first) | {"decoding": own}
    write_lines(other, [line])
    assert run(model, other, results, changed).computed == 0


def test_another_model_is_refused_unless_forced(model, tmp_path, asked):
    requests = write_lines(tmp_path / "requests.jsonl", questions(2))
    results = tmp_path / "results.jsonl"
    run(model, requests, results)
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(lines[0])
    asked.clear()
    name = "language_model.norm.weight"
    tuned = replace(model.model, params=model.params | {name: model.params[name] * 1.5})
    config = replace(model.config, text=replace(model.config.text, rope_theta=5000.0))
    others = (
        LlavaVideo(tuned, model.tokenizer, model.stop_ids),
        LlavaVideo(replace(model.model, config=config), model.tokenizer, model.stop_ids),
        LlavaVideo(replace(model.model, kv="int8"), model.tokenizer, model.stop_ids),
    )
    for other in others:
        with pytest.raises(RequestError, match="holds results of another model"):
            run(other, requests, results)
    assert not asked
    assert run(others[0], requests, results, force=True).computed == 1
    assert len({one["model"] for one in read_results(results).values()}) == 2


def test_shards_are_disjoint_and_make_the_whole_job(model, tmp_path):
    lines = [*questions(7), "{"]
    requests = write_lines(tmp_path / "requests.jsonl", lines)
    run(model, requests, tmp_path / "whole.jsonl")
    parts = {}
    for number in (1, 2, 3):
        path = tmp_path / f"{number}.jsonl"
        summary = run(model, requests, path, shard=parse_shard(f"{number}/3"))
        part = read_results(path)
        assert summary.requests == len(part)
        assert not parts.keys() & part.keys()
        parts |= part
    assert set(part) == {"q3", "q6"}  # every third line
    assert without_times(parts) == without_times(read_results(tmp_path / "whole.jsonl"))


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1/0", "1", "1/2/3", "a/b", "1/ 2", "-1/2"])
def test_what_is_no_shard_is_refused(tmp_path, text):
    requests = write_lines(tmp_path / "requests.jsonl", questions(1))
    code, _, err = run_main(
        "batch", requests, tmp_path / "results.jsonl", "--model", "none", "--shard", text
    )
    assert code == 2
    assert "shard" in err


def unreadable(number):
    error = VideoError("the file server does not answer")
    error.__cause__ = OSError(number, "some reason")
    return error


@pytest.mark.parametrize("retries", [0, 2])
def test_failures_that_may_pass_are_tried_again_after_the_others(
    model, tmp_path, monkeypatch, retries
):
    """One file can be read at the third try, one never, and one is not there."""
    clip = write_clip(tmp_path / "clip.mp4", 8)
    errors = {"third": [errno.EIO, errno.ESTALE], "never": [errno.ETIMEDOUT] * 9}
    errors["gone"] = [errno.ENOENT] * 9
    names = [*errors, "good"]
    requests = write_lines(
        tmp_path / "requests.jsonl",
        [{"id": name, "video": str(clip), "prompt": name} for name in names],
    )
    tried = []
    prepare = LlavaVideo.prepare

    def flaky(self, request, **options):
        tried.append(request.prompt)
        if left := errors.get(request.prompt):
            raise unreadable(left.pop(0))
        return prepare(self, request, **options)

    monkeypatch.setattr(LlavaVideo, "prepare", flaky)
    monkeypatch.setattr(running, "RETRY_AFTER", 0.001)
    summary = run(model, requests, tmp_path / "results.jsonl", max_retries=retries)
    found = read_results(tmp_path / "results.jsonl")
    assert [tried.count(name) for name in names] == [1 + retries, 1 + retries, 1, 1]
    failed = {name for name, result in found.items() if "error" in result}
    assert failed == ({"third"} if not retries else set()) | {"never", "gone"}
    assert found.keys() == set(names)
    assert summary.errors == {"video": len(failed)}
    assert found["never"]["error"]["message"] == "the file server does not answer"


def test_an_unexpected_error_is_the_result_of_its_request(tmp_path, monkeypatch):
    """Whatever is wrong with the program or the machine at one clip, the others are answered."""
    clip = write_clip(tmp_path / "clip.mp4", 8)
    lines = [{"id": "bug", "video": "bug.mp4", "prompt": "?"}]
    lines += [{"id": "memory", "video": "memory.mp4", "prompt": "?"}]
    lines += [{"id": "good", "video": "clip.mp4", "prompt": "?"}, *questions(3)]
    requests = write_lines(tmp_path / "requests.jsonl", lines)
    errors = {"bug.mp4": KeyError("width"), "memory.mp4": MemoryError()}

    def read(self, video, *arguments, **options):
        if video.name in errors:
            raise errors[video.name]
        return read_video(video, *arguments, **options)

    monkeypatch.setattr("dycoke_jax.inputs.decoding_pool.DecodingPool.read", read)
    results = tmp_path / "results.jsonl"
    settings = ("--frames", 4, "--max-new-tokens", 4, "--json")
    code, out, err = run_main("batch", requests, results, "--model", TINY, *settings)
    assert code == 3
    assert json.loads(out)["errors"] == {"internal": 2}
    assert "Traceback" not in err
    found = read_results(results)
    assert "(KeyError: 'width')" in found["bug"]["error"]["message"]
    assert "(MemoryError)" in found["memory"]["error"]["message"]
    assert {name for name, one in found.items() if "text" in one} == {"good", "q1", "q2", "q3"}
    assert clip.exists()


@pytest.fixture
def failing(monkeypatch):
    """A function that lets batches of these numbers fail, counted from the first that runs."""
    numbers, begun, before = set(), [], []
    run_batch = schedule.run_batch

    def run_or_fail(*arguments, **options):
        begun.append(None)
        if len(begun) in numbers:
            for call in before:
                call()
            raise ZeroDivisionError("out of\nmemory")
        yield from run_batch(*arguments, **options)

    monkeypatch.setattr(schedule, "run_batch", run_or_fail)

    def fail(*these, then=None):
        begun.clear()
        numbers.clear()
        numbers.update(these)
        before[:] = [then] if then else []

    return fail


def kinds_of(results):
    return {own: one["error"]["kind"] for own, one in results.items() if "error" in one}


def test_a_batch_that_fails_costs_its_own_requests_and_the_job_goes_on(model, tmp_path, failing):
    requests = write_lines(tmp_path / "requests.jsonl", questions(20))
    run(model, requests, tmp_path / "whole.jsonl")
    whole = read_results(tmp_path / "whole.jsonl")
    for number in (1, 3, 5):  # of five
        failing(number)
        results = tmp_path / f"{number}.jsonl"
        summary = run(model, requests, results)
        assert summary.errors == {"internal": 4}
        assert (summary.answered, summary.interrupted) == (16, False)
        found = read_results(results)
        assert found.keys() == whole.keys()
        failed = kinds_of(found)
        assert "(ZeroDivisionError: out of memory)" in found[min(failed)]["error"]["message"]
        answers = {own: one for own, one in found.items() if own not in failed}
        assert without_times(answers).items() <= without_times(whole).items()


def test_a_device_that_is_lost_ends_the_job_and_costs_no_results(model, tmp_path, failing):
    requests = write_lines(tmp_path / "requests.jsonl", questions(20))
    results = tmp_path / "results.jsonl"
    failing(3, 4)
    with pytest.raises(EngineError, match=r"two batches in a row .*ZeroDivisionError: out of mem"):
        run(model, requests, results)
    found = read_results(results)
    assert len(found) == 8
    assert not kinds_of(found)
    failing()
    assert run(model, requests, results).answered == 20


def test_an_interrupt_leaves_the_requests_of_a_failed_batch_to_the_next_run(
    model, tmp_path, failing
):
    requests = write_lines(tmp_path / "requests.jsonl", questions(20))
    results, stop = tmp_path / "results.jsonl", Event()
    failing(1, then=stop.set)
    summary = run(model, requests, results, stop=stop)
    assert (summary.computed, summary.interrupted) == (0, True)
    assert results.read_bytes() == b""
    stop.clear()
    failing()
    assert run(model, requests, results, stop=stop).answered == 20


def test_a_damaged_clip_is_read_once_and_an_unreadable_one_as_often_as_is_said(
    model, tmp_path, monkeypatch
):
    for name in ("damaged.mp4", "unreadable.mp4"):
        cut(write_clip(tmp_path / name, textured(20)), 0.6)
    names = ["damaged.mp4", "unreadable.mp4"]
    lines = [{"id": name, "video": name, "prompt": "?"} for name in names]
    requests = write_lines(tmp_path / "requests.jsonl", lines)
    tried = []

    def read(video, *arguments, **options):
        tried.append(video.name)
        return read_video(video, *arguments, **options)

    def check_readable(source):
        if "unreadable" in source.name:
            raise unreadable(errno.EIO)

    monkeypatch.setattr(container, "check_readable", check_readable)
    monkeypatch.setattr(running, "RETRY_AFTER", 0.001)
    run(model, requests, tmp_path / "results.jsonl", read=read, max_retries=3)
    assert [tried.count(name) for name in names] == [1, 4]
    found = read_results(tmp_path / "results.jsonl")
    assert "get the file again" in found["damaged.mp4"]["error"]["message"]
    assert found["unreadable.mp4"]["error"] == {
        "kind": "video",
        "message": "the file server does not answer",
    }


def test_which_failures_may_pass(tmp_path):
    assert may_pass(unreadable(errno.EMFILE))
    assert not may_pass(unreadable(errno.EACCES))
    assert not may_pass(VideoError("damaged"))
    with pytest.raises(VideoError) as missing:
        LlavaVideo.from_pretrained(TINY).generate([tmp_path / "none.mp4"], ["?"])
    assert not may_pass(missing.value)


def test_a_compression_that_no_clip_of_the_job_allows_is_refused_at_once(tmp_path):
    clip = {"id": "clip", "video": "clip.mp4", "prompt": "?"}
    requests = write_lines(tmp_path / "requests.jsonl", [clip, *questions(2)])
    results = tmp_path / "results.jsonl"
    code, _, err = run_main("batch", requests, results, "--model", TINY, "--layer", 99)
    assert code == 2
    assert "layer" in err
    assert results.read_bytes() == b""


def test_a_compression_that_some_clip_allows_is_not_refused(model, tmp_path):
    class Picky:
        stages = property(lambda self: self)

        def check(self, config, frames):
            if frames < 8:
                raise ConfigError("too short")

    job = Job(tmp_path / "requests.jsonl", SETTINGS)
    clip = {"id": "a", "video": "clip.mp4", "prompt": "?"}
    for sampling, works in ((None, False), ({"frames": 8}, True), ({"fps": 2}, True)):
        lines = [clip, clip | {"id": "b", "sampling": sampling}]
        write_lines(job.requests, lines)
        with open_results(tmp_path / "results.jsonl") as written:
            checked = check_requests(job, written)
        if works:
            check_compression(Picky(), model.config, checked)
        else:
            with pytest.raises(ConfigError, match="too short"):
                check_compression(Picky(), model.config, checked)


def test_a_stopped_job_completes_the_batch_that_runs_and_begins_no_other(model, tmp_path):
    requests = write_lines(tmp_path / "requests.jsonl", questions(20))
    results, stop = tmp_path / "results.jsonl", Event()

    def progress(what, done, total):
        assert total == 20
        if done == 5:  # the first of the second batch of four
            stop.set()

    summary = run(model, requests, results, stop=stop, progress=progress)
    assert (summary.answered, summary.computed, summary.interrupted) == (8, 8, True)
    assert len(read_results(results)) == 8
    summary = run(model, requests, results)
    assert (summary.answered, summary.computed, summary.interrupted) == (20, 12, False)


def test_a_job_that_is_stopped_before_its_first_batch_runs_none(model, tmp_path, asked):
    requests = write_lines(tmp_path / "requests.jsonl", questions(6))
    stop = Event()
    stop.set()
    summary = run(model, requests, tmp_path / "results.jsonl", stop=stop)
    assert (summary.computed, summary.interrupted) == (0, True)
    assert not asked


def test_progress_tells_failures_rate_and_time_left(model, tmp_path, monkeypatch):
    requests = write_lines(tmp_path / "requests.jsonl", ["{", *questions(3)])
    seen = []
    run(model, requests, tmp_path / "results.jsonl", progress=lambda *call: seen.append(call))
    assert [call[1:] for call in seen] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[0][0] == "requests: 0 failed"
    assert seen[1][0].startswith("requests: 1 failed, ")
    assert seen[1][0].endswith(" left")
    assert " a second, 0:00:00 left" in seen[4][0]


def test_without_a_terminal_progress_is_a_line_from_time_to_time(capsys):
    now = 0.0
    show = _logged(lambda: now)
    for done in range(200):
        show("requests: 0 failed", done, 200)
        now += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{done} of 200 requests: 0 failed" for done in (60, 120, 180)]


BLOCKED = """
import hashlib, sys, threading
from dycoke_jax.cli.interrupts import interruptible
with interruptible(lambda: print("asked", flush=True)) as event:
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})  # handlers of signals wait until it returns
    print("ended", event.is_set(), flush=True)
"""


@pytest.mark.parametrize("interrupts", [1, 2])
def test_the_first_interrupt_is_an_event_and_the_second_ends_a_blocked_process(interrupts):
    rounds = 2_000_000 if interrupts == 1 else 2_000_000_000
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED.format(rounds=rounds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    if interrupts == 2:
        process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert rest == ("ended True\n" if interrupts == 1 else "")
    assert process.returncode == (0 if interrupts == 1 else 130)


@pytest.mark.slow
def test_a_job_that_is_killed_and_interrupted_ends_as_an_undisturbed_one(tmp_path):
    requests = write_job(tmp_path, 60)
    whole, results = tmp_path / "whole.jsonl", tmp_path / "results.jsonl"
    assert run_main(*job_arguments(requests, whole))[0] == 3

    process = start_job(requests, results)
    wait_for_lines(process, results, 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopping after the batch that runs" in err
    read_results(results)

    counts = kill_often(requests, results, kills=5, most_lines=6)
    assert 0 < counts[-1] < 60
    process = start_job(requests, results)
    process.communicate(timeout=300)
    assert process.returncode == 3
    found = read_results(results)
    assert len(found) == 60
    assert without_times(found) == without_times(read_results(whole))
    kinds = {one["error"]["kind"] if "error" in one else "answer" for one in found.values()}
    assert kinds == {"answer", "video", "bad_request"}
