"""Measures how long long clips take to read, by seeking and by decoding in order.

    python docs/reading_speed.py CLIP --folder FOLDER [--json]

The clips are made from CLIP: its frames are coded once as a minute of H.264 with a key frame every
250 frames, and the coded minute is repeated. Both ways are measured in turn, and the ratio is the
median of the pairs.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import av
import numpy as np

from dycoke_jax.inputs import FrameSampling, read_clip, seeking

RATE, KEY_FRAMES = 25, 250
CLIPS = (("10 minutes of 384x216", 384, 216, 10, 5), ("20 minutes of 1920x1080", 1920, 1080, 20, 3))
"""Name, width, height, minutes and number of pairs."""


def code_minute(clip: Path, path: Path, width: int, height: int) -> None:
    """Codes the frames of a clip over and over, until a minute is full."""
    with av.open(str(clip)) as container:
        pictures = [
            frame.reformat(width, height, "yuv420p").to_ndarray()
            for frame in container.decode(video=0)
        ]
    options = {"g": str(KEY_FRAMES), "keyint_min": str(KEY_FRAMES), "sc_threshold": "0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=RATE, options={"preset": "veryfast", **options}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(60 * RATE):
            picture = pictures[number % len(pictures)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        container.mux(stream.encode(None))


def repeat(source: Path, path: Path, times: int) -> None:
    """Writes the coded packets of a clip several times, one after the other."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        video = old.streams.video[0]
        stream = new.add_stream_from_template(video)
        packets = [packet for packet in old.demux(video) if packet.size]
        length = max(packet.pts + packet.duration for packet in packets)
        for turn in range(times):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts = packet.pts + turn * length
                copy.dts = packet.dts + turn * length
                copy.duration, copy.time_base = packet.duration, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                new.mux(copy)


def measure(path: Path, pairs: int) -> list[tuple[float, float]]:
    """Returns the seconds in order and by seeking, once for each pair."""
    sampling = FrameSampling(frames=32)
    seconds = []
    for _ in range(pairs):
        with mock.patch.object(seeking, "_LEAST_SAVED", float("inf")):
            start = time.perf_counter()
            in_order = read_clip(path, sampling, 384)
            middle = time.perf_counter()
        sought = read_clip(path, sampling, 384)
        seconds.append((middle - start, time.perf_counter() - middle))
        assert np.array_equal(in_order.frames, sought.frames)
    return seconds


def main() -> None:
    """Makes the clips that are not there yet, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clip", type=Path, help="a video file of a few seconds")
    parser.add_argument("--folder", type=Path, required=True, help="where the clips are made")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    results = {}
    for name, width, height, minutes, pairs in CLIPS:
        minute = arguments.folder / f"minute-{height}.mp4"
        path = arguments.folder / f"{minutes}-minutes-{height}.mp4"
        if not path.exists():
            code_minute(arguments.clip, minute, width, height)
            repeat(minute, path, minutes)
        seconds = measure(path, pairs)
        ratio = statistics.median(in_order / sought for in_order, sought in seconds)
        results[name] = {"ratio": ratio, "seconds": seconds}
        if not arguments.json:
            in_order, sought = (statistics.median(column) for column in zip(*seconds, strict=True))
            print(
                f"{name}: in order {in_order:.2f} s, by seeking {sought:.2f} s, {ratio:.1f} times"
            )
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
