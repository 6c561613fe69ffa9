"""Signals of the vision tower, and clips of different lengths in one call of ``encode``."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.tiny import tiny_model, video

from dycoke_jax.compression.protocol import Signal
from dycoke_jax.config import VisionConfig
from dycoke_jax.errors import ConfigError
from dycoke_jax.generation.encode import encode
from dycoke_jax.model import Model
from dycoke_jax.models.llava import random_params
from dycoke_jax.models.siglip import SiglipLayer
from dycoke_jax.ops.attention import received_attention

TOLERANCE = 1e-4
KEYS, ATTENTION = Signal("keys"), Signal("attention")
BOTH = (KEYS, Signal("attention", 0))


@pytest.fixture(scope="module")
def model():
    return tiny_model().model


@pytest.fixture(scope="module")
def frames(pair):
    side = pair[1].config.vision.image_size
    return np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def of_torch(pair, frames):
    """Keys [C, P, D] and attention [C, P] of each layer, and the states after the last."""
    tower = copy.deepcopy(pair[0].model.vision_tower)
    tower.set_attn_implementation("eager")
    keys = []
    for name, module in tower.named_modules():
        if name.endswith("k_proj"):
            module.register_forward_hook(lambda _module, _given, out: keys.append(out))
    pixels = (torch.from_numpy(frames).float().permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        out = tower(pixels, output_attentions=True, output_hidden_states=True)
    attention = [weights.mean((1, 2)) for weights in out.attentions]
    return {"keys": keys, "attention": attention, "states": out.hidden_states[-1]}


def encoded(model, frames, signals):
    """Tokens and signals of frames, without chunks."""
    run = jax.jit(lambda model, frames: model.bind().encode_with_signals(frames, signals))
    return run(model, jnp.asarray(frames))


@pytest.mark.parametrize(("layer", "number"), [(0, 0), (2, 2), (-1, 2), (-3, 0)])
def test_keys_and_attention_equal_those_of_transformers(pair, frames, of_torch, layer, number):
    asked = (Signal("attention", layer), Signal("keys", layer), Signal("mean_keys", layer))
    tower = jax.jit(lambda model, frames: model.bind().vision_tower.with_signals(frames, asked))
    states, (attention, keys, mean_keys) = tower(pair[1].model, jnp.asarray(frames))
    np.testing.assert_allclose(states, of_torch["states"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(keys, of_torch["keys"][number], atol=TOLERANCE, rtol=0)
    heads = of_torch["keys"][number].unflatten(-1, (pair[1].config.vision.num_heads, -1))
    np.testing.assert_allclose(mean_keys, heads.mean(2), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(attention, of_torch["attention"][number], atol=TOLERANCE, rtol=0)
    # Layers and patches differ by far more than the tolerance.
    for kind in ("keys", "attention"):
        first, *_, last = of_torch[kind]
        assert (first - last).abs().max() > 100 * TOLERANCE
    assert of_torch["attention"][number].std(1).min() > 100 * TOLERANCE


@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
def test_signals_are_pooled_as_torch_does(pair, frames, of_torch, mode):
    """4 x 4 patches with stride 3: interpolated to 2 x 2, or one window of 3 x 3."""
    config = replace(pair[1].config, pool_mode=mode, pool_stride=3)
    _, signals = encoded(Model(pair[1].params, config), frames, (KEYS, ATTENTION))
    grid = torch.cat([of_torch["keys"][-1], of_torch["attention"][-1][..., None]], dim=2)
    grid = grid.reshape(len(frames), 4, 4, -1).permute(0, 3, 1, 2)
    if mode == "bilinear":
        wanted = torch.nn.functional.interpolate(grid, size=(2, 2), mode="bilinear")
    elif mode == "average":
        wanted = torch.nn.functional.avg_pool2d(grid, 3)
    else:
        wanted = torch.nn.functional.max_pool2d(grid, 3)
    wanted = wanted.flatten(2).permute(0, 2, 1)
    np.testing.assert_allclose(signals[0], wanted[..., :-1], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(signals[1], wanted[..., -1], atol=TOLERANCE, rtol=0)


def test_clips_of_different_lengths_equal_each_alone(model):
    clips = [video(0, 1), video(1, 3), video(2, 5)]
    together = encode(model, clips, 4, 8, BOTH)
    assert together.frames.tolist() == [1, 3, 5, 0]
    assert together.frames.dtype == jnp.int32
    arrays = (together.tokens, *together.signals)
    assert [array.shape for array in arrays] == [(4, 8, 16, 48), (4, 8, 16, 32), (4, 8, 16)]
    for row, clip in enumerate(clips):
        alone = encode(model, [clip], 1, len(clip), BOTH)
        for array, of_one in zip(arrays, (alone.tokens, *alone.signals), strict=True):
            atol = 1e-6 * np.abs(of_one).max()
            np.testing.assert_allclose(array[row, : len(clip)], of_one[0], atol=atol, rtol=0)
            assert np.asarray(array[row, : len(clip)]).reshape(len(clip), -1).any(1).all()
            assert not np.asarray(array[row, len(clip) :]).any()
    assert not any(np.asarray(array[3]).any() for array in arrays)


def test_only_frames_of_clips_are_encoded(model):
    """9 frames in a batch of 4 rows of 8: two chunks of 8."""
    calls = []
    clips = [video(0, 1), video(1, 3), video(2, 5)]
    encode(model, clips, 4, 8, BOTH, progress=lambda *call: calls.append(call))
    assert calls == [("encoding frames", 8, 9), ("encoding frames", 9, 9)]


def test_other_lengths_compile_nothing(model, compilations):
    encode(model, [video(0, 8)], 4, 8, BOTH)
    warm = compilations()
    for lengths in ([1], [2, 7], [8, 8, 8, 8], [5, 1, 3]):
        clips = [video(number, length) for number, length in enumerate(lengths)]
        features = encode(model, clips, 4, 8, BOTH)
        assert features.frames.tolist() == lengths + [0] * (4 - len(lengths))
    assert compilations() == warm
    encode(model, [video(0, 7)], 4, 7, BOTH)
    assert compilations() == warm + 1, "another F unfolds into another shape"


def test_no_signal_is_traced_where_none_is_asked_for(monkeypatch):
    def never(*_, **__):
        raise AssertionError("a signal was traced")

    monkeypatch.setattr(SiglipLayer, "signal", never)
    monkeypatch.setattr("dycoke_jax.models.siglip.received_attention", never)
    model = tiny_model(layers=1).model  # no other test has traced this model
    assert encode(model, [video(0, 2)], 1, 2).signals == ()
    with pytest.raises(AssertionError, match="traced"):
        encode(model, [video(0, 2)], 1, 2, (KEYS,))


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_the_tower_does_not_have_is_refused(model, layer):
    wanted = rf"layer is {layer}; it must lie in -2\.\.1, because the vision tower runs 2 layers"
    with pytest.raises(ConfigError, match=wanted):
        encode(model, [video(0, 2)], 1, 2, (KEYS, Signal("attention", layer)))


def test_half_precision_and_a_signal_asked_for_twice(model):
    weights = {name: weight.astype(jnp.bfloat16) for name, weight in model.params.items()}
    half = Model(weights, model.config, "bfloat16")
    features = encode(half, [video(0, 2)], 1, 2, (KEYS, ATTENTION, Signal("keys", 1), KEYS))
    keys, attention, *again = features.signals
    assert features.tokens.dtype == keys.dtype == jnp.bfloat16
    assert attention.dtype == jnp.float32
    for same in again:
        np.testing.assert_array_equal(keys, same)


def array_sizes(jaxpr):
    """Numbers of elements of all arrays that a program computes, loops included."""
    for equation in jaxpr.eqns:
        yield from (out.aval.size for out in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)  # closed or not
            if hasattr(inner, "eqns"):
                yield from array_sizes(inner)


def test_attention_of_a_chunk_exists_one_frame_at_a_time():
    chunk, heads, side = 8, 4, 27
    patches = side**2
    vision = VisionConfig(16, 16, 2, heads, patch_size=2, image_size=2 * side)
    config = replace(tiny_model().config, vision=vision)
    model = Model(random_params(config), config)
    frames = jnp.zeros((chunk, 2 * side, 2 * side, 3), jnp.uint8)
    program = jax.make_jaxpr(
        lambda model, frames: model.bind().encode_with_signals(frames, (ATTENTION,))
    )(model, frames)
    assert max(array_sizes(program.jaxpr)) < chunk * heads * patches**2
    q = jnp.zeros((chunk, heads, patches, 4))
    alone = jax.make_jaxpr(received_attention)(q, q)
    assert max(array_sizes(alone.jaxpr)) == heads * patches**2


def test_keys_cost_no_second_product():
    """They are written down twice, but computed once."""
    vision = VisionConfig(32, 48, 1, 4, patch_size=14, image_size=98)
    config = replace(tiny_model().config, vision=vision)

    def operations(signals):
        run = jax.jit(
            lambda p, frames: Model(p, config).bind().encode_with_signals(frames, signals)
        )
        program = run.lower(random_params(config), jnp.asarray(video(0, 8))).compile()
        return program.cost_analysis()["flops"]

    product = 2 * 8 * vision.grid**2 * vision.hidden_size**2
    assert operations((KEYS,)) < operations(()) + product / 2
