"""A model spread over a mesh: the same answers as on one device, and each device has its part."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from support.command_line import run_main
from support.on_mesh import MESHES, METHODS, OTHERS

from dycoke_jax import DycokeError
from dycoke_jax.config import PRESETS, TINY
from dycoke_jax.models.llava import abstract_params
from dycoke_jax.sharding import (
    check_mesh,
    kv_heads_on,
    make_mesh,
    parse_mesh,
    weight_spec,
)

CASES = [
    *(f"{newline} {name} {sizes}" for newline in ("one_token", "grid") for name in METHODS
      for sizes in MESHES),
    *OTHERS,
    "fsdp data=8,model=1",
    "fsdp data=2,model=4",
    "int8 KV",
    "heads that the mesh does not divide",
]  # fmt: skip
HALF, SEVEN, SEVENTY_TWO = (PRESETS[f"onevision-{size}"] for size in ("0.5b", "7b", "72b"))
ATTENTION = "language_model.layers.3.self_attn."


def mesh_of(data, model):
    """A mesh without devices: enough to look things up."""
    return AbstractMesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def found():
    """What eight simulated devices give, and one."""
    command = [sys.executable, "-m", "support.on_mesh"]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_mesh_of_eight_devices_answers_as_one_device_does(found, case):
    """Batches with rows of unequal lengths and an empty row; logits of random weights are about 1.

    Ids of 6 to 12 tokens a row, and how many visual tokens each step attended to, are equal.
    """
    one = found[case]
    assert one["spread"] > 0.5
    assert one["logits"] < 1e-4
    ours, theirs = one["ids"]
    assert ours == theirs
    assert len({tuple(ids) for ids in ours}) == 7
    assert one["attended"][0] == one["attended"][1]
    assert one["likelihoods"] < 1e-4


@pytest.mark.slow
def test_all_cases_were_run(found):
    assert list(found) == CASES


@pytest.mark.parametrize("config", [HALF, SEVEN, SEVENTY_TWO], ids=["0.5b", "7b", "72b"])
@pytest.mark.parametrize("model", [1, 2, 4, 8, 16])
def test_every_weight_of_the_released_models_can_be_spread(config, model):
    """An axis that a mesh spreads must be a multiple of its devices; checked for FSDP too."""
    mesh = mesh_of(8, model)
    for path, leaf in abstract_params(config).items():
        for fsdp in (False, True):
            spec = weight_spec(path, leaf.shape, config, mesh, fsdp=fsdp)
            assert len(spec) <= len(leaf.shape)
            for width, axis in zip(leaf.shape, spec, strict=False):
                assert axis is None or width % mesh.shape[axis] == 0, path


def test_a_7b_model_takes_a_quarter_of_its_language_model_on_each_of_four_devices():
    mesh, total, share = mesh_of(2, 4), 0, 0
    for path, leaf in abstract_params(SEVEN).items():
        if path.startswith(("language_model.layers", "lm_head", "language_model.embed")):
            size = int(np.prod(leaf.shape))
            total += size
            share += size // (4 if weight_spec(path, leaf.shape, SEVEN, mesh) else 1)
    # Norms and the bias of the output, which are on every device, are a ten-thousandth.
    assert total / 4 <= share < total / 4 * 1.0002


def test_weights_are_spread_by_heads_inner_width_and_vocabulary():
    mesh = mesh_of(2, 4)

    def spec(path, **settings):
        shape = abstract_params(SEVEN)[path].shape
        return weight_spec(path, shape, SEVEN, mesh, **settings)

    assert spec(ATTENTION + "q_proj.weight") == P("model")
    assert spec(ATTENTION + "k_proj.bias") == P("model")
    assert spec(ATTENTION + "o_proj.weight") == P(None, "model")
    assert spec("language_model.layers.0.mlp.down_proj.weight") == P(None, "model")
    assert spec("lm_head.weight") == P("model")
    assert spec("language_model.layers.0.input_layernorm.weight") == P()
    assert spec("vision_tower.layers.0.mlp.fc1.weight") == P()
    assert spec(ATTENTION + "q_proj.weight", fsdp=True) == P("model", "data")
    assert spec("vision_tower.layers.0.mlp.fc1.weight", fsdp=True) == P("data")
    # The scales of an int8 matrix belong to its rows.
    path = ATTENTION + "q_proj.weight_scale"
    assert weight_spec(path, (3584,), SEVEN, mesh) == P("model")
    path = ATTENTION + "o_proj.weight_scale"
    assert weight_spec(path, (3584,), SEVEN, mesh) == P()


def test_kv_heads_are_repeated_where_there_are_fewer_than_devices():
    """The 72B model has 64 query heads and 8 KV heads, the 0.5B model 14 and 2."""
    assert [kv_heads_on(SEVENTY_TWO.text, mesh_of(1, n)) for n in (1, 4, 8, 16, 32)] == [
        8, 8, 8, 16, 32,
    ]  # fmt: skip
    assert [kv_heads_on(HALF.text, mesh_of(1, n)) for n in (1, 2, 7, 14)] == [2, 2, 14, 14]
    # Its heads are whole on each device where they cannot be divided.
    assert kv_heads_on(HALF.text, mesh_of(1, 4)) == 2
    path = ATTENTION + "q_proj.weight"
    assert weight_spec(path, (896, 896), HALF, mesh_of(1, 4)) == P()
    assert weight_spec(path, (896, 896), HALF, mesh_of(1, 7)) == P("model")


def test_sizes_of_a_mesh_are_read():
    assert parse_mesh("data=2, model=4") == {"data": 2, "model": 4}
    assert parse_mesh("model=8") == {"data": 1, "model": 8}
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "model": 1}
    assert mesh.axis_names == ("data", "model")


@pytest.mark.parametrize("text", ["", "data", "data=0", "model=-2", "data=2,data=2", "tensor=2"])
def test_a_mesh_that_cannot_be_read_shows_how_to_write_it(text):
    with pytest.raises(DycokeError, match="as in data=2,model=4"):
        parse_mesh(text)


def test_a_mesh_that_cannot_work_says_why():
    with pytest.raises(DycokeError, match=r"needs 8 devices, and there are 1; .* product is 1"):
        make_mesh("data=2,model=4")
    with pytest.raises(DycokeError, match=r"model=5 does not divide the inner width \d+ .*: 1, 2"):
        check_mesh(TINY, mesh_of(1, 5))
    other = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,))
    with pytest.raises(DycokeError, match="must have data and model"):
        check_mesh(TINY, other)


def test_the_command_line_refuses_a_mesh_in_one_line():
    code, _, err = run_main("generate", "--model", "none", "--prompt", "?", "--mesh", "x=2")
    assert code == 2
    assert "as in data=2,model=4" in err
    assert "Traceback" not in err
