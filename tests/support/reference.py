"""Plain NumPy versions of the paper's algorithm, one clip at a time, written for clarity alone.

They share no code with the package: loops instead of vectors, lists instead of fixed shapes,
float64 instead of float32.
"""

from decimal import Decimal

import numpy as np


def cosine(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms else 0.0


def kept_of(count, dropped):
    return int((1 - Decimal(str(dropped))) * count)


def paper_merge(features, k):
    """Kept tokens of a clip [F, N, D], as indices into F * N."""
    frames, tokens, _ = features.shape
    features = features.astype(np.float64)
    keep = kept_of(tokens, k)
    result = []
    for window in range(0, frames, 4):
        compared_with = {window + 1: window, window + 2: window, window + 3: window + 2}
        for frame in range(window, min(window + 4, frames)):
            places = range(tokens)
            if frame in compared_with:
                other = compared_with[frame]
                alike = [cosine(features[frame, n], features[other, n]) for n in range(tokens)]
                places = sorted(sorted(range(tokens), key=lambda n: alike[n])[:keep])
            result += [frame * tokens + n for n in places]
    return np.array(result)


def rms_norm(x, weight, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Qwen2:
    """A Qwen2 decoder for one sequence whose later layers may see a part of the cache only."""

    def __init__(self, config, params):
        self.config = config
        self.params = {name: np.asarray(value, np.float64) for name, value in params.items()}

    def weight(self, name):
        return self.params[f"language_model.{name}"]

    def linear(self, name, x):
        bias = self.params.get(f"language_model.{name}.bias", 0.0)
        return x @ self.weight(f"{name}.weight").T + bias

    def rotate(self, x, positions):
        """Turns heads [T, heads, E]."""
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** -(np.arange(half) / half)
        angles = np.asarray(positions)[:, None] * frequencies
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(self, layer, x, cache, positions, visible):
        """Appends the tokens of x [T, D] to the cache; visible(t) lists the slots token t sees."""
        c, name = self.config, f"layers.{layer}.self_attn"
        h = rms_norm(x, self.weight(f"layers.{layer}.input_layernorm.weight"), c.rms_norm_eps)
        q = self.linear(f"{name}.q_proj", h).reshape(len(x), c.num_heads, -1)
        k = self.linear(f"{name}.k_proj", h).reshape(len(x), c.num_kv_heads, -1)
        v = self.linear(f"{name}.v_proj", h).reshape(len(x), c.num_kv_heads, -1)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        cache["k"] = np.concatenate([cache["k"], k]) if "k" in cache else k
        cache["v"] = np.concatenate([cache["v"], v]) if "v" in cache else v
        out, weights = np.zeros_like(q), None
        group = c.num_heads // c.num_kv_heads
        for t in range(len(x)):
            slots = visible(t)
            keys, values = cache["k"][slots], cache["v"][slots]
            weights = np.stack(
                [
                    softmax(keys[:, h // group] @ q[t, h] / c.head_dim**0.5)
                    for h in range(c.num_heads)
                ]
            )
            for h_index in range(c.num_heads):
                out[t, h_index] = weights[h_index] @ values[:, h_index // group]
        x = x + self.linear(f"{name}.o_proj", out.reshape(len(x), -1))
        h = rms_norm(
            x, self.weight(f"layers.{layer}.post_attention_layernorm.weight"), c.rms_norm_eps
        )
        gate = self.linear(f"layers.{layer}.mlp.gate_proj", h)
        up = self.linear(f"layers.{layer}.mlp.up_proj", h)
        x = x + self.linear(f"layers.{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
        return x, weights

    def logits(self, x):
        head = self.params.get("lm_head.weight", self.weight("embed_tokens.weight"))
        return rms_norm(x, self.weight("norm.weight"), self.config.rms_norm_eps) @ head.T

    def generate(self, prompt, candidates, fed, *, layer, p, threshold=0.9, one_shot=False):
        """Paper mode: logits after the prompt and after each fed token, and what was kept.

        prompt: embeddings [T, D]; candidates: slots of visual tokens; fed: token ids. one_shot:
        the prompt's last token chooses once and for all.
        """
        caches = [{} for _ in range(self.config.num_layers)]
        x = np.asarray(prompt, np.float64)
        for number, cache in enumerate(caches):
            positions = range(len(prompt))
            x, weights = self.attend(number, x, cache, positions, lambda t: list(range(t + 1)))
            if number == layer - 1:
                of_prompt = weights.mean(0)[candidates]
        logits, kept_sets, refreshes, weights = [self.logits(x[-1])], [], [], None
        keep, kept, last = kept_of(len(candidates), p), None, None
        for index, token in enumerate(fed):
            now = len(prompt) + index
            everything = list(range(now + 1))
            x = self.weight("embed_tokens.weight")[token][None]
            for number, cache in enumerate(caches):
                visible = everything
                if number == layer:
                    scores = of_prompt if one_shot else weights.mean(0)[candidates]
                    refresh = last is None or cosine(scores, last) < threshold
                    if refresh:
                        best = sorted(range(len(candidates)), key=lambda n: -scores[n])[:keep]
                        kept = {candidates[n] for n in best}
                    last = scores
                    refreshes.append(refresh)
                    kept_sets.append(kept)
                if number >= layer:
                    dropped = set(candidates) - kept
                    visible = [slot for slot in everything if slot not in dropped]
                x, weights = self.attend(number, x, cache, [now], lambda t, v=visible: v)
            logits.append(self.logits(x[-1]))
        return np.stack(logits), kept_sets, refreshes

    def generate_dropping(
        self, prompt, candidates, fed, *, first, r, layer=None, p=0.0, merge=None
    ):
        """FastV: logits after the prompt and after each fed token, and what the last layer saw.

        The layers from ``first`` on lack the visual tokens that the prompt's last token attends to
        least in the layer before. With ``layer``, the layers from there on choose among the others
        in each step, as in ``generate``. merge(x, dropped, left) changes what is left of the states
        x by what is dropped of them.
        """
        caches = [{} for _ in range(self.config.num_layers)]
        x = np.asarray(prompt, np.float64)
        held, left, holds = list(range(len(prompt))), list(candidates), []
        for number, cache in enumerate(caches):
            if number == first:
                scores = weights.mean(0)
                keep = kept_of(len(candidates), r)
                left = sorted(sorted(candidates, key=lambda slot: -scores[slot])[:keep])
                if merge is not None:
                    merge(x, sorted({*candidates} - {*left}), left)
                held = [slot for slot in held if slot not in candidates or slot in left]
                x = x[held]
            x, weights = self.attend(number, x, cache, held, lambda t: list(range(t + 1)))
            holds.append(list(held))
        logits, seen, last, kept = [self.logits(x[-1])], [], None, set(left)
        for index, token in enumerate(fed):
            now = len(prompt) + index
            x = self.weight("embed_tokens.weight")[token][None]
            for number, cache in enumerate(caches):
                if number == layer:
                    before = holds[number - 1]
                    scores = [weights.mean(0)[before.index(slot)] for slot in left]
                    if last is None or cosine(np.array(scores), np.array(last)) < 0.9:
                        order = sorted(range(len(left)), key=lambda n: -scores[n])
                        kept = {left[n] for n in order[: kept_of(len(left), p)]}
                    last = scores
                holds[number].append(now)
                hidden = set(left) - kept if layer is not None and number >= layer else set()
                visible = [n for n, slot in enumerate(holds[number]) if slot not in hidden]
                x, weights = self.attend(number, x, cache, [now], lambda t, v=visible: v)
            seen.append(kept)
            logits.append(self.logits(x[-1]))
        return np.stack(logits), seen
