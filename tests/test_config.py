"""Configurations: both dialects, the released sizes, and refusals by name."""

import json

import pytest
from transformers import LlavaOnevisionConfig, Qwen2Config

from dycoke_jax.checkpoint.hf_config import llava_hf_config, read_config
from dycoke_jax.config import (
    ONEVISION_0_5B,
    ONEVISION_7B,
    ONEVISION_72B,
    PRESETS,
    VIDEO_7B,
    LlavaConfig,
    TextConfig,
    VisionConfig,
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
        (LLAVA_HF_7B, "transformers_weights", "other.safetensors"),
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
        ("rms_norm_eps", float("inf"), "rms_norm_eps"),
        ("rope_theta", 10**400, "rope_theta"),
        ("layer_types", 5, "layer_types"),
    ],
)
def test_malformed_settings_are_refused_by_name(key, value, named):
    with pytest.raises(ConfigError, match=named):
        read_config(changed(LMMS_LAB_7B, key, value))


@pytest.mark.parametrize("key", ["hidden_size", "mm_vision_tower"])
def test_missing_keys_are_named(key):
    with pytest.raises(ConfigError, match=key):
        read_config(without(LMMS_LAB_7B, key))


# --- what a file leaves out, compared with transformers' classes ----------------------------------


def as_transformers_reads(config):
    """The model that transformers makes of a llava-hf configuration."""
    read = LlavaOnevisionConfig.from_dict(config)
    text, vision = read.text_config, read.vision_config
    rope = text.rope_parameters.get("full_attention", text.rope_parameters)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert rope["rope_type"] == "default"
    return LlavaConfig(
        vision=VisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
            layer_norm_eps=vision.layer_norm_eps,
        ),
        text=TextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=head_dim,
            tie_word_embeddings=read.tie_word_embeddings,
            rope_theta=rope["rope_theta"],
            rms_norm_eps=text.rms_norm_eps,
            max_positions=text.max_position_embeddings,
        ),
    )


HEADS_32 = changed(LLAVA_HF_7B, "text_config.num_attention_heads", 32)
"""A model whose heads are a multiple of the 32 heads of keys and values that the class gives."""


@pytest.mark.parametrize(
    "key",
    [
        "text_config",
        "vision_config",
        "tie_word_embeddings",
        "vision_feature_layer",
        *(f"text_config.{key}" for key in LLAVA_HF_7B["text_config"]),
        *(f"vision_config.{key}" for key in LLAVA_HF_7B["vision_config"]),
    ],
)
def test_an_absent_field_means_what_it_means_to_transformers(key):
    config = without(HEADS_32, key)
    if key == "text_config.num_attention_heads":
        config = changed(config, "text_config.hidden_size", 4096)
    if key == "vision_config.num_attention_heads":
        config = changed(config, "vision_config.hidden_size", 1200)
    assert read_config(config) == as_transformers_reads(config)


@pytest.mark.parametrize("key", ["text_config", "vision_config"])
def test_an_empty_nested_configuration_is_its_class_and_a_null_one_is_absent(key):
    for value in ({}, None):
        config = changed(LLAVA_HF_7B, key, value)
        assert read_config(config) == as_transformers_reads(config)


def test_null_key_value_heads_are_as_many_as_the_heads():
    config = changed(LLAVA_HF_7B, "text_config.num_key_value_heads", None)
    assert read_config(config) == as_transformers_reads(config)
    assert read_config(changed(LMMS_LAB_7B, "num_key_value_heads", None)).text.num_kv_heads == 28


@pytest.mark.parametrize("key", ["vocab_size", "max_position_embeddings", "intermediate_size"])
def test_an_integer_that_is_absent_or_null_has_the_default_of_the_language_models_class(key):
    expected = read_config(changed(LMMS_LAB_7B, key, getattr(Qwen2Config(), key)))
    assert read_config(without(LMMS_LAB_7B, key)) == expected
    assert read_config(changed(LMMS_LAB_7B, key, None)) == expected
    assert read_config(changed(LLAVA_HF_7B, f"text_config.{key}", None)).text == expected.text


@pytest.mark.parametrize("value", ["false", 0, []])
def test_a_flag_that_is_no_truth_value_is_refused_by_name(value):
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        read_config(changed(LMMS_LAB_7B, "tie_word_embeddings", value))


# --- rotary embedding -----------------------------------------------------------------------------

NO_ROPE = without(without(LLAVA_HF_7B, "text_config.rope_parameters"), "text_config.rope_theta")


