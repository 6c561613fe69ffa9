"""The networks equal transformers' torch models, from checkpoints in both layouts, in float32."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.checkpoints import VIDEO_TOKEN, tiny_llava_hf, to_lmms_lab
from support.tokenizers import tiny_tokenizer
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_jax import Decoding, LlavaVideo, checkpoint
from dycoke_jax.cache import Slots
from dycoke_jax.compression.protocol import Compression
from dycoke_jax.generation.assemble import TextIds, all_rows, no_visual, place_newlines
from dycoke_jax.generation.encode import encode
from dycoke_jax.generation.layout import Layout, group_layers
from dycoke_jax.generation.prefill import read_prompt
from dycoke_jax.inputs.prompts import build_prompt
from dycoke_jax.model import Model
from dycoke_jax.models.qwen2 import positions_of

TOLERANCE = 1e-4
FRAMES, SIDE = 5, 98  # a 7 x 7 grid of patches, pooled to 4 x 4


@pytest.fixture(scope="module", params=["llava-hf", "lmms-lab", "converted"])
def layout(request):
    return request.param


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, layout, tmp_path_factory):
    """The same weights in torch and here."""
    folder = tmp_path_factory.mktemp("checkpoint")
    hf = tiny_llava_hf(
        folder / "hf", tied=request.param, vision={"image_size": SIDE}, deviation=0.2
    )
    ours = hf
    if layout == "lmms-lab":
        ours = to_lmms_lab(hf, folder / "lmms")
    tiny_tokenizer().save_pretrained(ours)
    if layout == "converted":
        checkpoint.convert(hf, folder / "converted")
        ours = folder / "converted"
    reference = LlavaOnevisionForConditionalGeneration.from_pretrained(hf).eval()
    return reference, LlavaVideo.from_pretrained(ours)


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)


def to_torch(frames):
    pixels = torch.from_numpy(frames).float().permute(0, 3, 1, 2)
    return (pixels / 255 - 0.5) / 0.5


def test_vision_tower_block_by_block(pair, frames):
    reference, ours = pair
    with torch.no_grad():
        states = reference.model.vision_tower(
            to_torch(frames), output_hidden_states=True
        ).hidden_states
    tower = ours.model.bind().vision_tower
    assert len(states) == len(tower.layers) + 1
    for index, layer in enumerate(tower.layers):
        out = layer(jnp.asarray(states[index].numpy()))
        np.testing.assert_allclose(out, states[index + 1], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(tower(jnp.asarray(frames)), states[-1], atol=TOLERANCE, rtol=0)


def test_projector_pooling_and_newline(pair, frames):
    reference, ours = pair
    with torch.no_grad():
        wanted = reference.model.get_video_features(
            to_torch(frames)[None], vision_feature_layer=-1, vision_feature_select_strategy="full"
        )
    wanted = wanted.pooler_output.reshape(-1, ours.config.text.hidden_size)
    features = encode(ours.model, [frames], 1, FRAMES).tokens
    newline = ours.params["image_newline"]
    everything = all_rows(features, jnp.array([FRAMES]))
    visual = place_newlines(features, everything, newline, "one_token", ours.config.frame_grid)
    np.testing.assert_allclose(visual.embeds[0], wanted, atol=TOLERANCE, rtol=0)


def prompt_of(ours, has_video, text="What happens here, and when?"):
    return build_prompt(ours.tokenizer, text, has_video=has_video)


def text_of(prompt, padding=0):
    """The prompt's ids with empty slots at the end of both segments."""
    empty = [0] * padding
    return TextIds(
        jnp.asarray([[*prompt.before, *empty]], jnp.int32),
        jnp.asarray([len(prompt.before)]),
        jnp.asarray([[*prompt.after, *empty]], jnp.int32),
        jnp.asarray([len(prompt.after)]),
    )


def read_plain(model, segment, text):
    """The states after the final norm of the plain model, and the slots that hold a token."""
    slots = Slots(text.prefix.shape[1], segment.valid.shape[1], text.question.shape[1], 0)
    groups = group_layers(model.config.text.num_layers, slots, Compression())
    network = model.bind()
    read = read_prompt(network, segment, text, Layout(1, 0, None, groups))
    return network.language_model.norm(read.states), read.views[0].visible


def hf_ids(prompt, visual):
    return torch.tensor([[*prompt.before, *[VIDEO_TOKEN] * visual, *prompt.after]])


