"""The command line: what it prints, where, and how it fails."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.clips import cut, real_clip, write_clip, write_sound
from support.command_line import run_main

from dycoke_jax import Decoding, DyCoke, FrameSampling, LlavaVideo, __version__
from dycoke_jax.assets import TINY
from dycoke_jax.cli.app import COMMANDS
from dycoke_jax.compression.baselines import RandomTokens
from dycoke_jax.compression.methods import METHODS
from dycoke_jax.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    assert run_main("init", folder)[0] == 0
    return folder


def generate(model, *arguments):
    return run_main("generate", "--model", model, "--max-new-tokens", 6, *arguments)


def test_answers_about_a_real_clip(model):
    code, out, err = generate(model, "--video", real_clip(), "--prompt", "What happens?")
    assert code == 0
    assert out.endswith("\n")
    assert "tokens: 512 visual -> 224 after merging -> 67 attended per step" in err
    assert "seconds: vision" in err


def test_json_holds_what_the_api_gives(model):
    settings = ("--video", real_clip(), "--prompt", "What?", "--frames", 8, "--seed", 3)
    settings += ("--temperature", 0.8, "--p", 0.5, "--layer", 2)
    code, out, _ = generate(model, *settings, "--json")
    assert code == 0
    shown = json.loads(out)
    answer = LlavaVideo.from_pretrained(model).generate(
        [real_clip()],
        ["What?"],
        compression=DyCoke(layer=2, p=0.5),
        decoding=Decoding(6, 0.8, seed=3),
        sampling=FrameSampling(8),
    )[0]
    assert tuple(shown["token_ids"]) == answer.token_ids
    assert shown["text"] == answer.text
    assert shown["tokens"]["attended"] == list(answer.tokens.attended)
    assert shown["compression"]["method"] == "dycoke"
    assert shown["compression"]["p"] == 0.5


def test_compress_names_another_method_in_place_of_dycoke():
    clip = ("--video", real_clip(), "--prompt", "What?", "--frames", 8)
    code, out, _ = generate(TINY, *clip, "--compress", "random(k=0.5)", "--json")
    assert code == 0
    shown = json.loads(out)
    answer = LlavaVideo.from_pretrained(TINY).generate(
        [real_clip()],
        ["What?"],
        compression=RandomTokens(k=0.5),
        sampling=FrameSampling(8),
        decoding=Decoding(max_new_tokens=6),
    )[0]
    assert tuple(shown["token_ids"]) == answer.token_ids
    assert shown["tokens"]["merged"] == answer.tokens.merged
    assert shown["compression"] == {"method": "random", "k": 0.5, "seed": 0, "budget": None}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--k", "0.7"], "--compress and --k both choose the compression"),
        (["--no-dycoke"], "--compress and --no-dycoke both choose the compression"),
        (["--parked", "drop"], "--compress and --parked both choose the compression"),
        (["--compress", "nothing"], "there is no method 'nothing'"),
    ],
)
def test_compress_and_options_of_dycoke_exclude_each_other(model, arguments, says):
    ask = ("--video", real_clip(), "--prompt", "What?", "--compress", "random")
    for command in (("generate", "--model", model), ("demo",)):
        if command == ("demo",) and "--no-dycoke" in arguments:
            continue
        code, out, err = run_main(*command, *ask, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert says in err


def test_an_empty_system_text_omits_the_system_turn(model, monkeypatch):
    seen = []

    def stream(self, videos, prompts, *, prompting, **settings):
        seen.append(prompting.system)
        raise ConfigError("seen enough")

    monkeypatch.setattr(LlavaVideo, "stream", stream)
    for system in ((), ("--system", ""), ("--system", "Be brief.")):
        assert "seen enough" in generate(model, "--prompt", "Hello", *system)[2]
    assert seen == [..., None, "Be brief."]


def test_text_alone_and_the_plain_model(model):
    code, out, _ = generate(model, "--prompt", "Hello", "--no-dycoke", "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["compression"] is None
    assert shown["tokens"]["visual"] == 0


@pytest.fixture(scope="module")
def bad_clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.mp4").write_text("This is no video.\n")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "random.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    write_sound(folder / "sound.mp4")
    cut(Path(shutil.copy(real_clip(), folder / "cut.mp4")), 0.4)
    return folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cut.mp4", "is cut"),
        ("text.mp4", "is not a video"),
        ("empty.mp4", "empty.mp4"),
        ("random.mp4", "random.mp4"),
        ("sound.mp4", "no video stream"),
        ("missing.mp4", "no such file"),
    ],
)
def test_bad_clips_give_one_clear_line(model, bad_clips, name, says):
    code, out, err = generate(model, "--video", bad_clips / name, "--prompt", "What?")
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert name in err


def test_a_damaged_clip_can_be_used_on_request(model, bad_clips):
    clip = ("--video", bad_clips / "cut.mp4", "--prompt", "What?")
    code, _, err = generate(model, *clip, "--allow-damaged")
    assert code == 0
    assert "note: " in err
    assert "is cut" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "no/such/folder"], "neither an existing folder nor a hub id"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--k", "1.5"], "k is 1.5"),
        (["--layer", "6"], "1..5"),
        (["--mode", "official", "--frames", "4"], "at least 5 frames"),
        (["--frames", "0"], "frames is 0"),
        (["--fps", "-1"], "fps is -1"),
        (["--prompt", " "], "question is empty"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
    ],
)
def test_bad_settings_give_one_clear_line(model, arguments, says):
    base = {"--model": model, "--video": real_clip(), "--prompt": "What?"}
    base |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    code, out, err = run_main("generate", *(part for pair in base.items() for part in pair))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_usage_errors_exit_with_two():
    assert run_main("generate")[0] == 2
    assert run_main("nonsense")[0] == 2


def test_convert_there_and_back(model, tmp_path):
    from support.checkpoints import read_tensors, same_bits

    assert run_main("convert", model, tmp_path / "orbax")[0] == 0
    assert run_main("convert", tmp_path / "orbax", tmp_path / "hf", "--to", "llava-hf")[0] == 0
    assert same_bits(read_tensors(model), read_tensors(tmp_path / "hf"))
    code, _, err = run_main("convert", model, tmp_path / "hf")
    assert code == 2
    assert "exists already" in err


def test_scripts_do_the_same(model, tmp_path):
    root = Path(__file__).parent.parent / "convert"
    for script, source, target in (
        ("hf_to_orbax.py", model, tmp_path / "orbax"),
        ("orbax_to_hf.py", tmp_path / "orbax", tmp_path / "hf"),
    ):
        subprocess.run([sys.executable, root / script, source, target], check=True)
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_untrained_checkpoints_load_in_transformers(model):
    from transformers import LlavaOnevisionForConditionalGeneration

    _, report = LlavaOnevisionForConditionalGeneration.from_pretrained(
        model, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    code, _, err = run_main("init", model.parent / "other", "--preset", "huge")
    assert code == 2
    assert "onevision-7b" in err


def test_other_containers_and_rates(model, tmp_path):
    clip = write_clip(tmp_path / "clip.mkv", 20)
    code, out, _ = generate(model, "--video", clip, "--prompt", "What?", "--fps", 5, "--json")
    assert code == 0
    assert json.loads(out)["tokens"]["visual"] % 16 == 0


def test_version_and_help():
    assert run_main("--version")[1] == f"dycoke-jax {__version__}\n"
    for command in COMMANDS:
        code, out, _ = run_main(command, "--help")
        assert code == 0
        assert "Example" in out


def test_the_help_of_compress_names_every_method():
    for command in ("generate", "demo", "eval"):
        _, out, _ = run_main(command, "--help")
        shown = out.partition("--compress")[2]
        assert all(name in shown for name in METHODS)
