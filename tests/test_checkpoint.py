"""Checkpoints that are as they should be: located, loaded, converted and exported, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from support.checkpoints import (
    lmms_lab_name,
    read_tensors,
    same_bits,
    tiny_llava_hf,
    to_lmms_lab,
    write_tensors,
)
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_jax.checkpoint import convert, export, load_params, locate, open_folder
from dycoke_jax.checkpoint.names import LAYOUTS, detect_layout, llava_hf_name, path_of
from dycoke_jax.models.llava import abstract_params

ROOT = Path(__file__).parent.parent
POST_NORM = "vision_tower.post_layernorm."
EMBEDDING = "language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_hf(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def lmms_lab(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_lmms_lab(hf, tmp_path_factory.mktemp("lmms") / "model")


@pytest.fixture(scope="module")
def converted(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orbax") / "model"
    convert(hf, folder)
    return folder


def load(folder: Path, **arguments: object) -> dict[str, np.ndarray]:
    params = load_params(open_folder(folder), **arguments)
    return {path: np.asarray(array) for path, array in params.items()}


def rename(source: Path, target: Path, names: dict[str, str]) -> Path:
    """A copy of a checkpoint with some tensors renamed."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = read_tensors(source)
    write_tensors(target, {names.get(name, name): array for name, array in tensors.items()})
    return target


# --- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_layout_loads_to_the_same_parameters(tmp_path: Path, dtype: str, tied: bool):
    hf = tiny_llava_hf(tmp_path / "hf", tied=tied, dtype=dtype)
    lmms_lab = to_lmms_lab(hf, tmp_path / "lmms")
    convert(lmms_lab, tmp_path / "orbax")
    params = load(hf)
    expected = abstract_params(open_folder(hf).config)
    assert {path: array.shape for path, array in params.items()} == {
        path: leaf.shape for path, leaf in expected.items()
    }
    assert ("lm_head.weight" in params) is not tied
    assert {str(array.dtype) for array in params.values()} == {dtype}
    assert same_bits(params, load(lmms_lab))
    assert same_bits(params, load(tmp_path / "orbax"))
    tensors = read_tensors(hf)
    assert all(params[path].tobytes() == tensors[llava_hf_name(path)].tobytes() for path in params)


def test_the_names_that_hub_files_and_modules_have_load_as_well(hf: Path, tmp_path: Path):
    on_the_hub = {
        name: name.replace("vision_tower.", "vision_tower.vision_model.")
        for name in read_tensors(hf)
    }
    modules = {
        name: "model."
        + name.replace("language_model.model.", "language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
        for name in read_tensors(hf)
    }
    modules["language_model.lm_head.weight"] = "lm_head.weight"
    expected = load(hf)
    assert same_bits(load(rename(hf, tmp_path / "hub", on_the_hub)), expected)
    assert same_bits(load(rename(hf, tmp_path / "modules", modules)), expected)


def test_sharded_files_load_through_their_index(hf: Path, tmp_path: Path):
    sharded = tiny_llava_hf(tmp_path / "sharded", shards="60KB")
    assert len([*sharded.glob("*.safetensors")]) > 5
    assert same_bits(load(sharded), load(hf))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float16", np.float32])
def test_loading_casts_alike_from_both_kinds(hf: Path, converted: Path, dtype: object):
    expected = {path: array.astype(np.dtype(dtype)) for path, array in load(hf).items()}
    assert same_bits(load(hf, dtype=dtype), expected)
    assert same_bits(load(converted, dtype=dtype), expected)


def test_loaded_parameters_are_arrays_of_the_default_device(hf: Path, converted: Path):
    for folder in (hf, converted):
        params = load_params(open_folder(folder))
        assert {array.sharding for array in params.values()} == {jnp.zeros(()).sharding}
        assert all(isinstance(array, jax.Array) for array in params.values())


def test_unused_tensors_are_left_out(tmp_path: Path):
    """An unused last block, the head, rotary tables and position ids: known, and not loaded."""
    hf = tiny_llava_hf(tmp_path / "hf", vision={"vision_use_head": True}, vision_feature_layer=-2)
    tensors = read_tensors(hf)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["vision_tower.embeddings.position_ids"] = np.arange(16)[None]
    write_tensors(hf, tensors)
    params = load(hf)
    assert "vision_tower.layers.1.mlp.fc1.weight" in params
    assert "vision_tower.layers.2.mlp.fc1.weight" not in params
    assert params.keys() == abstract_params(open_folder(hf).config).keys()


@pytest.mark.parametrize("kind", ["hf", "converted"])
def test_progress_counts_stored_bytes_and_ends_at_the_total(
    kind: str, request: pytest.FixtureRequest
):
    calls: list[tuple[str, int, int]] = []
    params = load(
        request.getfixturevalue(kind),
        dtype="bfloat16",
        progress=lambda *call: calls.append(call),
    )
    total = sum(2 * array.nbytes for array in params.values())
    assert {call[0] for call in calls} == {"loading weights, bytes"}
    done = [call[1] for call in calls]
    assert [call[2] for call in calls] == [total] * len(params)
    assert done[-1] == total
    assert sorted(set(done)) == done, "each call tells of one more tensor"


# --- conversion and export ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tied", "dtype", "shards"),
    [
        (False, "float32", None),
        (False, "bfloat16", "40KB"),
        (True, "float16", None),
        (True, "float32", "40KB"),
    ],
)
def test_round_trip_is_bit_exact(tmp_path: Path, tied: bool, dtype: str, shards: str | None):
    source = tiny_llava_hf(tmp_path / "source", tied=tied, dtype=dtype, shards=shards)
    convert(source, tmp_path / "orbax")
    limit = 5_000_000_000 if shards is None else 40_000
    export(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=limit)
    assert same_bits(read_tensors(source), read_tensors(tmp_path / "back"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "orbax" / name).read_bytes() == (source / name).read_bytes()
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "back" / "model.safetensors").exists() is (shards is None)