def test_language_model_block_by_block(pair):
    reference, ours = pair
    ids = torch.tensor([prompt_of(ours, False).after])
    with torch.no_grad():
        states = reference(input_ids=ids, output_hidden_states=True).hidden_states
    language = ours.model.bind().language_model
    valid = jnp.ones(ids.shape, bool)
    rope = language.rope(positions_of(valid))
    for index, layer in enumerate(language.layers):
        out, _ = layer.prefill(jnp.asarray(states[index].numpy()), rope, valid)
        if index + 1 == len(language.layers):
            out = language.norm(out)  # transformers' last state is the normed one
        np.testing.assert_allclose(out, states[index + 1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("has_video", [True, False], ids=["video", "text"])
def test_logits_at_every_position(pair, frames, has_video):
    reference, ours = pair
    prompt = prompt_of(ours, has_video)
    visual = FRAMES * 16 + 1 if has_video else 0
    video = {"pixel_values_videos": to_torch(frames)[None]} if has_video else {}
    with torch.no_grad():
        wanted = reference(input_ids=hf_ids(prompt, visual), **video).logits[0].numpy()

    model = ours.model.bind()
    text = text_of(prompt, padding=3)  # empty slots between the segments must change nothing
    segment = no_visual(ours.config, 1)
    if has_video:
        features = encode(ours.model, [frames], 1, FRAMES).tokens
        everything = all_rows(features, jnp.array([FRAMES]))
        newline = model.image_newline[...]
        segment = place_newlines(features, everything, newline, "one_token", ours.config.frame_grid)
    x, valid = jax.jit(read_plain)(ours.model, segment, text)
    logits = np.asarray(model.logits(x))[0][np.asarray(valid[0])]
    assert logits.shape == wanted.shape
    np.testing.assert_allclose(logits, wanted, atol=TOLERANCE, rtol=0)
    assert np.abs(wanted).max() > 1, "the weights must make a difference"


@pytest.mark.parametrize("has_video", [True, False], ids=["video", "text"])
def test_greedy_ids(pair, frames, has_video):
    reference, ours = pair
    prompt = prompt_of(ours, has_video)
    visual = FRAMES * 16 + 1 if has_video else 0
    video = {"pixel_values_videos": to_torch(frames)[None]} if has_video else {}
    ids = hf_ids(prompt, visual)
    with torch.no_grad():
        wanted = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=32,
            pad_token_id=0,
            **video,
        )[0, ids.shape[1] :].tolist()
    ours = LlavaVideo(ours.model, ours.tokenizer)
    ours.stop_ids = ()
    answer = ours.generate(
        [frames if has_video else None],
        ["What happens here, and when?"],
        compression=None,
        decoding=Decoding(32),
    )[0]
    assert len(wanted) == 32
    assert list(answer.token_ids) == wanted
    assert len(set(wanted)) > 3, "a constant answer would prove little"


def test_bfloat16_is_as_close_to_float32_as_torch_is(pair, frames):
    """Released weights are half precision: our rounding must be no worse than the reference's."""
    reference, ours = pair
    prompt = prompt_of(ours, True)
    ids = hf_ids(prompt, FRAMES * 16 + 1)
    pixels = to_torch(frames)[None]
    with torch.no_grad():
        exact = reference(input_ids=ids, pixel_values_videos=pixels).logits[0, -1]
        rough = copy.deepcopy(reference).to(torch.bfloat16)
        theirs = rough(input_ids=ids, pixel_values_videos=pixels.bfloat16()).logits[0, -1].float()
    half = {name: weight.astype(jnp.bfloat16) for name, weight in ours.params.items()}
    low = Model(half, ours.config, "bfloat16")
    model = low.bind()
    text = text_of(prompt)
    features = encode(low, [frames], 1, FRAMES).tokens
    newline = half["image_newline"]
    everything = all_rows(features, jnp.array([FRAMES]))
    segment = place_newlines(features, everything, newline, "one_token", ours.config.frame_grid)
    x, _ = read_plain(low, segment, text)
    error = np.abs(np.asarray(model.logits(x)[0, -1]) - exact.numpy())
    assert 0 < error.mean() < 1.5 * float((theirs - exact).abs().mean())


@pytest.mark.slow
def test_true_size_half_billion(tmp_path):
    """The 0.5B model at its true size, from lmms-lab files that only name their vision tower."""
    sizes = {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
    }
    tower = {
        "hidden_size": 1152,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "image_size": 384,
    }
    # Stored in half precision, as the released files are, and computed in float32 by both.
    hf = tiny_llava_hf(
        tmp_path / "hf", tied=True, dtype="bfloat16", text=sizes, vision=tower, shards="1GB"
    )
    ours = to_lmms_lab(hf, tmp_path / "lmms", mm_vision_tower="google/siglip-so400m-patch14-384")
    settings = json.loads((ours / "config.json").read_text())
    del settings["vision_config"]
    (ours / "config.json").write_text(json.dumps(settings))
    tiny_tokenizer().save_pretrained(ours)
    frames = np.random.default_rng(1).integers(0, 256, (2, 384, 384, 3), dtype=np.uint8)

    model = LlavaVideo.from_pretrained(ours, dtype="float32")
    model.stop_ids = ()
    answer = model.generate([frames], ["What is it?"], compression=None, decoding=Decoding(8))[0]
    prompt = prompt_of(model, True, "What is it?")
    del model

    reference = LlavaOnevisionForConditionalGeneration.from_pretrained(
        hf, dtype=torch.float32
    ).eval()
    ids = hf_ids(prompt, 2 * 196 + 1)
    with torch.no_grad():
        wanted = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values_videos=to_torch(frames)[None],
            do_sample=False,
            max_new_tokens=8,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
    assert list(answer.token_ids) == wanted
    assert answer.tokens.visual == answer.tokens.merged == 392
