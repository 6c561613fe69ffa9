"""The server: the official client of the OpenAI API gets from it what ``generate`` gives."""

import base64
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import httpx
import openai
import pytest
from PIL import Image
from support.clips import cut, textured, write_clip
from support.command_line import run_main
from support.serving import DEFAULTS, clip_and, data_url, serving

from dycoke_jax import LlavaVideo, Prompting
from dycoke_jax.assets import TINY
from dycoke_jax.errors import RequestError
from dycoke_jax.serving.run import bind
from dycoke_jax.serving.settings import Serving

QUESTIONS = (
    *("What moves?", "Which colour is it?", "Where is it?", "How many are there?"),
    *("What happens first?", "Describe the video.", "What is red?", "Is it small?"),
)


@pytest.fixture(scope="module")
def model():
    return LlavaVideo.from_pretrained(TINY)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{n}.mp4", 4 + n) for n in range(3)]


@pytest.fixture(scope="module")
def running(model, clips):
    with serving(model, media_root=clips[0].parent, max_body=1, max_frames=16) as one:
        yield one


@pytest.fixture(scope="module")
def expected(model, clips):
    """The answers of ``generate``, each alone: by clip and question."""
    known = {}

    def answer(video, question, **settings):
        key = str(video), str(question), str(settings)
        if key not in known:
            settings = {"decoding": DEFAULTS.decoding, "sampling": DEFAULTS.sampling} | settings
            [known[key]] = model.generate([video], [question], **settings)
        return known[key]

    return answer


def test_a_plain_answer_is_that_of_generate(running, clips, expected):
    answer = expected(clips[0], "What moves?")
    got = running.ask(clip_and("What moves?", data_url(clips[0])))
    [choice] = got.choices
    assert choice.message.content == answer.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == answer.finish_reason
    assert got.model == "tiny"
    assert got.usage.prompt_tokens == answer.tokens.prompt
    assert got.usage.completion_tokens == len(answer.token_ids)
    assert got.usage.total_tokens == answer.tokens.prompt + len(answer.token_ids)
    assert got.usage.visual_tokens == answer.tokens.visual > 0
    assert got.usage.merged_tokens == answer.tokens.merged
    attended = answer.tokens.attended
    assert got.usage.attended_tokens == pytest.approx(sum(attended) / len(attended))


def test_a_streamed_answer_is_that_of_generate(running, clips, expected):
    answer = expected(clips[0], "Describe the video.")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [*running.ask(clip_and("Describe the video.", data_url(clips[0])), **options)]
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == answer.text
    assert sum(map(bool, texts)) > 1, "in several pieces"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [*[None] * (len(chunks) - 2), answer.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(answer.token_ids)
    assert chunks[-1].usage.merged_tokens == answer.tokens.merged
    assert len({chunk.id for chunk in chunks}) == 1
    without = [*running.ask("What moves?", stream=True)]
    assert all(chunk.usage is None and chunk.choices for chunk in without)


def test_conversations_and_pictures_are_answered(running, tmp_path, expected):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What moves?"},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": [{"type": "text", "text": "Which colour is it?"}]},
    ]
    picture = tmp_path / "red.png"
    Image.new("RGB", (64, 48), "red").save(picture)
    got = running.client.chat.completions.create(model="tiny", messages=turns)
    assert got.choices[0].message.content == expected(None, turns).text
    url = data_url(picture, "image/png")
    got = running.ask(clip_and("What is red?", url, "image_url"))
    assert got.choices[0].message.content == expected(picture, "What is red?").text
    after = [{"type": "text", "text": "Here: "}, *clip_and(" What is red?", url, "image_url")]
    got = running.ask(after)
    marked = [{"type": "text", "text": "Here: "}, {"type": "video"}]
    marked += [{"type": "text", "text": " What is red?"}]
    asked = [{"role": "user", "content": marked}]
    assert got.choices[0].message.content == expected(picture, asked).text


def test_eight_at_once_run_as_one_batch_and_each_gets_its_own_answer(model, clips, expected):
    asked = [(clips[n % 3], question) for n, question in enumerate(QUESTIONS)]
    with serving(model, gather=30.0) as running:  # which a full batch does not wait for
        later = [running.later(clip_and(question, data_url(clip))) for clip, question in asked]
        texts = [one.result(60).choices[0].message.content for one in later]
        assert texts == [expected(*one).text for one in asked]
        assert len(set(texts)) > 1
        assert running.metric("batch_fill_count") == running.metric("batch_fill_sum") == 1


