"""Makes checkpoints with random weights: the real files and shapes, before any training."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dycoke_jax.checkpoint.save import save_llava_hf
from dycoke_jax.config import LlavaConfig
from dycoke_jax.models.llava import abstract_params, random_param
from dycoke_jax.progress import Progress

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
"""The control tokens of ChatML and the places of images and videos; the last ids of a tokenizer."""


def write_untrained(
    dst: str | Path,
    config: LlavaConfig,
    dtype: DTypeLike = np.float32,
    seed: int = 0,
    progress: Progress | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes an untrained checkpoint in the llava-hf layout, with a tokenizer of plain bytes.

    Args:
        dst: a folder that does not exist; it appears when all is written.
        config: the sizes; the vocabulary must hold the 261 tokens of the tokenizer.
        dtype: of the weights.
        seed: of the random weights.
        progress: called after each tensor with the bytes written.
        max_shard_bytes: tensor data above this is split over several files with an index.

    Raises:
        CheckpointError: when ``dst`` exists or cannot be written.
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
    """A byte-level tokenizer with one id for each byte and no merges."""
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
