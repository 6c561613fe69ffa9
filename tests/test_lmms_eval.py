"""The plug-in of lmms-eval, against transformers and plain words; lmms-eval is a stand-in."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
import torch
from PIL import Image
from support import lmms_eval_stand_in
from support.checkpoints import VIDEO_TOKEN
from support.clips import textured, write_clip
from support.lmms_eval_stand_in import Instance, unwrap_generation_output

from dycoke_jax.errors import ConfigError, RequestError, VideoError
from dycoke_jax.evaluation import lmms_eval
from dycoke_jax.evaluation.lmms_eval.arguments import Arguments, arguments_of
from dycoke_jax.evaluation.lmms_eval.requests import clip_of, decoding_of, question_of

ROOT = Path(__file__).parent.parent
LENGTHS = (24, 9, 31)  # frames, at 10 a second
SETTINGS = {"until": ["\n\n"], "max_new_tokens": 6, "temperature": 0, "do_sample": False}
QUESTIONS = ("What?", "Which thing\nmoves first?", "Describe the clip.")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{n}.mp4", textured(n), fps=10) for n in LENGTHS]


@pytest.fixture
def log(monkeypatch):
    return lmms_eval_stand_in.install(monkeypatch)


@pytest.fixture
def plug_in(log, pair, clips):
    """Makes the model as lmms-eval does, with documents of two tasks."""

    def make(**arguments):
        module = importlib.import_module("dycoke_jax.evaluation.lmms_eval.model")
        usual = {"pretrained": pair[0].name_or_path, "max_frames_num": 3, "batch_size": "4"}
        model = module.DycokeJax(**usual | arguments)
        documents = [{"clip": str(path)} for path in clips]
        model.task_dict = {"one": {"test": documents}, "other": {"dev": documents[::-1]}}
        return model

    return make


def visual(document):
    return [document["clip"]]


def asked(question, doc_id=0, *, settings=SETTINGS, task="one", doc_to_visual=visual):
    split = "test" if task == "one" else "dev"
    return Instance((question, settings, doc_to_visual, doc_id, task, split))


def decoded(path, indices_of):
    """The frames of some indices, by PyAV and Pillow alone."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    resized = [
        Image.fromarray(frames[index]).resize((56, 56), Image.Resampling.BICUBIC)
        for index in indices_of(len(frames))
    ]
    return np.stack([np.asarray(picture) for picture in resized])


def reference_inputs(ours, text, frames):
    """Ids and pixels as the reference models of lmms-eval make them for one ``<image>``."""
    prompt = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<image>\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    before, after = (ours.tokenizer(part).input_ids for part in prompt.split("<image>"))
    tokens = [VIDEO_TOKEN] * (len(frames) * ours.config.tokens_per_frame + 1)
    pixels = torch.from_numpy(frames).float().permute(0, 3, 1, 2)[None]
    return [*before, *tokens, *after], {"pixel_values_videos": (pixels / 255 - 0.5) / 0.5}


def reference_answer(pair, text, frames, new_tokens):
    reference, ours = pair
    ids, inputs = reference_inputs(ours, text, frames)
    given = torch.tensor([ids])
    with torch.no_grad():
        out = reference.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            **inputs,
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=list(ours.stop_ids),
            pad_token_id=0,
        )
    return ours.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def evenly(total):
    return np.linspace(0, total - 1, 3, dtype=int)


def test_answers_are_those_of_transformers_for_the_reference_prompt_and_frames(
    plug_in, pair, clips
):
    """Requests of two tasks, with other numbers of new tokens, in batches of four."""
    short = SETTINGS | {"max_new_tokens": 2}
    requests = [asked(question, number) for number, question in enumerate(QUESTIONS)]
    requests += [asked(QUESTIONS[0], 0, settings=short, task="other")]
    requests += [asked(QUESTIONS[1], 0)]
    results = plug_in().generate_until(requests)
    wanted = [(QUESTIONS[i], clips[i], 6) for i in range(3)]
    wanted += [(QUESTIONS[0], clips[2], 2), (QUESTIONS[1], clips[0], 6)]
    texts = [
        reference_answer(pair, question, decoded(clip, evenly), new)
        for question, clip, new in wanted
    ]
    assert [unwrap_generation_output(result)[0] for result in results] == texts
    assert len(set(texts)) > 2


