"""Reads ``config.json`` in the lmms-lab and llava-hf formats, and writes it in the latter.

A setting that changes what the model computes and is not implemented here raises an error that
names it; it is never ignored. Sources: the published lmms-lab (LLaVA-NeXT) and llava-hf files.
"""

from collections.abc import Mapping
from typing import Any

from dycoke_jax.config import LlavaConfig, TextConfig, VisionConfig
from dycoke_jax.errors import ConfigError


def read_config(config: Mapping[str, Any]) -> LlavaConfig:
    """Makes a model configuration of a parsed ``config.json``.

    Args:
        config: the file's content, in the lmms-lab format (``model_type`` llava or llava_qwen) or
            the llava-hf format (llava_onevision).

    Raises:
        ConfigError: naming the key and value that are missing, malformed or not supported.
    """
    model_type = config.get("model_type")
    try:
        if model_type == "llava_onevision":
            return _from_llava_hf(config)
        if model_type in ("llava", "llava_qwen"):
            return _from_lmms_lab(config)
    except KeyError as error:
        raise ConfigError(f"config.json lacks the key {error.args[0]!r}") from error
    raise ConfigError(
        f"config.json: model_type is {model_type!r}; supported are llava_onevision (llava-hf) "
        "and llava or llava_qwen (lmms-lab)"
    )


def llava_hf_config(model: LlavaConfig) -> dict[str, Any]:
    """Returns the content of ``config.json`` in the llava-hf format, as transformers reads it.

    transformers implements only bilinear pooling with stride 2 and one newline vector per clip.
    Other settings are written under their lmms-lab keys, which ``read_config`` reads and
    transformers ignores.
    """
    vision, text = model.vision, model.text
    config: dict[str, Any] = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "image_token_index": 151646,
        "video_token_index": 151647,
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": text.tie_word_embeddings,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "max_position_embeddings": text.max_positions,
            "rms_norm_eps": text.rms_norm_eps,
            # transformers 4 reads the first key, transformers 5 the second.
            "rope_theta": text.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
            "tie_word_embeddings": text.tie_word_embeddings,
            "hidden_act": "silu",
            "use_sliding_window": False,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "hidden_act": "gelu_pytorch_tanh",
            "vision_use_head": False,
        },
    }
    if text.head_dim * text.num_heads != text.hidden_size:
        config["text_config"]["head_dim"] = text.head_dim
    if (model.pool_mode, model.pool_stride, model.newline) != ("bilinear", 2, "one_token"):
        config["mm_spatial_pool_mode"] = model.pool_mode
        config["mm_spatial_pool_stride"] = model.pool_stride
        config["mm_newline_position"] = model.newline
    return config


_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 384,
}
_TOWERS = {"google/siglip-so400m-patch14-384": _SO400M}
"""Vision towers that lmms-lab files name without giving their sizes."""

# The values supported for each key, where a file has it. Other values would change what the model
# computes.
_TEXT_MUST_BE = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
    "attention_bias": (True,),
}
_VISION_MUST_BE = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "num_channels": (3,),
    "model_type": ("siglip_vision_model",),
}
_LLAVA_HF_MUST_BE = {
    "vision_feature_select_strategy": ("full",),
    "projector_hidden_act": ("gelu",),
    "multimodal_projector_bias": (True,),
    "use_image_newline_parameter": (True,),
    "quantization_config": (None,),
}
_LMMS_LAB_MUST_BE = {
    "architectures": (["LlavaQwenForCausalLM"], None),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_vision_select_feature": ("patch",),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False, None),
    "mm_use_im_patch_token": (False, None),
    "add_faster_video": (False, None),
    "use_pos_skipping": (False, None),
}


