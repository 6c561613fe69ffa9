"""Values of the fields that a ``config.json`` leaves out.

Several versions of transformers write only the fields of a nested configuration that differ from
the defaults of its class, so those classes say what an absent field means.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any


def default_of(model_type: str, field: str) -> Any:
    """Returns the default of a field of a configuration class of transformers.

    Args:
        model_type: transformers' name of the class: qwen2, siglip_vision_model or llava_onevision.
        field: name of the field; ``vision_config`` and ``text_config`` are dictionaries.
    """
    return _defaults(model_type)[field]


@cache
def _defaults(model_type: str) -> Mapping[str, Any]:
    # Imported here because transformers takes seconds to import, and imports torch if installed;
    # most files leave nothing out.
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type).to_dict()
