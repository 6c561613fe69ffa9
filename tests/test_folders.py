"""Checkpoint folders as people have them: other files beside the weights, end ids, byte marks."""

import codecs
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.checkpoints import read_tensors, same_bits, tiny_llava_hf, to_lmms_lab
from support.clips import real_clip
from support.command_line import run_main
from support.tokenizers import CONTROL, PLACES, tiny_tokenizer
from tokenizers.decoders import DecodeStream
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Tokenizer,
)

from dycoke_jax import LlavaVideo
from dycoke_jax.assets import TINY
from dycoke_jax.checkpoint import convert, export, load_params, open_checkpoint, open_folder
from dycoke_jax.checkpoint.end_ids import read_end_ids
from dycoke_jax.checkpoint.tokenizer import load_tokenizer
from dycoke_jax.errors import CheckpointError
from dycoke_jax.inputs.prompts import build_prompt

VOCABULARY = json.loads((TINY / "config.json").read_text())["text_config"]["vocab_size"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the model that ships with the package, which has no generation_config.json."""
    folder = tmp_path / "tiny"
    shutil.copytree(TINY, folder)
    assert not (folder / "generation_config.json").exists()
    return folder


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_hf(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def random_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_hf(tmp_path_factory.mktemp("sharded") / "model", shards="100KB")


def edit(path: Path, **changes: object) -> None:
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | changes))


def add_adapter(folder: Path, name: str = "adapter_model.safetensors") -> None:
    save_file({"base_model.model.lora_A.weight": np.zeros((2, 3), np.float32)}, folder / name)


# --- files beside the weights ---------------------------------------------------------------------


@pytest.mark.parametrize("made", ["random_folder", "random_shards"])
def test_files_beside_the_weights_are_not_read_but_named(
    made: str, tmp_path: Path, request: pytest.FixtureRequest
):
    folder = tmp_path / "model"
    shutil.copytree(request.getfixturevalue(made), folder)
    tensors = read_tensors(folder)
    add_adapter(folder)
    add_adapter(folder, "optimizer.safetensors")
    halves = {name: array.astype(np.float16) for name, array in tensors.items()}
    save_file(halves, folder / "model.fp16.safetensors")
    save_file(
        {name: array + 1 for name, array in tensors.items()}, folder / "model-copy.safetensors"
    )

    theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).state_dict()
    ours = load_params(open_folder(folder))
    norm = np.asarray(ours["language_model.norm.weight"])
    np.testing.assert_array_equal(norm, theirs["model.language_model.norm.weight"].numpy())
    (note,) = open_folder(folder).notes
    assert note.endswith(
        "adapter_model.safetensors, model-copy.safetensors, model.fp16.safetensors, "
        "optimizer.safetensors"
    )
    assert "model-0" not in note


def test_a_folder_with_nothing_beside_the_weights_has_no_notes(
    random_folder: Path, random_shards: Path
):
    assert open_folder(random_folder).notes == ()
    assert open_folder(random_shards).notes == ()


def test_files_beside_converted_weights_are_named(random_folder: Path, tmp_path: Path):
    convert(random_folder, tmp_path / "model")
    assert open_folder(tmp_path / "model").notes == ()
    shutil.copy(random_folder / "model.safetensors", tmp_path / "model")
    add_adapter(tmp_path / "model")
    (note,) = open_folder(tmp_path / "model").notes
    assert note.endswith("not read: adapter_model.safetensors, model.safetensors")


def test_a_folder_by_the_name_of_a_weight_file_is_none(random_folder: Path, tmp_path: Path):
    shutil.copytree(random_folder, tmp_path / "model")
    (tmp_path / "model" / "adapter_model.safetensors").mkdir()
    assert open_folder(tmp_path / "model").notes == ()
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors files"):
        load_params(open_folder(tmp_path / "model"))


def test_a_link_to_weights_that_are_gone_is_told(random_folder: Path, tmp_path: Path):
    shutil.copytree(random_folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="a link to a file that does not exist") as caught:
        load_params(open_folder(tmp_path / "model"))
    assert "index" not in str(caught.value)


@pytest.mark.parametrize("name", ["./model.safetensors", ".//model.safetensors"])
def test_an_index_may_name_a_file_by_a_path_in_the_folder(
    random_folder: Path, tmp_path: Path, name: str
):
    shutil.copytree(random_folder, tmp_path / "model")
    index = {"metadata": {}, "weight_map": dict.fromkeys(read_tensors(random_folder), name)}
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    assert open_folder(tmp_path / "model").notes == ()
    assert (
        load_params(open_folder(tmp_path / "model")).keys()
        == load_params(open_folder(random_folder)).keys()
    )


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model.fp16.safetensors"])
def test_weights_under_another_name_are_refused_as_by_transformers(tiny: Path, name: str):
    (tiny / "model.safetensors").rename(tiny / name)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LlavaOnevisionForConditionalGeneration.from_pretrained(tiny)
    with pytest.raises(CheckpointError, match=f"neither model.safetensors nor {INDEX}") as caught:
        load_params(open_folder(tiny))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_without_its_model_is_refused_as_one(tiny: Path):
    (tiny / "model.safetensors").unlink()
    add_adapter(tiny)
    (tiny / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"an adapter .* merge") as caught:
        load_params(open_folder(tiny))
    assert "\n" not in str(caught.value)


def test_a_model_keeps_the_notes_of_its_checkpoint(tiny: Path):
    add_adapter(tiny)
    edit(tiny / "generation_config.json", eos_token_id=[VOCABULARY])
    files, ends = LlavaVideo.from_pretrained(tiny).notes
    assert "adapter_model.safetensors" in files
    assert "eos_token_id" in ends
    assert open_checkpoint(tiny).notes == (files, ends)


@pytest.mark.parametrize("to", ["orbax", "llava-hf"])
def test_convert_prints_the_notes(tiny: Path, tmp_path: Path, to: str):
    add_adapter(tiny)
    code, out, err = run_main("convert", tiny, tmp_path / "out", "--to", to)
    assert (code, out) == (0, "")
    assert err.startswith("note: ")
    assert "adapter_model.safetensors" in err.splitlines()[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--prompt", "What?"),
        ("demo", "--prompt", "What?", "--video", real_clip()),
        ("train", "run", "--data", "nowhere.jsonl"),
        ("eval", "results.json", "--clips", 1),
    ],
)
def test_commands_that_read_a_model_print_its_notes(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple
):
    """Before the weights are read, which fails here."""
    monkeypatch.chdir(tiny.parent)
    (tiny / "model.safetensors").rename(tiny / "copy.safetensors")
    code, _, err = run_main(*arguments, "--model", tiny)
    assert code == 2
    note, error = err.splitlines()
    assert note == "note: these files beside the weights are not read: copy.safetensors"
    assert error.startswith("error: ")


# --- ids that end an answer -----------------------------------------------------------------------


def ends_in_transformers(folder: Path) -> set[int]:
    """As its models take them: from the file, or if there is none from the configuration."""
    try:
        settings = GenerationConfig.from_pretrained(folder)
    except OSError:
        settings = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
    ids = settings.eos_token_id
    return set() if ids is None else set(ids) if isinstance(ids, list) else {ids}


@pytest.mark.parametrize("generation", ["no file", {}, {"eos_token_id": None}, 5, [6, 7]])
@pytest.mark.parametrize("config", [None, 8, [9, 10], []])
@pytest.mark.parametrize("text", ["absent", None, 11, [12]])
def test_an_answer_ends_where_it_does_in_transformers(
    tmp_path: Path, generation: object, config: object, text: object
):
    nested = {} if text == "absent" else {"eos_token_id": text}
    edit(tmp_path / "config.json", eos_token_id=config, text_config=nested)
    if generation != "no file":
        entries = generation if isinstance(generation, dict) else {"eos_token_id": generation}
        edit(tmp_path / "generation_config.json", **entries)
    ids, notes = read_end_ids(tmp_path, vocab_size=13)
    assert set(ids) == ends_in_transformers(tmp_path)
    assert notes == ()


def test_the_end_ids_of_the_files_and_of_the_tokenizer_end_an_answer(tiny: Path):
    before = open_checkpoint(tiny).stop_ids
    assert 5 not in before
    nested = json.loads((tiny / "config.json").read_text())["text_config"]
    edit(tiny / "config.json", text_config=nested | {"eos_token_id": 5})
    assert open_checkpoint(tiny).stop_ids == (5, *before)
    assert LlavaVideo.from_pretrained(tiny).stop_ids == (5, *before)


@pytest.mark.parametrize("place", ["generation_config.json", "config.json", "text_config"])
@pytest.mark.parametrize(
    "value", ["<|im_end|>", ["5"], [None], [[5]], True, [5, False], 5.0, [5.0], {"id": 5}]
)
def test_end_ids_that_are_no_ids_are_refused_by_name(tiny: Path, place: str, value: object):
    if place == "text_config":
        nested = json.loads((tiny / "config.json").read_text())["text_config"]
        edit(tiny / "config.json", text_config=nested | {"eos_token_id": value})
    else:
        edit(tiny / place, eos_token_id=value)
    with pytest.raises(CheckpointError, match="eos_token_id") as caught:
        open_checkpoint(tiny)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_end_ids_outside_the_vocabulary_are_left_out_with_a_note(tiny: Path, file: str):
    edit(tiny / file, eos_token_id=[5, VOCABULARY, -1, 10**30, VOCABULARY - 1])
    checkpoint = open_checkpoint(tiny)
    assert {5, VOCABULARY - 1} <= set(checkpoint.stop_ids) < set(range(VOCABULARY))
    (note,) = checkpoint.notes
    assert file in note
    assert f": {VOCABULARY}, -1, 1000" in note


def test_end_ids_of_the_configuration_survive_an_export(random_folder: Path, tmp_path: Path):
    lmms_lab = to_lmms_lab(random_folder, tmp_path / "lmms", eos_token_id=[9, 10])
    export(lmms_lab, tmp_path / "back")
    assert ends_in_transformers(tmp_path / "back") == {9, 10}


# --- control tokens -------------------------------------------------------------------------------

TEXTS = ["Hi there.", "  two\n", "a <|im_end|> b", "<|im_start|>user\n", "<image>\nWhat?", "你好"]
IDS = {token: 256 + number for number, token in enumerate((*CONTROL, *PLACES))}


def unmarked_tokenizer(folder: Path, kind: str) -> None:
    """Writes the tokenizer of ``support`` in files that do not mark its control tokens."""
    folder.mkdir()
    if kind == "tokenizer.json":
        tiny_tokenizer().save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            text = (folder / name).read_text().replace('"special": true', '"special": false')
            (folder / name).write_text(text)
        return
    vocabulary = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    (folder / "merges.txt").write_text("#version: 0.2\n")
    if kind == "added_tokens.json":
        (folder / "added_tokens.json").write_text(json.dumps(IDS))
    else:
        vocabulary |= IDS
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


@pytest.mark.parametrize("kind", ["tokenizer.json", "added_tokens.json", "vocab.json"])
def test_control_tokens_never_show_in_a_decoded_answer(tmp_path: Path, kind: str):
    unmarked_tokenizer(tmp_path / "files", kind)
    backend = load_tokenizer(tmp_path / "files").backend_tokenizer
    plain = backend.encode("Hi").ids
    for token, index in IDS.items():
        assert backend.token_to_id(token) == index
        assert backend.decode([*plain, index], skip_special_tokens=True) == "Hi"
        stream = DecodeStream(skip_special_tokens=True)
        assert [stream.step(backend, i) or "" for i in (*plain, index)] == ["H", "i", ""]


@pytest.mark.parametrize("kind", ["tokenizer.json", "added_tokens.json"])
def test_texts_are_encoded_as_before_the_control_tokens_are_marked(tmp_path: Path, kind: str):
    unmarked_tokenizer(tmp_path / "files", kind)
    auto = AutoTokenizer if kind == "tokenizer.json" else Qwen2Tokenizer
    theirs = auto.from_pretrained(tmp_path / "files", local_files_only=True)
    ours = load_tokenizer(tmp_path / "files")
    assert len(ours) == len(theirs)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
        assert build_prompt(ours, text, has_video=True) == build_prompt(
            theirs, text, has_video=True
        )


def test_no_token_is_added_to_a_tokenizer_without_placeholders(tmp_path: Path):
    unmarked_tokenizer(tmp_path / "files", "added_tokens.json")
    ids = {token: index for token, index in IDS.items() if token not in PLACES}
    (tmp_path / "files" / "added_tokens.json").write_text(json.dumps(ids))
    assert len(load_tokenizer(tmp_path / "files")) == 256 + len(ids)


# --- byte order marks -----------------------------------------------------------------------------

ENCODINGS = ["utf-8-sig", "utf-16"]


def mark(path: Path, encoding: str) -> None:
    """Rewrites a text file as editors do that begin it with a byte order mark."""
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    marks = (codecs.BOM_UTF8, codecs.BOM_UTF16)
    assert path.read_bytes().startswith(marks)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_files_with_a_byte_order_mark_are_read_as_without(tiny: Path, encoding: str):
    edit(tiny / "generation_config.json", eos_token_id=5)
    before = open_checkpoint(tiny)
    files = [*tiny.glob("*.json")]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= {f.name for f in files}
    for file in files:
        mark(file, encoding)
    after = open_checkpoint(tiny)
    assert (after.config, after.stop_ids) == (before.config, before.stop_ids)
    for text in TEXTS:
        assert after.tokenizer(text).input_ids == before.tokenizer(text).input_ids


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_index_with_a_byte_order_mark_is_read(
    random_shards: Path, tmp_path: Path, encoding: str
):
    shutil.copytree(random_shards, tmp_path / "model")
    mark(tmp_path / "model" / INDEX, encoding)
    ours, plain = (load_params(open_folder(f)) for f in (tmp_path / "model", random_shards))
    assert same_bits(
        {path: np.asarray(array) for path, array in ours.items()},
        {path: np.asarray(array) for path, array in plain.items()},
    )


def test_json_that_is_nested_too_deeply_is_refused_in_one_line(tiny: Path):
    (tiny / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json is not readable") as caught:
        open_checkpoint(tiny)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "added_tokens.json"])
def test_files_of_the_older_tokenizer_may_have_a_byte_order_mark(tmp_path: Path, name: str):
    unmarked_tokenizer(tmp_path / "files", "added_tokens.json")
    before = load_tokenizer(tmp_path / "files")
    mark(tmp_path / "files" / name, "utf-8-sig")
    after = load_tokenizer(tmp_path / "files")
    assert all(after(text).input_ids == before(text).input_ids for text in TEXTS)


@pytest.mark.parametrize("write", [convert, export])
def test_files_are_written_without_a_byte_order_mark(tiny: Path, tmp_path: Path, write: object):
    """transformers cannot read one."""
    expected = AutoTokenizer.from_pretrained(TINY)(TEXTS).input_ids
    for file in tiny.glob("*.json"):
        mark(file, "utf-8-sig")
    write(tiny, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS).input_ids == expected
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
