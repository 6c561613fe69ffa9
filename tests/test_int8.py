"""Weights and key/value caches as int8, against plain NumPy and against float32."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.command_line import run_main
from support.tiny import tiny_model, video

from dycoke_jax import Decoding, DyCoke, LlavaVideo, demo
from dycoke_jax.assets import TINY
from dycoke_jax.cache import KV
from dycoke_jax.checkpoint import convert, export, load_params, open_folder
from dycoke_jax.engine import batch
from dycoke_jax.engine.requests import Request
from dycoke_jax.errors import CheckpointError, ConfigError
from dycoke_jax.models.quantisation import can_be_int8, is_int8, quantised, scale_path
from dycoke_jax.ops.attention import _read_then_write, decode_attention
from dycoke_jax.ops.matmul import Int8Weight, matmul, quantise, take_rows
from dycoke_jax.training.step import Optimisation, start


def plain_int8(x):
    """Integers and scales of the last axis, in float64."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(-1) / 127
    return np.rint(x / scale[..., None]), scale


def int8_weight(weight):
    return Int8Weight(*map(jnp.asarray, quantise(weight)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("rows", "width", "channels"),
    [(1, 64, 40), (1, 50, 7), (3, 608, 33), (8, 112, 9), (9, 64, 40), (40, 48, 5), (2, 32, 8210)],
    ids="{}".format,
)
def test_a_product_is_that_of_the_quantised_matrix(rows, width, channels, dtype):
    rng = np.random.default_rng(rows * width + channels)
    weight = rng.standard_normal((channels, width), np.float32)
    x = jnp.asarray(rng.standard_normal((rows, width)), dtype)
    integers, scale = plain_int8(weight)
    exact = np.asarray(x, np.float64) @ (integers * scale[:, None]).T
    wide = matmul(x, int8_weight(weight), jnp.float32)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, exact, rtol=0, atol=2e-6 * np.abs(exact).max())
    out = matmul(x.reshape(1, rows, width), int8_weight(weight))
    assert out.dtype == x.dtype
    assert out.shape == (1, rows, channels)
    np.testing.assert_array_equal(out[0], wide.astype(dtype))


def test_no_weight_is_off_by_more_than_half_a_step():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5000, 24), np.float32) * np.logspace(-42, 30, 5000)[:, None]
    weight = weight.astype(np.float32)
    weight[7] = 0
    values, scale = quantise(weight)
    error = np.abs(weight.astype(np.float64) - values * scale[:, None].astype(np.float64))
    assert (error <= scale[:, None] / 2 * (1 + 1e-5)).all()
    assert (np.abs(values[scale > 1e-36]).max(1)[values[scale > 1e-36].any(1)] == 127).all()
    assert not values[7].any()
    assert (scale > 0).all()


