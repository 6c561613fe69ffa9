"""What ``dycoke-jax bench`` measures, counts and says."""

import itertools
import json
import sys
from dataclasses import replace
from io import StringIO
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from rich.console import Console
from support.command_line import run_main

from dycoke_jax import DyCoke, DycokeError
from dycoke_jax.bench import against, machine, memory, report, run, stages
from dycoke_jax.bench.costs import Cost
from dycoke_jax.bench.machine import Limit, Rates, Sizes
from dycoke_jax.bench.measure import Measured, Spread, measure, order, ratios
from dycoke_jax.bench.memory import Peak
from dycoke_jax.bench.results import row, same_ids
from dycoke_jax.bench.stages import STAGES, Combination, prepare, stages_run
from dycoke_jax.compilation import Compilations
from dycoke_jax.compression.unicomp import UniComp
from dycoke_jax.compression.visionzip import VisionZip
from dycoke_jax.config import PRESETS, TINY, LlavaConfig, TextConfig, VisionConfig
from dycoke_jax.generation.decode import decode_step
from dycoke_jax.generation.layout import plan
from dycoke_jax.generation.prefill import prefill
from dycoke_jax.model import Model
from dycoke_jax.models.llava import abstract_params, random_params

SMALL = Sizes(256, 16)
SHALLOW = LlavaConfig(
    VisionConfig(64, 96, 1, 4, patch_size=14, image_size=56),
    TextConfig(320, 64, 96, 2, 4, 2, 16, tie_word_embeddings=True),
)
# Wide enough that what is not counted is little beside the matrix products.
WIDE = LlavaConfig(
    VisionConfig(256, 1024, 2, 4, patch_size=14, image_size=112),
    TextConfig(1024, 512, 2048, 2, 8, 2, 64, tie_word_embeddings=False),
)
PLAIN = Combination(2, 4, "none", None)
DYCOKE = Combination(2, 4, "dycoke(layer=1)", DyCoke(layer=1))


@pytest.fixture(scope="module")
def model():
    """Weights large enough that the generated tokens vary."""
    params = random_params(SHALLOW)
    return Model({name: w * (10.0 if w.ndim > 1 else 1.0) for name, w in params.items()}, SHALLOW)


def untrained(config):
    return Model(random_params(config), config)


# Sizes, from METHOD.md's table of the released models.


def onevision(layers, width, inner, heads, kv_heads, vocabulary, tied):
    return dict(
        zip(RELEASED, (layers, width, inner, heads, kv_heads, vocabulary, tied), strict=True)
    )


RELEASED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
HALF = onevision(24, 896, 4864, 14, 2, 151936, True)
SEVEN = onevision(28, 3584, 18944, 28, 4, 152064, False)
SEVENTY_TWO = onevision(80, 8192, 29568, 64, 8, 152064, False)
MODELS = {
    "onevision-0.5b": (HALF, 196, 196 * 32 + 1),
    "onevision-7b": (SEVEN, 196, 196 * 32 + 1),
    "onevision-72b": (SEVENTY_TWO, 196, 196 * 32 + 1),
    "video-7b": (SEVEN, 169, 182 * 32),
    "video-72b": (SEVENTY_TWO, 169, 182 * 32),
}


def parameters_in_transformers(text, text_layers, vision_layers):
    settings = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text, "num_hidden_layers": text_layers},
        vision_config={
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 384,
        },
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    with torch.device("meta"):
        network = transformers.LlavaOnevisionForConditionalGeneration(settings)
    # The norm behind the tower is not used.
    return sum(p.numel() for n, p in network.named_parameters() if "post_layernorm" not in n)


