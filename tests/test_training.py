"""Training: packing, the loss, accumulation, freezing, schedules and exact resumption."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from support.tiny import tiny_model, video
from support.tokenizers import tiny_tokenizer

from dycoke_jax import Decoding, DyCoke, DycokeError
from dycoke_jax.tasks.scenes import SceneSettings
from dycoke_jax.training.batches import Example, encode_part, pack
from dycoke_jax.training.loss import score_answers
from dycoke_jax.training.run import Intervals, Run, train
from dycoke_jax.training.sources import BatchShape, TaskSource
from dycoke_jax.training.step import Cycle, Optimisation, module_of, schedule, start, train_step
from dycoke_jax.training.token_dropping import TokenDropping, TokenDroppingMix

TOKENIZER = tiny_tokenizer()
QUESTIONS = ("What is it?", "Which colour?", "How many are there?")
ANSWERS = ("a cat", "red", "two of them")


def example(seed=0, questions=QUESTIONS, answers=ANSWERS, frames=5):
    return Example(video(seed, frames), questions, answers)


@pytest.mark.parametrize("newline", ["one_token", "grid"])
def test_questions_that_share_a_row_do_not_attend_to_each_other(newline):
    """A packed row has the same loss and right answers as its questions in rows of their own."""
    model = tiny_model(newline=newline)
    together = score_answers(model.model, pack(TOKENIZER, [example(), example(1)], 200))
    alone = [
        score_answers(
            model.model,
            pack(TOKENIZER, [example(seed, (question,), (answer,))], 80),
        )
        for seed in (0, 1)
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    assert float(together.loss) == pytest.approx(sum(float(one.loss) for one in alone), rel=1e-5)
    assert int(together.tokens) == sum(int(one.tokens) for one in alone)
    assert int(together.tokens) == 2 * sum(len(answer) + 1 for answer in ANSWERS)
    np.testing.assert_array_equal(
        np.asarray(together.right)[:, :3].ravel(), [bool(one.right[0, 0]) for one in alone]
    )


@pytest.mark.parametrize("k", [None, 0.7])
def test_an_answer_is_right_if_greedy_decoding_generates_it(k):
    """The answer from greedy decoding is right; with another last token it is wrong."""
    model = tiny_model()
    clip = video(3, 5)
    compression = None if k is None else DyCoke(k=k, p=0.0)
    said = model.generate([clip], ["What is it?"], compression=compression, decoding=Decoding(6))[
        0
    ].token_ids
    batch = pack(TOKENIZER, [Example(clip, ("What is it?",), ("......",))], 80)
    place = np.flatnonzero(np.asarray(batch.is_answer[0]))[:6]
    ids = np.array(batch.ids)
    ids[0, place] = said
    is_answer = np.zeros_like(np.asarray(batch.is_answer))
    is_answer[0, place] = True
    dropping = None if k is None else TokenDropping(k)
    right = batch._replace(ids=jnp.asarray(ids), is_answer=jnp.asarray(is_answer))
    assert bool(score_answers(model.model, right, dropping=dropping).right[0, 0])
    ids[0, place[-1]] = (ids[0, place[-1]] + 1) % 256
    wrong = right._replace(ids=jnp.asarray(ids))
    assert not bool(score_answers(model.model, wrong, dropping=dropping).right[0, 0])


def test_random_dropping_depends_on_its_key_alone():
    model = tiny_model(layers=1)
    batch = pack(TOKENIZER, [example()], 200)
    losses = [
        float(
            score_answers(
                model.model,
                batch,
                dropping=TokenDropping(0.7, at_random=True),
                key=jax.random.key(seed),
            ).loss
        )
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def stacked(*batches):
    return jax.tree.map(lambda *x: jnp.stack(x), *batches)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """The two halves of the batch hold different numbers of answer tokens."""
    model = tiny_model(layers=1)
    settings = Optimisation(steps=4, learning_rate=1e-3, warm_up=0)
    examples = [example(0), example(1, QUESTIONS[:1], ANSWERS[:1])]
    one = stacked(pack(TOKENIZER, examples, 200))
    two = stacked(*(pack(TOKENIZER, [e], 200) for e in examples))
    whole, measured = train_step(settings, start(settings, model.model), one)
    parts, again = train_step(settings, start(settings, model.model), two)
    assert float(measured.loss) == pytest.approx(float(again.loss), rel=1e-5)
    assert float(measured.gradient) == pytest.approx(float(again.gradient), rel=1e-4)
    assert int(parts.step) == int(whole.step) == 1


def test_learning_rate_has_a_second_cycle():
    """Before its first step, the learning rate is the same as without it."""
    cycles = (Cycle(20, 4e-3),)
    twice = Optimisation(30, learning_rate=1e-2, warm_up=5, cycles=cycles)
    rates = [float(schedule(twice)(step)) for step in range(30)]
    once = schedule(Optimisation(20, learning_rate=1e-2, warm_up=5))
    assert rates[:20] == [float(once(step)) for step in range(20)]
    assert rates[20] == 0
    assert max(rates[20:]) == rates[25] == pytest.approx(4e-3)
    assert rates[25:] == sorted(rates[25:], reverse=True)


def test_rematerialisation_leaves_the_gradient_as_it_is():
    model = tiny_model(layers=1)
    batch = stacked(pack(TOKENIZER, [example()], 200))
    plain = Optimisation(steps=4, learning_rate=1e-3, warm_up=0)
    metrics = [
        train_step(settings, start(settings, model.model), batch)[1]
        for settings in (plain, replace(plain, rematerialise=True))
    ]
    assert float(metrics[0].gradient) == pytest.approx(float(metrics[1].gradient), rel=1e-4)


def test_bfloat16_keeps_float32_weights():
    model = tiny_model(layers=1)
    batch = stacked(pack(TOKENIZER, [example()], 200))
    settings = Optimisation(steps=4, learning_rate=1e-3, warm_up=0)
    half = replace(settings, dtype="bfloat16")
    state, metrics = train_step(half, start(half, model.model), batch)
    exact = train_step(settings, start(settings, model.model), batch)[1]
    assert {x.dtype for x in state.model.params.values()} == {jnp.dtype("float32")}
    assert float(metrics.loss) == pytest.approx(float(exact.loss), rel=0.05)


@pytest.mark.parametrize("frozen", ["tower", "projector", "language"])
def test_frozen_modules_stay_as_they_are(frozen):
    model = tiny_model(layers=1)
    settings = Optimisation(steps=4, learning_rate=1e-2, warm_up=0, **{frozen: 0.0})
    batch = stacked(pack(TOKENIZER, [example()], 200))
    state, _ = train_step(settings, start(settings, model.model), batch)
    for path, weight in state.model.params.items():
        same = bool((weight == model.params[path]).all())
        assert same == (module_of(path) == frozen), path


def test_frozen_layers_stay_as_they_are_and_have_no_moments():
    model = tiny_model(layers=3)
    settings = Optimisation(steps=4, learning_rate=1e-2, warm_up=0, frozen_layers=2)
    batch = stacked(pack(TOKENIZER, [example()], 200))
    before = start(settings, model.model)
    held = {x.shape for x in jax.tree.leaves(before.optimiser)}
    assert model.params["language_model.embed_tokens.weight"].shape in held
    moments = sum(x.size for x in jax.tree.leaves(before.optimiser))
    frozen = ("language_model.layers.0.", "language_model.layers.1.")
    trained = sum(x.size for path, x in model.params.items() if not path.startswith(frozen))
    assert 2 * trained <= moments < 2 * trained + 100
    state, _ = train_step(settings, before, batch)
    for path, weight in state.model.params.items():
        same = bool((weight == model.params[path]).all())
        assert same == path.startswith(frozen), path


class TwoTasks:
    """Six steps on still pictures, then steps on clips, some of which drop visual tokens."""

    pictures = TaskSource(TOKENIZER, 98, SceneSettings(1, 1, 1), BatchShape(4, 1, 200))
    clips = TaskSource(
        TOKENIZER,
        98,
        SceneSettings(6, 1, 2),
        BatchShape(1, 2, 600),
        TokenDroppingMix(0.4, 0.3, 0.7),
    )

    def step(self, number):
        return (self.pictures if number < 6 else self.clips).step(number)


def initial():
    return tiny_model(layers=1).model


def new_run(folder, source, optimisation, **settings):
    return Run(
        folder=folder,
        config=tiny_model(layers=1).config,
        initial=initial,
        source=source,
        optimisation=optimisation,
        save_tokenizer=TOKENIZER.save_pretrained,
        **({"described": {}} | settings),
    )


def run(folder, source=None):
    return train(
        new_run(
            folder,
            source or TwoTasks(),
            Optimisation(steps=12, learning_rate=3e-3, warm_up=2),
            described={"seed": 0},
            intervals=Intervals(log_every=1, evaluate_every=5, save_every=4),
            evaluate=lambda model: {"norm": float(jnp.linalg.norm(model.params["image_newline"]))},
        )
    )


class Killed(BaseException):
    """Simulates a killed process: no code in the package catches it."""


class Cut(TwoTasks):
    """Raises ``Killed`` instead of giving the data of the tenth step."""

    def step(self, number):
        if number == 9:
            raise Killed
        return super().step(number)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    """A run killed after nine steps resumes after step 8; its log has each step once."""
    straight = run(tmp_path / "straight")
    with pytest.raises(Killed):
        run(tmp_path / "cut", Cut())
    resumed = run(tmp_path / "cut")
    for path, weight in straight.params.items():
        np.testing.assert_array_equal(weight, resumed.params[path], err_msg=path)
    with ocp.training.Checkpointer(tmp_path / "straight" / "state") as saved:
        names = saved.metadata(12).metadata
    # Earlier versions wrote and read these names.
    assert names.keys() == {"step", "params", "optimiser"}
    assert names["params"].keys() == straight.params.keys()
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("straight", "cut")
    ]
    assert [entry["step"] for entry in logs[1]] == list(range(1, 13))
    assert [entry["loss"] for entry in logs[0]] == [entry["loss"] for entry in logs[1]]
    assert [entry["step"] for entry in logs[0] if "evaluation" in entry] == [5, 10, 12]


def test_a_state_is_read_by_the_names_of_earlier_runs(tmp_path):
    """The state of a finished run, written by hand as a plain dict, gives the trained model."""
    settings = Optimisation(steps=1)
    params = {path: x + 1 for path, x in initial().params.items()}
    moments = start(settings, initial()).optimiser
    with ocp.training.Checkpointer(tmp_path / "state") as saved:
        saved.save(1, {"step": jnp.int32(1), "params": params, "optimiser": moments})
    (tmp_path / "run.json").write_text("{}\n")
    trained = train(new_run(tmp_path, TwoTasks.pictures, settings))
    assert trained.params.keys() == params.keys()
    for path, weight in params.items():
        np.testing.assert_array_equal(trained.params[path], weight, err_msg=path)


@pytest.mark.slow
def test_loss_falls_from_scratch(tmp_path):
    """From chance over 320 token ids (5.8 nats) to below 2.5 nats in 80 steps on pictures."""
    settings = Optimisation(steps=80, learning_rate=1e-2, warm_up=5)
    model = initial()
    params = {k: v / 10 if v.ndim > 1 else v for k, v in model.params.items()}
    small = new_run(tmp_path / "run", TwoTasks.pictures, settings)
    train(replace(small, initial=lambda: replace(model, params=params)))
    entries = [json.loads(x) for x in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert entries[-1]["step"] == 80
    assert entries[-1]["loss"] < 2.5


def test_training_in_several_processes_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(DycokeError, match="2 processes run together, and training works in one"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": 1}\n')
    with pytest.raises(DycokeError, match=r"other settings \(seed\)"):
        run(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(DycokeError, match="holds no training run"):
        run(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_questions_that_do_not_fit_a_row_are_refused_or_left_out():
    with pytest.raises(DycokeError, match="tokens, and 20 are allowed"):
        pack(TOKENIZER, [example()], 20)
    first = len(encode_part(TOKENIZER, QUESTIONS[0], ANSWERS[0]).ids)
    batch = pack(TOKENIZER, [example()], first + 10)
    assert set(np.unique(batch.part)) == {0, 1}
    with pytest.raises(DycokeError, match="answer is empty"):
        pack(TOKENIZER, [example(answers=("", "red", "two"))], 200)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"tower": -1.0}, "tower is -1"),
        ({"frozen_layers": -1}, "frozen_layers is -1"),
        ({"cycles": (Cycle(4, 1e-3),)}, "give ascending steps within the run"),
        ({"language": 0.0, "tower": 0.0, "projector": 0.0}, "everything is frozen"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(DycokeError, match=message):
        Optimisation(**({"steps": 4} | changes))