def test_frames_a_second_and_times_are_those_of_llava_vid(plug_in, pair, clips):
    model = plug_in(video_fps=1, max_frames_num=3, add_time_instruction=True)
    results = model.generate_until([asked("What?", number) for number in range(3)])
    # 2.4 s and 0.9 s have at most 3 frames at one a second; 3.1 s have 4, so 3 are spread evenly.
    indices = [[0, 10, 20], [0], [0, 15, 30]]
    seconds = ["2.40", "0.90", "3.10"]
    times = ["0.00s,1.00s,2.00s", "0.00s", "0.00s,1.50s,3.00s"]
    for result, clip, chosen, length, at in zip(
        results, clips, indices, seconds, times, strict=True
    ):
        text = (
            f"The video lasts for {length} seconds, and {len(chosen)} frames are uniformly sampled "
            f"from it. These frames are located at {at}.Please answer the following questions "
            "related to this video.\nWhat?"
        )
        frames = decoded(clip, lambda _, chosen=chosen: chosen)
        assert result.text == reference_answer(pair, text, frames, 6)


def test_token_counts_are_those_of_the_prompt_and_the_answer(plug_in, pair, clips):
    (result,) = plug_in().generate_until([asked("What?")])
    ids, _ = reference_inputs(pair[1], "What?", decoded(clips[0], evenly))
    assert result.token_counts.input_tokens == len(ids)
    assert 1 <= result.token_counts.output_tokens <= 6


def test_dycoke_acts_with_the_settings_that_are_given(plug_in, pair, clips):
    """Of four frames, 4 + 2 + 2 + 2 tokens of 4 stay at k = 0.5."""
    given = {"dycoke": True, "dycoke_k": 0.5, "dycoke_l": 2, "dycoke_p": 0.5, "max_frames_num": 4}
    (result,) = plug_in(**given).generate_until([asked("What?")])
    per_frame = pair[1].config.tokens_per_frame
    assert per_frame == 4
    ids, _ = reference_inputs(pair[1], "What?", np.zeros((4, 56, 56, 3), np.uint8))
    assert result.token_counts.input_tokens == len(ids) - 3 * 2


def test_losses_are_means_of_those_of_transformers(plug_in, pair, clips):
    """Of the tokens of the answer and of its end; a target may be a function of the document."""
    reference, ours = pair
    answers = [" A", " a longer choice", " B"]

    def target(document):
        return answers[[str(path) for path in clips].index(document["clip"])]

    requests = [
        Instance((question, target if number else answers[0], visual, number, "one", "test"))
        for number, question in enumerate(QUESTIONS)
    ]
    results = [unwrap_generation_output(one)[0] for one in plug_in().loglikelihood(requests)]
    for (loss, is_greedy), question, clip, answer in zip(
        results, QUESTIONS, clips, answers, strict=True
    ):
        ids, inputs = reference_inputs(ours, question, decoded(clip, evenly))
        own = ours.tokenizer(answer + "<|im_end|>").input_ids
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([ids + own]), **inputs).logits[0]
        predicted = logits[-len(own) - 1 : -1]
        wanted = torch.nn.functional.cross_entropy(predicted, torch.tensor(own))
        assert loss == pytest.approx(float(wanted), abs=1e-4)
        assert is_greedy == bool((predicted.argmax(-1) == torch.tensor(own)).all())


