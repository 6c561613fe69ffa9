"""Several processes that answer a stream together, and that find each other before any device.

The processes are real and talk over the loopback interface; their devices are parts of the CPU.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from support.checkpoints import tiny_llava_hf
from support.clips import cut, write_clip
from support.command_line import run_main
from support.jobs import read_results, without_times, write_lines
from support.on_hosts import TIMEOUT, answers, requests, streamed
from support.tiny import tiny_model
from support.tokenizers import tiny_tokenizer

from dycoke_jax import Decoding, LlavaVideo, Request
from dycoke_jax.assets import TINY
from dycoke_jax.checkpoint import convert
from dycoke_jax.engine import sharing
from dycoke_jax.engine.requests import Prepared, failure
from dycoke_jax.engine.schedule import form_batches
from dycoke_jax.errors import ConfigError, HostError, VideoError
from dycoke_jax.hosts import Hosts, Processes, initialise, processes_of
from dycoke_jax.inputs.prompts import Prompt
from dycoke_jax.inputs.system_errors import may_pass

TESTS = Path(__file__).parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextmanager
def begun(folder, processes, *options):
    """Starts the processes; their output goes to files in the folder. They end with the block."""
    port = free_port()
    started = []
    try:
        for process in range(processes):
            command = ["-m", "support.on_hosts", folder, port, processes, process, *options]
            with open(folder / f"{process}.txt", "w") as output:
                started.append(
                    subprocess.Popen(
                        [sys.executable, "-X", "faulthandler", *map(str, command)],
                        cwd=TESTS,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        yield started
    finally:
        for one in started:
            if one.poll() is None:
                one.send_signal(signal.SIGABRT)  # which prints where it is
                one.wait()


def output(folder, process):
    return (folder / f"{process}.txt").read_text()[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random weights, and clips."""
    folder = tmp_path_factory.mktemp("hosts")
    layers = {"num_hidden_layers": 2}
    tiny_llava_hf(folder / "model", deviation=0.2, text=layers, vision=layers)
    tiny_tokenizer().save_pretrained(folder / "model")
    convert(folder / "model", folder / "orbax")
    for number in range(4):
        write_clip(folder / f"{number}.mp4", 12 + number)
    cut(write_clip(folder / "damaged.mp4"), 0.3)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """What one process with one device answers."""
    llava = LlavaVideo.from_pretrained(folder / "model")
    return *answers(llava, folder), streamed(llava, folder)


RUNS = {
    "2 processes, data=2, model=2": (2, "data=2,model=2", "orbax"),
    "4 processes, data=4, model=2, FSDP": (4, "data=4,model=2", "fsdp"),
}


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS)
def together(request, folder):
    """What each of several processes has answered, opened and read."""
    with begun(folder, *request.param) as started:
        for process, one in enumerate(started):
            assert one.wait(150) == 0, output(folder, process)
    return [json.loads((folder / f"{process}.json").read_text()) for process in range(len(started))]


@pytest.mark.slow
def test_every_process_gets_the_answers_that_one_process_gets(together, alone):
    expected = json.loads(json.dumps(alone[0]))
    assert len({str(one) for one in expected.values()}) > 8, "answers vary"
    assert sum(one[0] == "video" for one in expected.values()) == 1
    for found in together:
        assert found["answers"] == expected
        np.testing.assert_allclose(found["likelihoods"][0], alone[1][0], atol=1e-4)
        np.testing.assert_allclose(found["likelihoods"][1], alone[1][1], atol=1e-4)


@pytest.mark.slow
def test_each_process_opens_only_its_own_clips(together, folder):
    """The one with number i those of requests i, n + i, ... of n processes."""
    stream = [*requests(folder)]
    for process, found in enumerate(together):
        own = {one.video.name for one in stream[process :: len(together)] if one.video is not None}
        assert found["opened"] == sorted(own)


@pytest.mark.slow
def test_each_process_reads_only_the_weights_of_its_devices(together):
    """Each part once. With FSDP over four processes that is a quarter of what can be divided."""
    for found in together:
        assert found["read"] == found["own"]
        assert len(together) == 2 or found["read"] < 0.3 * found["all"]


@pytest.mark.slow
def test_matrices_that_are_quantised_part_by_part_are_those_of_whole_ones(together):
    assert all(found["int8"] for found in together)