def test_what_comes_while_a_batch_runs_is_the_next_batch(model):
    with serving(model, batch_size=8) as running:
        in_batch, goes_on = threading.Event(), threading.Event()

        def report(_, report=running.server.worker._report):
            report(_)
            in_batch.set()
            assert goes_on.wait(60)

        running.server.worker._report = report
        later = [running.later("Why?")]
        assert in_batch.wait(60)
        later += [running.later(question) for question in QUESTIONS[:4]]
        running.wait(lambda: running.in_hand() == 5)
        goes_on.set()
        assert all(one.result(60).choices for one in later)
        assert running.metric("batch_fill_count") == 2
        assert running.metric("batch_fill_sum") == (1 + 4) / 8


def test_a_clip_that_takes_long_to_read_holds_up_no_other_request(model, clips, expected):
    with serving(model) as running:
        running.gate.clear()
        slow = running.later(clip_and("What moves?", data_url(clips[0])))
        running.wait(lambda: running.in_hand() == 1)
        assert running.ask("Why?").choices[0].message.content == expected(None, "Why?").text
        assert not slow.done()
        running.gate.set()
        assert slow.result(60).choices[0].message.content == expected(clips[0], "What moves?").text


def test_requests_of_an_idle_server_that_come_together_run_together(model):
    """It waits a moment after the first of them, but not once a batch is full."""
    with serving(model, batch_size=2, gather=20.0) as running:
        later = [running.later(question, max_tokens=2) for question in QUESTIONS[:2]]
        assert all(one.result(15).usage.completion_tokens <= 2 for one in later)
        assert running.metric("batch_fill_count") == 1


def test_a_bad_clip_fails_alone(running, clips, tmp_path, expected):
    bad = cut(write_clip(tmp_path / "bad.mp4"), 0.5)
    running.gate.clear()
    good = [running.later(clip_and(q, data_url(clips[0]))) for q in QUESTIONS[:2]]
    failing = [
        running.later(clip_and("Why?", data_url(bad)), stream=stream) for stream in (False, True)
    ]
    running.wait(lambda: running.in_hand() == 4)
    running.gate.set()
    for one in failing:
        with pytest.raises(openai.BadRequestError, match="MP4 or MOV file without its index"):
            one.result(60)
    for one, question in zip(good, QUESTIONS, strict=False):
        assert one.result(60).choices[0].message.content == expected(clips[0], question).text


def test_damage_and_times_of_clips_are_told_as_by_generate(model, clips, tmp_path, expected):
    damaged = cut(write_clip(tmp_path / "cut.mkv", textured(40)), 0.6)
    settings = {"prompting": Prompting(time_text=True), "allow_damaged": True}
    with serving(model, defaults=replace(DEFAULTS, **settings)) as running:
        got = running.ask(clip_and("What moves?", data_url(damaged, "video/x-matroska")))
    answer = expected(damaged.read_bytes(), "What moves?", **settings)
    assert got.usage.prompt_tokens == answer.tokens.prompt
    assert got.choices[0].message.content == answer.text
    assert len(got.notes) == len(answer.notes) == 1