def test_rounds_go_on_until_their_task_ends_them(plug_in):
    """Request i has i + 1 rounds; each shows the task what was answered before."""
    seen = []

    def next_round(document, *, previous_output, round_idx, previous_round_info):
        seen.append((document["clip"], round_idx, list(previous_output), previous_round_info))
        rounds = 1 + [str(path) for path in documents].index(document["clip"])
        text = f"Round {round_idx}: {len(previous_output[-1])} letters?"
        return [document["clip"]], text, round_idx >= rounds, previous_output, round_idx * 10

    model = plug_in()
    documents = [document["clip"] for document in model.task_dict["one"]["test"]]
    requests = [
        Instance(("Begin.", SETTINGS, visual, next_round, number, "one", "test"))
        for number in range(3)
    ]
    results = model.generate_until_multi_round(requests)
    assert [len(rounds) for rounds in results] == [1, 2, 3]
    for number, rounds in enumerate(results):
        questions = ["Begin."]
        questions += [f"Round {i}: {len(rounds[i - 1])} letters?" for i in range(1, len(rounds))]
        single = model.generate_until([asked(question, number) for question in questions])
        assert rounds == [result.text for result in single]
        own = [entry[1:] for entry in seen if entry[0] == documents[number]]
        infos = [None, *range(10, 10 * len(rounds), 10)]
        assert own == [(i + 1, rounds[: i + 1], infos[i]) for i in range(len(rounds))]
        assert unwrap_generation_output(rounds)[0] == rounds


def test_clip_that_cannot_be_read_ends_the_evaluation(plug_in, tmp_path):
    requests = [asked("What?"), asked("What?", doc_to_visual=lambda _: [str(tmp_path / "no.mp4")])]
    with pytest.raises(VideoError, match=r"no\.mp4: no such file"):
        plug_in().generate_until(requests)


def test_clip_that_cannot_be_read_can_cost_its_own_answer_alone(plug_in, tmp_path, log):
    requests = [asked("What?", doc_to_visual=lambda _: [str(tmp_path / "no.mp4")]), asked("What?")]
    model = plug_in(failures="empty")
    failed, answered = model.generate_until(requests)
    assert failed.text == ""
    assert answered == model.generate_until(requests[1:])[0]
    assert len(log.lines) == 1
    assert log.lines[0].startswith("error: a request gets an empty answer: ")
    assert "no.mp4: no such file" in log.lines[0]


def test_question_without_a_clip_is_answered(plug_in, pair):
    (result,) = plug_in().generate_until([asked("What?", doc_to_visual=lambda _: [])])
    reference, ours = pair
    text = "user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    prompt = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>{text}"
    ids = torch.tensor([ours.tokenizer(prompt).input_ids])
    with torch.no_grad():
        out = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=list(ours.stop_ids),
            pad_token_id=0,
        )
    new = out[0, ids.shape[1] :]
    assert result.text == ours.tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize(("penalty", "count"), [(1.05, 1), (1.0, 0), (None, 0)])
def test_penalty_that_the_reference_models_apply_is_said(
    plug_in, pair, log, tmp_path, penalty, count
):
    shutil.copytree(pair[0].name_or_path, tmp_path, dirs_exist_ok=True)
    settings = {"eos_token_id": 258, "repetition_penalty": penalty}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    plug_in(pretrained=str(tmp_path))
    assert len([line for line in log.lines if "repetition_penalty of 1.05" in line]) == count
    assert len(log.lines) == count


def test_repeats_of_a_sampled_question_are_other_samples(plug_in):
    settings = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0}
    requests = [asked("What?", settings=settings)] * 4
    model = plug_in()
    texts = [result.text for result in model.generate_until(requests)]
    assert len(set(texts)) > 1
    assert texts == [result.text for result in model.generate_until(requests)]