def test_ties_are_rounded_to_even_and_the_largest_weight_is_127():
    weight = np.array([[-127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], np.float32)
    values, scale = quantise(weight)
    np.testing.assert_array_equal(values, [[-127, 0, 2, 2, 0, -2, -2, 126]])
    np.testing.assert_array_equal(scale, [1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_no_number_spoils_its_channel_as_it_does_in_float32(bad):
    weight = np.ones((2, 16), np.float32)
    weight[1, 3] = bad
    out = matmul(jnp.ones((1, 16)), int8_weight(weight))
    assert np.isfinite(out[0, 0])
    assert not np.isfinite(out[0, 1])


def test_rows_of_an_embedding():
    weight = np.random.default_rng(1).standard_normal((20, 8), np.float32)
    integers, scale = plain_int8(weight)
    ids = jnp.array([[3, 19], [0, 3]])
    rows = take_rows(int8_weight(weight), ids, jnp.float32)
    np.testing.assert_allclose(rows, (integers * scale[:, None])[np.asarray(ids)], rtol=1e-6)


def kv(seed, slots=6):
    rng = np.random.default_rng(seed)
    return KV(*map(jnp.asarray, rng.standard_normal((2, 2, 3, slots, 8), np.float32)))


CHOSEN = jnp.array([[4, 0, 1], [2, 2, 5]])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda cache, _: cache.part(1, 4), id="part"),
        pytest.param(lambda cache, _: cache.take(CHOSEN), id="take"),
        pytest.param(lambda cache, new: KV.join([cache, new, cache]), id="join"),
        pytest.param(lambda cache, new: cache.write(new.part(0, 2), 3), id="write"),
    ],
)
def test_changing_an_int8_cache_is_changing_the_cache_before_it_is_int8(change):
    cache, new = kv(0), kv(1)
    for one, other in zip(
        jax.tree.leaves(change(cache.int8(), new.int8())),
        jax.tree.leaves(change(cache, new).int8()),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_an_int8_cache_quantises_what_is_written_and_is_padded_with_empty_slots():
    cache, new = kv(0).int8(), kv(1, slots=1)
    written = cache.pad(2).write(new, jnp.int32(6))
    assert written.slots == 8
    for x, of_cache, of_new in zip(written, cache, new, strict=True):
        integers, scale = plain_int8(of_new)
        np.testing.assert_array_equal(x.values[:, :, 6:7], integers)
        np.testing.assert_allclose(x.scale[:, :, 6:7], scale, rtol=1e-6)
        np.testing.assert_array_equal(x.values[:, :, :6], of_cache.values)
        assert x.values.dtype == jnp.int8
        assert not x.values[:, :, 7].any()


@pytest.mark.parametrize("form", [decode_attention, _read_then_write], ids=["default", "tpu"])
def test_attention_to_an_int8_cache_is_that_to_its_numbers(form):
    rng = np.random.default_rng(2)
    cache, q = kv(3), rng.standard_normal((2, 6, 1, 8), np.float32)
    visible = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 0, 0]], bool)
    own = cache.part(2, 3).int8()
    stored = cache.write(KV(cache.keys[:, :, :1] + 5, cache.values[:, :, :1]), 2).int8()
    out, weights, _ = form(jnp.asarray(q), stored, own, 2, jnp.asarray(visible))
    k, v = (np.repeat(x[0] * x[1][..., None], 2, axis=1) for x in map(plain_int8, cache))
    scores = np.einsum("bhqe,bhse->bhs", q, k) * 8**-0.5
    expected = np.where(visible[:, None], np.exp(scores), 0)
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(
        out[:, :, 0], np.einsum("bhs,bhse->bhe", expected, v), rtol=2e-5, atol=1e-6
    )


def as_int8(llava, form):
    """The same model with weights, caches or both as int8."""
    params = llava.params
    if "weights" in form:
        host = {path: np.asarray(weight) for path, weight in params.items()}
        params = {path: jnp.asarray(x) for path, x in quantised(host.items())}
    model = replace(llava.model, params=params, kv="int8" if "kv" in form else None)
    other = LlavaVideo(model, llava.tokenizer)
    other.stop_ids = llava.stop_ids
    return other


@cache
def shipped():
    """The shipped model, with questions on made-up clips of its task."""
    llava = LlavaVideo.from_pretrained(TINY)
    made_up = demo.made_up(llava.config.vision.image_size)
    return llava, [(one.video, one.question) for one in made_up[:8]]


@cache
def random():
    """A model with random weights, with questions on random clips."""
    return tiny_model(), [(video(seed, 8), f"What is {seed}?") for seed in range(4)]


FORMS = ("weights", "kv", "weights and kv")
COMPRESSION = DyCoke(layer=2, p=0.5)


@pytest.mark.parametrize("form", FORMS)
# Random weights give nearly even logits: of 320 tokens the best two are often closer than rounding.
@pytest.mark.parametrize(
    ("of", "least"), [(shipped, 0.95), (random, 0.9)], ids=["shipped", "random"]
)
def test_most_greedy_tokens_are_those_of_float32(of, least, form, monkeypatch):
    llava, asked = of()
    requests = [llava.prepare(Request(text, frames)) for frames, text in asked]
    answers = [
        answer.token_ids
        for answer in llava.generate(
            [frames for frames, _ in asked],
            [text for _, text in asked],
            compression=COMPRESSION,
            decoding=Decoding(max_new_tokens=32),
        )
    ]
    found, score = [], batch.score
    monkeypatch.setattr(batch, "score", lambda *a, **kw: found.append(score(*a, **kw)) or found[-1])
    batch.score_batch(as_int8(llava, form).model, requests, answers, COMPRESSION)
    same = [found[0].is_likeliest[row, : len(ids)] for row, ids in enumerate(answers)]
    same = np.concatenate(same)
    assert same.size >= 32
    assert same.mean() >= least