def with_rope(**keys):
    return changed(NO_ROPE, "text_config", NO_ROPE["text_config"] | keys)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None, "rope_parameters": None},
        {"rope_theta": 1e6, "rope_scaling": {}, "rope_parameters": {"rope_theta": 7.0}},
        *(
            {key: rope, **theta}
            for key in ("rope_scaling", "rope_parameters")
            for theta in ({}, {"rope_theta": 1e6})
            for rope in (
                {"rope_type": "default"},
                {"type": "default"},
                {"rope_type": "default", "rope_theta": 5.0},
                {"full_attention": {"rope_type": "default", "rope_theta": 3.0}},
                {"full_attention": {"type": "default"}},
            )
        ),
        {
            "rope_scaling": {"rope_type": "default"},
            "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
            "rope_theta": 1e6,
        },
    ],
)
def test_the_default_rotary_embedding_has_the_base_that_transformers_reads(keys):
    config = with_rope(**keys)
    # transformers writes into the nested dictionaries that it is given.
    copied = json.loads(json.dumps(config))
    assert read_config(config).text.rope_theta == as_transformers_reads(copied).text.rope_theta


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_a_scaled_rotary_embedding_is_refused_by_name_in_either_spelling(key, kind, spelling):
    rope = {spelling: kind, "factor": 4.0, "rope_theta": 1e6}
    assert Qwen2Config(**{key: dict(rope)}).rope_parameters["rope_type"] == kind
    for value in (rope, {"full_attention": rope}):
        with pytest.raises(ConfigError, match=f"{key} .*{kind}"):
            read_config(with_rope(**{key: value}))
        with pytest.raises(ConfigError, match=f"{key} .*{kind}"):
            read_config(changed(LMMS_LAB_7B, key, value))


BROKEN = {"rope_type": "yarn", "factor": 4.0, "full_attention": {"rope_type": "default"}}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    "value",
    ["default", ["default"], 1, {"rope_type": None}, {"full_attention": None}, BROKEN],
)
def test_a_malformed_rotary_embedding_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key) as caught:
        read_config(with_rope(**{key: value}))
    assert "\n" not in str(caught.value)


def test_a_rotary_base_that_is_no_number_is_refused_by_name():
    with pytest.raises(ConfigError, match="rope_theta"):
        read_config(with_rope(rope_parameters={"rope_type": "default", "rope_theta": None}))


# --- the keys of LLaVA-NeXT -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["mm_spatial_pool_stride", "mm_spatial_pool_mode", "mm_newline_position"]
)
@pytest.mark.parametrize("base", [LMMS_LAB_7B, LLAVA_HF_7B])
def test_null_pooling_and_newline_are_the_defaults(base, key):
    """Bilinear pooling by two and one newline vector, as in ``ONEVISION_7B``."""
    assert read_config(changed(base, key, None)) == ONEVISION_7B


@pytest.mark.parametrize(
    ("key", "meaning"), [("mm_patch_merge_type", "flat"), ("mm_projector_type", "linear")]
)
def test_an_absent_key_is_refused_as_what_llava_next_takes_for_it(key, meaning):
    """``getattr(config, key, meaning)`` in LLaVA-NeXT."""
    with pytest.raises(ConfigError, match=f"{key}.*{meaning}"):
        read_config(without(LMMS_LAB_7B, key))
    with pytest.raises(ConfigError, match=f"{key}.*{meaning}"):
        read_config(changed(LMMS_LAB_7B, key, meaning))


@pytest.mark.parametrize("value", [False, True, None])
def test_a_token_for_patches_changes_nothing_that_the_model_computes(value):
    """LLaVA-NeXT takes true where the key is absent, and adds a token that no prompt holds."""
    assert read_config(changed(LMMS_LAB_7B, "mm_use_im_patch_token", value)) == ONEVISION_7B
    assert read_config(without(LMMS_LAB_7B, "mm_use_im_patch_token")) == ONEVISION_7B


@pytest.mark.parametrize(
    "tower",
    [
        "/data/models/siglip-so400m-patch14-384",
        "/data/models/siglip-so400m-patch14-384/",
        "google/siglip-so400m-patch14-384/",
        "siglip-so400m-patch14-384",
        "./siglip-so400m-patch14-384//",
        "C:\\models\\siglip-so400m-patch14-384",
        "C:\\models\\siglip-so400m-patch14-384\\",
    ],
)
def test_a_vision_tower_given_by_a_path_counts_by_the_last_part(tower):
    assert read_config(changed(LMMS_LAB_7B, "mm_vision_tower", tower)) == ONEVISION_7B


@pytest.mark.parametrize(
    "tower",
    ["/data/siglip-so400m-patch14-384/other", "google/siglip-base-patch16-224", "", None, [1], {}],
)
def test_another_vision_tower_is_refused_by_name(tower):
    with pytest.raises(ConfigError, match="mm_vision_tower"):
        read_config(changed(LMMS_LAB_7B, "mm_vision_tower", tower))


def test_a_list_of_one_vision_feature_layer_is_that_layer():
    whole = changed(LLAVA_HF_7B, "vision_config.num_hidden_layers", 27)
    for layer in (-2, 26):
        assert read_config(changed(whole, "vision_feature_layer", [layer])) == ONEVISION_7B
    for layer in ([], [True], [[-1]], [-30], 0, -28):
        with pytest.raises(ConfigError, match="vision_feature_layer"):
            read_config(changed(whole, "vision_feature_layer", layer))
