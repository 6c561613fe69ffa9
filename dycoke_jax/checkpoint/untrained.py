"""Writes checkpoints with random weights, in the same files and shapes as trained ones."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dycoke_jax.checkpoint.save import save_llava_hf
from dycoke_jax.checkpoint.tokenizer import CONTROL_TOKENS
from dycoke_jax.config import LlavaConfig
from dycoke_jax.models.llava import abstract_params, random_param
from dycoke_jax.progress import Progress


def write_untrained(
    dst: str | Path,
    config: LlavaConfig,
    dtype: DTypeLike = np.float32,
    seed: int = 0,
    progress: Progress | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes an untrained checkpoint in the llava-hf layout, with a byte-level tokenizer.

    Args:
        dst: a folder that does not exist yet; it is created once everything is written.
        config: the model's configuration; its vocabulary size must be at least 261, the number of
            tokens of the tokenizer.
        dtype: dtype of the written weights: float32, float16 or bfloat16.
        seed: seed of the random weights.
        progress: called after each tensor; counts bytes as written.
        max_shard_bytes: largest tensor data of a file, in bytes; beyond it the tensors are split
            into shards with an index.

    Raises:
        CheckpointError: if ``dst`` exists or cannot be written, or ``dtype`` is not supported.
    """
    shapes = abstract_params(config)

    def make(paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        for path in paths:
            yield path, random_param(path, shapes[path].shape, seed)

    save_llava_hf(
        dst,
        config,
        make,
        lambda folder: save_tokenizer(byte_tokenizer(), folder),
        dtype=dtype,
        progress=progress,
        max_shard_bytes=max_shard_bytes,
    )


def byte_tokenizer() -> Tokenizer:
    """Returns a byte-level BPE tokenizer with one token for each of the 256 bytes and no merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def save_tokenizer(backend: Tokenizer, folder: Path) -> None:
    """Appends ``CONTROL_TOKENS`` to a tokenizer and writes its files into a folder."""
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens(list(CONTROL_TOKENS))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(
        folder
    )
