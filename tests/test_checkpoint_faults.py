"""Checkpoints that are not as they should be: every fault is named, and nothing is left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import pytest
from huggingface_hub import errors
from support.checkpoints import read_tensors, tiny_llava_hf, to_lmms_lab, write_tensors

from dycoke_jax.checkpoint import (
    CheckpointWarning,
    convert,
    export,
    load_params,
    locate,
    open_folder,
)
from dycoke_jax.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parent.parent
NORM = "language_model.model.norm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return tiny_llava_hf(tmp_path / "hf")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_llava_hf(tmp_path / "sharded", shards="100KB")


@pytest.fixture
def converted(hf: Path, tmp_path: Path) -> Path:
    convert(hf, tmp_path / "orbax")
    return tmp_path / "orbax"


def load(folder: Path, **arguments: object) -> dict:
    return load_params(open_folder(folder), **arguments)


def problems(folder: Path, action: Callable[[Path], object] = load) -> list[str]:
    """The lines of the report that an action fails with, its heading first."""
    with pytest.raises(CheckpointError) as caught:
        action(folder)
    return str(caught.value).split("\n")


def change(folder: Path, changes: dict[str, np.ndarray | None]) -> None:
    """Replaces, adds or (None) removes tensors of a single-file checkpoint."""
    tensors = {**read_tensors(folder), **changes}
    write_tensors(folder, {name: array for name, array in tensors.items() if array is not None})


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def edit_index(folder: Path, changes: dict[str, object]) -> None:
    index = {"weight_map": {**weight_map(folder), **changes}}
    (folder / INDEX).write_text(json.dumps(index))


# --- tensors -----------------------------------------------------------------------------------


def test_missing_tensor(hf: Path):
    change(hf, {NORM: None})
    assert problems(hf) == [
        f"{hf}: 1 problem with the weights: 1 missing",
        "  missing: language_model.norm.weight (expected float [64])",
    ]


def test_missing_head_of_an_untied_model(hf: Path):
    change(hf, {"language_model.lm_head.weight": None})
    assert problems(hf)[1:] == ["  missing: lm_head.weight (expected float [320, 64])"]


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.4.mlp.up_proj.weight",
        "language_model.model.layers.0.self_attn.o_proj.bias",
        "vision_tower.encoder.layers.3.mlp.fc3.weight",
        "vision_tower.head.other",
        "vision_tower.vision_resampler.query",
        "adapter.lora_A.weight",
    ],
)
def test_unknown_tensor(hf: Path, name: str):
    change(hf, {name: np.zeros((2, 3), np.float32)})
    assert problems(hf)[1:] == [f"  unknown: {name} (F32 [2, 3])"]


def test_two_names_of_one_tensor(hf: Path):
    first = "vision_tower.embeddings.patch_embedding.bias"
    second = "vision_tower.vision_model.embeddings.patch_embedding.bias"
    change(hf, {second: np.zeros(48, np.float32)})
    (line,) = problems(hf)[1:]
    assert line.startswith("  duplicate: ")
    assert first in line
    assert second in line
    assert line.endswith("are both vision_tower.patch_embedding.bias")


def test_wrong_shape(hf: Path):
    change(hf, {NORM: np.ones(65, np.float32)})
    assert problems(hf)[1:] == ["  wrong shape: language_model.norm.weight is [65], not [64]"]


def test_transposed_matrix(hf: Path):
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    change(hf, {name: np.ascontiguousarray(read_tensors(hf)[name].T)})
    assert problems(hf)[1:] == [
        "  wrong shape: language_model.layers.1.mlp.up_proj.weight is [64, 96], not [96, 64]"
    ]


@pytest.mark.parametrize(("dtype", "code"), [(np.int8, "I8"), (np.float64, "F64")])
def test_unsupported_dtype(hf: Path, dtype: type, code: str):
    change(hf, {NORM: np.ones(64, dtype)})
    assert problems(hf)[1:] == [f"  wrong dtype: {NORM} is {code}; supported are F32, F16, BF16"]


def test_tied_head_that_differs(tmp_path: Path):
    hf = tiny_llava_hf(tmp_path / "hf", tied=True)
    head = read_tensors(hf)["language_model.model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    change(hf, {"language_model.lm_head.weight": head})
    (line,) = problems(hf)[1:]
    assert line.startswith("  tied head: language_model.lm_head.weight differs from ")
    assert "tie_word_embeddings" in line
    change(hf, {"language_model.lm_head.weight": head.astype(np.float16)})
    assert "differs" in problems(hf)[1]
    change(hf, {"language_model.lm_head.weight": head[:-1]})
    assert problems(hf)[1:] == ["  wrong shape: lm_head.weight is [319, 64], not [320, 64]"]


def test_names_of_no_known_layout(hf: Path):
    write_tensors(hf, {"bert.embeddings.weight": np.zeros(3, np.float32)})
    (line,) = problems(hf)[1:]
    assert "bert.embeddings.weight" in line
    assert "lmms-lab, llava-hf, transformers" in line


def test_a_language_model_alone(hf: Path, tmp_path: Path):
    """Every tensor of the vision tower, the projector and the newline is listed."""
    lmms_lab = to_lmms_lab(hf, tmp_path / "lmms")
    tensors = read_tensors(lmms_lab)
    text = {
        name: array
        for name, array in tensors.items()
        if not any(part in name for part in ("vision", "mm_projector", "newline"))
    }
    write_tensors(lmms_lab, text)
    lines = problems(lmms_lab)[1:]
    assert all(line.startswith("  missing: ") for line in lines)
    # The tower's final norm, two tensors, is not needed.
    assert len(lines) == len(tensors) - len(text) - 2


# --- files -------------------------------------------------------------------------------------


def test_missing_shard(sharded: Path):
    gone = weight_map(sharded)[NORM]
    (sharded / gone).unlink()
    count = sum(file == gone for file in weight_map(sharded).values())
    assert problems(sharded) == [
        f"{sharded}: 1 problem with the weights: 1 file",
        f"  file: {gone} is missing; the index puts {count} tensors there",
    ]


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_shard(sharded: Path, keep: int):
    file = sharded / weight_map(sharded)[NORM]
    os.truncate(file, keep if keep >= 0 else file.stat().st_size - 1)
    (line,) = problems(sharded)[1:]
    assert line.startswith(f"  file: {file.name} is truncated or damaged (")


def test_truncated_single_file(hf: Path):
    file = hf / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    (line,) = problems(hf)[1:]
    assert line.startswith("  file: model.safetensors is truncated or damaged (")


def test_header_that_lies_about_a_shape(hf: Path):
    file = hf / "model.safetensors"
    content = file.read_bytes()
    assert content.count(b'"shape":[320,64]') == 2
    file.write_bytes(content.replace(b'"shape":[320,64]', b'"shape":[320,65]'))
    (line,) = problems(hf)[1:]
    assert line.startswith("  file: model.safetensors is truncated or damaged (")


def test_index_names_a_tensor_that_its_shard_lacks(sharded: Path):
    others = {*weight_map(sharded).values()} - {weight_map(sharded)[NORM]}
    edit_index(sharded, {"language_model.model.nowhere": min(others)})
    (line,) = problems(sharded)[1:]
    assert line == (
        f"  index: {INDEX} puts language_model.model.nowhere in {min(others)}, which lacks it"
    )


def test_tensor_in_two_shards(sharded: Path):
    first, second = sorted({*weight_map(sharded).values()})[:2]
    stored = read_tensors(sharded)
    name = next(name for name, file in weight_map(sharded).items() if file == first)
    members = [other for other, file in weight_map(sharded).items() if file == second]
    extra = {member: stored[member] for member in [*members, name]}
    (sharded / second).unlink()
    write_tensors(sharded, extra)
    (sharded / "model.safetensors").rename(sharded / second)
    assert problems(sharded)[1:] == [f"  duplicate: {name} is in {first} and in {second}"]


@pytest.mark.parametrize(
    "where", ["../outside.safetensors", "/tmp/outside.safetensors", 3, "", "."]
)
def test_index_that_leaves_the_folder(sharded: Path, where: object):
    write_tensors(sharded.parent, {NORM: np.ones(64, np.float32)})
    (sharded.parent / "model.safetensors").rename(sharded.parent / "outside.safetensors")
    edit_index(sharded, {NORM: where})
    (line,) = problems(sharded)[1:]
    assert line == f"  index: {INDEX} puts {NORM} in {where!r}, which is not in this folder"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', "\x80"])
def test_index_that_is_none(sharded: Path, text: str):
    (sharded / INDEX).write_bytes(text.encode("latin-1"))
    (line,) = problems(sharded)
    assert INDEX in line


def test_stale_single_file_beside_an_index(sharded: Path):
    write_tensors(sharded, {NORM: np.ones(64, np.float32)})
    (line,) = problems(sharded)[1:]
    assert line.startswith("  file: both model.safetensors and")


def test_pickles_only(hf: Path):
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    (line,) = problems(hf)
    assert "pytorch_model.bin" in line
    assert "safetensors.torch.save_file" in line


def test_no_weights_at_all(hf: Path):
    (hf / "model.safetensors").unlink()
    (line,) = problems(hf)
    assert line == f"{hf} holds no *.safetensors files (and no converted params/ folder)"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "has no config.json"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b"[1]", "must hold an object, not list"),
    ],
)
def test_bad_config(hf: Path, text: bytes | None, says: str):
    (hf / "config.json").unlink()
    if text is not None:
        (hf / "config.json").write_bytes(text)
    (line,) = problems(hf, open_folder)
    assert says in line


def test_config_of_another_model(hf: Path):
    (hf / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="bert"):
        convert(hf, hf.parent / "orbax")


# --- all at once, and what failing leaves --------------------------------------------------------


@pytest.mark.parametrize("action", [convert, export])
def test_several_faults_make_one_report_and_no_folder(
    sharded: Path, tmp_path: Path, action: Callable[..., None]
):
    where = weight_map(sharded)
    by_file: dict[str, dict[str, np.ndarray]] = {}
    for name, array in read_tensors(sharded).items():
        by_file.setdefault(where[name], {})[name] = array
    missing, truncated, *rest = sorted(by_file, key=lambda file: len(by_file[file]))
    (sharded / missing).unlink()
    os.truncate(sharded / truncated, (sharded / truncated).stat().st_size - 4)
    edited = by_file[rest[-1]]
    dropped, reshaped, integers = [n for n in edited if n.endswith("weight")][:3]
    del edited[dropped]
    edited[reshaped] = np.zeros((7, 7), np.float32)
    edited[integers] = np.zeros(edited[integers].shape, np.int32)
    edited["mystery"] = np.zeros(5, np.float32)
    twice = next(iter(by_file[rest[0]]))
    edited[twice] = by_file[rest[0]][twice]
    write_tensors(sharded, edited)
    (sharded / "model.safetensors").rename(sharded / rest[-1])
    index = {name: file for name, file in where.items() if name != dropped}
    (sharded / INDEX).write_text(json.dumps({"weight_map": index}))

    lines = problems(sharded, lambda source: action(source, tmp_path / "out"))
    assert lines[0].startswith(f"{sharded}: 7 problems with the weights: ")
    for count in ("2 file", "1 duplicate", "1 unknown", "1 wrong dtype", "1 missing"):
        assert count in lines[0]
    assert len(lines) == 8
    text = "\n".join(lines[1:])
    for word in (missing, truncated, "mystery", twice, "[7, 7]", "I32"):
        assert word in text
    assert [path.name for path in tmp_path.iterdir()] == ["sharded"]


def test_headers_are_checked_before_any_data_is_read(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def read_tensor(tensor: object) -> None:
        pytest.fail("read data")

    monkeypatch.setattr("dycoke_jax.checkpoint.hf_folder.read_tensor", read_tensor)
    change(hf, {NORM: None})
    problems(hf)
    problems(hf, lambda source: convert(source, tmp_path / "orbax"))


@pytest.mark.parametrize("action", [convert, export])
@pytest.mark.parametrize("there", ["file", "empty folder", "dangling link", "source"])
def test_existing_destination_is_refused_before_any_work(
    hf: Path, tmp_path: Path, action: Callable[..., None], there: str
):
    target = hf if there == "source" else tmp_path / "out"
    if there == "file":
        target.write_text("mine")
    elif there == "empty folder":
        target.mkdir()
    elif there == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="exists already"):
        action("no/such/source" if there != "source" else hf, target)
    assert sorted(tmp_path.rglob("*")) == before


class Stop(BaseException):
    pass


@pytest.mark.parametrize("action", [convert, export])
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, ValueError, OSError])
def test_failing_midway_leaves_nothing(
    hf: Path, tmp_path: Path, action: Callable[..., None], error: type[BaseException]
):
    def progress(what: str, done: int, total: int) -> None:
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out.tmp-")]
        if done > total / 2:
            raise error("now")

    with pytest.raises(CheckpointError if error is OSError else error, match="now"):
        action(hf, tmp_path / "out", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    action(hf, tmp_path / "out")


def test_failing_between_groups_leaves_nothing(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("dycoke_jax.checkpoint.orbax_folder._WRITE_BYTES", 30_000)
    test_failing_midway_leaves_nothing(hf, tmp_path, convert, Stop)


def test_file_that_shrinks_while_it_is_read(hf: Path, tmp_path: Path):
    def progress(what: str, done: int, total: int) -> None:
        os.truncate(hf / "model.safetensors", 3000)

    with pytest.raises(CheckpointError, match="cannot read"):
        convert(hf, tmp_path / "out", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_killed_conversion_never_shows_a_destination(hf: Path, tmp_path: Path):
    code = """
