"""KV pruning while decoding: the authors' results, the paper's text, rows on their own."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.reference import Qwen2, kept_of

from dycoke_jax import DyCoke
from dycoke_jax.cache import Slots
from dycoke_jax.compression.kv_pruning import MaskedCache, OneShot, WorkingSet
from dycoke_jax.config import LlavaConfig, TextConfig, VisionConfig
from dycoke_jax.generation.assemble import TextIds, Visual
from dycoke_jax.generation.decode import decode_step
from dycoke_jax.generation.prefill import last_attention, read_prompt, start
from dycoke_jax.generation.state import Limits, take_token
from dycoke_jax.generation.walk import walk_prompt
from dycoke_jax.model import Model
from dycoke_jax.models.llava import random_params

PREFIX, QUESTION = 6, 9
"""Text slots of a prompt. Rows fill some of them; one size for all tests saves compilations."""
NO_VISION = VisionConfig(8, 8, 1, 1, patch_size=14, image_size=56)
step = jax.jit(
    lambda model, state, pruning, slots: decode_step(model.bind(), state, pruning, slots),
    static_argnums=(2, 3),
)


@functools.partial(jax.jit, static_argnames=("pruning", "generated"))
def read(model, visual, text, pruning, generated):
    """The state before the first token, of prompts that may have empty slots."""
    network = model.bind()
    prompt = read_prompt(network, visual, text)
    slots = slice(text.prefix.shape[1], text.prefix.shape[1] + visual.valid.shape[1])
    last = slots.stop + text.question_length - 1
    scores = last_attention(network, prompt, pruning.layer - 1, last)[:, :, slots].mean(1)
    rows = text.prefix.shape[0]
    return start(
        prompt.caches, prompt.valid, visual, None, scores, limits(rows), pruning, generated
    )


def limits(rows):
    return Limits(jnp.full(rows, 1000), jnp.full((rows, 1), -1))


def no_scores(segment):
    return jnp.zeros(segment.valid.shape)


@pytest.mark.parametrize("case", ["flat", "layer1_p90", "peaky"])
def test_official_equals_the_authors_code(golden, case):
    data = np.load(golden / f"kv_{case}.npz")
    meta = json.loads(str(data["meta"]))
    c = meta["config"]
    text = TextConfig(
        c["vocab_size"], c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"],
        c["num_attention_heads"], c["num_key_value_heads"],
        c["hidden_size"] // c["num_attention_heads"], c["tie_word_embeddings"],
    )  # fmt: skip
    config = LlavaConfig(NO_VISION, text)
    weights = load_file(golden / f"kv_{case}-1.safetensors")
    weights |= load_file(golden / f"kv_{case}-2.safetensors")
    renamed = {n.replace("model.", "language_model.", 1): w for n, w in weights.items()}
    renamed["lm_head.weight"] = weights["lm_head.weight"]
    params = random_params(config) | renamed

    # The published code's candidates leave out the last visual token, which ours include.
    begin, visual = meta["image_token_start_index"], meta["image_token_length"] + 1
    prompt, steps = meta["total_prompt"], meta["steps"]
    slots = Slots(begin, visual, prompt - begin - visual, steps + 1)
    method = DyCoke(layer=meta["prune_layer"], p=meta["prune_ratio"], mode="official")
    pruning = method.decode_pruning(slots, visual)
    assert isinstance(pruning, MaskedCache)

    embeds = jnp.asarray(data["inputs_embeds"])[None]
    everything = jnp.ones((1, prompt), bool)
    model = Model(params, config)
    network = model.bind()
    x, caches, _ = jax.jit(functools.partial(walk_prompt, network.language_model))(
        embeds, jnp.arange(prompt)[None], everything
    )
    np.testing.assert_allclose(network.logits(x)[0, -4:], data["prefill_logits"], atol=1e-3)
    all_visual = jnp.ones((1, visual), bool)
    segment = Visual(embeds[:, slots.visual_range], all_visual, all_visual)
    state = start(
        caches, everything, segment, None, no_scores(segment), limits(1), pruning, steps + 1
    )
    kept = np.split(data["kept_indices"], np.cumsum(data["kept_lengths"])[:-1])
    for index in range(steps):
        state = take_token(state, jnp.array([int(data["fed_tokens"][index])]), limits(1))
        logits, state = step(model, state, pruning, slots)
        np.testing.assert_allclose(logits[0], data["step_logits"][index + 1], atol=1e-3)
        np.testing.assert_allclose(state.pruned.similarity, data["similarity"][index], atol=1e-4)
        assert bool(state.pruned.refreshed[0]) == bool(data["refreshed"][index])
        np.testing.assert_array_equal(np.flatnonzero(state.pruned.visible[0]), kept[index])


def random_model(seed, layers=4, scale=8.0):
    """Weights large enough that attention is uneven and changes from step to step."""
    text = TextConfig(64, 32, 48, layers, 4, 2, 8, tie_word_embeddings=True)
    config = LlavaConfig(NO_VISION, text)
    params = random_params(config, seed)
    scaled = {n: w * scale if w.ndim == 2 else w for n, w in params.items()}
    return Model(scaled, config)


def ragged_prompts(model, seed, lengths, visual):
    """Rows (prefix, question) of different lengths around ``visual`` random visual embeddings."""
    rng = np.random.default_rng(seed)
    rows = len(lengths)
    text = TextIds(
        rng.integers(0, 64, (rows, PREFIX)),
        np.array([prefix for prefix, _ in lengths]),
        rng.integers(0, 64, (rows, QUESTION)),
        np.array([question for _, question in lengths]),
    )
    embeds = rng.normal(size=(rows, visual, model.config.text.hidden_size)).astype(np.float32)
    all_visual = jnp.ones((rows, visual), bool)
    table = np.asarray(model.params["language_model.embed_tokens.weight"])
    alone = [
        np.concatenate([table[text.prefix[row, :p]], embeds[row], table[text.question[row, :q]]])
        for row, (p, q) in enumerate(lengths)
    ]
    slots = Slots(PREFIX, visual, QUESTION, 16)
    text = TextIds(*map(jnp.asarray, text))
    return text, Visual(jnp.asarray(embeds), all_visual, all_visual), slots, alone


def run_steps(model, text, visual, slots, pruning, fed):
    """Logits [steps, B, L], refreshed [steps, B] and the states of feeding given tokens."""
    state, rows = read(model, visual, text, pruning, slots.generated), len(text.prefix)
    logits, refreshed, states = [], [], []
    for tokens in fed:
        state = take_token(state, jnp.asarray(tokens, jnp.int32), limits(rows))
        out, state = step(model, state, pruning, slots)
        logits.append(np.asarray(out))
        refreshed.append(np.asarray(state.pruned.refreshed))
        states.append(state)
    return np.stack(logits), np.stack(refreshed), states


@settings(max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    visual=st.integers(1, 24),
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=3),
    layer=st.integers(1, 3),
    p=st.sampled_from([0.3, 0.5, 0.7, 0.9]),
)
def test_paper_equals_the_text_of_the_paper(seed, visual, lengths, layer, p):
    model = random_model(seed % 5)
    text, segment, slots, alone = ragged_prompts(model, seed, lengths, visual)
    pruning = DyCoke(layer=layer, p=p).decode_pruning(slots, visual)
    assert isinstance(pruning, WorkingSet)
    fed = np.random.default_rng(seed).integers(0, 64, (6, len(lengths)))
    logits, refreshed, states = run_steps(model, text, segment, slots, pruning, fed)
    plain = Qwen2(model.config.text, model.params)
    for row, (prefix, _) in enumerate(lengths):
        candidates = list(range(prefix, prefix + visual))
        wanted, kept, refreshes = plain.generate(
            alone[row], candidates, fed[:, row], layer=layer, p=p
        )
        np.testing.assert_array_equal(refreshed[:, row], refreshes)
        np.testing.assert_allclose(logits[:, row], wanted[1:], atol=2e-3)
        for index, state in enumerate(states):
            chosen = {prefix + int(place) for place in state.pruned.chosen[row]}
            assert chosen == kept[index]
            assert int(state.pruned.attended[row]) == len(chosen) == kept_of(visual, p)


@settings(max_examples=5)
@given(
    seed=st.integers(0, 10_000),
    visual=st.integers(1, 24),
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=3),
    layer=st.integers(1, 3),
    p=st.sampled_from([0.3, 0.7]),
)
def test_dropping_lets_the_last_token_of_the_prompt_choose_once(seed, visual, lengths, layer, p):
    model = random_model(seed % 5)
    text, segment, slots, alone = ragged_prompts(model, seed, lengths, visual)
    pruning = DyCoke(layer=layer, p=p, parked="drop").decode_pruning(slots, visual)
    assert isinstance(pruning, OneShot)
    fed = np.random.default_rng(seed).integers(0, 64, (4, len(lengths)))
    logits, refreshed, states = run_steps(model, text, segment, slots, pruning, fed)
    assert not refreshed.any()
    plain = Qwen2(model.config.text, model.params)
    for row, (prefix, _) in enumerate(lengths):
        candidates = list(range(prefix, prefix + visual))
        wanted, kept, _ = plain.generate(
            alone[row], candidates, fed[:, row], layer=layer, p=p, one_shot=True
        )
        np.testing.assert_allclose(logits[:, row], wanted[1:], atol=2e-3)
        for index, state in enumerate(states):
            places = np.flatnonzero(state.pruned.chosen_slots()[row])
            chosen = {prefix + int(place) for place in places}
            assert chosen == kept[index]
            assert int(state.pruned.attended[row]) == len(chosen) == kept_of(visual, p)


def test_dropping_holds_no_second_copy_of_the_visual_cache():
    """Counted in bytes: later layers hold the chosen slots and the text, nothing beside."""
    model = random_model(1)
    text, segment, slots, _ = ragged_prompts(model, 7, [(3, 5)], 20)
    sizes = {}
    for parked in ("device", "drop"):
        pruning = DyCoke(layer=2, p=0.6, parked=parked).decode_pruning(slots, 20)
        state = run_steps(model, text, segment, slots, pruning, [[1]])[2][0]
        sizes[parked] = sum(x.nbytes for x in jax.tree.leaves(state.pruned) if x.ndim == 4)
    slot = (
        2 * 2 * model.config.text.num_kv_heads * model.config.text.head_dim * 4
    )  # two layers, keys, values
    assert sizes["drop"] == slot * (8 + slots.prefix + slots.question + slots.generated)
    assert sizes["device"] == sizes["drop"] + slot * 20


def test_working_set_equals_a_masked_full_cache():
    """The compact buffers hold exactly what hiding the other slots of the full cache shows."""
    model = random_model(1)
    lengths = [(3, 5), (6, 2), (1, 9)]
    text, segment, slots, _ = ragged_prompts(model, 7, lengths, 20)
    compact = DyCoke(layer=2, p=0.6).decode_pruning(slots, 20)
    fed = np.random.default_rng(0).integers(0, 64, (12, 3))
    logits, refreshed, states = run_steps(model, text, segment, slots, compact, fed)
    assert refreshed[0].all()
    assert 0 < refreshed[1:].mean() < 1, "the case must hold steps of both kinds"

    # The same choices on a full cache, where a mask hides what was not chosen.
    masked = ReplayedMask(2, slots, np.stack([s.pruned.chosen for s in states]))
    state = read(model, segment, text, masked, slots.generated)
    for index, tokens in enumerate(fed):
        state = take_token(state, jnp.asarray(tokens, jnp.int32), limits(3))
        out, state = step(model, state, masked, slots)
        np.testing.assert_allclose(out, logits[index], atol=1e-4)


class ReplayedMask:
    """A full cache whose hidden slots follow a list of kept sets."""

    def __init__(self, layer, slots, chosen):
        self.layer, self.slots, self.chosen = layer, slots, chosen
        self.inner = MaskedCache(layer, 0, 0.9, slots)

    def start(self, caches, valid, is_visual, scores):
        return self.inner.start(caches, valid, is_visual, scores)

    def update(self, state, scores, step, active):
        state = self.inner.update(state, scores, step, active)
        rows = jnp.arange(state.is_visual.shape[0])[:, None]
        chosen = jnp.asarray(self.chosen)[step]
        of_chosen = jnp.zeros(state.is_visual.shape, bool).at[rows, chosen].set(True)
        visual = self.slots.visual_range
        valid = state.valid
        visible = valid.at[:, visual].set(valid[:, visual] & of_chosen)
        return replace(state, visible=visible)


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_rows_of_a_batch_do_not_mix(mode):
    """Each row has its own scores, gate and state, whatever the others do."""
    model = random_model(2)
    lengths = [(2, 4), (5, 7), (3, 1)]
    text, segment, slots, _ = ragged_prompts(model, 3, lengths, 15)
    pruning = DyCoke(layer=2, p=0.7, mode=mode).decode_pruning(slots, 15)
    fed = np.random.default_rng(4).integers(0, 64, (12, 3))
    logits, refreshed, _ = run_steps(model, text, segment, slots, pruning, fed)
    assert (refreshed.any(1) & ~refreshed.all(1)).any(), "rows must differ in when they refresh"
    for row in range(3):
        one = slice(row, row + 1)
        alone = run_steps(
            model,
            TextIds(*(array[one] for array in text)),
            Visual(*(array[one] for array in segment)),
            slots,
            pruning,
            fed[:, one],
        )
        np.testing.assert_array_equal(alone[1][:, 0], refreshed[:, row])
        np.testing.assert_allclose(alone[0][:, 0], logits[:, row], atol=1e-4)


def test_newlines_stay_and_do_not_compete():
    """Protected slots are attended to besides the kept ones, and empty ones stay hidden."""
    model = random_model(3)
    text, segment, slots, _ = ragged_prompts(model, 5, [(4, 4)], 12)
    newline = np.zeros((1, 12), bool)
    newline[0, [3, 7, 11]] = True
    gone = np.zeros((1, 12), bool)
    gone[0, 7] = True
    segment = segment._replace(valid=jnp.asarray(~gone), is_visual=jnp.asarray(~newline))
    pruning = DyCoke(layer=2, p=0.5).decode_pruning(slots, 9)
    assert (pruning.kept, pruning.protected) == (4, 3)
    _, _, states = run_steps(model, text, segment, slots, pruning, [[1]])
    pruned = states[0].pruned
    assert set(np.flatnonzero(newline)) <= set(pruned.chosen[0].tolist())
    assert int(pruned.attended[0]) == 4
    assert int(pruned.visible[0, : 4 + 3].sum()) == 4 + 2