def _from_llava_hf(config: Mapping[str, Any]) -> LlavaConfig:
    _check(config, _LLAVA_HF_MUST_BE)
    text, vision = _section(config, "text_config"), _section(config, "vision_config")
    if text.get("model_type", "qwen2") != "qwen2":
        raise ConfigError(
            f"text_config.model_type is {text['model_type']!r}; only qwen2 is supported"
        )
    layer = config.get("vision_feature_layer", -1)
    depth = _integer(vision, "num_hidden_layers")
    if isinstance(layer, bool) or not isinstance(layer, int) or not -depth <= layer <= depth:
        raise ConfigError(
            f"vision_feature_layer is {layer!r}; supported is one layer of the {depth}-layer tower"
        )
    # The value indexes the tower's hidden_states: 0 is the embedding's output, -1 the last block's.
    used = layer if layer >= 0 else depth + 1 + layer
    # Published files have this flag in either place; transformers ties if either is set.
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return LlavaConfig(
        vision=_vision(vision, used),
        text=_text(text, tied),
        pool_mode=config.get("mm_spatial_pool_mode", "bilinear"),
        pool_stride=_integer(config, "mm_spatial_pool_stride", 2),
        newline=config.get("mm_newline_position", "one_token"),
    )


def _from_lmms_lab(config: Mapping[str, Any]) -> LlavaConfig:
    _check(config, _LMMS_LAB_MUST_BE)
    name = config["mm_vision_tower"]
    # A file may describe its tower as SigLIP's own config.json does, counting the last block too.
    tower = _section(config, "vision_config") if "vision_config" in config else _TOWERS.get(name)
    if tower is None:
        raise ConfigError(
            f"mm_vision_tower is {name!r}; supported are {', '.join(_TOWERS)} and any SigLIP "
            "tower that the file describes under vision_config"
        )
    return LlavaConfig(
        # LLaVA-NeXT's SigLIP code deletes the last block, whatever mm_vision_select_layer says.
        vision=_vision(tower, _integer(tower, "num_hidden_layers") - 1),
        text=_text(config, bool(config.get("tie_word_embeddings", False))),
        pool_mode=config.get("mm_spatial_pool_mode", "bilinear"),
        pool_stride=_integer(config, "mm_spatial_pool_stride", 2),
        newline=config.get("mm_newline_position", "one_token"),
    )


def _vision(config: Mapping[str, Any], num_layers: int) -> VisionConfig:
    _check(config, _VISION_MUST_BE, "vision_config.")
    return VisionConfig(
        hidden_size=_integer(config, "hidden_size"),
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=num_layers,
        num_heads=_integer(config, "num_attention_heads"),
        patch_size=_integer(config, "patch_size"),
        image_size=_integer(config, "image_size"),
        layer_norm_eps=_number(config, "layer_norm_eps", 1e-6),
    )


def _text(config: Mapping[str, Any], tied: bool) -> TextConfig:
    _check(config, _TEXT_MUST_BE)
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"rope_parameters is {rope!r}; only the default rotary embedding works")
    if sliding := [kind for kind in config.get("layer_types") or [] if kind != "full_attention"]:
        raise ConfigError(f"layer_types holds {sliding[0]!r}; only full_attention is supported")
    hidden, heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    own_head_dim = config.get("head_dim") is not None
    if heads < 1 or (not own_head_dim and hidden % heads):
        raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return TextConfig(
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=_integer(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_integer(config, "num_key_value_heads"),
        head_dim=_integer(config, "head_dim") if own_head_dim else hidden // heads,
        tie_word_embeddings=tied,
        rope_theta=_number(rope if "rope_theta" in rope else config, "rope_theta", 1e4),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        max_positions=_integer(config, "max_position_embeddings"),
    )


def _check(config: Mapping[str, Any], rules: Mapping[str, tuple], prefix: str = "") -> None:
    for key, allowed in rules.items():
        if key in config and config[key] not in allowed:
            wanted = " or ".join(repr(value) for value in allowed)
            raise ConfigError(
                f"config.json: {prefix}{key} is {config[key]!r}, which is not supported "
                f"(supported: {wanted})"
            )


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(config[key], Mapping):
        raise ConfigError(f"config.json: {key} must be an object, not {config[key]!r}")
    return config[key]


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config[key] if default is None else config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"config.json: {key} must be an integer, not {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config.json: {key} must be a number, not {value!r}")
    return float(value)