import os, signal, sys
from dycoke_jax.checkpoint import convert
def progress(what, done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], progress=progress)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(hf), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len([*tmp_path.glob(".out.tmp-*")]) == 1
    convert(hf, tmp_path / "out")
    assert load(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}


KILLED = """
import sys
from dycoke_jax.checkpoint import convert, orbax_folder
orbax_folder._WRITE_BYTES = 2_000_000
print("started", flush=True)
convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_a_conversion_that_is_killed_leaves_nothing_that_looks_finished(tmp_path: Path):
    """Six are killed after random times, one that writes at least; then one is left alone.

    What each leaves behind, its successor removes.
    """
    hf = tiny_llava_hf(tmp_path / "hf", text={"vocab_size": 60_000}, shards="4MB")
    out, rng, reached = tmp_path / "out", np.random.default_rng(7), set()
    expected = load(hf)

    def assert_whole() -> None:
        found = load(out)
        assert found.keys() == expected.keys()
        for path, weight in found.items():
            np.testing.assert_array_equal(weight, expected[path], err_msg=path)

    for number in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(hf), str(out)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        with process, process.stdout:
            process.stdout.readline()
            while number and not [*tmp_path.glob(".out.tmp-*/*")]:
                assert process.poll() is None
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
        assert process.returncode == -signal.SIGKILL
        if out.exists():
            # Killed after the end: what looks finished has every weight.
            assert_whole()
            shutil.rmtree(out)
        left = [*tmp_path.glob(".out.tmp-*")]
        assert len(left) <= 1
        for folder in left:
            reached |= {path.name for path in folder.rglob("*") if path.is_file()}
            with pytest.raises(CheckpointError):
                load(folder)
    assert {"config.json", "manifest.ocdbt"} <= reached
    convert(hf, out)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}
    assert_whole()


@pytest.mark.parametrize("action", [convert, export])
def test_two_processes_do_not_write_the_same_destination(
    hf: Path, tmp_path: Path, action: Callable[..., None]
):
    """The lock of a process that was killed is no obstacle."""
    with filelock.FileLock(tmp_path / ".out.lock"), pytest.raises(CheckpointError) as refused:
        action(hf, tmp_path / "out")
    assert "another process is writing" in str(refused.value)
    (tmp_path / ".out.lock").write_text("")
    (tmp_path / ".out.tmp-0123").mkdir()
    (tmp_path / ".out2.tmp-0123").mkdir()
    action(hf, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out", ".out2.tmp-0123"}


def test_destination_that_cannot_be_written(hf: Path, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    for action in (convert, export):
        with pytest.raises(CheckpointError, match="cannot write"):
            action(hf, tmp_path / "file" / "out")


# --- converted folders -------------------------------------------------------------------------


def test_converted_folder_for_another_configuration(converted: Path, tmp_path: Path):
    other = open_folder(tiny_llava_hf(tmp_path / "other", text={"intermediate_size": 100}))
    with pytest.raises(CheckpointError, match="12 problems with the weights: 12 wrong shape"):
        load_params(replace(open_folder(converted), config=other.config))
    fewer = open_folder(tiny_llava_hf(tmp_path / "fewer", text={"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="12 problems with the weights: 12 unknown"):
        load_params(replace(open_folder(converted), config=fewer.config))
    more = open_folder(tiny_llava_hf(tmp_path / "more", text={"num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match="12 problems with the weights: 12 missing"):
        load_params(replace(open_folder(converted), config=more.config))


def error_of_loading(folder: Path) -> str:
    """The message, from a process of its own.

    When one read fails, Orbax abandons the others, and Python remarks on each of these coroutines
    whenever it collects them, which might be in the middle of another test.
    """
    code = """