@pytest.mark.parametrize("preset", MODELS)
def test_presets_have_the_shapes_of_the_released_models(preset):
    """Parameters as transformers counts them in a model of the published sizes."""
    text, tokens, visual = MODELS[preset]
    config, layers = PRESETS[preset], text["num_hidden_layers"]
    one = parameters_in_transformers(text, 1, 1)
    of_text = parameters_in_transformers(text, 2, 1) - one
    of_vision = parameters_in_transformers(text, 1, 2) - one
    wanted = one + (layers - 1) * of_text + 25 * of_vision
    assert sum(leaf.size for leaf in abstract_params(config).values()) == wanted
    assert (config.vision.num_layers, config.text.num_layers) == (26, layers)
    assert config.text.vocab_size == text["vocab_size"]
    assert config.text.num_heads == text["num_attention_heads"]
    assert config.text.num_kv_heads == text["num_key_value_heads"]
    assert config.tokens_per_frame == tokens
    assert plan(config, 1, 32, 16, 32, 32, None).slots.visual == visual


# Costs.


def test_costs_are_those_counted_by_hand():
    """Every matrix product of the tiny model as (rows, inner width, columns), one by one."""
    work = prepare(untrained(TINY), Combination(2, 8, "none", None), 16)
    slots = work.layout.slots.prompt
    assert work.layout.slots.visual == 8 * 16 + 1
    vision = [(64, 3 * 8 * 8, 64)]
    for _ in range(3):
        vision += [(64, 64, 64)] * 4 + [(64, 64, 160), (64, 160, 64)]
        vision += [(64, 16, 64), (64, 64, 16)] * 4  # scores and values of 4 heads
    vision += [(64, 64, 128), (64, 128, 128)]
    layer = [(128, 128)] + [(128, 64)] * 2 + [(128, 128)] + [(128, 352)] * 2 + [(352, 128)]
    language = [(slots, a, b) for a, b in layer] * 6 + [(1, 128, 512)]
    for query in range(slots):
        language += [(1, 32, query + 1), (1, query + 1, 32)] * 4 * 6
    step = [(1, a, b) for a, b in layer] * 6 + [(1, 128, 512)]
    step += [(1, 32, slots + 32), (1, slots + 32, 32)] * 4 * 6

    def flops(products):
        return sum(2 * a * b * c for a, b, c in products)

    found = stages.stage_costs(work)
    assert found["vision"].flops == 2 * 8 * flops(vision)
    assert found["prefill"].flops == 2 * flops(language)
    assert found["decode"].flops == 2 * flops(step)
    assert found["token stage"].flops == 0

    weights = {path: leaf.size for path, leaf in abstract_params(TINY).items()}
    tower = sum(n for path, n in weights.items() if path.startswith(("vision", "projector")))
    language = sum(weights.values()) - tower - 128  # all but the newline; the head is tied
    cached = 6 * 2 * 64
    assert found["vision"].bytes == 4 * (tower + 16 * 16 * 128) + 16 * 3 * 64 * 64
    assert found["decode"].bytes == 4 * (language + 2 * (slots + 32) * cached)
    text = work.layout.slots.prefix + work.layout.slots.question
    inputs = (8 * 16 + text) * 128
    assert found["prefill"].bytes == 4 * (language + 2 * (inputs + slots * cached))


def counted_by_xla(function, *arguments):
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.fixture(scope="module")
def wide():
    """Work on a wide model, and its costs."""
    work = prepare(untrained(WIDE), PLAIN, 16)
    return work, stages.stage_costs(work)


def test_the_operations_of_vision_are_those_that_xla_counts(wide):
    work, found = wide
    frames = np.zeros((8, 112, 112, 3), np.uint8)

    def encoded(params, frames):
        return Model(params, WIDE).bind().encode(frames)

    counted = counted_by_xla(encoded, work.model.params, frames)
    assert found["vision"].flops == pytest.approx(counted, rel=0.02)


def read(work, params, features):
    return prefill(Model(params, WIDE), features, *stages._inputs(work), layout=work.layout)


