"""LLaVA's training data: its ids and targets are those of LLaVA-NeXT, and faults are refused."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from support.clips import numbered_frame, write_clip
from support.tokenizers import qwen2_tokenizer, tiny_tokenizer

from dycoke_jax import DycokeError
from dycoke_jax.inputs import FrameSampling, build_prompt
from dycoke_jax.training.batches import Example, pack
from dycoke_jax.training.loss import score_answers
from dycoke_jax.training.records import Record, RecordSource, read_records
from dycoke_jax.training.sources import BatchShape

SYSTEM = "You are a helpful assistant."
IMAGE = 151646
# The template that preprocess_qwen of LLaVA-NeXT gives its tokenizer.
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
)


@pytest.fixture(scope="module")
def qwen2():
    return qwen2_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "clip.mp4", 5)
    Image.fromarray(numbered_frame(5)).save(folder / "still.png")
    return folder


def write(folder, *records):
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def turns(*texts):
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def source(records, tokenizer, width=200, rows=1, frames=4, **sampling):
    shape = BatchShape(rows=rows, accumulate=1, width=width)
    return RecordSource(tuple(records), tokenizer, 56, FrameSampling(frames, **sampling), shape)


def reference(tokenizer, messages):
    """The ids of whole messages by the chat template, and which tokens belong to answers.

    preprocess_qwen encodes message by message too. What follows the last answer is left out.
    """
    ids, is_answer = [], []
    for role, content in messages:
        message = tokenizer.apply_chat_template(
            [{"role": role, "content": content}], chat_template=TEMPLATE, return_dict=False
        )
        head = len(tokenizer(f"<|im_start|>{role}\n").input_ids)
        predicted = role == "assistant"
        ids += message
        # The last token is the newline after <|im_end|>.
        is_answer += [False] * head + [predicted] * (len(message) - head - 1) + [False]
    return ids[:-1], is_answer[:-1]


def packed(batch):
    """Ids and targets of the only part of a batch, with the place of the clip as in LLaVA-NeXT."""
    used = np.asarray(batch.part[0, 0]) == 1
    ids = np.asarray(batch.ids[0, 0])[used].tolist()
    is_answer = np.asarray(batch.is_answer[0, 0])[used].tolist()
    if not batch.has_clip[0, 0]:
        assert batch.prefix_length[0, 0] == 0
        return ids, is_answer
    prefix = np.asarray(batch.prefix[0, 0])[: int(batch.prefix_length[0, 0])].tolist()
    return [*prefix, IMAGE, *ids], [False] * (len(prefix) + 1) + is_answer


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        (
            {"video": "clip.mp4", "conversations": turns("<video>\nWhat is it?", "A cat.")},
            [("system", SYSTEM), ("user", "<image>\nWhat is it?"), ("assistant", "A cat.")],
        ),
        (
            {
                "id": 7,
                "data_source": "academic",
                "video": "clip.mp4",
                "conversations": turns(
                    "<image>\n Which colour?\n", "Red.\nOr blue?", "How many?", " Two, 对。"
                ),
            },
            [
                ("system", SYSTEM),
                ("user", "<image>\n Which colour?\n"),
                ("assistant", "Red.\nOr blue?"),
                ("user", "How many?"),
                ("assistant", " Two, 对。"),
            ],
        ),
        (
            {"image": "still.png", "conversations": turns(" What is this?\n<image>", "A square.")},
            [("system", SYSTEM), ("user", "<image>\nWhat is this?"), ("assistant", "A square.")],
        ),
        (
            {"video": "clip.mp4", "conversations": turns("Is <video> new?", "No.")},
            [("system", SYSTEM), ("user", "<image>\nIs  new?"), ("assistant", "No.")],
        ),
        (
            {"conversations": turns("2 + 2?", "4", "And 3 + 3?", "6", "Thanks!", "My pleasure.")},
            [
                ("system", SYSTEM),
                ("user", "2 + 2?"),
                ("assistant", "4"),
                ("user", "And 3 + 3?"),
                ("assistant", "6"),
                ("user", "Thanks!"),
                ("assistant", "My pleasure."),
            ],
        ),
        (
            {
                "video": "clip.mp4",
                "image": None,
                "conversations": [{"from": "system", "value": "Be brief."}, *turns("Who?", "I.")],
            },
            [("system", "Be brief."), ("user", "<image>\nWho?"), ("assistant", "I.")],
        ),
    ],
    ids=["one turn", "two turns", "mark at the end", "mark inside", "text alone", "system"],
)
def test_ids_and_targets_are_those_of_llava_next(folder, qwen2, record, messages):
    records = read_records(write(folder, record))
    ids, is_answer = packed(source(records, qwen2).step(0).batch)
    wanted_ids, wanted_is_answer = reference(qwen2, messages)
    assert ids == wanted_ids
    assert is_answer == wanted_is_answer


def test_an_answer_that_begins_with_an_empty_line_follows_the_prompt_it_is_generated_from(
    folder, qwen2
):
    """Encoded as one text, the two line feeds would be one token, which no prompt ends before."""
    records = read_records(write(folder, {"conversations": turns("Hi?", "\nYes.")}))
    ids, is_answer = packed(source(records, qwen2).step(0).batch)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hi?"}]
    prompt = qwen2.apply_chat_template(messages, chat_template=TEMPLATE, return_dict=False)
    prompt += qwen2("<|im_start|>assistant\n").input_ids
    answer = [*qwen2("\nYes.").input_ids, *qwen2("<|im_end|>").input_ids]
    assert ids == prompt + answer
    assert is_answer == [False] * len(prompt) + [True] * len(answer)


def test_a_record_of_text_alone_is_the_prompt_without_a_video(folder):
    tokenizer = tiny_tokenizer()
    records = read_records(write(folder, {"conversations": turns("Hello?", "Yes.")}))
    ids, is_answer = packed(source(records, tokenizer).step(0).batch)
    prompt = build_prompt(tokenizer, "Hello?", has_video=False)
    answer = tokenizer("Yes.<|im_end|>").input_ids
    assert ids == [*prompt.after, *answer]
    assert is_answer == [False] * len(prompt.after) + [True] * len(answer)


def test_a_picture_is_a_clip_that_shows_it_in_every_frame(folder, qwen2):
    record = {"image": ["still.png"], "conversations": turns("<image>\nWhat?", "A square.")}
    batch = source(read_records(write(folder, record)), qwen2).step(0).batch
    frames = np.asarray(batch.frames[0, 0])
    assert len(frames) == 4
    assert frames.std() > 10
    assert (frames == frames[0]).all()


def test_records_of_text_alone_share_steps_with_clips(folder, qwen2):
    data = write(
        folder,
        {"conversations": turns("Hello?", "Yes.")},
        {"video": "clip.mp4", "conversations": turns("<video>\nWhat?", "A cat.")},
    )
    batch = source(read_records(data), qwen2, rows=2).step(0).batch
    has_clip = np.asarray(batch.has_clip[0])
    assert sorted(has_clip) == [False, True]
    assert not np.asarray(batch.frames[0])[~has_clip].any()


def test_text_beside_clips_has_the_loss_of_transformers_without_a_clip(pair):
    """The clip of another row, and the blank frames of its own, change nothing."""
    torch_model, ours = pair
    frames = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8)
    text = Example(frames, ("2 + 2?",), ("Four.",), ((("And 3 + 3?", "Six."),),), has_clip=False)
    clip = Example(frames, ("What?",), ("Red.",))
    tokenizer = tiny_tokenizer()
    score = jax.jit(score_answers)

    def loss(*examples):
        scores = score(ours.model, pack(tokenizer, examples, 160))
        return float(scores.loss), int(scores.tokens)

    messages = [("system", SYSTEM), ("user", "2 + 2?"), ("assistant", "Four.")]
    messages += [("user", "And 3 + 3?"), ("assistant", "Six.")]
    ids, is_answer = reference(tokenizer, messages)
    labels = [i if answer else -100 for i, answer in zip(ids, is_answer, strict=True)]
    with torch.no_grad():
        mean = torch_model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
    together, tokens = loss(text, clip)
    of_clip, tokens_of_clip = loss(clip, clip)
    assert tokens - tokens_of_clip / 2 == sum(is_answer) == 11
    assert together - of_clip / 2 == pytest.approx(float(mean) * 11, rel=1e-4)


def test_steps_of_text_alone_have_a_gradient_for_the_language_model_only(pair):
    _, ours = pair
    text = Example(np.zeros((1, 56, 56, 3), np.uint8), ("Hi?",), ("Yes.",), has_clip=False)
    batch = pack(tiny_tokenizer(), [text], 120)

    @jax.jit
    @jax.grad
    def gradient(params):
        return score_answers(replace(ours.model, params=params), batch).loss

    for path, values in gradient(ours.params).items():
        assert np.isfinite(values).all(), path
        of_clip = path.startswith(("vision_tower.", "projector.", "image_newline"))
        assert np.asarray(values).any() != of_clip, path


HUMAN, GPT = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ("What?", "list of at least two turns"),
        (None, "list of at least two turns"),
        ([], "list of at least two turns"),
        ([HUMAN, 3], "turn 2 is no object with from and value"),
        ([{"from": "human"}, GPT], "turn 1 is no object with from and value"),
        ([HUMAN, {"from": "bot", "value": "x"}], "turn 2: from must be human, gpt or system"),
        ([{"from": ["human"], "value": "x"}, GPT], "turn 1: from must be human, gpt or system"),
        ([HUMAN, {"from": "gpt", "value": 3}], "turn 2: value must be a text"),
        ([HUMAN, {"from": "gpt", "value": None}], "turn 2: value must be a text"),
        ([HUMAN, {"from": "gpt", "value": " \n"}], "turn 2 is empty"),
        ([HUMAN, HUMAN, GPT], "turn 2 is from human; it must be from gpt"),
        ([GPT, HUMAN, GPT], "turn 1 is from gpt; it must be from human"),
        ([HUMAN, GPT, GPT], "turn 3 is from gpt; it must be from human"),
        ([HUMAN], "must end with an answer from gpt"),
        ([HUMAN, GPT, HUMAN], "must end with an answer from gpt"),
        ([{"from": "system", "value": "x"}], "must end with an answer from gpt"),
        ([HUMAN, GPT, {"from": "system", "value": "x"}], "turn 3 is from system"),
        (turns("<video>\n", "x"), "holds no question"),
        (turns("<image><image>\nWhat changes?", "x"), "holds 2 marks"),
        (turns("<video>\nWhat?", "x", "<image>\nAnd here?", "y"), "holds 2 marks"),
        (turns("What?", "x", "<video>\nAnd here?", "y"), "turn 3 marks the clip"),
        (turns("What?", "See <video>."), "turn 2 marks the clip"),
    ],
)
def test_malformed_conversations_are_refused_by_record(folder, conversations, message):
    fine = {"conversations": turns("Hello?", "Yes.")}
    data = write(folder, fine, {"video": "clip.mp4", "conversations": conversations})
    with pytest.raises(DycokeError, match=message) as caught:
        read_records(data)
    assert "record 2: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "turn 1 marks a clip but the record names none"),
        ({"video": "clip.mp4", "image": "still.png"}, "a video and an image"),
        ({"image": ["still.png", "still.png"]}, "image is a list of 2"),
        ({"image": 3}, "image must be a text"),
        ({"video": {"path": "clip.mp4"}}, "must be texts"),
        ({"video": ""}, "video is no path"),
    ],
)
def test_clips_that_a_record_cannot_have_are_refused(folder, keys, message):
    data = write(folder, {**keys, "conversations": turns("<image>\nWhat?", "x")})
    with pytest.raises(DycokeError, match=f"record 1: .*{message}"):
        read_records(data)


def test_a_conversation_is_a_record_with_all_its_answers(folder):
    record = {"video": "clip.mp4", "conversations": turns("<video>\nA?", "B.", "C?", "D.")}
    assert read_records(write(folder, record)) == [
        Record(folder / "clip.mp4", "A?", "B.", (("C?", "D."),))
    ]
