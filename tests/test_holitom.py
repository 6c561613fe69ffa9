"""HoliTom against its steps written as loops: segments, clusters, and the merge inside prefill."""

from decimal import Decimal
from fractions import Fraction
from itertools import combinations, pairwise

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decoding import chosen_of, ragged_prompts, random_model, run_steps
from support.reference import Qwen2, cosine, kept_of

from dycoke_jax.compression.clustering import density_peaks
from dycoke_jax.compression.dycoke import DyCokeKV
from dycoke_jax.compression.holitom import HoliTom, HoliTomMerge, HoliTomTokens, _best_division
from dycoke_jax.compression.methods import described
from dycoke_jax.compression.protocol import Compression, PromptStage, Signal, TokenStage, combine
from dycoke_jax.errors import ConfigError

PROGRAMS = {}


def select(stage, features, attention, frames=None):
    """Compiled once for all tests of the same settings: compiling takes most of the time."""
    if stage not in PROGRAMS:
        PROGRAMS[stage] = jax.jit(stage.select)
    if frames is None:
        frames = [features.shape[1]] * len(features)
    rows = PROGRAMS[stage](features, np.asarray(frames, np.int32), (attention,))
    return jax.tree.map(np.asarray, rows)


def clip(seed, frames, tokens, width=16, *, still=False):
    """Features and attention of a clip with cuts, places that stand still, and identical tokens."""
    random = np.random.default_rng(seed)
    features, scene = np.zeros((frames, tokens, width)), None
    for frame in range(frames):
        if scene is None or (not still and random.random() < 0.3):
            scene = random.normal(size=(tokens, width))[random.integers(0, tokens, tokens)]
        elif not still:
            moved = random.random(tokens) < random.choice([0, 0.1, 0.4])
            scene = np.where(moved[:, None], random.normal(size=scene.shape), scene)
        noise = 0 if still else random.choice([0, 0.05])
        features[frame] = scene + noise * random.normal(size=scene.shape)
    attention = random.integers(1, 2 if still else tokens, (frames, tokens)) / tokens
    return np.float32(features), np.float32(attention)


def clips(seed, rows, *sizes, **kinds):
    of_clips = [clip(seed + row, *sizes, **kinds) for row in range(rows)]
    return [np.stack(each) for each in zip(*of_clips, strict=True)]


def divided(still):
    """The best division, by trying all: pairs (first, last) of segments. still: [F-1, N]."""
    frames, best = len(still) + 1, None
    for cuts in (c for n in range(frames) for c in combinations(range(1, frames), n)):
        segments = [(a, b - 1) for a, b in pairwise([0, *cuts, frames])]
        worth = sum((b - a) * int(still[a:b].all(0).sum()) for a, b in segments if b > a)
        lengths = [b - a for a, b in reversed(segments)]
        if best is None or (-worth, lengths) < best[:2]:
            best = (-worth, lengths, segments)
    return best[2]


def clustered(vectors, count, neighbours=7):
    """Centres, and the members of each besides itself."""
    if count == 0:
        return {}
    vectors = np.float64(vectors)
    squared = ((vectors[:, None] - vectors) ** 2).sum(-1)
    k, points = min(neighbours, count), range(len(vectors))
    density = [np.sort(row)[:k].sum() / k / vectors.shape[1] for row in squared]
    score = []
    for i in points:
        denser = [squared[i, j] for j in points if (density[j], j) < (density[i], i)]
        distance = min(denser) if denser else squared.max()
        score.append(np.exp(-density[i]) * np.sqrt(distance / vectors.shape[1]))
    centres = sorted(sorted(points, key=lambda i: -score[i])[:count])
    members = {centre: [] for centre in centres}
    for i in set(points) - {*centres}:
        members[min(centres, key=lambda centre: squared[i, centre])].append(i)
    return members


def shared(sizes, budget):
    """Equal shares of groups of these sizes in whole numbers, whose sum is the budget."""
    parts = [Fraction(size * budget, sum(sizes)) for size in sizes]
    whole = [int(part) for part in parts]
    most_lost = sorted(range(len(sizes)), key=lambda group: whole[group] - parts[group])
    for group in most_lost[: budget - sum(whole)]:
        whole[group] += 1
    return whole


