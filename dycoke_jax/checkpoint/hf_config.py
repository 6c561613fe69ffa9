"""Reads ``config.json`` in the lmms-lab and llava-hf formats, and writes it in the latter.

A setting that changes what the model computes and is not implemented here raises an error that
names it; it is never ignored. A field that a file leaves out has the value that transformers or
LLaVA-NeXT gives it. Sources: the published lmms-lab (LLaVA-NeXT) and llava-hf files, and the code
of both libraries.
"""

from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

from dycoke_jax import checks
from dycoke_jax.checkpoint.config_defaults import default_of
from dycoke_jax.config import LlavaConfig, TextConfig, VisionConfig
from dycoke_jax.errors import ConfigError

# transformers' names of the configuration classes.
_LLAVA_ONEVISION, _QWEN2, _SIGLIP = "llava_onevision", "qwen2", "siglip_vision_model"
_LMMS_LAB_TYPES = ("llava", "llava_qwen")

_MOST_LAYERS, _LARGEST = 400, 2**31 - 1
"""The largest number of layers and the largest other size; Qwen2-72B has 80 layers."""


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
        if model_type == _LLAVA_ONEVISION:
            return _from_llava_hf(config)
        if model_type in _LMMS_LAB_TYPES:
            return _from_lmms_lab(config)
    except KeyError as error:
        raise ConfigError(f"config.json lacks the key {error.args[0]!r}") from error
    raise ConfigError(
        f"config.json: model_type is {checks.shown(model_type)}; supported are llava_onevision "
        "(llava-hf) and llava or llava_qwen (lmms-lab)"
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
    "layer_norm_eps": 1e-6,
}
_TOWERS = {"google/siglip-so400m-patch14-384": _SO400M}
"""Vision towers that lmms-lab files name without giving their sizes."""

# The values supported for each key, where a file has it. Other values would change what the model
# computes.
_TEXT_MUST_BE = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False, None),
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
    "transformers_weights": (None, "model.safetensors"),  # the file to read
}
_LMMS_LAB_MUST_BE = {
    "architectures": (["LlavaQwenForCausalLM"], None),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_vision_select_feature": ("patch",),
    "mm_resampler_type": (None,),
    "mm_use_im_start_end": (False, None),
    "add_faster_video": (False, None),
    "use_pos_skipping": (False, None),
}
_LMMS_LAB_ABSENT = {"mm_projector_type": "linear", "mm_patch_merge_type": "flat"}
"""What LLaVA-NeXT takes where a file lacks a key, if that is not supported."""


def _from_llava_hf(config: Mapping[str, Any]) -> LlavaConfig:
    _check(config, _LLAVA_HF_MUST_BE)
    text, vision = (_nested(config, key) for key in ("text_config", "vision_config"))
    _check(text, {"model_type": (_QWEN2,), **_TEXT_MUST_BE}, "text_config.")
    depth = _integer(vision, "num_hidden_layers", _SIGLIP)
    # Published files have this flag in either place; transformers ties if either is set.
    tied = any(_flag(place, "tie_word_embeddings") for place in (config, text))
    return LlavaConfig(
        vision=_vision(vision, _layers_run(config, depth)),
        text=_text(text, tied),
        **_spatial(config),
    )


def _from_lmms_lab(config: Mapping[str, Any]) -> LlavaConfig:
    for key, meaning in _LMMS_LAB_ABSENT.items():
        if key not in config:
            raise ConfigError(
                f"config.json lacks {key}, for which LLaVA-NeXT takes {meaning!r}; that is not "
                f"supported (supported: {_LMMS_LAB_MUST_BE[key][0]!r})"
            )
    # The file is that of the language model, with the keys of LLaVA-NeXT added.
    _check(config, {**_LMMS_LAB_MUST_BE, **_TEXT_MUST_BE})
    tower = _tower(config)
    return LlavaConfig(
        # LLaVA-NeXT's SigLIP code deletes the last block, whatever mm_vision_select_layer says.
        vision=_vision(tower, _integer(tower, "num_hidden_layers", _SIGLIP) - 1),
        text=_text(config, _flag(config, "tie_word_embeddings")),
        **_spatial(config),
    )


