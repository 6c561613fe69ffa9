"""Attention from its formula, in NumPy, and its gradients by torch."""

import numpy as np
import torch


def plain_attention(q, k, v, seen):
    """One head at a time; ``seen`` [B, T, S]. A query that sees no key gets zeros."""
    out = np.zeros_like(q)
    for b, h in np.ndindex(q.shape[:2]):
        j = h // (q.shape[1] // k.shape[1])
        scores = q[b, h] @ k[b, j].T / np.sqrt(q.shape[-1])
        scores = np.where(seen[b], scores, -np.inf)
        with np.errstate(invalid="ignore"):
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights = np.nan_to_num(weights / weights.sum(-1, keepdims=True))
        out[b, h] = weights @ v[b, j]
    return out


def gradients_of_attention(q, k, v, seen, of_out):
    """Gradients of (attention * of_out).sum() in q, k and v; every query sees a key."""
    q, k, v = (torch.from_numpy(x).requires_grad_() for x in (q, k, v))
    mask = torch.from_numpy(seen)[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    (out * torch.from_numpy(of_out)).sum().backward()
    return q.grad.numpy(), k.grad.numpy(), v.grad.numpy()
