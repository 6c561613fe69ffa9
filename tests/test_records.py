"""Training on the user's records: reading, grouping into rows, and the train command."""

import json
import shutil
from collections import Counter

import pytest
from support.clips import write_clip
from typer.testing import CliRunner

from dycoke_jax import DycokeError
from dycoke_jax.cli import app
from dycoke_jax.inputs import FrameSampling
from dycoke_jax.training.records import Record, RecordSource, read_records
from dycoke_jax.training.sources import BatchShape


@pytest.fixture
def clips(tmp_path):
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_clip(tmp_path / name)
    return tmp_path


def write(folder, *lines):
    path = folder / "records.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def record(video="a.mp4", question="What is it?", answer="A cat."):
    return json.dumps({"video": video, "question": question, "answer": answer})


def test_records_are_read_relative_to_their_file(clips):
    conversation = [{"role": "user", "content": "Well?"}]
    records = read_records(write(clips, record(), "", record("b.mp4", conversation)))
    assert records == [
        Record(clips / "a.mp4", "What is it?", "A cat."),
        Record(clips / "b.mp4", conversation, "A cat."),
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "holds no record"),
        (("nonsense",), "line 1: Expecting value"),
        ((record(), "[]"), "line 2: not an object"),
        (('{"video": "a.mp4", "question": "x"}',), "line 1: has no answer"),
        ((record(answer=3),), "line 1: video and answer must be texts"),
        (("x",) * 12, r"line 10: .* \(and 2 more\)"),
        ((record("none.mp4"),), "none.mp4"),
    ],
)
def test_faulty_files_are_refused(clips, lines, message):
    with pytest.raises(DycokeError, match=message):
        read_records(write(clips, *lines))


def source(clips, tokenizer, width=120, count=9):
    records = [
        Record(clips / f"{'abc'[i % 3]}.mp4", f"Question {i}?", "yes" * (i + 1))
        for i in range(count)
    ]
    shape = BatchShape(rows=2, accumulate=1, width=width)
    return RecordSource(tuple(records), tokenizer, 98, FrameSampling(4), shape)


@pytest.fixture
def tokenizer():
    from support.tokenizers import tiny_tokenizer

    return tiny_tokenizer()


def test_every_record_is_in_a_row_of_its_clip(clips, tokenizer):
    made = source(clips, tokenizer)
    assert Counter(r.question for row in made.rows for r in row) == Counter(
        r.question for r in made.records
    )
    assert all(len({r.video for r in row}) == 1 for row in made.rows)
    assert len(made.rows) < len(made.records)


def test_each_epoch_has_every_row_once_in_a_new_order(clips, tokenizer):
    made = source(clips, tokenizer)
    count = len(made.rows)
    epochs = [[id(made._row(e * count + i)) for i in range(count)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(map(id, made.rows))
    assert epochs[0] != epochs[1]


def test_a_record_that_does_not_fit_a_row_is_refused(clips, tokenizer):
    with pytest.raises(DycokeError, match=r"[ab].mp4 take \d+ tokens; width is 40"):
        _ = source(clips, tokenizer, width=40).rows


@pytest.mark.slow
def test_train_command_writes_a_model_that_generates(clips, tmp_path):
    """The finished run is started a second time, which changes nothing."""
    runner = CliRunner()
    model, run = tmp_path / "model", tmp_path / "run"
    assert runner.invoke(app, ["init", str(model)]).exit_code == 0
    data = write(clips, record(), record("b.mp4"))
    arguments = f"train {run} --model {model} --data {data} --test-data {data} --steps 2 "
    arguments += "--frames 4 --accumulate 2 --log-every 1 --merged 0.5 --tower 0"
    for _ in range(2):
        result = runner.invoke(app, arguments.split(), catch_exceptions=False)
        assert result.exit_code == 0
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert "merged" in entries[-1]["evaluation"]
    asked = ["generate", "--model", str(run / "model"), "--video", str(clips / "a.mp4")]
    asked += ["--prompt", "What?", "--frames", "4", "--max-new-tokens", "2", "--json"]
    result = runner.invoke(app, asked, catch_exceptions=False)
    assert json.loads(result.stdout)["tokens"]["visual"] == 64
    with pytest.raises(DycokeError, match="other settings"):
        runner.invoke(app, [*arguments.split(), "--seed", "1"], catch_exceptions=False)
    shutil.rmtree(run)


def test_clips_of_a_step_must_have_equally_many_frames(tmp_path, tokenizer):
    for name, frames in (("long", 6), ("short", 2)):
        write_clip(tmp_path / f"{name}.mp4", frames)
    records = tuple(Record(tmp_path / f"{name}.mp4", "?", "yes") for name in ("long", "short"))
    shape = BatchShape(rows=2, accumulate=1, width=120)
    made = RecordSource(records, tokenizer, 98, FrameSampling(4, fps=100.0), shape)
    with pytest.raises(DycokeError, match=r"\.mp4 gives \d frames and .*\.mp4 \d; clips of a step"):
        made.step(0)