def test_a_request_can_choose_frames_and_compression(running, clips, expected):
    body = {"frames": 3, "compression": "none"}
    got = running.ask(clip_and("What moves?", data_url(clips[2])), extra_body=body)
    sampling = type(DEFAULTS.sampling)(3)
    answer = expected(clips[2], "What moves?", sampling=sampling, compression=None)
    assert got.choices[0].message.content == answer.text
    assert got.usage.visual_tokens == got.usage.merged_tokens == answer.tokens.visual
    got = running.ask(clip_and("What moves?", data_url(clips[2])), extra_body={"fps": 5.0})
    assert got.usage.visual_tokens == answer.tokens.visual  # 0.6 seconds: 3 frames
    for wrong, message in (
        ({"frames": 17}, "at most 16 frames"),
        ({"frames": 0}, "frames is 0"),
        ({"frames": 2.5}, "frames: "),
        ({"fps": -1}, "fps is -1"),
        ({"compression": "magic"}, "there is no method 'magic'"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            running.ask("Why?", extra_body=wrong)


def test_other_compressions_wait_for_their_turn_and_all_are_answered(running, clips, expected):
    running.gate.clear()
    chosen = [{}, {"compression": "none"}, {}, {"compression": "none"}]
    content = clip_and("What moves?", data_url(clips[0]))
    later = [running.later(content, extra_body=body) for body in chosen]
    running.wait(lambda: running.in_hand() == 4)
    running.gate.set()
    for body, one in zip(chosen, later, strict=True):
        answer = expected(clips[0], "What moves?", **({"compression": None} if body else {}))
        assert one.result(60).choices[0].message.content == answer.text
        assert one.result(60).usage.merged_tokens == answer.tokens.merged


def test_sampled_answers_follow_their_seed(running, expected):
    ask = {"temperature": 2.0, "top_p": 0.9, "max_completion_tokens": 8}
    decoding = type(DEFAULTS.decoding)(8, 2.0, top_p=0.9, seed=7)
    got = running.ask("Describe the video.", seed=7, **ask)
    answer = expected(None, "Describe the video.", decoding=decoding)
    assert got.choices[0].message.content == answer.text
    assert len({running.ask("Why?", **ask).choices[0].message.content for _ in range(4)}) > 1


def test_a_full_server_says_so_and_answers_those_it_has(model, clips, expected):
    with serving(model, max_requests=3, batch_size=2) as running:
        running.gate.clear()
        content = clip_and("What moves?", data_url(clips[0]))
        later = [running.later(content) for _ in range(3)]
        running.wait(lambda: running.in_hand() == 3)
        with pytest.raises(openai.RateLimitError) as refused:
            running.ask(content)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "queue_full"
        running.gate.set()
        for one in later:
            assert one.result(60).choices[0].message.content == (
                expected(clips[0], "What moves?").text
            )
        running.wait(lambda: running.in_hand() == 0)
        assert running.ask(content).choices[0].message.content
        assert running.metric('requests_total{status="429"}') == 1


def test_what_takes_too_long_is_given_up_and_the_server_goes_on(model, clips):
    with serving(model, timeout=1.0, max_requests=2) as running:
        running.gate.clear()
        content = clip_and("What moves?", data_url(clips[0]))
        later = [running.later(content, stream=stream) for stream in (False, True)]
        for one in later:
            with pytest.raises(openai.InternalServerError) as late:
                one.result(60)
            assert late.value.status_code == 504
        running.gate.set()
        running.wait(lambda: running.in_hand() == 0)
        assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
        assert running.metric('requests_total{status="504"}') == 2
        assert running.metric("batch_fill_count") == 0, "for nobody, nothing is computed"


def test_a_client_that_goes_away_leaves_no_trace(model, clips):
    """Its place is free again when its clip has been read."""
    with serving(model, max_requests=2, batch_size=1) as running:
        running.gate.clear()
        body = json.dumps(
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": clip_and("What?", data_url(clips[0]))}],
            }
        )
        for _ in range(2):
            with pytest.raises(httpx.ReadTimeout), httpx.Client() as client:
                client.post(
                    f"{running.url}/v1/chat/completions",
                    content=body,
                    headers={"content-type": "application/json"},
                    timeout=httpx.Timeout(60, read=0.3),
                )
        running.wait(lambda: running.metric('requests_total{status="499"}') == 2)
        running.gate.set()
        running.wait(lambda: running.in_hand() == 0)
        assert running.metric("batch_fill_count") == 0
        assert running.post(body).status_code == 200


@pytest.fixture
def stopped(model, clips):
    """A context manager: a server that has sent the first piece of a stream and makes no other."""

    @contextmanager
    def begin(**settings):
        with serving(model, **settings) as running:
            goes_on, deliver = threading.Event(), running.server.worker._deliver

            def stopping(result):
                deliver(result)
                assert goes_on.wait(60)

            running.server.worker._deliver = stopping
            stream = running.ask(clip_and("Describe the video.", data_url(clips[0])), stream=True)
            assert next(stream).choices[0].delta.role == "assistant"
            assert next(stream).choices[0].delta.content
            try:
                yield running, stream
            finally:
                goes_on.set()

    return begin


def test_a_reader_of_a_stream_may_go_away(stopped):
    with stopped() as (running, stream):
        stream.close()
        running.wait(lambda: running.metric('requests_total{status="499"}') == 1)
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_a_stream_that_takes_too_long_ends_with_an_error(stopped):
    with stopped(timeout=3.0) as (running, stream):
        with pytest.raises(openai.APIError, match="not ready in time"):
            list(stream)
        assert running.metric('requests_total{status="504"}') == 1


def test_a_stream_that_a_shutdown_ends_says_so(stopped):
    with stopped(grace=0.2) as (running, stream):
        running.server.drain()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)


