"""Log-likelihoods of given answers, with and without compression."""

import numpy as np
import pytest
import torch
from support.checkpoints import VIDEO_TOKEN
from support.reference import Qwen2, paper_merge
from support.tiny import tiny_model, video

from dycoke_jax import Decoding, DyCoke
from dycoke_jax.errors import PromptError, RequestError
from dycoke_jax.generation.encode import encode
from dycoke_jax.inputs.prompts import build_prompt, encode_answer

PROMPTS = ["What?", "Which of the many things moves first?", "Describe the clip."]
ANSWERS = ["A cat.", "No.", "It begins with a long silence, and then somebody sings."]
METHODS = [None, DyCoke(layer=2), DyCoke(layer=2, mode="official"), DyCoke(layer=2, parked="drop")]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("has_video", [True, False], ids=["video", "text"])
def test_likelihoods_are_those_of_transformers(pair, has_video):
    reference, ours = pair
    frames = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), np.uint8)
    videos = [frames if has_video else None] * 3
    scored = ours.score(videos, PROMPTS, ANSWERS, compression=None)
    pixels = torch.from_numpy(frames).float().permute(0, 3, 1, 2)[None]
    inputs = {"pixel_values_videos": (pixels / 255 - 0.5) / 0.5} if has_video else {}
    for prompt, answer, one in zip(PROMPTS, ANSWERS, scored, strict=True):
        built = build_prompt(ours.tokenizer, prompt, has_video=has_video)
        visual = [VIDEO_TOKEN] * (3 * ours.config.tokens_per_frame + 1) if has_video else []
        ids = encode_answer(ours.tokenizer, answer)
        whole = [*built.before, *visual, *built.after, *ids]
        with torch.no_grad():
            logits = reference(input_ids=torch.tensor([whole]), **inputs).logits[0]
        likely = torch.log_softmax(logits, -1)[-len(ids) - 1 : -1]
        wanted = likely.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert one.token_ids == ids
        np.testing.assert_allclose(one.log_likelihoods, wanted, atol=1e-4, rtol=0)
        assert one.total == pytest.approx(float(wanted.sum()), abs=1e-3)
        assert one.is_greedy == bool((likely.argmax(-1) == torch.tensor(ids)).all())


def test_likelihoods_with_dycoke_are_those_of_the_paper(model):
    """Merged and pruned, against plain NumPy behind the vision tower."""
    clips = [video(seed, 7, 0.5) for seed in range(2)]
    scored = model.score(clips, PROMPTS[:2], ANSWERS[:2], compression=DyCoke(k=0.6, layer=2))
    features = np.asarray(encode(model.model, clips, 2, 7).tokens)
    table = np.asarray(model.params["language_model.embed_tokens.weight"])
    newline = np.asarray(model.params["image_newline"])[None]
    for clip, prompt, answer, one in zip(features, PROMPTS, ANSWERS, scored, strict=False):
        kept = paper_merge(clip, 0.6)
        built = build_prompt(model.tokenizer, prompt, has_video=True)
        before, after = table[list(built.before)], table[list(built.after)]
        embeds = np.concatenate([before, clip.reshape(-1, clip.shape[-1])[kept], newline, after])
        candidates = list(range(len(before), len(before) + len(kept)))
        ids = encode_answer(model.tokenizer, answer)
        logits, _, _ = Qwen2(model.config.text, model.params).generate(
            embeds, candidates, ids[:-1], layer=2, p=0.7
        )
        wanted = log_softmax(logits)[np.arange(len(ids)), list(ids)]
        np.testing.assert_allclose(one.log_likelihoods, wanted, atol=1e-4, rtol=0)
        assert one.merged == len(kept)
        assert one.visual == clip.shape[0] * clip.shape[1]


@pytest.mark.parametrize("compression", METHODS, ids=["plain", "paper", "official", "drop"])
def test_a_row_of_a_batch_has_the_likelihood_of_the_request_alone(model, compression):
    videos = [video(0, 8), None, video(2, 5)]
    together = model.score(videos, PROMPTS, ANSWERS, compression=compression)
    for clip, prompt, answer, one in zip(videos, PROMPTS, ANSWERS, together, strict=True):
        alone = model.score([clip], [prompt], [answer], compression=compression)[0]
        np.testing.assert_allclose(one.log_likelihoods, alone.log_likelihoods, atol=1e-5)
        assert (one.token_ids, one.merged) == (alone.token_ids, alone.merged)


@pytest.mark.parametrize("compression", METHODS, ids=["plain", "paper", "official", "drop"])
def test_what_greedy_decoding_says_is_greedy(model, compression):
    """And an answer with another last token is not."""
    from dycoke_jax.engine.batch import score_batch
    from dycoke_jax.engine.requests import Request

    clip = video(0, 8)
    said = model.generate([clip], ["What?"], compression=compression, decoding=Decoding(12))[0]
    request = model.prepare(Request("What?", clip))
    other = (*said.token_ids[:-1], (said.token_ids[-1] + 1) % 256)
    for ids, is_greedy in ((said.token_ids, True), (other, False)):
        one = score_batch(model.model, [request], [ids], compression)[0]
        assert one.is_greedy == is_greedy
        assert all(value <= 0 for value in one.log_likelihoods)


def test_answers_of_similar_length_share_programs(model, compilations):
    settings = {"compression": DyCoke(layer=2)}
    model.score([video(0, 8)], ["What?"], ["A cat."], **settings)
    warm = compilations()
    model.score([video(1, 8)], ["Who?"], ["Two dogs and a cat."], **settings)
    assert compilations() == warm


def test_answers_that_cannot_be_scored_are_refused(model):
    with pytest.raises(PromptError, match="empty"):
        model.score([None], ["What?"], [""])
    with pytest.raises(RequestError, match="1 prompts and 2 answers"):
        model.score([None], ["What?"], ["A", "B"])
    with pytest.raises(RequestError, match="answers must be lists"):
        model.score([None], ["What?"], "A")
