"""Training on a mesh: the same steps as on one device, with weights and moments spread."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh
from support.command_line import run_main
from support.train_on_mesh import CASES, model

from dycoke_jax import DycokeError
from dycoke_jax.assets import TINY
from dycoke_jax.cli import learning
from dycoke_jax.training.fine_tuning import FineTuning, fine_tune
from dycoke_jax.training.placement import check_rows
from dycoke_jax.training.run import Intervals

# Softmax is the same whatever is added to all keys, so this bias has no gradient, and what the
# optimiser makes of rounding errors is noise. (In the language model, keys are rotated afterwards.)
NO_GRADIENT = tuple(f"vision_tower.layers.{n}.self_attn.k_proj.bias" for n in (0, 1))
# What tensor parallelism over eight devices divides; two KV heads stay whole.
SPREAD = ("q_proj.weight", "q_proj.bias", "o_proj.weight", "gate_proj.weight", "up_proj.weight",
          "down_proj.weight", "embed_tokens.weight", "lm_head.weight")  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What eight simulated devices do, and one."""
    command = [sys.executable, "-m", "support.train_on_mesh", tmp_path_factory.mktemp("runs")]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_same(weights):
    """Weights are the same to rounding, a hundredth of what three steps changed or less."""
    for path, (apart, changed) in weights.items():
        if path not in NO_GRADIENT:
            assert apart < 1e-5, path
            assert changed > 1e-3, path
    assert weights.keys() >= set(NO_GRADIENT)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_three_steps_on_a_mesh_are_those_on_one_device(found, case):
    """Loss and gradient of each step and the weights after them; some rows have no clip."""
    one, other = found[case]["metrics"]
    assert len(one) == 3
    for (loss, gradient), (loss_on_mesh, gradient_on_mesh) in zip(one, other, strict=True):
        assert loss_on_mesh == pytest.approx(loss, rel=1e-5)
        assert gradient_on_mesh == pytest.approx(gradient, rel=1e-5)
    assert_same(found[case]["weights"])


def shares(case):
    """Bytes of float32 weights on each device, by hand."""
    newline = CASES[case][3]
    total = 0
    for path, weight in model(newline).params.items():
        size = 4 * weight.size
        # The only axis of a bias of heads is that of tensor parallelism.
        of_heads = path.startswith("language") and path.endswith("proj.bias")
        if case == "FSDP" and any(width % 8 == 0 for width in weight.shape) and not of_heads:
            size //= 8
        if case == "tensor" and path.startswith(("language", "lm_head")) and path.endswith(SPREAD):
            size //= 8
        total += size
    return total


@pytest.mark.slow
@pytest.mark.parametrize("case", ["data", "tensor", "FSDP"])
def test_each_device_holds_its_part_of_weights_and_moments(found, case):
    assert found[case]["bytes"] == [shares(case)] * 8
    assert found[case]["bytes of moments"] == [2 * shares(case)] * 8


@pytest.mark.slow
def test_a_step_with_FSDP_never_holds_all_weights_of_the_model_at_once(found):
    """Not even with its temporaries; with and without rematerialised layers.

    Where weights are gathered at the start of the program, temporaries are 1.5 times the weights.
    """
    for temporaries, weights in found["memory"]:
        assert weights > 10e6
        assert temporaries < weights


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one to FSDP", "FSDP to one"])
def test_a_run_is_resumed_on_another_mesh(found, name):
    """The model that it writes is that of a straight run, and so is the held-out loss."""
    assert_same(found["resumed"][name]["weights"])
    losses = [run["log"][-1]["evaluation"]["loss"] for run in found["resumed"].values()]
    assert losses[0] == pytest.approx(losses[1], abs=1.1e-4)  # rounded to four decimals
    assert [entry["step"] for entry in found["resumed"][name]["log"]] == [3]


def test_all_cases_differ_in_how_they_are_spread():
    assert len({(sizes, fsdp) for sizes, fsdp, *_ in CASES.values()}) == len(CASES)


def test_rows_that_a_mesh_does_not_divide_are_refused(tmp_path, unchecked_types):
    mesh = AbstractMesh((4, 2), ("data", "model"))
    with pytest.raises(DycokeError, match=r"rows is 6; .* data=4, so it must be a multiple of 4"):
        check_rows(6, mesh)
    check_rows(8, mesh)
    check_rows(3, None)
    with pytest.raises(DycokeError, match=r"rows is 1; .* data=4"):
        fine_tune(tmp_path, FineTuning(str(TINY)), Intervals(), mesh=mesh)
    assert not list(tmp_path.iterdir())


def test_the_command_line_trains_on_a_mesh(tmp_path, monkeypatch):
    calls = []

    def fine_tune(folder, *_, mesh, fsdp):
        calls.append((dict(mesh.shape), fsdp))
        return folder

    monkeypatch.setattr(learning, "fine_tune", fine_tune)
    run = ("train", tmp_path, "--model", TINY, "--mesh", "data=1,model=1", "--fsdp")
    assert run_main(*run)[0] == 0
    assert calls == [({"data": 1, "model": 1}, True)]
    code, _, err = run_main(*run[:-2], "data=2")
    assert code == 2
    assert "needs 2 devices, and there are 1" in err