def holitom(stage, features, attention):
    """The steps before the language model on one clip: places [M] and embeddings [M, D]."""
    features = np.float64(features)
    frames, tokens, _ = features.shape
    still = np.array(
        [
            [cosine(a, b) > stage.threshold for a, b in zip(x, y, strict=True)]
            for x, y in pairwise(features)
        ]
    ).reshape(frames - 1, tokens)
    dynamic, static = [[] for _ in range(frames)], []
    for first, last in divided(still):
        is_static = still[first:last].all(0) & (last > first)
        for frame in range(first, last + 1):
            dynamic[frame] = np.flatnonzero(~is_static).tolist()
        if last > first:
            static.append((first, last, np.flatnonzero(is_static)))
    sizes = [*map(len, dynamic), *(len(places) for *_, places in static)]
    budget = max(1, int(Decimal(str(stage.budget)) * frames * tokens))
    quotas = shared(sizes, min(budget, sum(sizes)))
    rows = {}
    for frame in range(frames):
        best = sorted(dynamic[frame], key=lambda n: -attention[frame, n])
        rows |= {frame * tokens + n: features[frame, n] for n in best[: quotas[frame]]}
    for (first, last, places), count in zip(static, quotas[frames:], strict=True):
        means = features[first : last + 1, places].mean(0)
        for centre, members in clustered(means, count).items():
            value = means[centre]
            if members:
                value = stage.beta * value + (1 - stage.beta) * means[members].mean(0)
            rows[first * tokens + places[centre]] = value
    places = sorted(rows)
    return np.array(places), np.array([rows[place] for place in places])


def assert_row(rows, index, places, embeds, atol=1e-5):
    """Row ``index`` holds these tokens first, and all that follow are empty."""
    count = len(places)
    np.testing.assert_array_equal(rows.valid[index], np.arange(rows.valid.shape[1]) < count)
    np.testing.assert_array_equal(rows.places[index, :count], places)
    np.testing.assert_allclose(rows.embeds[index, :count], embeds, rtol=0, atol=atol)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), ints=st.booleans(), count=st.integers(0, 14))