def test_a_shutdown_in_the_middle_answers_what_is_here_and_refuses_the_rest(model, clips, expected):
    with serving(model, batch_size=1) as running:
        running.gate.clear()
        later = [
            running.later(clip_and(QUESTIONS[n], data_url(clips[0])), stream=n == 1)
            for n in range(3)
        ]
        running.wait(lambda: running.in_hand() == 3)
        running.server.handle_exit(signal.SIGTERM, None)
        running.wait(lambda: httpx.get(f"{running.url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError) as refused:
            running.ask("Why?")
        assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
        running.gate.set()
        for n, one in enumerate(later):
            got = one.result(60)
            text = (
                "".join(chunk.choices[0].delta.content or "" for chunk in got)
                if n == 1
                else got.choices[0].message.content
            )
            assert text == expected(clips[0], QUESTIONS[n]).text
        running.thread.join(30)
        assert not running.thread.is_alive()


@pytest.mark.parametrize(("grace", "signals"), [(0.2, 1), (60.0, 2)])
def test_a_shutdown_waits_for_its_time_of_grace_or_a_second_signal(model, clips, grace, signals):
    with serving(model, grace=grace) as running:
        running.gate.clear()
        later = running.later(clip_and("What moves?", data_url(clips[0])))
        running.wait(lambda: running.in_hand() == 1)
        for _ in range(signals):
            running.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.InternalServerError) as refused:
            later.result(30)
        assert refused.value.status_code == 503
        running.thread.join(30)
        assert not running.thread.is_alive()


def test_a_fault_of_the_program_fails_those_in_hand_and_the_next_is_answered(
    model, clips, monkeypatch
):
    def broken(*_, **__):
        raise ZeroDivisionError

    with serving(model, max_requests=1) as running:
        with monkeypatch.context() as patch:
            patch.setattr(running.server.worker, "_read", broken)
            with pytest.raises(openai.InternalServerError, match="the engine has failed"):
                running.ask(clip_and("Why?", data_url(clips[0])))
        with monkeypatch.context() as patch:
            patch.setattr("dycoke_jax.engine.schedule.run_batch", broken)
            with pytest.raises(openai.InternalServerError, match="the engine has failed"):
                running.ask("Why?")
        assert running.ask("Why?").choices[0].message.content is not None


def test_an_unexpected_error_fails_its_request_alone(model, clips, expected, monkeypatch, caplog):
    prepare = model.prepare

    def broken(request, **options):
        if "Break" in str(request.prompt):
            raise ZeroDivisionError("of the program")
        return prepare(request, **options)

    with serving(model, gather=30.0, batch_size=3) as running:  # the three run together
        monkeypatch.setattr(model, "prepare", broken)
        later = [running.later(question) for question in ("Why?", "Break", "What moves?")]
        with pytest.raises(openai.InternalServerError, match="the engine has failed") as caught:
            later[1].result(60)
        assert caught.value.status_code == 500
        for question, one in (("Why?", later[0]), ("What moves?", later[2])):
            text = one.result(60).choices[0].message.content
            assert text == expected(None, question).text
    (record,) = [one for one in caplog.records if one.name == "dycoke_jax.serving.worker"]
    assert "ZeroDivisionError: of the program" in record.message
    assert record.exc_info[0] is ZeroDivisionError


def test_sigterm_ends_the_command_after_the_answer_of_its_requests(clips, tmp_path):
    variables = os.environ | {"DYCOKE_JAX_API_KEY": "key"}
    command = [sys.executable, "-c", "from dycoke_jax.cli import main; main()", "serve"]
    options = [
        "--model",
        str(TINY),
        "--port",
        "0",
        "--frames",
        "4",
        "--gather",
        "2",
        "--max-new-tokens",
        "8",
    ]
    with subprocess.Popen(
        [*command, *options], env=variables, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stderr.readline()
            url = line.split()[-1]
            client = openai.OpenAI(base_url=url, api_key="key", max_retries=0, timeout=60)
            content = clip_and("What moves?", data_url(clips[0]))
            got = []
            asking = threading.Thread(
                target=lambda: got.append(
                    client.chat.completions.create(
                        model="tiny", messages=[{"role": "user", "content": content}]
                    )
                )
            )
            asking.start()
            metrics = f"{url.removesuffix('/v1')}/metrics"
            while "requests_waiting 1" not in httpx.get(metrics, timeout=60).text:
                assert asking.is_alive()
            process.send_signal(signal.SIGTERM)
            asking.join(60)
            assert got[0].usage.visual_tokens > 0
            assert process.wait(60) == 0
        finally:
            process.kill()


# What is refused.


@pytest.fixture(scope="module")
def secret(clips):
    """A file beside the folder that is served."""
    path = clips[0].parent.parent / "secret.mp4"
    path.write_bytes(clips[0].read_bytes())
    return path


def test_files_in_the_served_folder_are_read_by_path(running, clips, expected):
    link = clips[0].parent / "link to it.mp4"
    link.symlink_to(clips[0])
    for url in (clips[0].as_uri(), link.as_uri(), clips[0].as_uri().replace("//", "//localhost")):
        got = running.ask(clip_and("What moves?", url))
        assert got.choices[0].message.content == expected(clips[0], "What moves?").text


def test_files_elsewhere_are_not_and_nobody_learns_whether_they_are_there(running, clips, secret):
    root = clips[0].parent
    (root / "out.mp4").symlink_to(secret)
    (root / "folder").symlink_to(root.parent)
    (root / "ring.mp4").symlink_to(root / "ring.mp4")
    beside = root.parent / f"{root.name}-beside"
    beside.mkdir()
    (beside / "a.mp4").write_bytes(clips[0].read_bytes())
    inside = root.as_uri()
    urls = (
        *(secret.as_uri(), f"{inside}/../{secret.name}", f"{inside}/%2e%2e/{secret.name}"),
        *(f"{inside}/out.mp4", f"{inside}/folder/{secret.name}", f"{inside}/ring.mp4"),
        *(f"{inside}/none.mp4", "file:///etc/passwd", "file:///none", inside, f"{inside}/"),
        *((beside / "a.mp4").as_uri(), f"{inside}/0.mp4%00", f"{inside}/0.mp4?a", "file:0.mp4"),
        *(clips[0].as_uri().replace("file://", "file://host"), "file://", f"{inside}/%ff.mp4"),
        f"{inside}/{'a' * 5000}.mp4",
    )
    for url in urls:
        with pytest.raises(openai.BadRequestError) as refused:
            running.ask(clip_and("Why?", url))
        message = "the file:// URL names no file in the folder that is served"
        assert refused.value.body["message"] == message, url


def test_no_file_is_read_unless_a_folder_is_served(model, clips):
    with serving(model) as running:
        with pytest.raises(openai.BadRequestError, match="reads no files"):
            running.ask(clip_and("Why?", clips[0].as_uri()))
        # Bytes without a zero byte are a path to the reader of clips.
        data = base64.b64encode(os.fsencode(clips[0])).decode()
        with pytest.raises(openai.BadRequestError, match="not a video"):
            running.ask(clip_and("Why?", f"data:video/mp4;base64,{data}"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:video/mp4,abc", "data URL must have the form"),
        ("data:video/mp4;base64", "data URL must have the form"),
        ("data:video/mp4;base64,a!", "no valid base64"),
        ("data:video/mp4;base64,é", "no valid base64"),
        ("data:video/mp4;base64,", "is empty"),
        ("clip.mp4", "must be a data: URL"),
        ("ftp://host/a.mp4", "must be a data: URL"),
        ("http://127.0.0.1:1/a.mp4", "fetches no URLs"),
    ],
)
def test_urls_that_are_no_clips_are_refused(running, url, message):
    with pytest.raises(openai.BadRequestError, match=message):
        running.ask(clip_and("Why?", url))


def test_addresses_are_fetched_only_where_that_is_allowed(model, clips, expected):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/to-file":
                self.send_response(302)
                self.send_header("Location", clips[0].as_uri())
                self.end_headers()
            elif self.path == "/large":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(bytes(1_000_001))
            else:
                super().do_GET()

        def log_message(self, *_):
            pass

    folder = str(clips[0].parent)
    web = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: Handler(*arguments, directory=folder)
    )
    threading.Thread(target=web.serve_forever).start()
    address = f"http://127.0.0.1:{web.server_port}"
    try:
        with serving(model, allow_urls=True, max_body=1) as running:
            got = running.ask(clip_and("What moves?", f"{address}/0.mp4"))
            assert got.choices[0].message.content == expected(clips[0], "What moves?").text
            for path in ("none.mp4", "to-file"):
                with pytest.raises(openai.BadRequestError, match="cannot be fetched"):
                    running.ask(clip_and("Why?", f"{address}/{path}"))
            with pytest.raises(openai.APIStatusError) as refused:
                running.ask(clip_and("Why?", f"{address}/large"))
            assert refused.value.status_code == 413
    finally:
        web.shutdown()
        web.server_close()


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"n": 2}, "n"),
        ({"stop": ["."]}, "stop"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"extra_body": {"best_of": 2}}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1025}, "max_tokens"),
        ({"max_completion_tokens": 1025}, "max_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_is_refused_by_name(running, given, param):
    with pytest.raises(openai.BadRequestError) as refused:
        running.ask("Why?", **given)
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_accepted(running):
    neutral = {"n": 1, "stop": [], "logprobs": False, "user": "me", "frequency_penalty": 0.0}
    body = {"tools": None, "response_format": {"type": "text"}, "max_tokens": None}
    assert running.ask("Why?", extra_body=neutral | body).choices


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": []}, "turn 1 is empty"),
        ({"role": "assistant", "content": "Yes."}, "end the conversation with a user turn"),
        ({"role": "tool", "content": "1"}, "messages.0.role"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages.0.content.0"),
        ({"role": "user", "content": [{"type": "video"}]}, "messages.0.content.0"),
        (
            {"role": "user", "content": clip_and("?", "data:,") + clip_and("?", "data:,")},
            "there are 2 clips",
        ),
    ],
    ids=("empty", "assistant", "tool", "null", "audio", "marker", "two-clips"),
)
def test_conversations_that_make_no_sense_are_refused(running, message, words):
    response = running.post(json.dumps({"model": "tiny", "messages": [message]}))
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"model": "tiny"}', b"\xff", b"[" * 100_000, b'{"messages": 1}'],
    ids=("empty", "open", "list", "null", "no-messages", "bytes", "deep", "number"),
)
def test_bad_bodies_are_refused(running, body):
    response = running.post(body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "\n" not in response.json()["error"]["message"]


def test_large_bodies_are_refused_announced_or_not(running):
    assert running.post(bytes(1_000_001)).status_code == 413
    assert running.post(iter([bytes(600_000)] * 2)).status_code == 413


def test_other_content_types_are_refused(running):
    """A page in a browser could send them without being asked for leave."""
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "Why?"}]})
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert running.post(body, headers={"content-type": kind}).status_code == 415


