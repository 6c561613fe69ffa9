"""Training on the user's records: reading, grouping into rows, and the train command."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.checkpoints import tiny_llava_hf
from support.clips import write_clip
from support.command_line import run_main
from transformers import GenerationConfig
from typer.testing import CliRunner

from dycoke_jax import DycokeError
from dycoke_jax.checkpoint import open_checkpoint
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


def conversation(*texts, **clip):
    turns = [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]
    return json.dumps({**clip, "conversations": turns})


def test_questions_with_different_texts_before_the_clip_have_rows_of_their_own(clips, tokenizer):
    brief = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    data = write(clips, record(), record(question=brief), record(question="Where?"))
    shape = BatchShape(rows=1, accumulate=1, width=200)
    made = RecordSource(tuple(read_records(data)), tokenizer, 56, FrameSampling(2), shape)
    assert [[r.question for r in row] for row in made.rows] == [["What is it?", "Where?"], [brief]]
    for number in range(2):
        asked = made._row(number)[0].question
        batch = made.step(number).batch
        prefix = np.asarray(batch.prefix[0, 0])[: int(batch.prefix_length[0, 0])]
        system = "Be brief." if asked == brief else "You are a helpful assistant."
        wanted = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
        assert tokenizer.decode(prefix) == wanted


def test_records_of_text_alone_share_rows(clips, tokenizer):
    data = write(clips, conversation("A?", "B."), record(), conversation("C?", "D.", "E?", "F."))
    shape = BatchShape(rows=1, accumulate=1, width=300)
    made = RecordSource(tuple(read_records(data)), tokenizer, 56, FrameSampling(2), shape)
    assert [[r.question for r in row] for row in made.rows] == [["A?", "C?"], ["What is it?"]]
    batch = next(made.step(i).batch for i in range(2) if made._row(i)[0].video is None)
    assert batch.frames.shape == (1, 1, 1, 56, 56, 3)
    part = np.asarray(batch.part[0, 0])
    ids, is_answer = np.asarray(batch.ids[0, 0]), np.asarray(batch.is_answer[0, 0])
    answers = [tokenizer.decode(ids[is_answer & (part == number)]) for number in (1, 2)]
    assert answers == ["B.<|im_end|>", "D.<|im_end|>F.<|im_end|>"]


def test_faults_that_need_the_tokenizer_are_told_by_record_before_the_first_step(clips, tokenizer):
    data = write(
        clips,
        record(),
        record(answer="long " * 50),
        record(question="half a pair: \ud800"),
        conversation("A?", "B.", "C?", "D." * 100),
    )
    shape = BatchShape(rows=1, accumulate=1, width=120)
    made = RecordSource(tuple(read_records(data)), tokenizer, 56, FrameSampling(2), shape)
    with pytest.raises(DycokeError) as caught:
        _ = made.rows
    faults = str(caught.value).split("; line ")
    assert "line 2 of records.jsonl: a question and its answer about" in faults[0]
    assert faults[1].startswith("3 of records.jsonl: the prompt holds")
    assert faults[2].startswith("4 of records.jsonl: a question and its answer take")


@pytest.mark.slow
def test_train_reads_conversations_and_resumes(clips, tmp_path, tokenizer):
    """Two turns about a clip, a picture, and text alone; a run that lost its last step goes on."""
    Image.new("RGB", (64, 48), "red").save(clips / "red.png")
    data = write(
        clips,
        conversation("<video>\nWhat?", "A cat.", "Where?", "Here.", video="a.mp4"),
        conversation("2 + 2?", "4"),
        conversation("Which colour?\n<image>", "Red.", image="red.png"),
    )
    run = tmp_path / "run"
    model = tiny_llava_hf(
        tmp_path / "model", text={"num_hidden_layers": 1}, vision={"num_hidden_layers": 1}
    )
    tokenizer.save_pretrained(model)
    arguments = ["train", run, "--model", model, "--data", data, "--test-data", data]
    arguments += ["--steps", 2, "--frames", 3, "--accumulate", 3, "--merged", 1, "--save-every", 1]
    code, _, err = run_main(*arguments)
    assert code == 0, err
    entry = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(entry["loss"])
    assert 0 < entry["gradient"] < float("inf")
    weights = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "state" / "2")
    code, _, err = run_main(*arguments)
    assert code == 0, err
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    shutil.rmtree(run)


@pytest.mark.slow
def test_train_command_writes_a_model_that_generates(clips, tmp_path):
    """The finished run is started a second time, which changes nothing."""
    runner = CliRunner()
    model, run = tmp_path / "model", tmp_path / "run"
    assert runner.invoke(app, ["init", str(model)]).exit_code == 0
    assert not (model / "generation_config.json").exists()
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"eos_token_id": 5}))
    data = write(clips, record(), record("b.mp4"))
    arguments = f"train {run} --model {model} --data {data} --test-data {data} --steps 2 "
    arguments += "--frames 4 --accumulate 2 --log-every 1 --merged 0.5 --tower 0"
    for _ in range(2):
        result = runner.invoke(app, arguments.split(), catch_exceptions=False)
        assert result.exit_code == 0
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert "merged" in entries[-1]["evaluation"]
    assert GenerationConfig.from_pretrained(run / "model").eos_token_id == [5]
    assert 5 in open_checkpoint(run / "model").stop_ids
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
    message = r"\.mp4 gives \d frames and .*\.mp4 \d; clips of a step"
    with pytest.raises(DycokeError, match=message):
        made.step(0)
    with pytest.raises(DycokeError, match=message):
        _ = made.rows
    one_clip_a_step = replace(made, shape=BatchShape(rows=1, accumulate=1, width=120))
    counts = [one_clip_a_step.step(number).batch.frames.shape[2] for number in range(2)]
    assert sorted(counts) == [2, 4]
