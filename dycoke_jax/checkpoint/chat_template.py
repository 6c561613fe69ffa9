"""Finds a checkpoint's chat template."""

from pathlib import Path

from dycoke_jax.errors import CheckpointError
from dycoke_jax.files import read_json_object
from dycoke_jax.inputs.chat_template import default_template, template_of
from dycoke_jax.inputs.prompts import Tokenizer


def find_chat_template(folder: Path, tokenizer: Tokenizer) -> str | None:
    """Finds the chat template where transformers' processor finds it, or else its tokenizer.

    Args:
        folder: the checkpoint's folder. The processor reads ``chat_template`` in
            ``processor_config.json``, then ``chat_template.json``, then ``chat_template.jinja``.
        tokenizer: the tokenizer of that folder. transformers has read ``chat_template.jinja`` and
            ``tokenizer_config.json`` for it.

    Returns:
        The source of the template; None if there is none.

    Raises:
        CheckpointError: if one of the JSON files cannot be read, or holds no text as template.
    """
    for name in ("processor_config.json", "chat_template.json"):
        path = folder / name
        settings = read_json_object(path) if path.exists() else {}
        template = default_template(settings.get("chat_template"))
        if template is not None and not isinstance(template, str):
            raise CheckpointError(f"{path}: chat_template is no text; copy the file again")
        if template is not None:
            return template
    return template_of(tokenizer)
