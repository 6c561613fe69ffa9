"""Which weights of a model can be int8, and how they lie among its parameters.

All matrices of the language model can: those of the decoder layers, the token embedding and the
head. Decoding reads every one of them for each token, so their bytes are its time; embedding and
head are more than a quarter of them in the smallest model, and the scale of an entry of the
vocabulary serves both. Norms and biases are few and stay, and so do the vision tower and the
projector, which are limited by arithmetic and not by bytes.

A parameter stays at its path as int8 [out, in]; its float32 scales [out] are a parameter besides,
at ``scale_path``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import Array

from dycoke_jax.ops.matmul import Int8Weight, quantise

_MATRIX = re.compile(
    r"language_model\.(?:embed_tokens|layers\.\d+\.(?:self_attn|mlp)\.\w+)\.weight|lm_head\.weight"
)
_SCALE = "_scale"


def can_be_int8(path: str) -> bool:
    """Whether the parameter at a path is a matrix of the language model."""
    return _MATRIX.fullmatch(path) is not None


def scale_path(path: str) -> str:
    """The path of the scales of an int8 parameter."""
    return path + _SCALE


def matrix_path(path: str) -> str:
    """The path of the int8 parameter that scales belong to; of any other parameter, its own."""
    return path.removesuffix(_SCALE)


def is_int8(params: Mapping[str, Array]) -> bool:
    """Whether parameters of a model hold int8 matrices."""
    return any(weight.dtype == np.int8 for weight in params.values())


def stored_weight(params: Mapping[str, Array], path: str) -> Array | Int8Weight:
    """The weight at a path, with its scales if it is int8."""
    scale = params.get(scale_path(path))
    return params[path] if scale is None else Int8Weight(params[path], scale)


def quantised(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """Quantises what can be int8 in a stream of parameters by path.

    Each int8 matrix is followed by its scales; all else is passed on unchanged.
    """
    for path, array in tensors:
        if can_be_int8(path) and array.dtype != np.int8:
            values, scale = quantise(array)
            yield path, values
            yield scale_path(path), scale
        else:
            yield path, array
