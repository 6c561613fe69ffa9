"""Configurations: both dialects, the released sizes, and refusals by name."""

import pytest

from dycoke_jax.checkpoint.hf_config import llava_hf_config, read_config
from dycoke_jax.config import (
    ONEVISION_0_5B,
    ONEVISION_7B,
    ONEVISION_72B,
    PRESETS,
    VIDEO_7B,
)
from dycoke_jax.errors import ConfigError

LMMS_LAB_7B = {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_hidden_size": 1152,
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_resampler_type": None,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_newline_position": "one_token",
    "mm_spatial_pool_mode": "bilinear",
    "image_aspect_ratio": "anyres_max_9",
    "tokenizer_model_max_length": 32768,
    "torch_dtype": "bfloat16",
}
LLAVA_HF_7B = llava_hf_config(ONEVISION_7B)


def changed(config, path, value):
    """A copy of a configuration with one key, dotted if nested, set."""
    key, _, rest = path.partition(".")
    return config | {key: changed(config[key], rest, value) if rest else value}


def without(config, path):
    key, _, rest = path.partition(".")
    if rest:
        return config | {key: without(config[key], rest)}
    return {name: value for name, value in config.items() if name != key}


def test_lmms_lab_dialect():
    assert read_config(LMMS_LAB_7B) == ONEVISION_7B
    video = changed(LMMS_LAB_7B, "mm_newline_position", "grid")
    video = changed(video, "mm_spatial_pool_mode", "average")
    assert read_config(video) == VIDEO_7B
    assert read_config(changed(LMMS_LAB_7B, "model_type", "llava_qwen")) == ONEVISION_7B


@pytest.mark.parametrize("preset", PRESETS)
def test_llava_hf_dialect_reads_what_it_writes(preset):
    assert read_config(llava_hf_config(PRESETS[preset])) == PRESETS[preset]


def test_rope_theta_in_either_place():
    old = without(LLAVA_HF_7B, "text_config.rope_parameters")
    assert read_config(old) == ONEVISION_7B
    assert read_config(without(LLAVA_HF_7B, "text_config.rope_theta")) == ONEVISION_7B


def test_vision_feature_layer_cuts_the_tower():
    """27 layers with the last but one state, or 26 with the last: the same tower."""
    whole = changed(LLAVA_HF_7B, "vision_config.num_hidden_layers", 27)
    assert read_config(changed(whole, "vision_feature_layer", -2)) == ONEVISION_7B
    assert read_config(changed(whole, "vision_feature_layer", 26)) == ONEVISION_7B


@pytest.mark.parametrize("place", ["tie_word_embeddings", "text_config.tie_word_embeddings"])
def test_tied_in_either_place(place):
    assert read_config(changed(LLAVA_HF_7B, place, True)).text.tie_word_embeddings


def test_released_sizes():
    """Tokens a frame, heads and parameters as published."""
    assert (ONEVISION_7B.tokens_per_frame, VIDEO_7B.tokens_per_frame) == (196, 169)
    assert ONEVISION_7B.vision.grid == 27
    assert [c.text.head_dim for c in (ONEVISION_0_5B, ONEVISION_7B, ONEVISION_72B)] == [
        64,
        128,
        128,
    ]

    from math import prod

    from dycoke_jax.models.llava import abstract_params

    count = sum(prod(leaf.shape) for leaf in abstract_params(ONEVISION_7B).values())
    assert count == pytest.approx(8.03e9, rel=0.005)


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (LMMS_LAB_7B, "rope_scaling", {"type": "yarn", "factor": 4.0}),
        (LMMS_LAB_7B, "use_sliding_window", True),
        (LMMS_LAB_7B, "hidden_act", "gelu"),
        (LMMS_LAB_7B, "mm_vision_tower", "openai/clip-vit-large-patch14-336"),
        (LMMS_LAB_7B, "mm_projector_type", "linear"),
        (LMMS_LAB_7B, "mm_patch_merge_type", "flat"),
        (LMMS_LAB_7B, "mm_resampler_type", "qformer"),
        (LMMS_LAB_7B, "mm_use_im_start_end", True),
        (LMMS_LAB_7B, "add_faster_video", True),
        (LMMS_LAB_7B, "architectures", ["LlavaLlamaForCausalLM"]),
        (LMMS_LAB_7B, "mm_newline_position", "everywhere"),
        (LMMS_LAB_7B, "mm_spatial_pool_mode", "conv"),
        (LMMS_LAB_7B, "mm_spatial_pool_stride", 0),
        (LMMS_LAB_7B, "quantization_config", {"quant_method": "gptq"}),
        (LMMS_LAB_7B, "model_type", "llava_mistral"),
        (LLAVA_HF_7B, "text_config.rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}),
        (LLAVA_HF_7B, "text_config.layer_types", ["sliding_attention"] * 28),
        (LLAVA_HF_7B, "text_config.model_type", "llama"),
        (LLAVA_HF_7B, "vision_config.model_type", "clip_vision_model"),
        (LLAVA_HF_7B, "vision_config.hidden_act", "quick_gelu"),
        (LLAVA_HF_7B, "vision_feature_layer", [-1, -2]),
        (LLAVA_HF_7B, "vision_feature_select_strategy", "default"),
        (LLAVA_HF_7B, "projector_hidden_act", "silu"),
        (LLAVA_HF_7B, "multimodal_projector_bias", False),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_unsupported_settings_are_refused_by_name(base, key, value):
    name = "pool mode" if key == "mm_spatial_pool_mode" else key.split(".")[-1]
    with pytest.raises(ConfigError, match=name):
        read_config(changed(base, key, value))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_size", "big", "hidden_size"),
        ("hidden_size", 3585, "num_attention_heads"),
        ("num_attention_heads", 0, "num_attention_heads"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
        ("num_hidden_layers", -1, "num_layers"),
        ("rms_norm_eps", None, "rms_norm_eps"),
    ],
)
def test_malformed_settings_are_refused_by_name(key, value, named):
    with pytest.raises(ConfigError, match=named):
        read_config(changed(LMMS_LAB_7B, key, value))


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "mm_vision_tower"])
def test_missing_keys_are_named(key):
    with pytest.raises(ConfigError, match=key):
        read_config(without(LMMS_LAB_7B, key))
