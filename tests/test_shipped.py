"""The checkpoint that ships: its files, its answers in transformers, and what compression costs."""

import json

import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_jax import LlavaVideo
from dycoke_jax.assets import TINY
from dycoke_jax.checkpoint import open_checkpoint
from dycoke_jax.evaluation.accuracy import evaluate
from dycoke_jax.evaluation.settings import DEFAULT, FULL, HEADLINES
from dycoke_jax.inputs.prompts import build_prompt
from dycoke_jax.tasks.pictures import draw
from dycoke_jax.tasks.task import task_clip


@pytest.fixture(scope="module")
def model():
    return LlavaVideo.from_pretrained(TINY)


def test_it_is_small_and_whole():
    files = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= (
        files.keys()
    )
    assert sum(files.values()) < 12e6
    assert open_checkpoint(str(TINY)).config.text.num_layers >= 6


def test_its_log_tells_how_it_learned():
    log = [json.loads(line) for line in (TINY / "training.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == sorted(entry["step"] for entry in log)
    assert log[0]["loss"] > 3
    # The loss of the last steps is no measure: they drop up to 95 % of the tokens.
    of_held_out = log[-1]["evaluation"]
    assert of_held_out["full"]["loss"] < 0.1
    assert all(figures["accuracy"] > 0.9 for figures in of_held_out.values())


def test_transformers_gives_the_same_greedy_answers(model):
    """Without compression, in float32: the files alone say everything that an answer needs."""
    reference = LlavaOnevisionForConditionalGeneration.from_pretrained(
        TINY, dtype=torch.float32
    ).eval()
    token = reference.config.video_token_id
    asked = 0
    for number in range(3):
        clip = task_clip("test", number)
        frames = draw(clip.scene)
        pixels = torch.from_numpy(frames).float().permute(0, 3, 1, 2)[None] / 127.5 - 1
        prompts = [question.text for question in clip.questions]
        answers = model.generate(
            [frames] * len(prompts), prompts, compression=None, batch_size=len(prompts)
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            parts = build_prompt(model.tokenizer, prompt, has_video=True)
            ids = torch.tensor([[*parts.before, *[token] * 257, *parts.after]])
            with torch.no_grad():
                wanted = reference.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values_videos=pixels,
                    do_sample=False,
                    max_new_tokens=128,
                    eos_token_id=list(model.stop_ids),
                    pad_token_id=0,
                )[0, ids.shape[1] :].tolist()
            assert list(answer.token_ids) == wanted
            asked += 1
    assert asked > 20


@pytest.mark.slow
def test_compression_costs_little_and_dropping_blindly_much(model):
    """On 60 clips, so with some room; docs/accuracy.md has the figures of 1,000."""
    clips = [task_clip("test", 2000 + number) for number in range(60)]
    accuracy = {
        name: evaluate(model, clips, name, compression).whole.accuracy
        for name, compression in HEADLINES.items()
    }
    assert accuracy[FULL] > 0.88
    assert accuracy[DEFAULT] > accuracy[FULL] - 0.03
    blind = [value for name, value in accuracy.items() if name not in (FULL, DEFAULT)]
    assert len(blind) == 2
    assert max(blind) < accuracy[DEFAULT] - 0.05


@pytest.mark.slow
def test_files_are_answered_like_drawings(model):
    clips = [task_clip("test", 3000 + number) for number in range(10)]
    drawn = evaluate(model, clips, "drawn", None).whole
    filmed = evaluate(model, clips, "filmed", None, through_files=True).whole
    assert np.isclose(drawn.accuracy, filmed.accuracy, atol=0.06)