def test_unknown_models_and_paths_are_not_found(running):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4o'"):
        running.client.chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": "Why?"}]
        )
    assert [one.id for one in running.client.models.list()] == ["tiny"]
    assert running.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        running.client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        running.client.embeddings.create(model="tiny", input="Why?")


def test_the_key_is_asked_for_under_v1(model):
    with serving(model, api_key="the key") as running:
        assert running.ask("Why?", max_tokens=2).choices
        for wrong in ("the ke", "the keyy", "é", "-"):
            for kind in ("Bearer", "Basic"):
                headers = {
                    "authorization": f"{kind} {wrong}".encode(),
                    "content-type": "application/json",
                }
                assert running.post(b"{}", headers=headers).status_code == 401
        right = {"authorization": "Basic the key", "content-type": "application/json"}
        assert running.post(b"{}", headers=right).status_code == 401
        assert running.post(b"{}").json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert httpx.get(f"{running.url}/metrics").status_code == 200


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"max_requests": 0}, {"timeout": 0}, {"media_root": TINY / "none"}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_are_checked(settings):
    with pytest.raises(RequestError, match=next(iter(settings))):
        Serving(**settings)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("dycoke_jax.cli.serve.find_spec", lambda name: None)
    code, _, err = run_main("serve", "--model", "no-such-model")
    assert code == 2
    assert "pip install 'dycoke_jax[serve]'" in err


def test_bad_options_are_refused_before_the_model_is_read():
    for options, message in (
        (["--frames", "200"], "--frames is 200, above --max-frames, which is 128"),
        (["--max-new-tokens", "2000"], "--max-new-tokens is 2000, above --max-tokens"),
        (["--api-key", " "], "the API key is empty"),
        (["--compress", "magic"], "there is no method 'magic'"),
    ):
        code, _, err = run_main("serve", "--model", "no-such-model", "--port", "0", *options)
        assert code == 2
        assert message in err


def test_a_port_that_is_taken_is_refused_before_the_model_is_read():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run_main("serve", "--model", "no-such-model", "--port", port)
    assert code == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in err
    code, _, err = run_main("serve", "--model", "no-such-model", "--port", 70_000)
    assert code == 2
    assert "port is 70000" in err