def test_rows_of_a_batch_are_answered_as_alone_and_nothing_is_compiled_anew(compilations):
    llava, asked = random()
    llava = as_int8(llava, "weights and kv")
    settings = {"compression": COMPRESSION, "decoding": Decoding(max_new_tokens=12)}
    clips, texts = zip(*asked, strict=True)
    together = llava.generate(clips, texts, **settings)
    alone = [llava.generate([clip], [text], **settings)[0] for clip, text in asked]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert len({a.token_ids for a in together}) > 1
    before = compilations()
    llava.generate(clips[::-1], texts, **settings)
    llava.generate(clips[1:2], texts[:1], **settings)
    assert compilations() == before


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "tiny"
    convert(TINY, folder, weights="int8")
    return folder


def assert_same(a, b):
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_a_converted_folder_loads_as_what_loading_quantises(int8_folder, tmp_path):
    stored = load_params(open_folder(int8_folder))
    assert_same(stored, load_params(open_folder(TINY), weights="int8"))
    assert_same(stored, load_params(open_folder(int8_folder), weights="int8"))
    convert(TINY, tmp_path / "orbax")
    assert_same(stored, load_params(open_folder(tmp_path / "orbax"), weights="int8"))
    convert(int8_folder, tmp_path / "again")
    assert_same(stored, load_params(open_folder(tmp_path / "again")))
    source = load_params(open_folder(TINY))
    for path, weight in source.items():
        if can_be_int8(path):
            _, scale = plain_int8(weight)
            np.testing.assert_allclose(stored[scale_path(path)], scale, rtol=1e-6)
            steps = np.asarray(weight, np.float64) / scale[:, None]
            assert np.abs(steps - stored[path]).max() <= 0.5 + 1e-4
        else:
            np.testing.assert_array_equal(stored[path], weight)


def test_another_dtype_leaves_int8_and_scales_as_they_are(int8_folder):
    llava = LlavaVideo.from_pretrained(int8_folder, dtype="bfloat16")
    assert llava.model.dtype == "bfloat16"
    stored = load_params(open_folder(int8_folder))
    for path, weight in llava.params.items():
        if can_be_int8(path) or path.endswith("_scale"):
            assert weight.dtype == stored[path].dtype
            np.testing.assert_array_equal(weight, stored[path])
        else:
            assert weight.dtype == jnp.bfloat16
    assert LlavaVideo.from_pretrained(int8_folder).model.dtype == "float32"


def test_int8_takes_a_quarter_of_the_bytes():
    llava, asked = random()
    both = as_int8(llava, "weights and kv")

    def matrices(llava):
        paths = [path for path in llava.params if can_be_int8(path.removesuffix("_scale"))]
        return sum(llava.params[path].nbytes for path in paths)

    # A scale has 4 bytes for a row of at least 48 weights.
    assert 1 / 4 < matrices(both) / matrices(llava) < 1 / 4 + 1 / 48
    sizes = {}
    for name, one in (("float32", llava), ("int8", both)):
        states = []
        request = one.prepare(Request(asked[0][1], asked[0][0], Decoding(1)))
        next(batch.run_batch(one.model, [request], COMPRESSION, (), observe=states.append))
        caches = [view.caches for view in states[0].views] + [states[0].views[-1].memory.caches]
        sizes[name] = sum(x.nbytes for x in jax.tree.leaves(caches))
    # A scale has 4 bytes for a head of 12 numbers.
    assert sizes["int8"] / sizes["float32"] == pytest.approx((12 + 4) / 48)


def test_what_int8_cannot_do_is_refused_in_one_line(int8_folder, tmp_path, unchecked_types):
    with pytest.raises(CheckpointError, match="int8 weights, which the llava-hf layout") as info:
        export(int8_folder, tmp_path / "hf")
    assert "\n" not in str(info.value)
    assert not (tmp_path / "hf").exists()
    llava = LlavaVideo.from_pretrained(int8_folder)
    assert is_int8(llava.params)
    with pytest.raises(ConfigError, match="int8 weights cannot be trained"):
        start(Optimisation(steps=1), llava.model)
    for setting in ("weights", "kv"):
        with pytest.raises(ConfigError, match=f"{setting} is 'int4'; it must be int8 or None"):
            LlavaVideo.from_pretrained(TINY, **{setting: "int4"})


def test_the_command_line_converts_to_int8_and_uses_it(tmp_path):
    code, _, err = run_main("convert", TINY, tmp_path / "int8", "--weights", "int8")
    assert code == 0, err
    assert is_int8(load_params(open_folder(tmp_path / "int8")))
    llava_hf = "--to", "llava-hf", "--weights", "int8"
    code, _, err = run_main("convert", TINY, tmp_path / "hf", *llava_hf)
    assert code == 2
    assert err == "error: the layout llava-hf has no int8 weights; use --to orbax\n"