def test_the_operations_of_prefill_are_those_that_xla_counts(wide):
    work, found = wide
    slots, rows = work.layout.slots.prompt, work.layout.rows
    # In one block of queries, XLA's program computes what lies above the diagonal too.
    assert slots <= 256
    above = 2 * rows * 4 * 512 * slots * (slots - 1) // 2
    features = stages._shapes_of_features(work)
    counted = counted_by_xla(lambda *inputs: read(work, *inputs).token, work.model.params, features)
    assert found["prefill"].flops + above == pytest.approx(counted, rel=0.005)


def test_the_operations_of_a_decode_step_are_those_that_xla_counts(wide):
    work, found = wide
    arguments = work.model.params, stages._shapes_of_features(work)

    def step(params, features):
        network = Model(params, WIDE).bind()
        return decode_step(network, read(work, params, features), work.layout)[0]

    before = counted_by_xla(lambda *inputs: read(work, *inputs).token, *arguments)
    counted = counted_by_xla(step, *arguments) - before
    assert found["decode"].flops == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize("method", [UniComp(), VisionZip()], ids=["unicomp", "visionzip"])
def test_what_is_counted_of_the_features_has_the_shapes_that_encoding_gives(model, method):
    work = prepare(model, Combination(1, 2, "", method), 2)
    for array, counted in zip(
        jax.tree.leaves(stages._encode(work)),
        jax.tree.leaves(stages._shapes_of_features(work)),
        strict=True,
    ):
        assert (array.shape, array.dtype) == (counted.shape, counted.dtype)


def test_pruned_layers_are_counted_with_the_slots_that_they_read():
    plain, pruned = (
        prepare(untrained(TINY), Combination(1, 16, "", method), 16)
        for method in (None, DyCoke(k=0, layer=2, p=0.75))
    )
    difference = (
        stages.stage_costs(plain)["decode"].bytes - stages.stage_costs(pruned)["decode"].bytes
    )
    # 4 of 6 layers read a quarter of 256 visual tokens; 2 heads of 32, keys and values, float32.
    assert difference == 4 * 192 * 2 * 64 * 4


def test_the_least_time_is_that_of_what_takes_longer():
    rates = Rates(flops=100.0, bytes=10.0)
    assert machine.limit(Cost(1000, 50), rates) == Limit(10.0, "matrix rate")
    assert machine.limit(Cost(1000, 200), rates) == Limit(20.0, "bandwidth")


# Rounds.


def test_every_item_has_every_place_once():
    for count in range(1, 9):
        rounds = [order(range(count), number) for number in range(count)]
        assert all(sorted(round_) == list(range(count)) for round_ in rounds)
        assert all(sorted(place) == list(range(count)) for place in zip(*rounds, strict=True))
        assert all(one != other for one, other in itertools.pairwise(rounds))


@pytest.mark.parametrize("count", [2, 4, 6, 8])
def test_every_item_follows_every_other_once(count):
    rounds = [order(range(count), number) for number in range(count)]
    pairs = [pair for round_ in rounds for pair in itertools.pairwise(round_)]
    assert sorted(pairs) == sorted(itertools.permutations(range(count), 2))


class FakeClock:
    """Moves only where a run says so."""

    now = 0.0

    def __call__(self):
        return self.now


def test_rounds_are_interleaved_and_every_case_runs_once_in_each():
    clock, calls = FakeClock(), []
    times = {"a": [9, 5, 1, 3, 2], "b": [100, 20, 40, 10, 30], "c": [7, 7, 7, 7, 7]}

    def case(name):
        remaining = iter([1000, *times[name]])  # the first run, which compiles, counts nothing

        def run_once(watch):
            calls.append(name)
            clock.now += 123  # outside of the stages
            with watch.time("stage", parts=2):
                clock.now += next(remaining)
            return len(calls)

        return run_once

    groups = [{"a": case("a"), "b": case("b")}, {"c": case("c")}]
    measured = measure(groups, 5, clock=clock)
    rounds = [calls[start : start + 3] for start in range(3, len(calls), 3)]
    assert len(rounds) == 5
    assert all(sorted(round_) == ["a", "b", "c"] for round_ in rounds)
    assert all(one != other for one, other in itertools.pairwise(rounds))
    # Those of a group follow each other.
    assert all(abs(round_.index("a") - round_.index("b")) == 1 for round_ in rounds)
    for name in times:
        assert measured[name].seconds["stage"] == [t / 2 for t in times[name]]
    assert measured["a"].result > 3