def _nested(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Returns a nested configuration; that of transformers' class if it is absent or null."""
    if config.get(key) is None:
        return default_of(_LLAVA_ONEVISION, key)
    return _section(config, key)


def _layers_run(config: Mapping[str, Any], depth: int) -> int:
    """Returns the number of the tower's blocks whose last output is used."""
    layer = config.get("vision_feature_layer", -1)
    # transformers joins the features of the layers of a list; those of one layer stay as they are.
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if isinstance(layer, bool) or not isinstance(layer, int) or not 1 <= abs(layer) <= depth:
        raise ConfigError(
            f"vision_feature_layer is {checks.shown(layer)}; supported is one layer of the "
            f"{depth}-layer tower"
        )
    # The value indexes the tower's hidden_states: 0 is the embedding's output, -1 the last block's.
    return layer if layer >= 0 else depth + 1 + layer


def _tower(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the configuration of the vision tower that an lmms-lab file describes or names."""
    name = config["mm_vision_tower"]
    # A file may describe its tower as SigLIP's own config.json does, counting the last block too.
    if config.get("vision_config") is not None:
        return _section(config, "vision_config")
    if isinstance(name, str):
        for known, sizes in _TOWERS.items():
            # Fine-tuning scripts write the local path of the tower, with either kind of separator.
            if PureWindowsPath(name).name == PureWindowsPath(known).name:
                return sizes
    raise ConfigError(
        f"mm_vision_tower is {checks.shown(name)}; supported are {', '.join(_TOWERS)} and any "
        "SigLIP tower that the file describes under vision_config"
    )


def _spatial(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how visual tokens are pooled and separated, without what is absent or null."""
    settings = {
        "pool_mode": config.get("mm_spatial_pool_mode"),
        "pool_stride": config.get("mm_spatial_pool_stride"),
        "newline": config.get("mm_newline_position"),
    }
    settings = {field: value for field, value in settings.items() if value is not None}
    if "pool_stride" in settings:
        _as_integer(settings["pool_stride"], "mm_spatial_pool_stride")
    return settings


def _vision(config: Mapping[str, Any], num_layers: int) -> VisionConfig:
    _check(config, _VISION_MUST_BE, "vision_config.")
    return VisionConfig(
        hidden_size=_integer(config, "hidden_size", _SIGLIP),
        intermediate_size=_integer(config, "intermediate_size", _SIGLIP),
        num_layers=num_layers,
        num_heads=_integer(config, "num_attention_heads", _SIGLIP),
        patch_size=_integer(config, "patch_size", _SIGLIP),
        image_size=_integer(config, "image_size", _SIGLIP),
        layer_norm_eps=_number(config, "layer_norm_eps", _SIGLIP),
    )


def _text(config: Mapping[str, Any], tied: bool) -> TextConfig:
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise ConfigError(f"config.json: layer_types must be a list, not {checks.shown(kinds)}")
    if sliding := [kind for kind in kinds if kind != "full_attention"]:
        raise ConfigError(
            f"layer_types holds {checks.shown(sliding[0])}; only full_attention is supported"
        )
    hidden = _integer(config, "hidden_size", _QWEN2)
    heads = _integer(config, "num_attention_heads", _QWEN2)
    head_dim = config.get("head_dim")
    if heads < 1 or (head_dim is None and hidden % heads):
        raise ConfigError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    # To Qwen2's class, null means as many as there are heads; its default is for an absent field.
    kv_heads_null = config.get("num_key_value_heads", 0) is None
    return TextConfig(
        vocab_size=_integer(config, "vocab_size", _QWEN2),
        hidden_size=hidden,
        intermediate_size=_integer(config, "intermediate_size", _QWEN2),
        num_layers=_integer(config, "num_hidden_layers", _QWEN2),
        num_heads=heads,
        num_kv_heads=heads if kv_heads_null else _integer(config, "num_key_value_heads", _QWEN2),
        head_dim=hidden // heads if head_dim is None else _as_integer(head_dim, "head_dim"),
        tie_word_embeddings=tied,
        rope_theta=_rope_theta(config),
        rms_norm_eps=_number(config, "rms_norm_eps", _QWEN2),
        max_positions=_integer(config, "max_position_embeddings", _QWEN2),
    )


def _rope_theta(config: Mapping[str, Any]) -> float:
    """Returns the base of the rotary embedding, refusing any but the default embedding.

    transformers 4 writes ``rope_theta`` and ``rope_scaling``, transformers 5 ``rope_parameters``;
    the latter reads all three. The type is ``rope_type``, or ``type`` in older files. There may be
    an entry for each kind of layer; Qwen2 without sliding windows has one kind.
    """
    chosen: Mapping[str, Any] = {}
    # Where a file has both, transformers takes the second.
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is None:
            continue
        rope = _section(config, key)
        of_layers = rope.get("full_attention", rope)
        entries = [rope, *(entry for entry in rope.values() if isinstance(entry, Mapping))]
        if not isinstance(of_layers, Mapping) or not all(map(_is_default_rope, entries)):
            raise ConfigError(
                f"config.json: {key} is {checks.shown(rope)}; only the default rotary embedding "
                "is supported"
            )
        chosen = of_layers or chosen
    for place in (chosen, config):
        if "rope_theta" in place:
            return _as_number(place["rope_theta"], "rope_theta")
    return default_of(_QWEN2, "rope_parameters")["rope_theta"]


def _is_default_rope(rope: Mapping[str, Any]) -> bool:
    kinds = [rope.get(key, "default") for key in ("rope_type", "type")]
    return kinds == ["default", "default"] and rope.get("partial_rotary_factor", 1) == 1


def _check(config: Mapping[str, Any], rules: Mapping[str, tuple], prefix: str = "") -> None:
    for key, allowed in rules.items():
        if key in config and config[key] not in allowed:
            wanted = " or ".join(repr(value) for value in allowed)
            raise ConfigError(
                f"config.json: {prefix}{key} is {checks.shown(config[key])}, which is not "
                f"supported (supported: {wanted})"
            )


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(config[key], Mapping):
        raise ConfigError(f"config.json: {key} must be an object, not {checks.shown(config[key])}")
    return config[key]


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    return value is not None and checks.flag(f"config.json: {key}", value)


def _integer(config: Mapping[str, Any], key: str, model_type: str) -> int:
    """Returns an integer field, or the default of transformers' class if it is absent or null."""
    value = config.get(key)
    return _as_integer(default_of(model_type, key) if value is None else value, key)


def _number(config: Mapping[str, Any], key: str, model_type: str) -> float:
    """Returns a field that is a number, or the default of transformers' class if it is absent.

    Null is refused, as by transformers: a wrong number would fit the weights, and go unnoticed.
    """
    return _as_number(config[key] if key in config else default_of(model_type, key), key)


def _as_integer(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"config.json: {key} must be an integer, not {checks.shown(value)}")
    # Refused here because a description of every layer is made before weights are looked at.
    most = _MOST_LAYERS if key == "num_hidden_layers" else _LARGEST
    if value > most:
        raise ConfigError(f"config.json: {key} is {checks.shown(value)}; it must be at most {most}")
    return value


def _as_number(value: Any, key: str) -> float:
    return checks.number(f"config.json: {key}", value, 0, with_low=False)