@pytest.mark.slow
def test_processes_restore_a_converted_checkpoint_and_stream_after_a_warm_up(together, alone):
    """The pieces of text are those of one process, and no program is compiled for them."""
    runs = [found for found in together if "restored" in found]
    assert len(runs) == (2 if len(together) == 2 else 0)
    for found in runs:
        assert found["restored"]
        pieces = json.loads(json.dumps(alone[2]["pieces"]))
        assert found["streamed"]["pieces"] == pieces
        assert found["streamed"]["layouts"] == 1
        assert found["streamed"]["compiled"]
        assert len(found["streamed"]["pieces"]) == 2
        assert found["streamed"]["after"] == 0


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others(folder):
    (folder / "0.json").unlink(missing_ok=True)
    with begun(folder, 2, "data=2,model=2", "kill") as (first, last):
        assert last.wait(60) == -signal.SIGKILL
        killed = time.monotonic()
        assert first.wait(3 * TIMEOUT) != 0
        assert time.monotonic() - killed < 3 * TIMEOUT
    assert not (folder / "0.json").exists()


def run_together(*asked):
    """What two processes print, each on a device of its own, with all exit codes."""
    several = ["--coordinator", f"localhost:{free_port()}", "--processes", "2"]
    program = "import sys; from dycoke_jax.cli import main; main(sys.argv[1:])"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, [*asked, *several, "--process-id", process])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        )
        for process in range(2)
    ]
    ended = [one.communicate(timeout=120) for one in started]
    # Gloo, which stands in for the links between devices on CPUs, talks on standard output.
    printed = [
        [line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in ended
    ]
    return printed, [one.returncode for one in started], ended


@pytest.mark.slow
def test_one_process_prints_the_answer_of_the_command_line(tmp_path):
    """The result is that of a run without others, and is printed once."""
    clip = write_clip(tmp_path / "clip.mp4", 6)
    asked = ["generate", "--model", TINY, "--video", clip, "--prompt", "What moves?", "--json"]
    asked += ["--frames", "4"]
    (first, second), codes, ended = run_together(*asked)
    assert codes == [0, 0], ended
    assert second == []
    code, alone, _ = run_main(*asked)
    assert code == 0
    (line,) = first
    assert without_seconds(line) == without_seconds(alone)


@pytest.mark.slow
def test_a_batch_job_of_two_processes_writes_one_file_of_results(tmp_path):
    """Each request has one result, the one of a run without others; what is there is kept."""
    write_clip(tmp_path / "clip.mp4", 6)
    (tmp_path / "bad.mp4").write_text("no clip")
    lines = [
        {"id": str(number), "prompt": "What moves" + "?" * number, "video": name}
        for number, name in enumerate(["clip.mp4", None, "bad.mp4", "clip.mp4", "clip.mp4"])
    ]
    lines = [{key: value for key, value in line.items() if value} for line in lines]
    requests = write_lines(tmp_path / "requests.jsonl", [*lines, "{"])
    asked = ["batch", requests, "--model", TINY, "--frames", "4", "--json"]
    code, _, _ = run_main(*asked[:2], tmp_path / "alone.jsonl", *asked[2:])
    assert code == 3
    alone = read_results(tmp_path / "alone.jsonl")
    together = tmp_path / "together.jsonl"
    kept = (tmp_path / "alone.jsonl").read_text().splitlines(keepends=True)[0]
    together.write_text(kept)
    (first, second), codes, ended = run_together(*asked[:2], together, *asked[2:])
    assert codes == [3, 3], ended
    assert second == []
    assert json.loads(first[0])["computed"] == 5
    assert together.read_text().startswith(kept)
    assert without_times(read_results(together)) == without_times(alone)


def without_seconds(line):
    return {name: value for name, value in json.loads(line).items() if name != "seconds"}


def mesh_of(rows):
    """A mesh of devices that belong to the given processes."""
    mesh = mock.create_autospec(Mesh, instance=True)
    mesh.devices = np.array([[SimpleNamespace(process_index=one) for one in row] for row in rows])
    mesh.shape = {"data": len(rows), "model": len(rows[0])}
    return mesh


@pytest.fixture
def process_2_of_4(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    monkeypatch.setattr(jax, "process_count", lambda: 4)


@pytest.mark.usefixtures("process_2_of_4")
def test_a_process_knows_its_place_among_the_rows_of_the_mesh():
    rows = [[3, 3], [3, 3], [2, 2], [2, 2], [0, 0], [0, 0], [1, 1], [1, 1]]
    assert processes_of(mesh_of(rows)) == Processes(count=4, index=1)
    assert processes_of(mesh_of([[2, 2], [2, 2]])) == Processes(count=1, index=0)
    assert processes_of(None) == Processes(count=1, index=0)


@pytest.mark.usefixtures("process_2_of_4")
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1], [2, 3]], "data=2 cannot be divided among 4 processes"),
        ([[0, 0, 1, 1, 2, 2, 3, 3]], r"model at most the 2 devices of a process .*: fsdp"),
        ([[0, 1], [0, 1], [2, 3], [2, 3]], "mixes the devices"),
        ([[0], [1], [2], [3], [0], [1], [2], [3]], "mixes the devices"),
        ([[0], [2]], "of 2 of 4 processes"),
    ],
    ids=["rows shared", "one row of all", "columns shared", "not contiguous", "some processes"],
)
def test_a_mesh_that_gives_processes_no_rows_of_their_own_is_refused(rows, message):
    with pytest.raises(ConfigError, match=message):
        processes_of(mesh_of(rows))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinator": "host:1"}, "give all three"),
        ({"processes": 2, "process_id": 0}, "give all three"),
        ({"coordinator": "host", "processes": 2, "process_id": 0}, "host:port"),
        ({"coordinator": "host:1", "processes": 2, "process_id": 2}, "lie in 0..1"),
        ({"process_timeout": 0}, "at least 2"),
    ],
    ids=["coordinator alone", "no coordinator", "no port", "number too large", "no time"],
)
def test_settings_of_hosts_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Hosts(**settings)


