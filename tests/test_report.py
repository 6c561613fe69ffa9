"""Results of an evaluation: as a file that grows, a table and a plot."""

import json
from io import StringIO

import pytest
from PIL import Image
from rich.console import Console
from support.command_line import run_main

from dycoke_jax import DyCoke, DycokeError
from dycoke_jax.compression.baselines import RandomTokens
from dycoke_jax.evaluation import accuracy, report
from dycoke_jax.evaluation.accuracy import Result
from dycoke_jax.evaluation.settings import DEFAULT, HEADLINES, SWEEPS
from dycoke_jax.tasks.questions import KINDS

DESCRIBED = {"model": "abc", "clips": 2}
BLIND = dict.fromkeys(KINDS, 0.25)


def result(name, right, merged=112.0):
    made = Result(name, visual=256.0, merged=merged, read=merged, attended=33.5)
    for kind in KINDS:
        made.kinds[kind].right, made.kinds[kind].asked = right, 40
    return made


def test_results_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "results.json"
    assert report.read(path, DESCRIBED) == {}
    results = {"full": result("full", 39), "other": result("other", 20)}
    report.write(path, DESCRIBED, results, BLIND)
    assert report.read(path, DESCRIBED) == results
    saved = json.loads(path.read_text())["settings"]["other"]
    assert saved["all"]["accuracy"] == 0.5
    low, high = saved["all"]["interval"]
    assert low < 0.5 < high


def test_results_of_something_else_are_not_mixed_in(tmp_path):
    path = tmp_path / "results.json"
    report.write(path, DESCRIBED, {}, BLIND)
    with pytest.raises(DycokeError, match=r"another evaluation \(clips\); name another file"):
        report.read(path, DESCRIBED | {"clips": 3})
    path.write_text("[1, 2]")
    with pytest.raises(DycokeError, match="holds no results of an evaluation"):
        report.read(path, DESCRIBED)


def test_table_says_what_is_lost_and_what_guessing_gives():
    console = Console(width=report.WIDTH, record=True, file=StringIO())
    console.print(report.table([result("full", 38), result("paper", 30)], BLIND))
    lines = [line.split() for line in console.export_text().splitlines()]
    full = next(words for words in lines if "full" in words)
    paper = next(words for words in lines if "paper" in words)
    blind = next(words for words in lines if "blind" in words)
    assert "95.0" in full
    assert "75.0" in paper
    assert "20.0" in paper, "points lost"
    assert "25.0" in blind


def test_settings_of_one_line_differ_in_one_number():
    lines = report.sweeps(list(HEADLINES | SWEEPS))
    assert lines.keys() == {
        "full",
        "paper, K",
        "paper, P",
        "paper, L",
        "paper drop",
        "official",
        "stage 1 only",
        "stage 2 only",
        "random tokens",
        "whole frames",
    }
    assert lines["full"] == ["full"]
    assert set(lines["paper, P"]) == {DEFAULT, "paper K=0.7 P=0.5 L=3", "paper K=0.7 P=0.9 L=3"}
    assert {name for names in lines.values() for name in names} == (HEADLINES | SWEEPS).keys()


def test_settings_that_are_texts_are_lines_of_their_own():
    texts = ["dycoke(k=0.5,p=0.5)", "dycoke(k=.7, mode=official)", "random"]
    lines = report.sweeps(["full", "random tokens K=0.3", *texts])
    assert all(lines[text] == [text] for text in texts)
    assert lines["random tokens"] == ["random tokens K=0.3"]


def test_plot_is_a_picture(tmp_path):
    results = [result("full", 38, 256), result("paper K=0.5", 37), result("paper K=0.7", 36, 90)]
    names = [one.name for one in results]
    report.plot(results, tmp_path / "plot.png", report.sweeps(names))
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 500


def test_compress_says_what_is_compared_with_the_plain_model(tmp_path, monkeypatch):
    asked = {}

    def evaluate(model, clips, name, compression, **settings):
        asked[name] = compression
        return result(name, 20)

    monkeypatch.setattr(accuracy, "evaluate", evaluate)
    texts = ["random(k=0.5)", "dycoke(k=.5, parked=drop)"]
    ask = ("eval", tmp_path / "r.json", "--clips", 1, "--compress", texts[0], "--compress")
    code, out, _ = run_main(*ask, texts[1], "--json")
    assert code == 0
    compared = {"full": None, texts[0]: RandomTokens(0.5), texts[1]: DyCoke(0.5, parked="drop")}
    assert asked == compared
    assert json.loads(out)["settings"].keys() == compared.keys()
    for added, says in (
        (("random", "--settings", "all"), "--compress and --settings both choose"),
        (("nothing",), "there is no method 'nothing'"),
        (("dycoke(layer=99)",), "DyCoke: layer is 99; with "),
    ):
        code, out, err = run_main(*ask, *added)
        assert (code, out) == (2, "")
        assert says in err
        assert err.count("\n") == 1
    assert asked == compared


