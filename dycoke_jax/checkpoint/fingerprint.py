"""A fingerprint of a model's weights that does not depend on how they were stored."""

import hashlib

import numpy as np

from dycoke_jax.models.llava import Params


def fingerprint(params: Params) -> str:
    """Returns 16 hexadecimal digits of a SHA-256 over the paths, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for path, weight in sorted(params.items()):
        digest.update(f"{path} {weight.dtype} {weight.shape}".encode())
        digest.update(np.ascontiguousarray(weight).view(np.uint8).data)
    return digest.hexdigest()[:16]