import sys
from dycoke_jax.checkpoint import load_params, open_folder
from dycoke_jax.errors import CheckpointError
try:
    load_params(open_folder(sys.argv[1]))
except CheckpointError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_damaged_converted_folder(converted: Path):
    largest = max((converted / "params").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    message = error_of_loading(converted)
    assert message.startswith(f"cannot read the Orbax checkpoint {converted / 'params'}: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_converted_folder_that_lacks_a_file(converted: Path, name: str):
    (converted / "params" / "state" / name).unlink()
    message = error_of_loading(converted)
    assert str(converted / "params") in message
    assert message.count("\n") == 1


def test_params_folder_of_something_else(converted: Path):
    for path in (converted / "params").iterdir():
        path.rename(converted / path.name)
    (line,) = problems(converted)
    assert str(converted / "params") in line


# --- values ------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_warned_of_once(hf: Path, tmp_path: Path):
    nan, inf = np.ones(64, np.float32), np.ones((64, 64), np.float32)
    nan[3], inf[5, 6] = np.nan, -np.inf
    change(hf, {NORM: nan, "multi_modal_projector.linear_2.weight": inf})

    def check(action: Callable[[], object]) -> None:
        with pytest.warns(CheckpointWarning) as caught:
            action()
        (warning,) = [str(w.message) for w in caught if w.category is CheckpointWarning]
        assert "2 tensors" in warning
        assert "language_model.norm.weight" in warning
        assert "projector.linear_2.weight" in warning

    check(lambda: load(hf))
    check(lambda: convert(hf, tmp_path / "orbax"))
    check(lambda: export(hf, tmp_path / "back"))
    check(lambda: load(tmp_path / "orbax", dtype="bfloat16"))
    assert read_tensors(tmp_path / "back")[NORM].tobytes() == nan.tobytes()


def test_a_cast_that_overflows_is_warned_of(hf: Path, tmp_path: Path):
    change(hf, {NORM: np.full(64, 1e5, np.float32)})
    with pytest.warns(CheckpointWarning, match="in 1 tensor: language_model.norm.weight"):
        load(hf, dtype="float16")
    with pytest.warns(CheckpointWarning, match="in 1 tensor: language_model.norm.weight"):
        convert(hf, tmp_path / "orbax", dtype="float16")
    load(hf, dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["int8", "float64", float, "half-size", "float8_e4m3fn"])
def test_dtype_that_weights_cannot_have(hf: Path, tmp_path: Path, dtype: object):
    for action in (convert, export):
        with pytest.raises(CheckpointError, match="float32, float16 or bfloat16"):
            action(hf, tmp_path / "out", dtype=dtype)
    with pytest.raises(CheckpointError, match="float32, float16 or bfloat16"):
        load(hf, dtype=dtype)


# --- locating ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "a/b/c", "./models/x", "", "-a/b"])
def test_locate_says_what_it_accepts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("network"))
    monkeypatch.chdir(tmp_path)
    if name == "":
        name = " "
    with pytest.raises(CheckpointError, match="neither an existing folder nor a hub id") as caught:
        locate(name)
    assert "\n" not in str(caught.value)


def test_locate_refuses_a_file(hf: Path):
    with pytest.raises(CheckpointError, match="is a file"):
        locate(hf / "model.safetensors")


def hub_error(kind: type[Exception], message: str) -> Exception:
    # Without its __init__, which wants a response of whichever HTTP library the hub client uses.
    return kind.__new__(kind, message)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (hub_error(errors.GatedRepoError, "403\ngated"), "asks for consent"),
        (hub_error(errors.RepositoryNotFoundError, "404"), "no such repository"),
        (hub_error(errors.LocalEntryNotFoundError, "offline"), "the hub cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
        (OSError("500\nserver error"), "500 server error"),
        (ConnectionError("refused"), "refused"),
        (ConnectionError(), "ConnectionError"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_hub_errors_become_one_line(error: Exception, says: str, monkeypatch: pytest.MonkeyPatch):
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError) as caught:
        open_folder("org/name")
    message = str(caught.value)
    assert message.startswith("cannot download org/name: ")
    assert says in message
    assert "\n" not in message
