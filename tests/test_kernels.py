"""Attention kernels against plain versions, and which of them each platform's programs hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from support.plain_attention import gradients_of_attention, plain_attention

from dycoke_jax.ops.attention import attention
from dycoke_jax.ops.kernels import cudnn_attention, splash_attention


def compiled(kernel, **settings):
    return jax.jit(partial(kernel, **settings), static_argnames="causal")


KERNELS = {
    # Blocks of 128, so that short sequences have several.
    "splash": compiled(splash_attention, block=128, interpret=True),
    # What is brought to cuDNN and back, with jax's own form in its place.
    "cudnn": compiled(cudnn_attention, implementation="xla"),
}
LENGTH = 301  # not a number of whole blocks, and odd


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(heads, kv_heads, width):
    return [normal(seed, 2, n, LENGTH, width) for seed, n in enumerate((heads, kv_heads, kv_heads))]


def holes():
    valid = np.random.default_rng(3).random((2, LENGTH)) < 0.7
    valid[1, : LENGTH // 2] = False
    valid[0, :130] = False  # a whole block and more
    return valid


def seen_by(valid, causal):
    """What each query sees; those in empty slots see themselves, which is as good as anything."""
    seen = np.broadcast_to(valid[:, None], (2, LENGTH, LENGTH)).copy()
    if causal:
        seen &= np.tril(np.ones((LENGTH, LENGTH), bool))
    return seen | (~valid[:, :, None] & np.eye(LENGTH, dtype=bool))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("empty", ["holes", "full"])
def test_kernel_equals_plain_attention(kernel, causal, empty):
    """Grouped heads of an odd width, slots without a token anywhere, whole blocks of them."""
    q, k, v = inputs(6, 2, 72)
    valid = holes() if empty == "holes" else np.ones((2, LENGTH), bool)
    given = None if empty == "full" else jnp.asarray(valid)
    out = KERNELS[kernel](*map(jnp.asarray, (q, k, v)), given, causal=causal)
    wanted = plain_attention(q, k, v, seen_by(valid, causal))
    there = np.broadcast_to(valid[:, None], q.shape[:3])
    np.testing.assert_allclose(np.asarray(out)[there], wanted[there], atol=2e-6)
    assert (np.asarray(out)[~there] == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_rounds_as_its_dtype_does(kernel):
    q, k, v = (np.asarray(x, jnp.bfloat16) for x in inputs(6, 2, 72))
    valid = holes()
    out = KERNELS[kernel](*map(jnp.asarray, (q, k, v, valid)), causal=True)
    assert out.dtype == jnp.bfloat16
    exact = [x.astype(np.float32) for x in (q, k, v)]
    wanted = plain_attention(*exact, seen_by(valid, True))
    there = np.broadcast_to(valid[:, None], q.shape[:3])
    # The values are of size 1: a rounding of them is 2**-9, one of the scores a little more.
    np.testing.assert_allclose(
        np.asarray(out, np.float32)[there], wanted[there], atol=3e-2, rtol=2e-2
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("empty", ["holes", "full"])
def test_gradients_of_a_kernel_equal_torch(kernel, causal, empty):
    q, k, v = inputs(4, 2, 24)
    valid = holes() if empty == "holes" else np.ones((2, LENGTH), bool)
    given = None if empty == "full" else jnp.asarray(valid)
    of_out = normal(5, *q.shape)

    def loss(q, k, v):
        out = KERNELS[kernel](q, k, v, given, causal=causal)
        # A loss reads no empty slots.
        return (out * of_out * valid[:, None, :, None]).sum()

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(*map(jnp.asarray, (q, k, v)))
    of_tokens = of_out * valid[:, None, :, None]
    wanted = gradients_of_attention(q, k, v, seen_by(valid, causal), of_tokens)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision_on_this_machine(causal, dtype):
    """By the platform's form."""
    q, k, v = (jnp.asarray(x, dtype) for x in inputs(6, 2, 16))
    valid = holes()
    out = attention(q, k, v, jnp.asarray(valid), causal=causal)
    exact = [np.asarray(x, np.float32) for x in (q, k, v)]
    wanted = plain_attention(*exact, seen_by(valid, causal))
    there = np.broadcast_to(valid[:, None], q.shape[:3])
    assert out.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(out, np.float32)[there], wanted[there], atol=3e-2, rtol=2e-2
    )


def program(platform, dtype, causal=True, parts=False, gradient=False, width=64):
    """What jax gives to the compiler of a platform, for attention with empty slots."""
    shapes = [jax.ShapeDtypeStruct((2, heads, 300, width), dtype) for heads in (4, 2, 2)]
    valid = jax.ShapeDtypeStruct((2, 300), bool)

    def run(q, k, v, valid):
        of = valid.astype(jnp.int32) if parts else None
        return attention(q, k, v, valid, causal=causal, parts=of).astype(jnp.float32).sum()

    run = jax.grad(run, (0, 1, 2)) if gradient else run
    return jax.jit(run).trace(*shapes, valid).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def with_cudnn(monkeypatch):
    """As on a machine with cuDNN 9.10, as far as tracing goes."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    jax.clear_caches()
    yield
    jax.clear_caches()


def kernels_in(text):
    calls = {"splash": "tpu_custom_call", "cudnn": "__cudnn$fmhaSoftmax"}
    return {name for name, target in calls.items() if target in text}


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_programs_of_accelerators_hold_their_kernel(causal, gradient):
    of = partial(program, dtype=jnp.bfloat16, causal=causal, gradient=gradient)
    assert kernels_in(of("tpu")) == {"splash"}
    assert kernels_in(of("cuda")) == {"cudnn"}
    assert ("fmhaSoftmaxBackward" in of("cuda")) == gradient
    assert kernels_in(of("cpu")) == kernels_in(of("rocm")) == set()


@pytest.mark.usefixtures("with_cudnn")
def test_programs_hold_no_kernel_that_cannot_say_what_is_asked():
    """Float32 stays exact, and parts are no mask of either kernel."""
    for platform in ("tpu", "cuda"):
        assert kernels_in(program(platform, jnp.float32)) == set()
        assert kernels_in(program(platform, jnp.bfloat16, parts=True)) == set()
    assert kernels_in(program("tpu", jnp.float16)) == set()
    assert kernels_in(program("cuda", jnp.float16)) == {"cudnn"}
    # cuDNN wants widths that are a multiple of 8.
    assert kernels_in(program("cuda", jnp.bfloat16, width=12)) == set()