def test_without_other_processes_nothing_is_connected():
    initialise(Hosts())
    assert jax.process_count() == 1


def test_connecting_after_a_device_was_used_is_refused():
    jax.devices()
    with pytest.raises(ConfigError, match="before"):
        initialise(Hosts(coordinator="localhost:1", processes=1, process_id=0))


def test_what_processes_tell_each_other_comes_out_as_it_went_in(monkeypatch):
    """Of two processes this is the second; what the first says is made by the same function."""
    asked = {3: Request("?"), 4: Request("!", decoding=Decoding(7)), 5: Request("bad")}
    asked |= {6: Request("bad"), 7: Request("bad")}
    clip = np.ones((2, 4, 4, 3), np.uint8)
    prepared = Prepared(Prompt((1, 2), (3,)), clip, asked[4].decoding, ("damaged\udcff",))
    own = (3, Prepared(Prompt((), (9,)), None, Decoding()))
    failed = failure(5, VideoError("no clip"))
    busy = VideoError("no answer")
    busy.__cause__ = OSError(errno.ESTALE, "Stale file handle")
    others = [(4, prepared), failed, failure(6, busy), failure(7, KeyError("x"))]
    said = json.dumps([*map(sharing._told, others)]).encode()
    monkeypatch.setattr(sharing, "share", lambda told: [said, told])
    first, second, third, fourth, fifth = sharing.share_prepared(asked, [own])
    assert first is own
    assert second[0] == 4
    assert (second[1].prompt, second[1].notes) == (prepared.prompt, prepared.notes)
    assert second[1].decoding == Decoding(7)
    assert second[1].frames.shape == clip.shape
    assert (third.index, third.kind, third.message) == (5, "video", "no clip")
    assert isinstance(third.error, VideoError)
    assert not may_pass(third.error)
    assert may_pass(fourth.error), "so that all of them try again"
    assert (fifth.kind, "KeyError" in fifth.message) == ("internal", True)


def test_an_error_of_another_process_is_an_error_here_and_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(sharing, "share", lambda own: told.append(own) or [b"[]", own])

    def broken():
        raise MemoryError("no room")
        yield

    with pytest.raises(MemoryError):
        sharing.share_prepared({0: Request("?")}, broken())
    monkeypatch.setattr(sharing, "share", lambda own: [told[0], own])
    with pytest.raises(HostError, match="process 0 has failed: MemoryError: no room"):
        sharing.share_prepared({0: Request("?")}, [])


def test_batches_of_several_processes_have_as_many_rows_of_each(monkeypatch):
    """Requests of one layout, of which process 0 of two has read every other one."""
    model, two = tiny_model(), Processes(2, 0)
    prepared = {}

    def prepare(request):
        prepared[request.prompt] = model.prepare(request)
        return prepared[request.prompt]

    def share_prepared(requests, own):
        found = dict(own)
        return [(i, found.get(i) or model.prepare(requests[i])) for i in sorted(requests)]

    monkeypatch.setattr("dycoke_jax.engine.prepare.share_prepared", share_prepared)
    stream = [Request(f"question {number}") for number in range(10)]
    formed = form_batches(model.config, prepare, stream, None, batch_size=3, processes=two)
    indices = [[one.index for one in batch] for batch in formed]
    assert [sorted(batch) for batch in indices] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert sorted(prepared) == [f"question {number}" for number in range(0, 10, 2)]