def test_clusters_equal_density_peaks_written_as_loops(seed, ints, count):
    """Whole numbers make many equal distances; others have identical vectors."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(6, 5))[random.integers(0, 6, 20)]
    vectors[::3] = random.normal(size=vectors[::3].shape)
    if ints:
        vectors = random.integers(0, 3, (20, 2))
    vectors, candidates = np.float32(vectors), random.random(20) < 0.8
    places = np.flatnonzero(candidates)
    count = min(count, len(places))
    is_centre, centre = jax.tree.map(
        np.asarray, jax.jit(density_peaks, static_argnums=3)(vectors, candidates, count, 7)
    )
    wanted = clustered(vectors[candidates], count)
    assert np.flatnonzero(is_centre).tolist() == places[[*wanted]].tolist()
    for of_cluster, members in wanted.items():
        for member in (of_cluster, *members):
            assert centre[places[member]] == places[of_cluster]


@given(
    seed=st.integers(0, 10**6),
    frames=st.integers(1, 8),
    tokens=st.sampled_from([1, 3, 6]),
    share=st.sampled_from([0, 0.5, 0.8, 1]),
)
def test_the_division_is_the_best_of_all(seed, frames, tokens, share):
    """Of every beginning of the clip, too; few tokens make many equally good divisions."""
    still = np.random.default_rng(seed).random((7, tokens)) < share
    since = np.array([[0] * tokens] * 8)
    for frame in range(1, 8):
        since[frame] = np.where(still[frame - 1], since[frame - 1], frame)
    is_first = np.asarray(jax.jit(_best_division)(since))
    wanted = [first for first, _ in divided(still[: frames - 1])]
    assert np.flatnonzero(is_first[frames]).tolist() == wanted


CASES = {
    "a quarter of 7 frames": (HoliTomTokens(0.25, 0.8, 0.6), 7, 25),
    "less than one token a frame": (HoliTomTokens(0.05, 0.8, 0.6), 6, 9),
    "nine tenths": (HoliTomTokens(0.9, 0.8, 0.6), 5, 16),
    "all, of centres alone": (HoliTomTokens(1, 0.65, 1), 4, 16),
    "one frame": (HoliTomTokens(0.3, 0.8, 0.6), 1, 25),
}


@given(case=st.sampled_from(sorted(CASES)), seed=st.integers(0, 10**6), still=st.booleans())
def test_rows_equal_the_steps_written_as_loops(case, seed, still):
    """The second clip of each batch is shorter, so that empty frames follow it."""
    stage, frames, tokens = CASES[case]
    features, attention = clips(seed, 2, frames, tokens, still=still)
    lengths = [frames, max(1, frames - 2)]
    features[1, lengths[1] :], attention[1, lengths[1] :] = 0, 0
    rows = select(stage, features, attention, lengths)
    assert rows.valid.shape[1] == stage.most_rows(frames, tokens)
    assert (np.diff(rows.places) >= 0).all()  # as newlines in rows or frames need it
    for row, length in enumerate(lengths):
        places, embeds = holitom(stage, features[row, :length], attention[row, :length])
        assert len(places) <= max(1, int(Decimal(str(stage.budget)) * length * tokens))
        assert_row(rows, row, places, embeds)


def test_made_up_clips_have_long_segments_clusters_and_dynamic_tokens():
    stage, frames, tokens = CASES["a quarter of 7 frames"]
    segments = merged = as_they_were = 0
    for seed in range(20):
        features, attention = clip(seed, frames, tokens)
        still = [[cosine(*pair) > 0.8 for pair in zip(x, y, strict=True)]
                 for x, y in pairwise(features)]  # fmt: skip
        segments += sum(1 for first, last in divided(np.array(still)) if last > first + 1)
        places, embeds = holitom(stage, features, attention)
        same = (embeds == features.reshape(-1, 16)[places]).all(1)
        merged, as_they_were = merged + (~same).sum(), as_they_were + same.sum()
    assert min(segments, merged, as_they_were) > 20, (segments, merged, as_they_were)


def test_a_still_clip_becomes_one_frame_and_leaves_rows_empty():
    features, attention = (np.repeat(x, 8, axis=1) for x in clips(1, 1, 1, 16))
    rows = select(HoliTomTokens(0.5, 0.8, 0.6), features, attention)
    assert rows.valid.sum() == 16 < rows.valid.size == 64
    np.testing.assert_array_equal(rows.places[0, :16], np.arange(16))
    np.testing.assert_allclose(rows.embeds[0, :16], features[0, 0], rtol=0, atol=1e-6)
    assert (rows.places[0, 16:] == 8 * 16 - 1).all()


def test_a_row_is_the_same_in_every_batch():
    """At the number of tokens of a true model."""
    (features, attention), lengths = clips(5, 3, 6, 196, 64), [6, 2, 3]
    stage = HoliTomTokens(0.15, 0.8, 0.6)
    together = select(stage, features, attention, lengths)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = select(stage, features[one], attention[one], [length])
        np.testing.assert_array_equal(together.places[one], alone.places)
        np.testing.assert_array_equal(together.valid[one], alone.valid)
        np.testing.assert_allclose(together.embeds[one], alone.embeds, rtol=0, atol=1e-6)


def test_a_row_without_a_clip_has_no_tokens():
    stage, frames, tokens = CASES["a quarter of 7 frames"]
    rows = select(stage, *clips(7, 2, frames, tokens), [7, 0])
    assert rows.valid.any(1).tolist() == [True, False]


def test_nothing_is_compiled_anew_for_other_values(compilations):
    stage, frames, tokens = CASES["a quarter of 7 frames"]
    select(stage, *clips(8, 2, frames, tokens))
    before = compilations()
    select(stage, *clips(9, 2, frames, tokens), [3, 0])
    assert compilations() == before


def test_bfloat16_is_compared_in_float32():
    stage, frames, tokens = CASES["nine tenths"]
    features, attention = clips(4, 2, frames, tokens)
    half = features.astype(ml_dtypes.bfloat16)
    rows = select(stage, half, attention)
    wide = select(stage, half.astype(np.float32), attention)
    np.testing.assert_array_equal(rows.valid, wide.valid)
    assert rows.embeds.dtype == ml_dtypes.bfloat16
    # The means of step 2 have the dtype of the tokens, so centres may differ where they are close.
    assert (rows.places == wide.places).mean() > 0.9
    same = rows.places == wide.places
    np.testing.assert_allclose(np.float32(rows.embeds)[same], wide.embeds[same], atol=0.1)


def test_the_program_does_not_grow_with_frames_or_tokens():
    def operations(frames, tokens):
        given = jnp.zeros((2, frames, tokens, 4)), jnp.full(2, frames)
        stage = CASES["nine tenths"][0]
        return str(jax.make_jaxpr(stage.select)(*given, (given[0][..., 0],))).count(" = ")

    assert operations(5, 9) == operations(32, 48)


def one_after_another(x, dropped, left, mean):
    """The published merge: each dropped state, in order, into the most similar one that is left."""
    target = {i: max(left, key=lambda j: round(cosine(x[i], x[j]), 9)) for i in dropped}
    if mean == "equal":
        for j in left:
            x[j] = np.mean([x[j], *(x[i] for i in dropped if target[i] == j)], 0)
    else:
        for i in dropped:
            x[target[i]] = (x[target[i]] + x[i]) / 2


@pytest.mark.parametrize("mean", ["halves", "equal"])
@pytest.mark.parametrize("r", [0.0, 0.3, 0.5, 0.9])
def test_the_merge_inside_prefill_equals_the_loop(r, mean):
    """Whole numbers make equal scores; identical states make equal similarities."""
    random = np.random.default_rng(round(10 * r))
    states = np.float32(random.normal(size=(3, 30, 6))[:, random.integers(0, 25, 30)])
    scores = np.float32(random.integers(0, 9, (3, 30)))
    is_token = np.arange(30) % 5 < 4  # newlines are none
    is_token = np.stack([is_token, is_token & (np.arange(30) < 17), np.zeros(30, bool)])
    stage = HoliTomMerge(2, r, mean)
    rows = jax.tree.map(np.asarray, jax.jit(stage.select, static_argnums=3)(
        states, scores, is_token, 24
    ))  # fmt: skip
    for row in range(3):
        candidates = np.flatnonzero(is_token[row]).tolist()
        count = min(len(candidates), max(1, kept_of(len(candidates), r)))
        left = sorted(sorted(candidates, key=lambda slot: -scores[row, slot])[:count])
        x = np.float64(states[row])
        one_after_another(x, sorted({*candidates} - {*left}), left, mean)
        assert_row(rows, row, left, x[left])


def test_many_tokens_merged_into_one_underflow_to_nothing():
    """2 to the power of -199 is nothing in float32; the last 20 of 200 have nearly all weight."""
    states = np.ones((1, 200, 4), np.float32)
    states[0, :180] = 1e3
    is_token = np.ones((1, 200), bool)
    run = jax.jit(HoliTomMerge(1, 0.995).select, static_argnums=3)
    rows = run(states, np.float32(is_token), is_token, 200)
    assert rows.places.tolist() == [[0]]
    np.testing.assert_allclose(rows.embeds, 1 + 999 / 2**20, rtol=1e-6)


@pytest.mark.parametrize(
    ("mean", "behind"), [("halves", {}), ("equal", {"layer": 3, "p": 0.5})], ids=["alone", "pruned"]
)
def test_merged_states_go_through_the_layers_that_follow(mean, behind):
    """Logits and what is attended to, of every row, whatever it is batched with."""
    model, seed, lengths, visual = random_model(4), 7, [(3, 5), (6, 9), (1, 1)], 23
    text, segment, slots, alone = ragged_prompts(model, seed, lengths, visual)
    method = HoliTomMerge(2, 0.5, mean)
    if behind:
        method = combine(method, DyCokeKV(**behind))
    fed = np.random.default_rng(seed).integers(0, 64, (3, len(lengths)))
    logits, _, states = run_steps(model, text, segment, slots, method, fed)
    plain = Qwen2(model.config.text, model.params)
    for row, (prefix, _) in enumerate(lengths):
        wanted, seen = plain.generate_dropping(
            alone[row],
            list(range(prefix, prefix + visual)),
            fed[:, row],
            first=2,
            r=0.5,
            merge=lambda *given: one_after_another(*given, mean),
            **behind,
        )
        np.testing.assert_allclose(logits[:, row], wanted[1:], atol=2e-3)
        for index, state in enumerate(states):
            assert {prefix + place for place in chosen_of(state, row)} == seen[index]


def test_the_stages_and_what_they_are_called():
    stages = HoliTom().stages
    assert stages == Compression(HoliTomTokens(0.25, 0.8, 0.6), HoliTomMerge(18, 0.5))
    assert isinstance(stages.tokens, TokenStage)
    assert isinstance(stages.prompt, PromptStage)
    assert stages.tokens.signals == (Signal("attention"),)
    assert HoliTom(layer=0).stages == HoliTom(r=0).stages == Compression(stages.tokens)
    both = combine(HoliTom(layer=2), DyCokeKV())
    assert described(both)["method"] == "holitom(layer=0)+holitom-merge+dycoke-kv"
    with pytest.raises(ConfigError, match="HoliTom: layer is 18; with 4 layers it must lie in 1"):
        stages.check(random_model(0).config, 8)


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("budget", 0, "lie in (0, 1]"),
        ("budget", 1.5, "lie in (0, 1]"),
        ("threshold", 1.1, "lie in [-1, 1]"),
        ("beta", -0.1, "lie in [0, 1]"),
        ("layer", -1, "lie in 0..layers-1"),
        ("r", 1, "lie in [0, 1)"),
        ("mean", "plain", "be halves or equal"),
    ],
)
def test_settings_out_of_range_are_named(unchecked_types, setting, value, allowed):
    with pytest.raises(ConfigError) as caught:
        HoliTom(**{setting: value})
    assert str(caught.value).startswith(f"HoliTom: {setting} is ")
    assert str(caught.value).endswith(f"it must {allowed}")
