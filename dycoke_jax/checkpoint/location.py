"""Finds a checkpoint: a folder on this machine, or a repository on the Hugging Face hub."""

import re
from pathlib import Path

from dycoke_jax.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights as safetensors, configuration, tokenizer, chat template. Never code or pickles.
_WANTED = ["*.safetensors", "*.json", "*.txt", "*.jinja"]


def locate(name_or_path: str | Path) -> Path:
    """The absolute path of a checkpoint's folder.

    Args:
        name_or_path: a folder, used as it is; or a hub id such as
            ``lmms-lab/llava-onevision-qwen2-7b-ov``, which is downloaded to (or found in) the
            hub's cache. The network is used for nothing else.

    Raises:
        CheckpointError: when it is neither, or the download fails.
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
    # Imported here because only this needs it, and it is slow to import.
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
    # Connections that break, disks that fill up, tokens that are refused.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        cause = error
    raise CheckpointError(f"cannot download {name}: {reason}") from cause
