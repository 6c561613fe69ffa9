"""Writes frames as a real video file."""

from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8


def write_clip(path: Path, frames: UInt8[np.ndarray, "F height width 3"], fps: int = 8) -> None:
    """Encodes frames as H.264 in an mp4 file, as cameras and editors do (yuv420p, crf 23).

    Args:
        path: of the file; one that exists is replaced.
        frames: of even height and width.
        fps: frames a second.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "23"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
