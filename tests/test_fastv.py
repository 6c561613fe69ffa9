"""FastV against the text of its paper in NumPy, alone and with DyCoke's cache stage behind it."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoding import chosen_of, ragged_prompts, random_model, run_steps
from support.reference import Qwen2, kept_of

from dycoke_jax import DyCoke
from dycoke_jax.compression.dycoke import DyCokeKV
from dycoke_jax.compression.fastv import FastV
from dycoke_jax.compression.protocol import Compression, PromptStage, combine
from dycoke_jax.errors import ConfigError
from dycoke_jax.generation.layout import group_layers

LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=3)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    visual=st.sampled_from([1, 7, 24]),
    lengths=LENGTHS,
    first=st.integers(1, 2),
    r=st.sampled_from([0.0, 0.3, 0.5, 0.8]),
    pruned=st.booleans(),
)
def test_equals_the_text_of_the_paper(seed, visual, lengths, first, r, pruned):
    """Logits and what is attended to, of every row, whatever it is batched with."""
    model = random_model(seed % 5)
    text, segment, slots, alone = ragged_prompts(model, seed, lengths, visual)
    method = FastV(first, r)
    behind = {"layer": 3, "p": 0.5} if pruned else {}
    if pruned:
        method = combine(method, DyCokeKV(**behind))
    fed = np.random.default_rng(seed).integers(0, 64, (5, len(lengths)))
    logits, _, states = run_steps(model, text, segment, slots, method, fed)
    plain = Qwen2(model.config.text, model.params)
    for row, (prefix, _) in enumerate(lengths):
        candidates = list(range(prefix, prefix + visual))
        wanted, seen = plain.generate_dropping(
            alone[row], candidates, fed[:, row], first=first, r=r, **behind
        )
        np.testing.assert_allclose(logits[:, row], wanted[1:], atol=2e-3)
        for index, state in enumerate(states):
            assert {prefix + place for place in chosen_of(state, row)} == seen[index]
            assert int(state.views[-1].attended()[row]) == len(seen[index])


def test_layers_are_grouped_where_stages_act():
    model = random_model(0)
    slots = ragged_prompts(model, 0, [(2, 3)], 20)[2]
    both = combine(FastV(1, 0.5), DyCokeKV(layer=3))
    groups = {
        "plain": group_layers(4, slots, Compression()),
        "dycoke": group_layers(4, slots, DyCoke(layer=2).stages),
        "fastv": group_layers(4, slots, FastV(1, 0.5).stages),
        "both": group_layers(4, slots, both),
    }
    layers = {name: [(g.first, g.stop, g.slots.visual) for g in of] for name, of in groups.items()}
    assert layers == {
        "plain": [(0, 4, 20)],
        "dycoke": [(0, 2, 20), (2, 4, 20)],
        "fastv": [(0, 1, 20), (1, 4, 10)],
        "both": [(0, 1, 20), (1, 3, 10), (3, 4, 10)],
    }


def test_later_layers_hold_no_dropped_keys():
    """Counted in bytes: the caches from the layer on are as small as what they hold."""
    model = random_model(1)
    text, segment, slots, _ = ragged_prompts(model, 7, [(3, 5)], 20)
    state = run_steps(model, text, segment, slots, FastV(1, 0.75), [[1]])[2][0]
    sizes = [[cache.keys.nbytes + cache.values.nbytes for cache in v.caches] for v in state.views]
    slot = 2 * model.config.text.num_kv_heads * model.config.text.head_dim * 4
    text_slots = slots.prefix + slots.question + slots.generated
    assert sizes == [[slot * (20 + text_slots)], [slot * (5 + text_slots)] * 3]


def test_newlines_go_on_and_do_not_compete():
    model = random_model(3)
    text, segment, slots, _ = ragged_prompts(model, 5, [(4, 4)], 12)
    newline, gone = np.zeros((1, 12), bool), np.zeros((1, 12), bool)
    newline[0, [3, 7, 11]] = True
    gone[0, 7] = True  # a newline whose row has no token
    segment = segment._replace(valid=jnp.asarray(~gone), is_visual=jnp.asarray(~newline))
    slots = slots.__class__(6, 12, 9, 16, newlines=3)
    _, _, states = run_steps(model, text, segment, slots, FastV(2, 0.5), [[1]])
    view = states[0].views[-1]
    assert int(view.attended()[0]) == kept_of(9, 0.5) == 4
    # Prefix and question of 4 tokens each, 2 newlines, 4 visual tokens, and the current token.
    assert int(view.visible[0].sum()) == 8 + 2 + 4 + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": 0}, r"FastV: layer is 0; it must lie in 1\.\.layers-1"),
        ({"r": 1.0}, r"FastV: r is 1.0; it must lie in \[0, 1\)"),
    ],
    ids=["layer", "r"],
)
def test_settings_outside_their_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        FastV(**settings)


def test_stages_that_cannot_work_together():
    config = random_model(0).config
    assert isinstance(FastV(), PromptStage)
    with pytest.raises(ConfigError, match=r"FastV: layer is 4; with 4 layers"):
        FastV(4).stages.check(config, 8)
    with pytest.raises(ConfigError, match="from layer 2 on; it must be a layer above 2"):
        combine(FastV(2), DyCokeKV(layer=2)).check(config, 8)
    with pytest.raises(ConfigError, match="cannot be combined: both act inside prefill"):
        combine(FastV(1), FastV(2))
