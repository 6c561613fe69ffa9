"""Writes frames as a video file."""

from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8


def write_clip(path: Path, frames: UInt8[np.ndarray, "F height width 3"], fps: int = 8) -> None:
    """Encodes frames as H.264 in an MP4 file, lossily as usual (yuv420p, CRF 23).

    Args:
        path: the file to write; an existing file is replaced.
        frames: RGB frames of even height and width.
        fps: frames a second, at least 1.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "23"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
