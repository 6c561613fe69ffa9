"""Checkpoints restored onto a mesh: each device gets its part, whatever mesh they were saved on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import read_tensors, tiny_llava_hf
from support.restore_on_mesh import CASES

from dycoke_jax.checkpoint import convert

pytestmark = pytest.mark.slow

# By hand: what lies in parts along ``model``, of these matrices and biases of heads. There are two
# KV heads, which neither four nor eight devices divide.
MATRICES = ("q_proj.weight", "o_proj.weight", "gate_proj.weight", "up_proj.weight",
            "down_proj.weight", "embed_tokens.weight", "lm_head.weight")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random bfloat16 weights in several shards, and the same converted."""
    folder = tmp_path_factory.mktemp("restored")
    text = {"num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 20_000}
    tiny_llava_hf(folder / "hf", dtype="bfloat16", shards="1MB", text=text)
    convert(folder / "hf", folder / "orbax")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What a process with eight devices restores."""
    command = [sys.executable, "-m", "support.restore_on_mesh", folder]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def sizes(folder):
    """Name and number of elements of each weight of the model, and whether it is a vector."""
    for name, array in read_tensors(folder / "hf").items():
        if "post_layernorm" not in name:
            yield name, array.size, array.ndim == 1


def share(folder, model, data=1):
    """Elements on a device where ``model`` devices spread matrices, and ``data`` with FSDP."""
    total = 0
    for name, size, is_vector in sizes(folder):
        language = "language_model" in name and "vision_tower" not in name
        of_heads = language and name.endswith("q_proj.bias")
        in_parts = (language and name.endswith(MATRICES)) or of_heads
        # A vector has a single axis, which is spread once.
        divided = (model if in_parts else 1) * (1 if is_vector and in_parts else data)
        assert size % divided == 0
        total += size // divided
    return total


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_each_device_gets_its_slices_and_each_is_read_once(found, folder, kind):
    whole = 2 * sum(size for _, size, _ in sizes(folder))
    expected = {
        "data": 2 * share(folder, 1),
        "tensor": 2 * share(folder, 8),
        "FSDP and tensor": 2 * share(folder, 4, data=2),
        "float32": 4 * share(folder, 4, data=2),
    }
    assert expected["data"] == whole
    for name, share_of_device in expected.items():
        case = found[f"{kind} {name}"]
        assert case["bytes"] == [share_of_device] * 8
        if kind == "hf":  # Orbax reads whole chunks, and some for one device after another.
            assert case["read"] == whole


@pytest.mark.parametrize("case", CASES)
def test_weights_on_a_mesh_are_those_of_the_files_in_the_dtype_asked_for(found, case):
    dtype, weights = CASES[case][3:]
    assert found[case]["unlike"] == []
    kinds = ["bfloat16", "float32", "int8"] if weights else [dtype or "bfloat16"]
    assert found[case]["dtypes"] == kinds


def test_a_training_state_is_read_on_another_mesh_than_it_was_saved_on(found, folder):
    state = found["another mesh"]
    assert state["unlike"] == []
    assert state["placed"]
    assert sum(state["bytes"]) > 4 * sum(size for _, size, _ in sizes(folder))


def test_converted_weights_are_in_the_ocdbt_format(folder):
    """Its database is the file ``manifest.ocdbt``; there is no folder for each weight."""
    state = folder / "orbax" / "params" / "state"
    assert (state / "manifest.ocdbt").is_file()
    assert not list(state.rglob("*embed_tokens*"))
