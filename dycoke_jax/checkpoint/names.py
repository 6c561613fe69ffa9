r"""The tensor names of each checkpoint layout, as tables of regular expressions.

One table for each layout maps its names to the paths of this package
(``language_model.layers.0.mlp.up_proj.weight``); another maps paths to llava-hf names. A name that
matches no table is reported as an error, never ignored.

A *carried* tensor belongs to the part of the vision tower that the model does not run: the blocks
after the last one used, the final layer norm and the pooling head. Conversion copies such tensors,
so that an export to the llava-hf layout can include them.
"""

import re
from collections.abc import Iterable, Mapping

Table = tuple[tuple[re.Pattern[str], str], ...]


def _table(*rules: tuple[str, str]) -> Table:
    return tuple((re.compile(pattern), target) for pattern, target in rules)


def _vision(prefix: str) -> tuple[tuple[str, str], ...]:
    return (
        (prefix + r"embeddings\.(.+)", r"vision_tower.\1"),
        (prefix + r"encoder\.(layers\..+)", r"vision_tower.\1"),
        (prefix + r"((?:post_layernorm|head)\..+)", r"vision_tower.\1"),
    )


LAYOUTS: Mapping[str, Table] = {
    "lmms-lab": _table(
        (r"model\.((?:embed_tokens|layers|norm)\..+)", r"language_model.\1"),
        (r"(lm_head\..+)", r"\1"),
        (r"model\.mm_projector\.0\.(.+)", r"projector.linear_1.\1"),
        (r"model\.mm_projector\.2\.(.+)", r"projector.linear_2.\1"),
        (r"model\.(image_newline)", r"\1"),
        *_vision(r"model\.vision_tower\.vision_tower\.vision_model\."),
    ),
    # transformers 4 writes the prefix vision_model, transformers 5 does not.
    "llava-hf": _table(
        (r"language_model\.model\.(.+)", r"language_model.\1"),
        (r"language_model\.(lm_head\..+)", r"\1"),
        (r"multi_modal_projector\.(.+)", r"projector.\1"),
        (r"(image_newline)", r"\1"),
        *_vision(r"vision_tower\.(?:vision_model\.)?"),
    ),
    "transformers": _table(
        (r"model\.language_model\.(.+)", r"language_model.\1"),
        (r"(lm_head\..+)", r"\1"),
        (r"model\.multi_modal_projector\.(.+)", r"projector.\1"),
        (r"model\.(image_newline)", r"\1"),
        *_vision(r"model\.vision_tower\.(?:vision_model\.)?"),
    ),
}
"""For each supported layout, the rules from the name in a file to the path."""

_TO_LLAVA_HF = _table(
    (r"language_model\.(.+)", r"language_model.model.\1"),
    (r"(lm_head\..+)", r"language_model.\1"),
    (r"projector\.(.+)", r"multi_modal_projector.\1"),
    (r"(image_newline)", r"\1"),
    (r"vision_tower\.((?:patch|position)_embedding\..+)", r"vision_tower.embeddings.\1"),
    (r"vision_tower\.(layers\..+)", r"vision_tower.encoder.\1"),
    (r"(vision_tower\.(?:post_layernorm|head)\..+)", r"\1"),
)

# Buffers computed from the configuration, which only some library versions store.
_DROPPED = re.compile(r".+\.(?:rotary_emb\.inv_freq|position_ids)")

POST_NORM = ("vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias")
_CARRIED = re.compile(
    r"vision_tower\.(?:post_layernorm\.(?:weight|bias)"
    r"|head\.(?:probe|attention\.(?:in_proj_(?:weight|bias)|out_proj\.(?:weight|bias))"
    r"|layernorm\.(?:weight|bias)|mlp\.fc[12]\.(?:weight|bias))"
    r"|layers\.(?P<layer>\d+)\.(?:layer_norm[12]|mlp\.fc[12]"
    r"|self_attn\.(?:q|k|v|out)_proj)\.(?:weight|bias))"
)


def _rename(table: Table, name: str) -> str | None:
    for pattern, target in table:
        if match := pattern.fullmatch(name):
            return match.expand(target)
    return None


def detect_layout(names: Iterable[str]) -> str | None:
    """Returns the key in ``LAYOUTS`` that matches most of the names; None if none matches any."""
    names = list(names)
    known = {
        layout: sum(_rename(table, name) is not None for name in names)
        for layout, table in LAYOUTS.items()
    }
    best = max(known, key=known.__getitem__)
    return best if known[best] else None


def path_of(name: str, layout: str) -> str | None:
    """Returns the path for a tensor name of a layout; None if no rule of the layout matches."""
    return _rename(LAYOUTS[layout], name)


def llava_hf_name(path: str) -> str:
    """Returns the llava-hf name of a path, as transformers 5 saves the tensor."""
    name = _rename(_TO_LLAVA_HF, path)
    assert name is not None, path  # Every parameter and carried tensor has a rule.
    return name


def is_dropped(name: str) -> bool:
    """Whether a tensor name of any layout is a buffer that is computed from the configuration."""
    return _DROPPED.fullmatch(name) is not None


def is_carried(path: str, vision_layers: int) -> bool:
    """Whether a tensor belongs to the part of the vision tower that the model does not run.

    Args:
        path: the tensor's path in this package.
        vision_layers: number of blocks that the model runs; later blocks are carried.
    """
    match = _CARRIED.fullmatch(path)
    return match is not None and (match["layer"] is None or int(match["layer"]) >= vision_layers)