def test_entry_point_leads_to_the_class(log):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["lmms_eval.models"]["dycoke_jax"].split(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert manifest.model_id == "dycoke_jax"
    module, name = manifest.simple_class_path.rsplit(".", 1)
    made = getattr(importlib.import_module(module), name)
    assert issubclass(made, lmms_eval_stand_in.Lmms)
    assert made.is_simple


def test_manifest_loads_no_jax():
    """lmms-eval imports it whatever model is evaluated."""
    program = (
        "import sys, dycoke_jax.evaluation.lmms_eval; "
        "print([n for n in ('jax', 'flax', 'av', 'transformers', 'torch') if n in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "pretrained is missing"),
        ({"device_map": "auto", "model_name": "x"}, "no argument device_map, model_name; it takes"),
        ({"conv_template": "vicuna_v1"}, "conv_template is 'vicuna_v1'; it must be qwen_1_5"),
        ({"pretrained": 7}, "pretrained is 7; it must be a path"),
        ({"max_frames_num": 0}, "frames is 0; it must be at least 1"),
        ({"max_frames_num": 2.5}, "frames is 2.5, not a whole number"),
        ({"batch_size": "auto"}, "batch_size is 'auto', not a whole number"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"video_fps": -1.0}, "fps is -1.0; a number above 0 is needed"),
        ({"dycoke": "yes"}, "dycoke is 'yes'; it must be True or False"),
        ({"dycoke_p": 0.7}, "DyCoke, which is off; add dycoke=True"),
        ({"mode": "official"}, "DyCoke, which is off; add dycoke=True"),
        ({"dycoke": True, "dycoke_k": 1}, "DyCoke: k is 1; it must lie in"),
        ({"dycoke": True, "mode": "other"}, "DyCoke: mode is 'other'; it must be"),
        ({"mm_spatial_pool_mode": "mean"}, "mm_spatial_pool_mode is 'mean'; it must be"),
        ({"add_time_instruction": 1}, "add_time_instruction is 1; it must be True or False"),
        ({"mesh": 2}, "mesh is 2; write the sizes of its axes data and model, as in 2x4"),
        ({"mesh": "data=2"}, "mesh is 'data=2'; write the sizes"),
        ({"failures": "return"}, "failures is 'return'; it must be raise or empty"),
    ],
    ids=lambda value: "-".join(value) or "none" if isinstance(value, dict) else "",
)
def test_arguments_are_refused_in_one_line(given, message, unchecked_types):
    given = {"pretrained": "folder"} | given if given else given
    with pytest.raises(ConfigError) as error:
        arguments_of(given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_documented_arguments_are_those_that_are_known():
    """Names and defaults; the table is that of docs/evaluation.md."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE)
    fields = {field.name: field.default for field in dataclasses.fields(Arguments)}
    assert [name for name, _ in rows] == list(fields)
    for name, default in rows:
        if not default.startswith("("):  # words for a default that is none
            assert default == str(fields[name])


def test_arguments_stand_for_settings():
    plain = arguments_of({"pretrained": "folder"})
    assert plain.compression is None
    assert (plain.sampling.frames, plain.sampling.fps) == (32, None)
    assert (plain.batch_size, plain.mesh_sizes) == (1, None)
    assert not plain.prompting.time_text
    given = {"dycoke": True, "dycoke_l": 4, "dycoke_p": 0.8, "mode": "official"}
    given |= {"mesh": "2x4", "batch_size": "8", "video_fps": 1, "max_frames_num": 64}
    whole = arguments_of({"pretrained": "folder", "add_time_instruction": True} | given)
    method = whole.compression
    assert method is not None
    assert (method.k, method.layer, method.p, method.mode) == (0.7, 4, 0.8, "official")
    assert (whole.sampling.frames, whole.sampling.fps) == (64, 1.0)
    assert (whole.batch_size, whole.mesh_sizes) == (8, {"data": 2, "model": 4})
    assert whole.prompting.time_text


def test_settings_of_generation_are_those_of_the_reference_models():
    """Greedy unless do_sample is set; 1,024 tokens by default; until has no effect."""
    greedy = decoding_of({"until": ["\n"], "temperature": 0.7, "top_p": None}, "task", 3)
    assert (greedy.max_new_tokens, greedy.temperature) == (1024, 0)
    settings = {"do_sample": True, "top_p": 0.5, "max_new_tokens": 9, "num_beams": 1}
    sampled = decoding_of(settings, "task", 3)
    assert (sampled.max_new_tokens, sampled.temperature) == (9, 1.0)
    assert (sampled.top_k, sampled.top_p, sampled.seed) == (50, 0.5, 3)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: decoding_of({"num_beams": 3}, "qa", 0), "task qa asks for beam search"),
        (lambda: decoding_of({"penalty": 2}, "qa", 0), "task qa has penalty among its generation"),
        (lambda: clip_of(["a.mp4", "b.mp4"], "qa"), "task qa gives 2 visuals with a question"),
        (lambda: clip_of([Image.new("RGB", (8, 8))], "qa"), "task qa gives a visual of type Image"),
        (lambda: clip_of("a.mp4", "qa"), "task qa gives visuals of type str"),
        (lambda: question_of("See <image>", "qa", has_clip=True), "task qa has <image> in the"),
    ],
    ids=["beams", "unknown setting", "two clips", "picture", "no list", "placeholder"],
)
def test_tasks_that_ask_for_more_are_refused_by_name(refused, message):
    with pytest.raises(RequestError, match=message):
        refused()


def test_wrapper_finds_the_tasks_and_passes_errors_on(log, monkeypatch):
    """The tasks of the package, unless others are named; lmms-eval raises at level DEBUG alone."""
    from dycoke_jax.evaluation.lmms_eval.__main__ import main

    seen = []
    cli, dispatch = ModuleType("lmms_eval.cli"), ModuleType("lmms_eval.cli.dispatch")
    dispatch.main = lambda: seen.append(sys.argv[1:])
    monkeypatch.setitem(sys.modules, "lmms_eval.cli", cli)
    monkeypatch.setitem(sys.modules, "lmms_eval.cli.dispatch", dispatch)
    monkeypatch.setattr(sys, "argv", sys.argv)
    main(["eval", "--tasks", "daily_omni"])
    main(["eval", "--tasks", "x", "--include_path=mine", "--verbosity", "INFO"])
    main(["tasks", "list"])
    last = ["--verbosity", "DEBUG"]
    own = ["--include_path", str(lmms_eval.TASKS)]
    assert seen[0] == ["eval", "--tasks", "daily_omni", *own, *last]
    given = ["eval", "--tasks", "x", "--include_path=mine", "--verbosity", "INFO"]
    assert seen[1] == [*given, *last]
    assert seen[2] == ["tasks", "list"]
    assert (lmms_eval.TASKS / "daily_omni" / "daily_omni.yaml").is_file()


def test_wrapper_says_that_lmms_eval_is_missing(monkeypatch):
    from dycoke_jax.evaluation.lmms_eval.__main__ import main

    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "lmms_eval"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"lmms-eval is not installed; docs/evaluation\.md"):
        main(["eval"])


def test_daily_omni_asks_and_scores_as_the_benchmark(monkeypatch, tmp_path):
    """The prompt of its script for models that only see, and its rule: the first letter counts."""
    from dycoke_jax.evaluation.lmms_eval.tasks.daily_omni import utils

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    choices = ["A. A dog.", "B. A cat's tail."]
    document = {"video_id": "x1", "Question": "What?", "Choice": choices, "Answer": "B"}
    document |= {"video_duration": "60s"}
    videos = tmp_path / "daily_omni" / "Videos"
    assert utils.doc_to_visual(document) == [str(videos / "x1" / "x1_video.mp4")]
    assert utils.doc_to_text(json.loads(json.dumps(document))) == (
        "\nYour task is to accurately answer multiple-choice questions based on the given video.\n"
        "Select the single most accurate answer from the given choices.\nQuestion: What?\n"
        "Choices: ['A. A dog.', \"B. A cat's tail.\"]\nYour answer should be a capital letter "
        "representing your choice: A, B, C, or D. Don't generate any other text.\n"
    )
    scores = {"B": 1, " b. A cat": 1, "A": 0, "The answer is B": 0, "": 0}
    for answer, score in scores.items():
        assert utils.process_results(document, [answer]) == {
            "daily_omni_accuracy": score,
            "daily_omni_accuracy_30s": None,
            "daily_omni_accuracy_60s": score,
        }
    assert utils.mean_of_asked([1.0, None, 0.0, None]) == 0.5