def test_round_trip_carries_what_the_model_does_not_use(tmp_path: Path):
    source = tiny_llava_hf(
        tmp_path / "source", vision={"vision_use_head": True}, vision_feature_layer=-2
    )
    convert(source, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back")
    tensors = read_tensors(source)
    assert "vision_tower.head.probe" in tensors
    assert "vision_tower.encoder.layers.2.mlp.fc1.weight" in tensors
    assert same_bits(tensors, read_tensors(tmp_path / "back"))


def test_mixed_dtypes_stay_as_they_are(hf: Path, tmp_path: Path):
    dtypes = [np.dtype(np.float16), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)]
    source = rename(hf, tmp_path / "source", {})
    tensors = {
        name: array.astype(dtypes[i % 3])
        for i, (name, array) in enumerate(read_tensors(source).items())
    }
    write_tensors(source, tensors)
    convert(source, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=50_000)
    assert same_bits(tensors, read_tensors(tmp_path / "back"))
    assert same_bits(load(source), load(tmp_path / "orbax"))


def test_a_clone_of_the_embedding_in_a_tied_checkpoint_is_dropped(tmp_path: Path):
    source = tiny_llava_hf(tmp_path / "source", tied=True, dtype="bfloat16")
    tensors = read_tensors(source)
    clone = tensors["language_model.model.embed_tokens.weight"].copy()
    write_tensors(source, {**tensors, "language_model.lm_head.weight": clone})
    assert "lm_head.weight" not in load(source)
    export(source, tmp_path / "back")
    assert same_bits(tensors, read_tensors(tmp_path / "back"))


@pytest.mark.parametrize("kind", ["hf", "lmms_lab", "converted"])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 50_000])
@pytest.mark.filterwarnings("error")
def test_transformers_loads_what_is_exported(
    kind: str, shard_bytes: int, tmp_path: Path, request: pytest.FixtureRequest
):
    source = request.getfixturevalue(kind)
    export(source, tmp_path / "back", max_shard_bytes=shard_bytes)
    model, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(info.values()), info
    original = request.getfixturevalue("hf")
    reference = LlavaOnevisionForConditionalGeneration.from_pretrained(original).state_dict()
    state = model.state_dict()
    assert state.keys() == reference.keys()
    assert all(torch.equal(state[name], reference[name]) for name in state)
    model.save_pretrained(tmp_path / "again")
    assert same_bits(read_tensors(tmp_path / "again"), read_tensors(tmp_path / "back"))