def test_medians_and_quartiles_are_those_of_the_pairs():
    ours, theirs = [1.0, 2.0, 4.0, 8.0, 16.0], [3.0, 2.0, 8.0, 40.0, 16.0]
    of_pairs = [3.0, 1.0, 2.0, 5.0, 1.0]
    assert ratios(theirs, ours) == Spread(median(of_pairs), 1.0, 3.0)
    assert median(theirs) / median(ours) == 2.0
    assert ratios([3.0, 9.0], [1.0, 1.0]).median == 6.0


def test_a_program_that_is_compiled_while_it_is_timed_is_an_error():
    sizes = iter(range(3, 1000))

    def run_once(watch):
        x = jnp.zeros(next(sizes))
        with watch.time("stage"):
            jax.jit(lambda x: x * 2.5)(x).block_until_ready()

    with pytest.raises(AssertionError, match="stage: a program was compiled while it was timed"):
        measure([{"case": run_once}], 2)


def test_programs_are_counted_where_they_are_compiled():
    double = jax.jit(lambda x: x * 2.25)
    x = jnp.arange(7.0)

    def run_once(watch):
        with watch.time("stage"):
            double(x).block_until_ready()

    measured = measure([{"first": run_once, "second": run_once}], 2)
    assert measured["first"].compiled.programs == 1
    assert measured["first"].compiled.seconds > 0
    assert measured["second"].compiled.programs == 0


# Memory.


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is that of Linux")
def test_peak_memory_on_the_cpu_is_what_was_taken_meanwhile_and_given_back():
    peak = memory.watch_memory(lambda: None)
    array = np.ones(100_000_000, np.uint8)
    del array
    found = peak()
    if found is None:
        pytest.skip("this system does not let the mark be reset")
    assert 95e6 < found.above < 130e6
    assert found.whole > found.above
    again = memory.watch_memory(lambda: None)()
    assert again.above < 30e6, "the mark is reset"


def test_peak_memory_of_an_accelerator_is_its_mark_if_that_rises():
    marks = iter([(500, 300), (800, 300), (800, 300), (800, 200)])

    def statistics():
        peak, used = next(marks)
        return {"peak_bytes_in_use": peak, "bytes_in_use": used}

    assert memory.watch_memory(statistics)() == Peak(whole=800, above=500)
    assert memory.watch_memory(statistics)() is None


# Results.


def test_a_row_has_the_shares_of_the_limits_and_the_ratios_to_transformers(model):
    work = prepare(model, PLAIN, 9)
    of_stages = stages.stage_costs(work)
    rates = Rates(flops=1e9, bytes=1e6)
    ours = Measured(
        Compilations(3, 1, 0.5),
        None,
        {"vision": [2.0, 1.0, 4.0], "decode": [0.5, 0.5, 0.5], "end to end": [10.0, 10.0, 10.0]},
    )
    theirs = Measured(Compilations(), None, {"vision": [4.0, 1.0, 12.0], "prefill": [1.0] * 3})
    found = row(work, ours, theirs, rates)
    vision = found.stages["vision"]
    assert vision.spread.median == 2.0
    assert vision.faster == Spread(2.0, 1.5, 2.5)
    assert vision.limit.seconds == pytest.approx(
        max(of_stages["vision"].flops / 1e9, of_stages["vision"].bytes / 1e6)
    )
    assert vision.share == pytest.approx(vision.limit.seconds / 2.0)
    assert found.stages["decode"].faster is None
    least = [machine.limit(of_stages[name], rates).seconds for name in ("vision", "prefill")]
    least.append(8 * machine.limit(of_stages["decode"], rates).seconds)
    assert found.stages["end to end"].limit.seconds == pytest.approx(sum(least))


