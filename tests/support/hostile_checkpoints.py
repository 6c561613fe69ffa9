"""Ways in which a checkpoint's folder can be hostile, by name; each changes a good folder."""

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NORM = "language_model.model.norm.weight"
TOKENIZER = "tokenizer.json"

KINDS: dict[str, tuple[Callable[[Path], None], str]] = {}
"""What each kind does to a folder, and what the error must say (a regular expression)."""


def kind(name: str, says: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def add(change: Callable[[Path], None]) -> Callable[[Path], None]:
        assert name not in KINDS
        KINDS[name] = change, says
        return change

    return add


# Safetensors files


def header_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(folder: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(folder: Path, name: str, **changes: Any) -> None:
    header, data = header_of(folder)
    header[name].update(changes)
    write_header(folder, header, data)


def set_length(folder: Path, length: int) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", length))


DAMAGED = "model.safetensors is truncated or damaged"


@kind("a header longer than the file", DAMAGED)
def _(folder: Path) -> None:
    set_length(folder, (folder / WEIGHTS).stat().st_size)


@kind("a header of 2**63 bytes", DAMAGED)
def _(folder: Path) -> None:
    set_length(folder, 2**63)


@kind("a header of nearly 100 MB of spaces", DAMAGED)
def _(folder: Path) -> None:
    write_header(folder, b" " * 99_000_000, b"")


@kind("a header of 100,000 tensors", "its header has [0-9]+ bytes")
def _(folder: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header, data = header_of(folder)
    write_header(folder, {f"t{i}": empty for i in range(100_000)} | header, data)


@kind("a header of 40,000 tensors", "40000 unknown")
def _(folder: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header, data = header_of(folder)
    write_header(folder, {f"t{i}": empty for i in range(40_000)} | header, data)


@kind("a header that is a list", DAMAGED)
def _(folder: Path) -> None:
    write_header(folder, b"[1, 2]", b"")


@kind("a header nested 100,000 deep", DAMAGED)
def _(folder: Path) -> None:
    write_header(folder, b'{"a":' * 100_000, b"")


@kind("a header that is not UTF-8", DAMAGED)
def _(folder: Path) -> None:
    write_header(folder, b'{"\xff\xfe": 1}', b"")


@kind("offsets that overlap", DAMAGED)
def _(folder: Path) -> None:
    header, data = header_of(folder)
    other = next(n for n in header if header[n].get("shape") == header[NORM]["shape"] and n != NORM)
    header[NORM]["data_offsets"] = header[other]["data_offsets"]
    write_header(folder, header, data)


@kind("offsets outside the file", DAMAGED)
def _(folder: Path) -> None:
    edit_header(folder, NORM, data_offsets=[2**40, 2**40 + 256])


@kind("offsets in reverse", DAMAGED)
def _(folder: Path) -> None:
    header, _ = header_of(folder)
    edit_header(folder, NORM, data_offsets=header[NORM]["data_offsets"][::-1])


@kind("negative offsets", DAMAGED)
def _(folder: Path) -> None:
    edit_header(folder, NORM, data_offsets=[-256, 0])


@kind("a shape whose size overflows", DAMAGED)
def _(folder: Path) -> None:
    edit_header(folder, NORM, shape=[2**40, 2**40])


@kind("a negative shape", DAMAGED)
def _(folder: Path) -> None:
    edit_header(folder, NORM, shape=[-64])


@kind("a dtype that there is not", DAMAGED)
def _(folder: Path) -> None:
    edit_header(folder, NORM, dtype="F1024")


@kind("a hole between the data", DAMAGED)
def _(folder: Path) -> None:
    header, data = header_of(folder)
    del header[NORM]
    write_header(folder, header, data)


@kind("a tensor twice in a header", "is there twice")
def _(folder: Path) -> None:
    header, data = header_of(folder)
    entry = json.dumps({NORM: header[NORM]}).encode()
    write_header(folder, entry[:-1] + b", " + json.dumps(header).encode()[1:], data)


@kind("a tensor's name with control characters", r"unknown: .*\\x1b\[2J")
def _(folder: Path) -> None:
    save(folder, {"language_model.\x1b[2J\n  missing: all": np.zeros(1, np.float32)})


@kind("a tensor's name of 2 MB", "unknown: ")
def _(folder: Path) -> None:
    save(folder, {"language_model." + "x" * 2_000_000: np.zeros(1, np.float32)})


def save(folder: Path, changes: dict[str, np.ndarray]) -> None:
    save_file(load_file(folder / WEIGHTS) | changes, folder / WEIGHTS)


@kind("weights in float8", "wrong dtype: .* is F8_E4M3")
def _(folder: Path) -> None:
    save(folder, {NORM: np.ones(64, ml_dtypes.float8_e4m3fn)})


@kind("weights in int64", "wrong dtype: .* is I64")
def _(folder: Path) -> None:
    save(folder, {NORM: np.ones(64, np.int64)})


@kind("NaN weights", "NaN or infinity in 1 tensor: language_model.norm.weight")
def _(folder: Path) -> None:
    save(folder, {NORM: np.full(64, np.nan, np.float32)})


@kind("weights cut in half", DAMAGED)
def _(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


@kind("weights of 0 bytes", DAMAGED)
def _(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 0)


@kind("pickles alone", "pickles")
def _(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


# The index of the shards


def shard(folder: Path, weight_map: dict[str, Any]) -> None:
    names = [name for name in header_of(folder)[0] if name != "__metadata__"]
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(names, "a.safetensors") | weight_map}
    (folder / INDEX).write_text(json.dumps(index))


for path in (
    "../x.safetensors",
    "/etc/passwd",
    "b/../../x.safetensors",
    "a\0b",
    "..\\x",
    "b" * 9999,
):

    @kind(f"an index that points to {path[:24]!r}", "index: |file: ")
    def _(folder: Path, path: str = path) -> None:
        (folder.parent / "x.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
        shard(folder, {NORM: path})


@kind("an index of missing shards", "file: b3?.safetensors is missing")
def _(folder: Path) -> None:
    shard(folder, {NORM: "b.safetensors"})


@kind("an index of 50,000 shards", "names 50001 files")
def _(folder: Path) -> None:
    shard(folder, {f"t{i}": f"{i}.safetensors" for i in range(50_000)})


@kind("an index that names a tensor twice", f"{INDEX} .*twice")
def _(folder: Path) -> None:
    shard(folder, {})
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace(f'"{NORM}"', f'"{NORM}": "b.safetensors", "{NORM}"'))


# Files that are none


@kind("a FIFO for weights", f"{WEIGHTS} is no regular file")
def _(folder: Path) -> None:
    replace_by(folder / WEIGHTS, os.mkfifo)


@kind("a FIFO for a configuration", f"{CONFIG} is no regular file")
def _(folder: Path) -> None:
    replace_by(folder / CONFIG, os.mkfifo)


@kind("a FIFO for a tokenizer", f"{TOKENIZER} is no regular file")
def _(folder: Path) -> None:
    replace_by(folder / TOKENIZER, os.mkfifo)


@kind("a FIFO for a chat template", "chat_template.jinja is no regular file")
def _(folder: Path) -> None:
    os.mkfifo(folder / "chat_template.jinja")


@kind("a FIFO for a shard", "b.safetensors is no regular file")
def _(folder: Path) -> None:
    shard(folder, {NORM: "b.safetensors"})
    os.mkfifo(folder / "b.safetensors")


@kind("a FIFO for a shard without the usual name", "file: shard .*no regular file")
def _(folder: Path) -> None:
    shard(folder, {NORM: "shard"})
    os.mkfifo(folder / "shard")


@kind("a device for a configuration", f"{CONFIG} is no regular file")
def _(folder: Path) -> None:
    replace_by(folder / CONFIG, lambda path: path.symlink_to("/dev/zero"))


@kind("a device for weights", f"{WEIGHTS} is no regular file")
def _(folder: Path) -> None:
    replace_by(folder / WEIGHTS, lambda path: path.symlink_to("/dev/zero"))


@kind("a socket for a configuration", f"{CONFIG} is no regular file")
def _(folder: Path) -> None:
    def bind(path: Path) -> None:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket may have about 100 characters
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)

    replace_by(folder / CONFIG, bind)


@kind("a folder for a configuration", CONFIG)
def _(folder: Path) -> None:
    replace_by(folder / CONFIG, Path.mkdir)


@kind("a folder for weights", "no [*].safetensors files")
def _(folder: Path) -> None:
    replace_by(folder / WEIGHTS, Path.mkdir)


@kind("weights that are a link to themselves", WEIGHTS)
def _(folder: Path) -> None:
    replace_by(folder / WEIGHTS, lambda path: path.symlink_to(path))


@kind("a configuration that is a link to itself", CONFIG)
def _(folder: Path) -> None:
    replace_by(folder / CONFIG, lambda path: path.symlink_to(path))


@kind("a converted folder that is a link to its parent", "params")
def _(folder: Path) -> None:
    (folder / "params").symlink_to(folder)


def replace_by(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


# config.json


def edit_config(folder: Path, place: str, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (config[place] if place else config).update(changes)
    (folder / CONFIG).write_text(json.dumps(config))


SIZES = {
    "text_config": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    "vision_config": ("hidden_size", "num_hidden_layers", "image_size", "patch_size"),
}
for place, fields in SIZES.items():
    for field in fields:
        for value in (10**9, 10**30, -3, float("nan"), "64", 6.5):

            @kind(
                f"{place}.{field} = {json.dumps(value)}",
                rf"{field}|num_layers|-layer tower|wrong shape",
            )
            def _(
                folder: Path, place: str = place, field: str = field, value: object = value
            ) -> None:
                edit_config(folder, place, **{field: value})


@kind("huge sizes everywhere", "num_hidden_layers")
def _(folder: Path) -> None:
    for place, fields in SIZES.items():
        edit_config(folder, place, **dict.fromkeys(fields, 2**31 - 2**24))


for number in ("NaN", "Infinity", "-1", "1e999", "1" * 5000):

    @kind(f"rms_norm_eps = {number[:10]}", "rms_norm_eps|not readable as JSON")
    def _(folder: Path, number: str = number) -> None:
        edit_config(folder, "text_config", rms_norm_eps="here")
        text = (folder / CONFIG).read_text().replace('"here"', number)
        (folder / CONFIG).write_text(text)


@kind("a value of 3 MB in a configuration", "hidden_act is ")
def _(folder: Path) -> None:
    edit_config(folder, "text_config", hidden_act="x" * 3_000_000)


@kind("a configuration nested 100,000 deep", "not readable as JSON")
def _(folder: Path) -> None:
    (folder / CONFIG).write_text('{"a":' * 100_000)


@kind("a configuration of 200 MB", f"{CONFIG} has 200.0 MB")
def _(folder: Path) -> None:
    with (folder / CONFIG).open("wb") as file:
        file.truncate(200_000_000)


@kind("a configuration of a million small lists", CONFIG)
def _(folder: Path) -> None:
    (folder / CONFIG).write_text('{"model_type": [' + "[]," * 1_000_000 + "1]}")


@kind("a configuration with a key twice", f"{CONFIG} .*twice")
def _(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace("{", '{"model_type": "llava", ', 1))


for text in ("[]", "null", "3", '"llava"', "", "{}", "\x00" * 100):

    @kind(f"a configuration that is {text[:8]!r}", CONFIG)
    def _(folder: Path, text: str = text) -> None:
        (folder / CONFIG).write_text(text)


@kind("an end token list of 500,000 texts", "eos_token_id")
def _(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ["x"] * 500_000}))


# Tokenizers


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tokenizer = json.loads((folder / TOKENIZER).read_text())
    change(tokenizer)
    (folder / TOKENIZER).write_text(json.dumps(tokenizer))


@kind("a tokenizer of words", "tokenizer")
def _(folder: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    edit_tokenizer(folder, lambda it: it.update(model=model, added_tokens=[]))


@kind("a tokenizer without a model", "tokenizer cannot be loaded")
def _(folder: Path) -> None:
    edit_tokenizer(folder, lambda it: it.pop("model"))


@kind("a tokenizer with an id of 2**31", "tokenizer")
def _(folder: Path) -> None:
    edit_tokenizer(folder, lambda it: it["model"]["vocab"].update(x=2**31))


@kind("a tokenizer with an id of -1", "tokenizer cannot be loaded")
def _(folder: Path) -> None:
    edit_tokenizer(folder, lambda it: it["model"]["vocab"].update(x=-1))


@kind("a tokenizer nested 100,000 deep", "tokenizer cannot be loaded")
def _(folder: Path) -> None:
    (folder / TOKENIZER).write_text("[" * 100_000)


@kind("a tokenizer of 200 MB", f"{TOKENIZER} has 200.0 MB")
def _(folder: Path) -> None:
    with (folder / TOKENIZER).open("r+b") as file:
        file.truncate(200_000_000)


@kind("a tokenizer of remote code", "tokenizer")
def _(folder: Path) -> None:
    (folder / TOKENIZER).unlink()
    (folder / "evil.py").write_text("import os; os.abort()\nclass Evil: pass\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@kind("a tokenizer's settings that are a list", "tokenizer")
def _(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[1, 2]")


@kind("processor settings nested deep", "preprocessor_config.json is not readable as JSON")
def _(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"a":' * 100_000)
