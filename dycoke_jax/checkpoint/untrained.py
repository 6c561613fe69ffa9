"""Makes checkpoints with random weights: the real files and shapes, before any training."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dycoke_jax.checkpoint.conversion import with_post_norm, write_config
from dycoke_jax.checkpoint.names import llava_hf_name
from dycoke_jax.checkpoint.safetensors_writer import write_safetensors
from dycoke_jax.checkpoint.staging import absent, staged_folder
from dycoke_jax.checkpoint.tensors import Progress, TensorInfo, Weights, weight_dtype
from dycoke_jax.config import LlavaConfig
from dycoke_jax.models.llava import abstract_params, random_param

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")


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
        progress: told after each tensor.
        max_shard_bytes: tensor data above this is split over several files with an index.

    Raises:
        CheckpointError: when ``dst`` exists or cannot be written.
    """
    destination, kind = absent(dst), weight_dtype(dtype)
    assert kind is not None
    shapes = abstract_params(config)

    def make(paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        for path in paths:
            yield path, random_param(path, shapes[path].shape, seed)

    infos = {path: TensorInfo(leaf.shape, kind) for path, leaf in shapes.items()}
    weights = with_post_norm(Weights(infos, {}, make))
    tensors = {**weights.params, **weights.carried}
    total = sum(info.nbytes for info in tensors.values())

    def arrays() -> Iterator[np.ndarray]:
        done = 0
        for path, array in weights.stream(tensors):
            yield array.astype(kind)
            done += array.nbytes
            if progress:
                progress(done, total, path)

    with staged_folder(destination) as folder:
        write_config(folder, config.to_llava_hf() | {"dtype": kind.name})
        save_byte_tokenizer(folder)
        names = {llava_hf_name(path): info for path, info in tensors.items()}
        write_safetensors(folder, names, arrays(), max_shard_bytes)


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer with one id a byte and the control tokens of ChatML after them."""
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROL_TOKENS))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(
        folder
    )