def test_tied_lmms_lab_export_loads_in_transformers(tmp_path: Path):
    hf = tiny_llava_hf(tmp_path / "hf", tied=True, dtype="bfloat16")
    lmms_lab = to_lmms_lab(hf, tmp_path / "lmms", mm_newline_position="grid")
    export(lmms_lab, tmp_path / "back")
    model, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert same_bits(read_tensors(hf), read_tensors(tmp_path / "back"))
    # What transformers has no word for survives all the same.
    assert open_folder(tmp_path / "back").config == open_folder(lmms_lab).config
    assert open_folder(tmp_path / "back").config.newline == "grid"


def test_export_makes_the_towers_final_norm_where_there_is_none(hf: Path, tmp_path: Path):
    source = rename(hf, tmp_path / "source", {})
    tensors = {k: v for k, v in read_tensors(source).items() if not k.startswith(POST_NORM)}
    write_tensors(source, tensors)
    export(source, tmp_path / "back", dtype="float16")
    exported = read_tensors(tmp_path / "back")
    made = {name: array for name, array in exported.items() if name.startswith(POST_NORM)}
    assert same_bits(
        made,
        {
            POST_NORM + "weight": np.ones(48, np.float16),
            POST_NORM + "bias": np.zeros(48, np.float16),
        },
    )
    _, info = LlavaOnevisionForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(info.values()), info


def test_dropped_blocks_of_an_lmms_lab_tower_are_not_exported(lmms_lab: Path, tmp_path: Path):
    """The configuration that is made for them describes only the blocks that are run."""
    prefix = "model.vision_tower.vision_tower.vision_model.encoder.layers."
    source = rename(lmms_lab, tmp_path / "source", {})
    tensors = read_tensors(source)
    last = {
        name.replace(prefix + "2.", prefix + "3."): array + 1
        for name, array in tensors.items()
        if name.startswith(prefix + "2.")
    }
    write_tensors(source, tensors | last)
    convert(source, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back")
    assert {lmms_lab_name(name) for name in read_tensors(tmp_path / "back")} == tensors.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conversion_casts_and_says_so_in_the_exported_config(hf: Path, tmp_path: Path, dtype: str):
    convert(hf, tmp_path / "orbax", dtype=dtype)
    export(tmp_path / "orbax", tmp_path / "back")
    cast = {name: array.astype(np.dtype(dtype)) for name, array in read_tensors(hf).items()}
    assert same_bits(read_tensors(tmp_path / "back"), cast)
    export(hf, tmp_path / "direct", dtype=dtype)
    assert same_bits(read_tensors(tmp_path / "direct"), cast)
    for name in ("back", "direct"):
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == dtype
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / name)
        assert model.dtype == getattr(torch, dtype)


def test_a_converted_folder_converts_again(converted: Path, tmp_path: Path):
    convert(converted, tmp_path / "again", dtype="bfloat16")
    assert same_bits(load(tmp_path / "again"), load(converted, dtype="bfloat16"))