def test_rows_stand_below_their_headings_and_notes_below_the_table():
    results = [result("full", 38), result("a(b=1)", 30), result("c", 29), result("a(b=2)", 20)]
    headings = {"full": "", "a(b=1)": "50 %", "c": "50 %", "a(b=2)": "25 %"}
    console = Console(width=report.WIDTH, record=True, file=StringIO())
    console.print(report.table(results, BLIND, headings, ["c is left out at 25 %."]))
    lines = console.export_text().splitlines()
    first = [line.split()[1] for line in lines if line.startswith("│")]
    assert first == ["full", "50", "a(b=1)", "c", "25", "a(b=2)", "blind"]
    assert lines[-1].strip() == "c is left out at 25 %."


def test_more_frames_are_compared_on_longer_clips(tmp_path, monkeypatch):
    """The number of sampled frames is that of the setting, and a second call repeats nothing."""
    asked = {}

    def evaluate(model, clips, name, compression, **settings):
        assert {clip.scene.frames for clip in clips} == {64}
        assert name not in asked
        asked[name] = settings["frames"]
        return result(name, 20)

    monkeypatch.setattr(accuracy, "evaluate", evaluate)
    ask = ("eval", tmp_path / "r.json", "--clips", 4, "--settings", "more-frames")
    ask = (*ask, "--frames", 16, "--clip-frames", 64)
    plot = tmp_path / "plot.png"
    code, out, err = run_main(*ask, "--plot", plot)
    assert (code, err) == (0, "")
    assert next(iter(asked)) == "16 frames"
    assert {name: frames for name, frames in asked.items() if "evs" in name} == {
        "32 frames, evs(budget=0.5)": 32,
        "32 frames, evs(budget=0.5, first_frame=budget)": 32,
        "64 frames, evs(budget=0.25)": 64,
        "64 frames, evs(budget=0.25, first_frame=budget)": 64,
    }
    assert "32 frames at 50 %" in out
    assert "…" not in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    code, out, _ = run_main(*ask, "--json")
    saved = json.loads(out)
    assert (code, saved["settings"].keys()) == (0, asked.keys())
    assert saved["evaluation"]["frames"] == 64
    assert "sampled" not in saved["evaluation"]


def test_frames_that_are_sampled_of_longer_clips_are_part_of_the_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "evaluate", lambda model, clips, name, *_, **__: result(name, 9))
    ask = ("eval", tmp_path / "r.json", "--clips", 1, "--compress", "evs", "--clip-frames", 32)
    code, out, _ = run_main(*ask, "--json")
    assert code == 0
    described = json.loads(out)["evaluation"]
    assert (described["frames"], described["sampled"]) == (32, 16)
    code, _, err = run_main(*ask, "--frames", 8)
    assert code == 2
    assert "another evaluation (sampled)" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        pytest.param(["--frames", 0], "--frames is 0; it must be at least 1", id="none"),
        pytest.param(
            ["--frames", 16, "--clip-frames", 9],
            "--frames 16 samples more frames than clips of --clip-frames 9 have",
            id="too many",
        ),
        pytest.param(
            ["--settings", "more-frames", "--clip-frames", 31],
            "clips of 31 frames have no room for more frames than 16; they need 32 at least",
            id="too short",
        ),
    ],
)
def test_frames_that_cannot_be_sampled_are_an_error_in_one_line(options, says, tmp_path):
    code, out, err = run_main("eval", tmp_path / "r.json", "--clips", 1, *options)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_evaluation_goes_on_where_it_was(tmp_path):
    """A second call with more settings runs the new ones only."""
    model, results = tmp_path / "model", tmp_path / "results.json"
    assert run_main("init", model)[0] == 0
    ask = ("eval", results, "--model", model, "--clips", 1, "--frames", 8)
    code, out, _ = run_main(*ask)
    assert code == 0
    assert all(name in out for name in HEADLINES)
    saved = json.loads(results.read_text())
    # Marked, so that it shows whether this one is computed anew.
    saved["settings"]["full"]["merged"] = 12345.0
    results.write_text(json.dumps(saved))
    code, out, _ = run_main(*ask, "--json")
    assert code == 0
    assert json.loads(out)["settings"]["full"]["merged"] == 12345.0
    code, _, err = run_main(*ask[:-4], "--clips", 2, "--frames", 8)
    assert code == 2
    assert "another evaluation (clips)" in err


@pytest.mark.parametrize("arguments", [("r.json", "--plot", "missing/p.png"), ("missing/r.json",)])
def test_where_nothing_can_be_written_is_said_before_the_work(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_main("eval", *arguments)
    assert code == 2
    assert "there is no folder missing" in err
    assert not list(tmp_path.iterdir())
