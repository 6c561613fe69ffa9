"""Finds a checkpoint: a local folder, or a repository on the Hugging Face hub."""

import re
from pathlib import Path

from dycoke_jax.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Safetensors weights, configuration, tokenizer and chat template; never code or pickles.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja"]


def locate(name_or_path: str | Path) -> Path:
    """Returns the absolute path of a checkpoint's folder, downloading it if needed.

    Args:
        name_or_path: a folder, or a hub id such as ``lmms-lab/llava-onevision-qwen2-7b-ov``, which
            is taken from the local hub cache or downloaded into it. The network is used for
            nothing else.

    Raises:
        CheckpointError: if it is neither a folder nor a hub id, or the download fails.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.exists():
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder (with config.json)")
    name = str(name_or_path)
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name!r} is neither an existing folder nor a hub id like org/name")
    return _download(name)


def _download(name: str) -> Path:
    # Imported here because only downloads need it, and it is slow to import.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_WANTED))
    except errors.GatedRepoError as error:
        reason = "its owner asks for consent; accept on its page and log in with `hf auth login`"
        cause: Exception = error
    except errors.RepositoryNotFoundError as error:
        reason = "the hub has no such repository (or it is private); nor is there such a folder"
        cause = error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason = "it is not in the cache and the hub cannot be reached"
        cause = error
    # Broken connections, full disks and rejected access tokens raise many types.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        cause = error
    raise CheckpointError(f"cannot download {name}: {reason}") from cause
