"""The command ``inspect``: what any method keeps of a clip, as numbers and as a picture."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support.clips import real_clip
from support.command_line import run_main
from support.tiny import tiny_model, video

from dycoke_jax import Decoding, DyCoke, DycokeError
from dycoke_jax.checkpoint.untrained import write_untrained
from dycoke_jax.compression.fastv import FastV
from dycoke_jax.compression.methods import METHODS, parse_compression
from dycoke_jax.compression.protocol import Compression, Rows
from dycoke_jax.compression.unicomp import UniComp
from dycoke_jax.compression.vidcom2 import VidCom2
from dycoke_jax.config import LlavaConfig, TextConfig, VisionConfig
from dycoke_jax.generation.assemble import all_rows
from dycoke_jax.generation.encode import encode
from dycoke_jax.inspection.coverage import covered
from dycoke_jax.inspection.keeping import kept_of_clip
from dycoke_jax.inspection.tracing import trace_answer
from dycoke_jax.model import Model
from dycoke_jax.models.llava import random_params

BLUE = [0, 170, 255]

# A released model's frames: 27 x 27 patches of 14 pixels, and 6 pixels that no patch holds.
LARGE_FRAMES = LlavaConfig(
    VisionConfig(16, 24, 1, 2, patch_size=14, image_size=384),
    TextConfig(320, 16, 24, 2, 2, 1, 8, tie_word_embeddings=True),
)


class _Stage:
    """What a hand-made token stage needs besides ``select``."""

    signals: ClassVar = ()

    @property
    def stages(self):
        return Compression(tokens=self)

    def check(self, config, frames):
        pass


@dataclass(frozen=True)
class Chosen(_Stage):
    """Rows that are known beforehand, in no order, two of them at one place."""

    places = (17, 3, 3, 40, 79)

    def most_rows(self, frames, tokens):
        return len(self.places)

    def select(self, features, frames, signals):
        tokens = features.reshape(1, -1, features.shape[-1])
        embeds = tokens[:, jnp.array(self.places)]
        next_number = jnp.nextafter(embeds[:, 1, 5], jnp.inf)
        embeds = embeds.at[:, 1, 5].set(next_number)  # the last bit of one number
        embeds = embeds.at[:, 3].set(tokens[:, 40:42].mean(1))
        embeds = embeds.at[:, 4].set(0)  # a row that holds nothing
        return Rows(jnp.array([self.places]), jnp.array([[True] * 4 + [False]]), embeds)


@dataclass(frozen=True)
class Everything(_Stage):
    """All tokens, as embeddings of their own."""

    def most_rows(self, frames, tokens):
        return frames * tokens

    def select(self, features, frames, signals):
        return all_rows(features, frames)


def test_merged_rows_are_those_that_differ_from_the_token_at_their_place():
    kept = kept_of_clip(tiny_model().model, video(0, 5), Chosen())
    assert kept.places.tolist() == [17, 3, 3, 40]
    assert kept.is_merged.tolist() == [False, True, False, True]
    assert kept.visual == 5 * 16
    assert kept.kept.shape == (5, 16)
    assert np.flatnonzero(kept.kept).tolist() == [3, 17, 40]
    assert np.flatnonzero(kept.merged).tolist() == [3, 40]
    assert kept.counts_of_frames() == [
        "2 of 16, 1 merged", "1 of 16", "1 of 16, 1 merged", "0 of 16", "0 of 16",
    ]  # fmt: skip
    assert kept.counts() == "4 of 80, 2 merged"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embeddings_that_equal_the_tokens_are_not_merged(dtype):
    kept = kept_of_clip(replace(tiny_model().model, dtype=dtype), video(1, 3), Everything())
    assert kept.places.tolist() == list(range(48))
    assert not kept.is_merged.any()
    assert kept.kept.all()


SETTINGS = {
    "dycoke": "dycoke(mode=official, layer=2)",
    "evs": "evs(budget=.3)",
    "frames": "frames(budget=.5)",
    "holitom": "holitom(threshold=.2)",
    "random": "random",
    "unicomp": "unicomp(token_threshold=.7)",
    "vidcom2": "vidcom2(budget=.25)",
    "visionzip": "visionzip",
}


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]().stages.tokens])
def test_places_and_merged_rows_are_those_of_the_stage_for_every_method(name):
    """The stage is given the clip alone, without the empty frames that an answer has."""
    model, clip, method = tiny_model().model, video(2, 6, 0.1), parse_compression(SETTINGS[name])
    kept = kept_of_clip(model, clip, method)
    stage = method.stages.tokens
    features = encode(model, [clip], 1, 6, stage.signals)
    rows = jax.jit(stage.select)(features.tokens, jnp.array([6]), features.signals)
    valid = np.ones(rows.places.shape[1], bool) if rows.valid is None else np.asarray(rows.valid[0])
    places = np.asarray(rows.places[0])[valid]
    assert kept.places.tolist() == places.tolist()
    tokens = np.asarray(features.tokens).reshape(96, -1)
    if rows.embeds is None:
        assert not kept.is_merged.any()
    else:
        differs = np.asarray(rows.embeds)[0][valid] != tokens[places]
        assert kept.is_merged.tolist() == differs.any(1).tolist()
        assert kept.is_merged.any()
    rows, merged = zip(*kept.numbers_of_frames, strict=True)
    assert list(rows) == [int((places // 16 == frame).sum()) for frame in range(6)]
    assert sum(merged) == kept.is_merged.sum()


def test_what_is_kept_is_what_the_language_model_reads():
    model, clip = tiny_model("grid", "average"), video(3, 7, 0.1)
    trace = trace_answer(model, clip, "?", compression=UniComp(0.3), decoding=Decoding(1))
    kept = kept_of_clip(model.model, clip, UniComp(0.3))
    assert (kept.kept == trace.kept).all()
    assert len(kept.places) == trace.tokens.merged
    # Three windows of two patches of 14 pixels; the seventh patch fills none.
    assert kept.frames.shape == trace.frames.shape == (7, 84, 84, 3)


def test_other_clips_of_the_same_length_compile_nothing(compilations):
    model = tiny_model().model
    kept_of_clip(model, video(0, 7), VidCom2())
    before = compilations()
    kept_of_clip(model, video(1, 5), VidCom2())
    assert compilations() == before


@pytest.mark.parametrize("method", [FastV(), None, DyCoke(k=0), "dycoke"], ids=str)
def test_methods_without_a_token_stage_are_refused(method, unchecked_types):
    with pytest.raises(DycokeError, match=r"^.*(nothing to show|must be a compressor).*$"):
        kept_of_clip(tiny_model().model, video(0, 1), method)


@pytest.mark.parametrize(("pool_mode", "side"), [("bilinear", 378), ("average", 364)])
def test_frames_are_cut_to_the_pixels_that_tokens_stand_for(pool_mode, side):
    config = replace(LARGE_FRAMES, pool_mode=pool_mode)
    model = Model(random_params(config, 0), config)
    clip = np.random.default_rng(0).integers(0, 256, (1, 384, 384, 3), dtype=np.uint8)
    part = covered(clip, config)
    assert part.shape == (1, side, side, 3)
    assert (part == clip[:, :side, :side]).all()
    tokens = encode(model, [clip], 1, 1).tokens
    outside, inside = clip.copy(), clip.copy()
    outside[:, side:] = outside[:, :, side:] = 0
    inside[:, side - 1, side - 1] = 255 - inside[:, side - 1, side - 1]
    of_outside, of_inside = (encode(model, [x], 1, 1).tokens for x in (outside, inside))
    if pool_mode == "bilinear":  # the tower's attention reads patches that pooling leaves out
        assert (of_outside == tokens).all()
    assert (of_inside != tokens).any()


def coloured_frames(cells, pixels, side=384):
    """Frames whose tokens each have a colour of their own; what no token stands for is red."""
    row, column = np.meshgrid(np.arange(cells), np.arange(cells), indexing="ij")
    colours = np.stack([60 + 12 * row, 60 + 12 * column, np.full_like(row, 250)], -1)
    frame = np.zeros((side, side, 3), np.uint8)
    frame[..., 0] = 255
    used = cells * pixels
    frame[:used, :used] = colours.repeat(pixels, 0).repeat(pixels, 1)
    return frame, colours.reshape(-1, 3)


def runs(mask):
    """First and last index of each run of True."""
    edges = np.flatnonzero(np.diff(np.pad(mask.astype(int), 1)))
    return list(zip(edges[::2], edges[1::2], strict=True))


def drawn_frames(path):
    """The frames in a picture, row by row: all that is not grey, as text and paper are."""
    with Image.open(path) as image:
        picture = np.asarray(image)
    is_coloured = np.ptp(picture, axis=-1) > 0
    return [
        picture[top:bottom, left:right].astype(int)
        for top, bottom in runs(is_coloured.any(1))
        for left, right in runs(is_coloured[top:bottom].any(0))
    ]


@pytest.fixture(scope="module")
def large_frames(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect") / "checkpoint"
    write_untrained(folder, LARGE_FRAMES)
    return folder


@pytest.mark.parametrize(
    ("pool_mode", "cells", "pixels"), [("bilinear", 14, 27), ("average", 13, 28)]
)
def test_pictures_show_what_became_of_each_token(large_frames, tmp_path, pool_mode, cells, pixels):
    frame, colours = coloured_frames(cells, pixels)
    clip = tmp_path / "clip"
    clip.mkdir()
    for number in range(3):
        Image.fromarray(frame).save(clip / f"{number}.png")
    names = ["visionzip(budget=0.3)", "frames(budget=.5)"]
    code, out, _ = run_main(
        "inspect", clip, "--model", large_frames, "--pool-mode", pool_mode, "--frames", 3,
        "--compress", names[0], "--compress", names[1], "--picture", tmp_path / "x.png", "--json",
    )  # fmt: skip
    assert code == 0
    result = json.loads(out)
    assert result["grid"] == [cells, cells]
    assert [method["name"] for method in result["methods"]] == names
    shown = drawn_frames(tmp_path / "x.png")
    assert len(shown) == 2 * 3
    tokens = cells * cells
    assert result["methods"][0]["tokens"]["kept"] == int(3 * tokens * 0.3)
    assert result["methods"][1]["tokens"] == {"visual": 3 * tokens, "kept": tokens, "merged": 0}
    for method, of_method in zip(result["methods"], (shown[:3], shown[3:]), strict=True):
        places, merged = np.array(method["places"]), np.array(method["merged"])
        assert method["tokens"]["kept"] == len(places)
        assert method["tokens"]["merged"] == merged.sum()
        for number, drawn in enumerate(of_method):
            own = places // tokens == number
            assert method["frames"][number] == {"kept": own.sum(), "merged": (own & merged).sum()}
            is_kept, is_merged = np.zeros((2, tokens), bool)
            is_kept[places[own] % tokens] = True
            is_merged[places[own & merged] % tokens] = True
            assert drawn.shape == (10 * cells, 10 * cells, 3)
            of_cells = drawn.reshape(cells, 10, cells, 10, 3).swapaxes(1, 2).reshape(-1, 10, 10, 3)
            brightness = np.where(is_kept, 1, 0.25)[:, None]
            assert np.abs(of_cells[:, 5, 5] - brightness * colours).max() <= 1
            border = np.ones((10, 10), bool)
            border[1:-1, 1:-1] = False
            is_blue = (of_cells == BLUE).all(-1)
            assert (is_blue == (is_merged[:, None, None] & border)).all()


def test_numbers_are_printed_and_what_is_not_shown_is_said(tmp_path):
    """Stages that are not run may have settings that do not fit the model, here their layers."""
    picture, later = tmp_path / "picture.png", "evs+fastv(layer=9)+dycoke-kv(layer=18)"
    code, out, err = run_main(
        "inspect", real_clip(), "--frames", 4, "--picture", picture,
        "--compress", "random(budget=.25)", "--compress", later,
    )  # fmt: skip
    assert code == 0
    assert "random(budget=.25)" in out
    assert "16 of 64" in out
    assert err.splitlines()[-2:] == [
        f"{later}: not shown: what it does inside prefill and while decoding, which depends on the "
        "question; `dycoke-jax demo --video ... --prompt ... --compress ...` draws what is "
        "attended to",
        f"wrote {picture}: dropped tokens are dark, merged ones have a blue border",
    ]
    assert len(drawn_frames(picture)) == 2 * 4


def test_dycoke_is_shown_where_no_method_is_named(tmp_path):
    code, out, _ = run_main(
        "inspect", real_clip(), "--frames", 4, "--picture", tmp_path / "picture.png", "--json"
    )
    assert code == 0
    (method,) = json.loads(out)["methods"]
    assert method["compression"]["method"] == "dycoke"
    # One frame whole, and 30 % of the other three, rounded down; all tokens are as they were.
    assert method["tokens"] == {"visual": 64, "kept": 16 + 3 * 4, "merged": 0}
    assert method["not_shown"] == "what it does while decoding"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--compress", "nothing"], "there is no method 'nothing'"),
        (["--compress", "vidcom2(budget=1.5)"], "budget is 1.5; it must lie in (0, 1]"),
        (["--compress", "evs", "--compress", "fastv"], "fastv neither drops nor merges tokens"),
        (["--compress", "fastv+dycoke-kv"], "fastv+dycoke-kv neither drops nor merges tokens"),
        (["--compress", "none"], "none neither drops nor merges tokens"),
        (["--compress", "dycoke(mode=official)", "--frames", 4], "at least 5 frames, not 4"),
        (["--frames", 0], "frames is 0"),
        (["--model", "no/such/folder"], "neither an existing folder nor a hub id"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_shown_is_refused_in_one_line(arguments, says, tmp_path):
    picture = tmp_path / "picture.png"
    code, out, err = run_main("inspect", real_clip(), "--picture", picture, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert not picture.exists()


def test_files_that_cannot_be_read_or_written_are_refused_in_one_line(tmp_path):
    for arguments, says in (
        (["missing.mp4", "--picture", tmp_path / "x.png"], "missing.mp4"),
        ([real_clip(), "--picture", tmp_path / "missing" / "x.png"], "there is no folder"),
    ):
        code, out, err = run_main("inspect", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err