def measured(**seconds):
    return Measured(
        Compilations(), None, {name.replace("_", " "): s for name, s in seconds.items()}
    )


@pytest.mark.parametrize(
    ("plain", "wanted"),
    [
        # Of 10 seconds 4 are left beside the token stage, which takes 1.
        pytest.param([10.0, 14.0, 2.0], 1 / 6, id="saves"),
        pytest.param([4.0, 14.0, 2.0], None, id="saves nothing"),
        pytest.param(None, None, id="no plain model"),
    ],
)
def test_the_token_stage_is_a_share_of_the_prefill_that_it_saves(model, plain, wanted):
    ours = measured(token_stage=[1.0, 1.0, 2.0], prefill=[5.0, 5.0, 6.0])
    rates = Rates(flops=1e9, bytes=1e6)
    plain = None if plain is None else measured(prefill=plain)
    found = row(prepare(model, DYCOKE, 9), ours, None, rates, plain).of_saved
    assert found == (None if wanted is None else pytest.approx(wanted))


def test_equal_tokens_are_counted_up_to_the_first_that_differs():
    assert same_ids([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == (4, 6)
    assert same_ids([[1, 2]], [[1, 2, 3]]) is None


@pytest.fixture(scope="module")
def results(model):
    """Plain and DyCoke, all stages, against transformers, in one thread."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPROC", "1")
        yield run.bench(
            "shallow",
            model,
            [PLAIN, DYCOKE],
            new_tokens=8,
            rounds=3,
            stages=STAGES,
            sizes=SMALL,
            against=True,
        )
    torch.set_num_threads(threads)


def test_transformers_gives_the_same_greedy_tokens(results):
    plain, pruned = results.rows
    assert plain.same_ids == (16, 16)
    assert len({*plain.counts.token_ids[0]}) > 2, "a constant answer would prove little"
    assert plain.counts.token_ids[0] != plain.counts.token_ids[1]
    assert pruned.same_ids is None, "transformers has no DyCoke to compare with"


def test_every_stage_is_timed_and_compared_with_the_plain_torch_model(results):
    plain, pruned = results.rows
    assert list(plain.stages) == ["vision", "prefill", "decode", "end to end"]
    assert list(pruned.stages) == list(STAGES)
    (theirs,) = results.theirs
    assert list(theirs.stages) == ["vision", "prefill", "decode"]
    for found in results.rows:
        assert all(len(stage.seconds) == 3 for stage in found.stages.values())
        assert all(min(stage.seconds) > 0 for stage in found.stages.values())
        assert found.stages["decode"].faster.low <= found.stages["decode"].faster.median
        assert {name for name, stage in found.stages.items() if stage.faster} == {*theirs.stages}
    for name, spread in theirs.stages.items():
        pairs = plain.stages[name]
        # A ratio of medians lies between the smallest and largest of the pairs' parts.
        assert spread.low / max(pairs.seconds) <= pairs.faster.high
        assert spread.high / min(pairs.seconds) >= pairs.faster.low


def test_what_a_method_saves_is_compared_with_the_plain_model_of_the_same_rounds(results):
    plain, pruned = results.rows
    assert plain.of_saved is None
    stage, prefill = (np.array(pruned.stages[n].seconds) for n in ("token stage", "prefill"))
    saved = np.median(plain.stages["prefill"].seconds) - np.median(prefill) + np.median(stage)
    if saved > 0:  # in so small a model it may save nothing
        assert pruned.of_saved == pytest.approx(np.median(stage) / saved)
    else:
        assert pruned.of_saved is None


def test_tokens_are_counted_from_the_arrays(results):
    plain, pruned = (found.counts for found in results.rows)
    # 4 frames of 2 x 2 tokens, of which DyCoke keeps 4 + 3 * int(0.3 * 4).
    assert (plain.visual, plain.merged, plain.attended) == (16, 16, 16.0)
    assert (pruned.visual, pruned.merged) == (16, 7)
    assert pruned.attended == 2.0, "int(0.3 * 7)"
    assert (plain.prompt, pruned.prompt) == (34 + 17, 34 + 8)
    assert plain.refreshes == 0
    assert pruned.refreshes >= 1


def test_without_vision_the_clips_are_encoded_once_and_not_timed(model):
    case = stages_run(prepare(model, PLAIN, 8), ["decode"])
    measured = measure([{"case": case}], 2)["case"]
    assert list(measured.seconds) == ["decode"]
    assert len(measured.result.token_ids[0]) == 8


def shown(table):
    console = Console(width=report.WIDTH, record=True, file=StringIO())
    console.print(table)
    return console.export_text()


def test_tables_fit_and_have_a_row_for_each_combination(results):
    text = shown(report.times(results))
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert [line.split("│")[3].strip() for line in lines] == ["none", DYCOKE.name, "transformers"]
    assert "7 of 16" in lines[1]
    assert "…" not in text
    pruned = replace(results.rows[1], of_saved=0.0234)
    text = shown(report.times(replace(results, rows=(results.rows[0], pruned))))
    assert "2.34 %" in text
    assert "the token stage as a share of the prefill that it saves" in " ".join(text.split())
    assert "…" not in text
    text = shown(report.limits(results))
    assert text.count("decode/step") == 2
    assert "…" not in text
    assert "matrix rate" in text
    assert report.agreement(results) == [
        "batch 2, 4 frames, none: 16 of 16 greedy tokens are those of transformers, up to the "
        "first that differs"
    ]


def test_times_are_written_with_three_digits():
    values = (12.345, 0.99961, 0.012, 0.00095, 3e-8, 1234.0)
    assert [*map(report.seconds, values)] == [
        "12.3 s",
        "1000 ms",
        "12.0 ms",
        "950 µs",
        "0.0300 µs",
        "1234 s",
    ]


def test_the_plot_shows_time_and_memory(results, tmp_path):
    path = tmp_path / "plot.png"
    report.plot(results, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10, "lines in several colours"


# The command.


@pytest.fixture
def shallow_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SHALLOW)
    monkeypatch.setattr(machine, "sizes_for", lambda device: SMALL)


def test_json_holds_every_combination_with_its_counts(shallow_preset):
    code, out, _ = run_main(
        *("bench", "--batch", "1,2", "--frames", 4, "--new-tokens", 8, "--rounds", 3),
        *("--compress", "none", "--compress", DYCOKE.name, "--stages", "prefill,decode", "--json"),
    )
    assert code == 0
    found = json.loads(out)
    combinations = [entry["combination"] for entry in found["rows"]]
    assert [(c["batch"], c["compression"]) for c in combinations] == [
        *itertools.product((1, 2), ("none", DYCOKE.name))
    ]
    assert (
        combinations[1]["settings"] | {"method": "dycoke", "k": 0.7, "layer": 1}
        == (combinations[1]["settings"])
    )
    assert found["machine"]["jax"] == jax.__version__
    assert found["machine"]["dtype"] == "float32"
    assert found["weights"] == 4 * sum(x.size for x in abstract_params(SHALLOW).values())
    for entry, merged in zip(found["rows"], (16, 7, 16, 7), strict=True):
        assert entry["counts"]["merged"] == merged
        assert [*entry["stages"]] == ["prefill", "decode"]
        for stage in entry["stages"].values():
            assert len(stage["seconds"]) == 3
            assert stage["spread"]["median"] == pytest.approx(median(stage["seconds"]))
            assert stage["share"] > 0
            assert stage["limit"]["bound"] in ("matrix rate", "bandwidth")
        assert entry["compiled"].keys() == {"programs", "found", "seconds"}


def test_weights_and_caches_as_int8_are_measured_beside_those_as_they_are(shallow_preset):
    """In the same rounds; and what a step has to read is less by what they take less."""
    code, out, _ = run_main(
        *("bench", "--batch", 1, "--frames", 4, "--new-tokens", 4, "--rounds", 3, "--json"),
        *("--compress", "none", "--stages", "prefill,decode"),
        *("--weights", "stored,int8", "--kv", "stored,int8"),
    )
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [(row["combination"]["weights"], row["combination"]["kv"]) for row in rows] == [
        *itertools.product((None, "int8"), (None, "int8"))
    ]
    moved = [row["stages"]["decode"]["cost"]["bytes"] for row in rows]
    language = [
        (path, leaf.shape)
        for path, leaf in abstract_params(SHALLOW).items()
        if path.startswith("language_model.") and len(leaf.shape) == 2
    ]
    # A matrix gives 3 of 4 bytes a number, and takes 4 for the scale of each row.
    saved = sum(3 * rows * columns - 4 * rows for _, (rows, columns) in language)
    assert moved[0] - moved[2] == saved
    assert moved[1] - moved[3] == saved
    text = SHALLOW.text
    numbers = 2 * text.num_layers * text.num_kv_heads * plan_slots(rows[0])
    assert moved[0] - moved[1] == numbers * (3 * text.head_dim - 4)


def plan_slots(row):
    """Slots of the caches of a batch of one request: the bucket of its prompt and of its answer."""
    return plan(SHALLOW, 1, row["combination"]["frames"], 16, 32, 32, None).slots.prompt + 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--batch", "1,x"], "--batch is '1,x'; it must be whole numbers", id="words"),
        pytest.param(["--batch", "0"], "--batch is 0; it must be at least 1", id="no rows"),
        pytest.param(["--frames", ""], "--frames is ''; it must be whole numbers", id="no frames"),
        pytest.param(["--new-tokens", "1"], "--new-tokens is 1; it must be at least 2", id="token"),
        pytest.param(["--rounds", "1"], "--rounds is 1; it must be at least 3", id="round"),
        pytest.param(["--stages", "vision,x"], "--stages is 'x'; it must be vision", id="stage"),
        pytest.param(["--preset", "3b"], "no preset '3b'; there are tiny,", id="preset"),
        pytest.param(
            ["--preset", "tiny", "--model", "x"], "both choose the model; give one", id="model"
        ),
        pytest.param(["--weights", "int4"], "--weights is 'int4'; it must be stored", id="weights"),
        pytest.param(["--compress", "x"], "there is no method 'x'", id="method"),
        pytest.param(["--compress", "dycoke(layer=9)"], "it must lie in 1..5", id="layer"),
        pytest.param(["--frames", "4000"], "exceed the model's 4096 positions", id="long"),
        pytest.param(["--plot", "no/such.png"], "there is no folder no", id="plot"),
        pytest.param(
            ["--against", "transformers", "--dtype", "bfloat16"], "not in bfloat16", id="dtype"
        ),
        pytest.param(
            ["--against", "transformers", "--preset", "video-7b"],
            "no model with average pooling and newlines grid",
            id="video",
        ),
    ],
)
def test_bad_options_are_an_error_in_one_line(options, message):
    code, out, err = run_main("bench", *options)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_torch_the_comparison_is_an_error_in_one_line(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DycokeError, match="needs torch and its model of LLaVA-OneVision") as error:
        against.check_against(TINY, "float32")
    assert "\n" not in str(error.value)


def test_weights_of_another_dtype_are_not_compared_with_torch():
    params = {"image_newline": jnp.zeros(4, jnp.int8), "lm_head.weight": jnp.zeros((2, 4))}
    with pytest.raises(DycokeError, match="compares float32 weights, not int8; give a checkpoint"):
        against.torch_model(Model(params, TINY))
