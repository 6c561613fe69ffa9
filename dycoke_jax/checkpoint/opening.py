"""Opens a checkpoint: reads and checks all but the weights, which are loaded on demand."""

from dataclasses import dataclass, replace
from os import PathLike

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dycoke_jax.checkpoint.end_ids import read_end_ids
from dycoke_jax.checkpoint.folder import Folder, open_folder
from dycoke_jax.checkpoint.load import load_params
from dycoke_jax.checkpoint.processor import check_processor
from dycoke_jax.checkpoint.tensors import INT8
from dycoke_jax.checkpoint.tokenizer import load_tokenizer
from dycoke_jax.config import LlavaConfig, PoolMode, Storage
from dycoke_jax.errors import CheckpointError
from dycoke_jax.inputs.prompts import Tokenizer, stop_ids
from dycoke_jax.model import Model
from dycoke_jax.progress import Progress
from dycoke_jax.sharding import check_mesh


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: configuration and tokenizer in memory, weights on disk.

    Attributes:
        folder: the checkpoint's folder and model configuration.
        tokenizer: a fast tokenizer of transformers.
        stop_ids: token ids that end an answer, in ascending order.
        notes: remarks for the user, one sentence each, on files that are not read and on settings
            that are left out.
    """

    folder: Folder
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> LlavaConfig:
        """The model's configuration."""
        return self.folder.config

    def load(
        self,
        dtype: DTypeLike | None = None,
        progress: Progress | None = None,
        weights: Storage | None = None,
        mesh: Mesh | None = None,
        *,
        fsdp: bool = False,
    ) -> Model:
        """Loads the model onto JAX's default device or a mesh, as ``load_params`` does.

        Args:
            dtype: float32, float16 or bfloat16, of weights and computation. None leaves each tensor
                in its stored dtype, and computes in that of the token embedding, or of the final
                norm where the embedding is int8.
            progress: called after each tensor; counts bytes as stored.
            weights: as in ``load_params``.
            mesh: as in ``load_params``.
            fsdp: as in ``load_params``.

        Raises:
            ConfigError: if the mesh cannot divide the model.
        """
        if mesh is not None:
            check_mesh(self.config, mesh)
        params = load_params(self.folder, dtype, progress, weights, mesh, fsdp=fsdp)
        # The only place where a dtype is read off a weight: nothing else says what was stored.
        stored = params["language_model.embed_tokens.weight"].dtype
        if stored == INT8:
            stored = params["language_model.norm.weight"].dtype
        return Model(params, self.config, jnp.dtype(dtype or stored).name, mesh, fsdp=fsdp)


def open_checkpoint(
    name_or_path: str | PathLike[str], *, pool_mode: PoolMode | None = None
) -> Checkpoint:
    """Finds a checkpoint, and reads and checks everything but its weights.

    Args:
        name_or_path: a folder in the lmms-lab or the llava-hf layout, a folder that
            ``dycoke-jax convert`` wrote, or a hub id ``org/name``, which is downloaded if not
            cached.
        pool_mode: spatial pooling to use; None takes that of the configuration.

    Raises:
        CheckpointError: if the checkpoint cannot be found, or its configuration, processor or
            tokenizer cannot be read or does not fit the model.
        ConfigError: naming a setting of the model or its processor that is not supported.
    """
    folder = open_folder(str(name_or_path))
    if pool_mode is not None:
        folder = replace(folder, config=replace(folder.config, pool_mode=pool_mode))
    check_processor(folder.path, folder.config.vision.image_size)
    end_ids, notes = read_end_ids(folder.path, folder.config.text.vocab_size)
    tokenizer = load_tokenizer(folder.path)
    check_vocabulary(tokenizer, folder.config)
    return Checkpoint(
        folder, tokenizer, stop_ids(tokenizer, end_ids), notes=(*folder.notes, *notes)
    )


def check_vocabulary(tokenizer: Tokenizer, config: LlavaConfig) -> None:
    """Checks that every token id of the tokenizer is below the model's vocabulary size.

    Raises:
        CheckpointError: if not, naming the largest id and the vocabulary size.
    """
    largest = max(tokenizer.backend_tokenizer.get_vocab().values())
    if largest >= config.text.vocab_size:
        raise CheckpointError(
            f"the tokenizer has ids up to {largest}, but the model's vocabulary has only "
            f"{config.text.vocab_size} tokens; they do not belong together"
        )
