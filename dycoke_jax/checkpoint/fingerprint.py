"""A short name for weights, the same wherever and however they were stored."""

import hashlib

import numpy as np

from dycoke_jax.models.llava import Params


def fingerprint(params: Params) -> str:
    """16 hexadecimal digits that depend on every weight's path, shape, dtype and bits."""
    digest = hashlib.sha256()
    for path, weight in sorted(params.items()):
        digest.update(f"{path} {weight.dtype} {weight.shape}".encode())
        digest.update(np.ascontiguousarray(weight).view(np.uint8).data)
    return digest.hexdigest()[:16]
