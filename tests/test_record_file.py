"""Files of training records: which text is a record, and one line for each fault."""

import json

import numpy as np
import pytest
from PIL import Image
from support.clips import cut, write_clip
from support.command_line import run_main

from dycoke_jax import DycokeError
from dycoke_jax.assets import TINY
from dycoke_jax.training.records import Record, read_records

FINE = json.dumps({"video": "a.mp4", "question": "What?", "answer": "A cat."})
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    write_clip(folder / "a.mp4", 5)
    return folder


def read(folder, content):
    path = folder / "records.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_records(path)


def changed(**keys):
    return json.dumps({"video": "a.mp4", "question": "What?", "answer": "A cat."} | keys)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_only_a_line_feed_ends_a_record(folder, separator):
    text = f"One{separator}two."
    line = f'{{"video": "a.mp4", "question": "What?", "answer": "{text}"}}'
    assert [record.answer for record in read(folder, f"{line}\n{FINE}\n")] == [text, "A cat."]


@pytest.mark.parametrize(
    "content",
    [
        f"\ufeff{FINE}\n{FINE}\n",
        f"{FINE}\r\n\r\n  {FINE}\t\r\n",
        f"{FINE}\n{FINE}",
        f"[{FINE}, {FINE}]",
        f"\ufeff\n [\n{FINE}\n,{FINE}\n]\n",
        json.dumps([json.loads(FINE)] * 2, indent=4),
    ],
    ids=["mark", "windows", "no last line feed", "array", "spaced array", "indented array"],
)
def test_two_records_are_read(folder, content):
    assert read(folder, content) == [Record(folder / "a.mp4", "What?", "A cat.")] * 2


def test_other_keys_are_ignored_whatever_number_they_hold(folder):
    line = FINE.replace("{", '{"id": ' + "9" * 5000 + ', "score": -1.5e9999, ', 1)
    assert len(read(folder, line)) == 1


def test_a_key_that_is_given_twice_is_found_quickly_among_many(folder):
    """Within seconds, where comparing each key with every other one takes hours."""
    keys = ",".join(f'"k{number}": 0' for number in range(500_000))
    with pytest.raises(DycokeError, match="line 1: the key 'k499999' is given twice"):
        read(folder, f'{{{keys}, "k499999": 0}}')


FAULTY = [
    ("nonsense", "Expecting value"),
    ("{", "Expecting property name"),
    (DEEP, "nested too deeply"),
    ('{"a":' * 100_000, "nested too deeply"),
    (f'{{"video": "a.mp4", "question": {DEEP}, "answer": "x"}}', "nested too deeply"),
    ("3", "not an object"),
    ("null", "not an object"),
    ('"text"', "not an object"),
    ("[]", "not an object"),
    ("{}", "has no question"),
    ('{"question": "x", "answer": "y"}', "has no video"),
    (changed(video=None), "has no video"),
    (changed(video=["a.mp4", "a.mp4"]), "one clip is supported"),
    (changed(video=3), "video and answer must be texts"),
    (changed(video="a\0b.mp4"), r"no path of a file: 'a\\x00b.mp4'"),
    (changed(question=5), "question must be a text"),
    (changed(question=None), "question must be a text"),
    (changed(question={}), "question must be a text"),
    (changed(question=" "), "question is empty"),
    (changed(question=[]), "conversation is empty"),
    (changed(question=[3]), "question must be a text, or a list of messages"),
    (changed(question=[{"content": "x"}]), "turn 1 is no message"),
    (changed(question=[{"role": "user", "content": 3}]), "turn 1"),
    (changed(question=[{"role": 3, "content": "x"}]), "turn 1: unknown role"),
    (changed(question=[{"role": "assistant", "content": "x"}]), "the last turn"),
    (changed(answer=["x"]), "video and answer must be texts"),
    (changed(answer=None), "video and answer must be texts"),
    (changed(answer=" \n"), "answer is empty"),
    (changed(answer=float("nan")), "NaN is no JSON value"),
    (changed(answer=float("inf")), "Infinity is no JSON value"),
    (FINE.replace("{", '{"answer": "x", '), "the key 'answer' is given twice"),
    (f'{{"video": "a.mp4", "question": {"9" * 5000}, "answer": "x"}}', "question must be"),
]


@pytest.mark.parametrize(("text", "message"), FAULTY, ids=range(len(FAULTY)))
def test_faults_are_told_by_line_or_by_record(folder, text, message):
    for content, place in (
        (f"{FINE}\n\n{text}\n{FINE}\n", "line 3"),
        (f"[{FINE},\n{FINE},\n\n{text},\n{FINE}]", "record 3"),
    ):
        with pytest.raises(DycokeError, match=f"records.json: {place}: .*{message}") as caught:
            read(folder, content)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no record"),
        (b" \r\n", "holds no record"),
        (b"[ ]", "holds no record"),
        (b"[", r"record 1: Expecting value"),
        (b"[" + FINE.encode(), r"record 1: no comma or \] follows it \(line 1\)"),
        (b"[" + FINE.encode() + b",]", "record 2: Expecting value"),
        (b"[\n" + FINE.encode() + b"\n]\nx", r"record 2: text after the end .*\(line 4\)"),
        (FINE.encode() + FINE.encode(), r"line 1: text after the end .*\(column \d+\)"),
        (b"\xef\xbb\xbf\n\n" + b"\xff", "line 3 is not UTF-8"),
        (FINE.encode("utf-16"), "line 1 is not UTF-8"),
    ],
)
def test_files_that_are_no_records_are_refused(folder, content, message):
    with pytest.raises(DycokeError, match=message) as caught:
        read(folder, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "none.jsonl", "x" * 300, "a\0b"])
def test_files_that_cannot_be_read_are_refused(folder, name):
    with pytest.raises(DycokeError, match="cannot be read") as caught:
        read_records(folder / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.mp4", "x" * 300, "two\nlines.mp4", "\ud800.mp4", "."])
def test_a_clip_that_cannot_be_opened_is_told_by_record(folder, name):
    with pytest.raises(DycokeError, match=r"line 2 of records.json: ") as caught:
        read(folder, f"{FINE}\n{changed(video=name)}\n{changed(video=name)}")
    message = str(caught.value)
    assert message.count("line ") == 1
    assert message.isprintable()
    assert (name if name.isprintable() else name.encode("unicode_escape").decode()) in message


def test_train_tells_faults_in_one_line_and_starts_no_run(folder, tmp_path):
    data = tmp_path / "records.jsonl"
    for line, message in (
        ("{", "line 1: Expecting property name"),
        (changed(video=str(folder / "a.mp4"), answer="long " * 100), "line 1 of records.jsonl: "),
    ):
        data.write_text(line)
        for option in ("--data", "--test-data"):
            code, out, err = run_main("train", tmp_path / "run", "--model", TINY, option, data)
            assert (code, out) == (2, "")
            assert err.startswith("error: ")
            assert err.count("\n") == 1
            assert message in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg"])
def test_a_damaged_picture_is_told_before_the_first_step(folder, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / name)
    line = changed(image=name, video=None)
    assert len(read(folder, line)) == 1
    cut(folder / name, 0.6)
    with pytest.raises(DycokeError, match=rf"line 2 of records.json: .*{name}"):
        read(folder, f"{FINE}\n{line}\n")


def test_the_first_ten_faulty_clips_are_told(folder):
    with pytest.raises(DycokeError, match=r"line 10 .*9\.mp4.* \(and 2 more\)"):
        read(folder, "\n".join(changed(video=f"none-{i}.mp4") for i in range(12)))
