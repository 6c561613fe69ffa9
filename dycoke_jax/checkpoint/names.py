r"""The names of tensors in each layout, as tables of regular expressions.

Every layout maps to the paths of this package (``language_model.layers.0.mlp.up_proj.weight``); one
table leads back to the llava-hf layout. A name that no table knows is an error, never ignored.
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
    # transformers 4 wrote the level vision_model, transformers 5 does not.
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
"""Name in the file -> path, for each layout that is read."""

_TO_LLAVA_HF = _table(
    (r"language_model\.(.+)", r"language_model.model.\1"),
    (r"(lm_head\..+)", r"language_model.\1"),
    (r"projector\.(.+)", r"multi_modal_projector.\1"),
    (r"(image_newline)", r"\1"),
    (r"vision_tower\.((?:patch|position)_embedding\..+)", r"vision_tower.embeddings.\1"),
    (r"vision_tower\.(layers\..+)", r"vision_tower.encoder.\1"),
    (r"(vision_tower\.(?:post_layernorm|head)\..+)", r"\1"),
)

# Computed from the configuration, so some versions of some libraries stored them and others not.
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
    """The key in ``LAYOUTS`` whose table knows most of these names; None when none knows any."""
    names = list(names)
    known = {
        layout: sum(_rename(table, name) is not None for name in names)
        for layout, table in LAYOUTS.items()
    }
    best = max(known, key=known.__getitem__)
    return best if known[best] else None


def path_of(name: str, layout: str) -> str | None:
    """The path that a name in a file of this layout stands for; None for one not in its table."""
    return _rename(LAYOUTS[layout], name)


def llava_hf_name(path: str) -> str:
    """The name that transformers 5 gives a tensor when it saves a model."""
    name = _rename(_TO_LLAVA_HF, path)
    assert name is not None, path  # every parameter and every carried tensor is in the table
    return name


def is_dropped(name: str) -> bool:
    """Whether a name in a file (any layout) is a table that can be computed again."""
    return _DROPPED.fullmatch(name) is not None


def is_carried(path: str, vision_layers: int) -> bool:
    """Whether the tensor belongs to the part of the vision tower that the model does not run.

    Args:
        path: a path of this package.
        vision_layers: blocks that the model runs; those after them are not used.
    """
    match = _CARRIED.fullmatch(path)
    return match is not None and (match["layer"] is None or int(match["layer"]) >= vision_layers)
