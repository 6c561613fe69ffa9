"""FFmpeg's program: an independent reader of clips, and a writer of what PyAV cannot write."""

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np


def ffmpeg(*arguments: object) -> bytes:
    """Runs the program and returns what it prints."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def ffmpeg_frames(path: Path, size: int = 64) -> np.ndarray:
    """Every frame of a clip, turned upright, as uint8 RGB [F, size, size, 3]."""
    scale = ("-vf", f"scale={size}:{size}", "-fps_mode", "passthrough")
    raw = ffmpeg("-i", path, *scale, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, size, size, 3)