@pytest.mark.slow
def test_a_group_boundary_falls_anywhere(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Many groups on writing and on reading give what one group gives."""
    monkeypatch.setattr("dycoke_jax.checkpoint.orbax_folder._WRITE_BYTES", 30_000)
    monkeypatch.setattr("dycoke_jax.checkpoint.orbax_folder._READ_BYTES", 20_000)
    monkeypatch.setattr("dycoke_jax.checkpoint.orbax_folder._CHUNK_BYTES", 1_000)
    convert(hf, tmp_path / "orbax")
    assert same_bits(load(tmp_path / "orbax"), load(hf))
    export(tmp_path / "orbax", tmp_path / "back")
    assert same_bits(read_tensors(tmp_path / "back"), read_tensors(hf))


def test_tokenizer_and_processor_files_travel(hf: Path, tmp_path: Path):
    source = rename(hf, tmp_path / "source", {})
    companions = [
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "generation_config.json",
    ]
    for name in [*companions, "README.md", "training_args.bin", "modeling.py"]:
        (source / name).write_text(f"this is {name}")
    convert(source, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back")
    for folder, weights in (("orbax", "params"), ("back", "model.safetensors")):
        files = {path.name for path in (tmp_path / folder).iterdir()}
        assert files == {*companions, "config.json", weights}
        for name in companions:
            assert (tmp_path / folder / name).read_text() == f"this is {name}"


def test_conversion_reports_progress_and_leaves_only_the_destination(hf: Path, tmp_path: Path):
    calls: list[tuple[str, int, int]] = []
    convert(hf, tmp_path / "a" / "orbax", progress=lambda *call: calls.append(call))
    assert [*(tmp_path / "a").iterdir()] == [tmp_path / "a" / "orbax"]
    total = sum(array.nbytes for array in read_tensors(hf).values())
    assert calls[-1] == ("converting, bytes", total, total)
    assert len(calls) == len(read_tensors(hf))
    calls.clear()
    export(tmp_path / "a" / "orbax", tmp_path / "b", progress=lambda *call: calls.append(call))
    assert calls[-1] == ("converting, bytes", total, total)


# --- locating ----------------------------------------------------------------------------------


def test_locate_takes_folders_as_they_are(
    hf: Path, converted: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(hf.parent)
    assert locate("model") == hf
    assert locate(hf) == hf
    assert open_folder(hf).kind == "hf"
    assert open_folder(converted).kind == "orbax"


def test_locate_asks_the_hub_for_weights_and_settings_only(
    hf: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = {}

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(hf)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_folder("lmms-lab/llava-onevision-qwen2-0.5b-ov").path == hf
    (patterns,) = asked.values()
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".py", ".pth", "*")) for pattern in patterns)


def test_links_out_of_the_folder_are_followed(hf: Path, tmp_path: Path):
    """The hub's cache is made of links to files elsewhere."""
    for file in hf.iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert same_bits(load(tmp_path), load(hf))
    export(tmp_path, tmp_path / "back")
    assert not any(path.is_symlink() for path in (tmp_path / "back").iterdir())


# --- names -------------------------------------------------------------------------------------


def test_name_tables_know_their_own_layout(hf: Path, lmms_lab: Path):
    names = [*read_tensors(hf)]
    assert detect_layout(names) == "llava-hf"
    assert detect_layout([lmms_lab_name(name) for name in names]) == "lmms-lab"
    assert detect_layout(["bert.embeddings.weight"]) is None
    assert set(LAYOUTS) == {"lmms-lab", "llava-hf", "transformers"}
    for name in names:
        path = path_of(name, "llava-hf")
        assert path is not None
        assert path == path_of(lmms_lab_name(name), "lmms-lab")
        assert llava_hf_name(path) == name


# --- what is imported ---------------------------------------------------------------------------


def run_python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_starts_no_backend():
    code = """
import dycoke_jax.checkpoint
from jax._src import xla_bridge
assert not xla_bridge._backends
"""
    run_python(code)


def test_converting_and_loading_import_no_torch(lmms_lab: Path, tmp_path: Path):
    code = """
import sys
from dycoke_jax.checkpoint import convert, export, load_params, open_folder
source, target = sys.argv[1:]
convert(source, target + "/orbax")
export(target + "/orbax", target + "/hf")
for folder in (source, target + "/orbax"):
    load_params(open_folder(folder))
assert not {"torch", "transformers", "tensorflow"} & sys.modules.keys()
"""
    run_python(code, lmms_lab, tmp_path)


def test_scripts_convert_and_say_errors_in_one_line(lmms_lab: Path, tmp_path: Path):
    def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "convert" / script), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("hf_to_orbax.py", lmms_lab, tmp_path / "orbax", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    done = run("orbax_to_hf.py", tmp_path / "orbax", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    assert same_bits(load(tmp_path / "hf"), load(lmms_lab, dtype="bfloat16"))
    done = run("orbax_to_hf.py", tmp_path / "orbax", tmp_path / "hf")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "exists already" in done.stderr
