"""Traces of answers, and the pictures drawn of them."""

import numpy as np
import pytest
from PIL import Image
from support.reference import paper_merge
from support.tiny import tiny_model, video

from dycoke_jax import Decoding, DyCoke, DycokeError
from dycoke_jax.generation.encode import encode
from dycoke_jax.inspection.drawing import paint_frames, save, sheet
from dycoke_jax.inspection.tracing import trace_answer

SETTINGS = {
    "paper": DyCoke(layer=2),
    "official": DyCoke(layer=2, mode="official"),
    "drop": DyCoke(layer=2, parked="drop"),
    "merging only": DyCoke(layer=2, p=0),
    "pruning only": DyCoke(layer=2, k=0),
    "plain": None,
}


@pytest.mark.parametrize("compression", SETTINGS.values(), ids=SETTINGS)
def test_traces_are_of_the_same_answer(compression):
    model, clip = tiny_model(), video(0, 8)
    trace = trace_answer(model, clip, "What?", compression=compression, decoding=Decoding(6))
    answer = model.generate([clip], ["What?"], compression=compression, decoding=Decoding(6))[0]
    assert (trace.text, trace.tokens) == (answer.text, answer.tokens)
    assert trace.kept.sum() == answer.tokens.merged
    assert tuple(trace.attended.sum((1, 2))) == answer.tokens.attended
    assert trace.refreshed.sum() == answer.tokens.refreshes
    assert (trace.attended <= trace.kept).all()
    assert len(trace.words) == len(answer.token_ids) == 1 + len(trace.attended)


@pytest.mark.parametrize("newline", ["one_token", "grid", "frame", "no_token"])
def test_tokens_are_told_apart_from_newlines(newline):
    """Which tokens stay is the same in every layout, however newlines lie among them."""
    model, clip = tiny_model(newline), video(1, 6)
    trace = trace_answer(model, clip, "?", compression=DyCoke(layer=2), decoding=Decoding(3))
    features = np.asarray(encode(model.model, [clip], 1, 6).tokens)[0]
    assert np.flatnonzero(trace.kept).tolist() == paper_merge(features, 0.7).tolist()
    assert trace.attended.shape == (2, 6, 16)


def test_a_trace_needs_a_clip(unchecked_types):
    with pytest.raises(DycokeError, match="nothing to trace without a clip"):
        trace_answer(tiny_model(), None, "?")


def test_frames_show_what_became_of_each_token():
    frames = np.full((2, 40, 40, 3), 200, np.uint8)
    kept = np.zeros((2, 16), bool)
    attended = np.zeros((2, 16))
    kept[0, 0] = kept[1, 5] = True
    attended[1, 5] = 1.0
    painted = paint_frames(frames, (4, 4), kept, attended, size=160)
    cells = painted.reshape(2, 4, 40, 4, 40, 3).swapaxes(2, 3)
    middle = cells[:, :, :, 20, 20, 0].reshape(2, 16)
    assert (middle == np.where(kept, 200, 50)).all()
    corner = cells[:, :, :, 0, 0].reshape(2, 16, 3)
    assert corner[1, 5].tolist() == [255, 220, 0]
    assert corner[0, 0].tolist() == [200, 200, 200]
    assert corner[1, 4].tolist() == [50, 50, 50]


def test_pictures_are_written_whole_or_not_at_all(tmp_path):
    trace = trace_answer(tiny_model(), video(0, 10), "?", decoding=Decoding(2))
    picture = sheet([("clip: ?\nan answer", trace), ("again", trace)])
    save(picture, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size == picture.size
    with pytest.raises(DycokeError, match=r"cannot write .*missing"):
        save(picture, tmp_path / "missing" / "picture.png")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
