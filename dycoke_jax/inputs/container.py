"""Opens video files with FFmpeg (PyAV) and chooses their video stream.

A clip is one file. Some of FFmpeg's formats are lists or scripts that make it open other files, so
only formats whose data lie in the file itself are allowed, and FFmpeg gets the list of these before
it opens the file.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import av
import av.container
import av.stream

from dycoke_jax.errors import VideoError, printable
from dycoke_jax.inputs.limits import LimitError, Watch


@runtime_checkable
class OpenFile(Protocol):
    """A file that is open for reading in binary mode."""

    def read(self) -> bytes:
        """Returns the rest of the file."""


Readable = str | os.PathLike[str] | bytes | bytearray | memoryview | OpenFile
"""A path, the bytes of a path, the bytes of a file, or an open binary file."""

# Names of FFmpeg's demuxers. Left out are those that open other files (concat, dash, hls, image2,
# imf, sdp, vobsub, ...), devices, text drawn as pictures (tty), and still pictures, which Pillow
# reads.
_VIDEO = (
    "3g2,3gp,asf,avi,av1,avs,avs2,avs3,cavsvideo,dirac,dnxhd,dv,evc,flic,flv,gxf,h261,h263,h264,"
    "hevc,ivf,kux,live_flv,lvf,lxf,m4v,matroska,mjpeg,mjpeg_2000,mov,mp4,mpeg,mpegts,mpegvideo,mtv,"
    "mxf,nsv,nut,nuv,obu,ogg,pva,rm,smk,swf,vc1,vc1test,vvc,webm,wtv,xmv,yuv4mpegpipe"
)
# Files without pictures are allowed, so that the message can say what they hold.
_OTHER = "aac,ac3,aiff,amr,ass,caf,flac,mp3,srt,wav,webvtt"
_PICTURE_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
"""Major brands of HEIF and AVIF files (ISO/IEC 23008-12)."""
_OPTIONS = {"format_whitelist": f"{_VIDEO},{_OTHER}", "protocol_whitelist": "file"}

_PICTURES = "give a file such as MP4, MKV, WebM or AVI"
_PART = 1 << 20  # bytes
_LONGEST_NAME = 4096  # characters; a path cannot be longer


@dataclass(frozen=True)
class Source:
    """A file to read, which may be opened several times.

    Attributes:
        name: what messages call it.
        content: absolute path of the file, or its bytes.
        head: the first 4096 bytes of the file.
        watch: the limits of reading it.
    """

    name: str
    content: Path | bytes
    head: bytes
    watch: Watch = field(default_factory=Watch)

    def open(self) -> io.BytesIO | str:
        """Returns what FFmpeg and Pillow open: a path, or a new file in memory."""
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else str(self.content)

    def check_time(self) -> None:
        """Raises a VideoError if reading it has taken too long."""
        self.watch.check_time(self.name)


def folder_of(readable: Readable) -> Path | None:
    """Returns the path of a folder; None if the argument is anything else."""
    if isinstance(readable, bytes | bytearray | memoryview) and b"\0" not in bytes(readable):
        readable = os.fsdecode(bytes(readable))
    if not isinstance(readable, str | os.PathLike) or not os.fspath(readable):
        return None
    try:
        folder = Path(os.fsdecode(readable))
        return folder if folder.is_dir() else None
    except (OSError, ValueError):  # an impossible path; find_source says so
        return None


def find_source(readable: Readable, watch: Watch | None = None) -> Source:
    """Finds a file and reads its first bytes; messages call it by its path, control codes escaped.

    Bytes without a zero byte are taken for a path, since no path holds a zero byte and every video
    file does. An open file is read into memory, from its current position.

    Args:
        readable: the file.
        watch: the limits of reading it; None for the default ones without a deadline.

    Raises:
        VideoError: if there is no such file, or it is empty or cannot be read.
    """
    watch = watch or Watch()
    if isinstance(readable, bytes | bytearray | memoryview):
        data = bytes(readable)
        if b"\0" in data or not data:
            return _in_memory("the clip given as bytes", data, watch)
        readable = os.fsdecode(data)
    if not isinstance(readable, str | os.PathLike):
        name = getattr(readable, "name", None) or "the clip given as a file object"
        try:
            data = readable.read()
        except Exception as error:  # which errors there are is up to the class of the object
            reason = shown_name(str(error))
            raise VideoError(f"the file object of the clip cannot be read ({reason})") from error
        if not isinstance(data, bytes | bytearray | memoryview):
            raise VideoError(
                f"the file object of the clip gives {type(data).__name__}, not bytes; open the "
                "file in mode 'rb'"
            )
        return _in_memory(shown_name(str(name)), bytes(data), watch)
    return _on_disk(os.fsdecode(readable), watch)


def _in_memory(name: str, data: bytes, watch: Watch) -> Source:
    if not data:
        raise VideoError(f"{name} is empty (0 bytes); get the file again")
    return Source(name, data, data[:4096], watch)


def shown_name(name: str) -> str:
    """A name as messages show it: in one line, an endless one cut."""
    if len(name) > _LONGEST_NAME:
        name = f"{name[:50]}... ({len(name)} characters)"
    return printable(name)


def _on_disk(path: str, watch: Watch) -> Source:
    file = Path(path)
    name = shown_name(path) or "''"
    try:
        if not file.exists():
            raise VideoError(f"{name}: no such file; check the path")
        if not file.is_file():
            raise VideoError(f"{name} is no regular file; name one video file")
        with file.open("rb") as opened:
            head = opened.read(4096)
    except ValueError as error:  # a zero byte in the path
        raise VideoError(f"{name} is no path ({error}); check it") from error
    except OSError as error:
        raise VideoError(f"{name} cannot be opened ({error.strerror})") from error
    if not head:
        raise VideoError(f"{name} is empty (0 bytes); get the file again")
    # The path is absolute because FFmpeg would take a "name:" at its start for a protocol.
    return Source(name, file.absolute(), head, watch)


def open_container(source: Source) -> av.container.InputContainer:
    """Opens a video file with FFmpeg.

    Raises:
        VideoError: if it is no video file, or of a format that is not allowed.
    """
    if source.head[4:8] == b"ftyp" and source.head[8:12] in _PICTURE_BRANDS:
        # FFmpeg would open it and show one of its tiles.
        raise VideoError(
            f"{source.name} is a HEIF or AVIF picture, which the installed Pillow cannot read; "
            "convert it to JPEG"
        )
    try:
        # Metadata that is not UTF-8 must not be an error.
        return av.open(source.open(), "r", options=_OPTIONS, metadata_errors="replace")
    except av.FFmpegError as error:
        raise VideoError(_why_not(source, error)) from error
    except OSError as error:
        raise VideoError(f"{source.name} cannot be opened ({error.strerror})") from error


def _why_not(source: Source, error: av.FFmpegError) -> str:
    """Returns why FFmpeg could not open a file, and what to do."""
    if source.head[4:8] == b"ftyp":
        return (
            f"{source.name} is an MP4 or MOV file without its index (moov), which is written last: "
            "a recording, copy or download was broken off; get the file again"
        )
    if _is_text(source.head):
        return (
            f"{source.name} is not a video, it is a text file, and playlists and scripts are not "
            f"followed; {_PICTURES}"
        )
    return f"{source.name} is not a video ({error.strerror}); {_PICTURES}"


@contextmanager
def damage_or_unreadable(source: Source) -> Iterator[None]:
    """Tells errors of the operating system from damage, for which FFmpeg takes them.

    A file that cannot be read on is to FFmpeg one that ends there. So a file that is refused is
    read to its end once more, which has the same error if it is one of the system.

    Raises:
        VideoError: that of the block; in its place one that comes from an ``OSError``, if the file
            cannot be read to its end.
    """
    try:
        yield
    except LimitError:
        raise  # what it holds does not matter, and it may be large
    except VideoError:
        check_readable(source)
        raise
    except OSError as error:
        if isinstance(error, av.FFmpegError):
            raise
        raise _unreadable(source, error) from error


def check_readable(source: Source) -> None:
    """Reads a file to its end, whatever it holds.

    Raises:
        VideoError: if the operating system does not give all of it.
    """
    if isinstance(source.content, bytes):
        return
    try:
        with source.content.open("rb", buffering=0) as file:
            while file.read(_PART):
                source.check_time()
    except OSError as error:
        raise _unreadable(source, error) from error


def _unreadable(source: Source, error: OSError) -> VideoError:
    return VideoError(
        f"{source.name} cannot be read to its end ({error.strerror}); try again, and if that does "
        "not help copy the file to another disk"
    )


def _is_text(head: bytes) -> bool:
    try:
        # The last character may be cut.
        return "\0" not in head[:-4].decode()
    except UnicodeDecodeError:
        return False


def video_stream(source: Source, container: av.container.InputContainer) -> av.VideoStream:
    """Returns the video stream that FFmpeg's program takes: the default one, then the largest.

    Cover pictures, thumbnails and the tiles of a picture are left aside.

    Raises:
        VideoError: if there is none, or no decoder for it, or if its frames are too large.
    """
    kinds = av.stream.Disposition
    aside = kinds.attached_pic | kinds.timed_thumbnails | kinds.dependent
    streams = [stream for stream in container.streams.video if not stream.disposition & aside]
    if not streams:
        found = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise VideoError(
            f"{source.name} has no video stream, only {found}; give a file with pictures"
        )
    decodable = [stream for stream in streams if stream.codec_context is not None]
    if not decodable:
        raise VideoError(
            f"{source.name}: there is no decoder for its video stream; convert it, to H.264 in MP4 "
            "for instance"
        )

    def rank(stream: av.VideoStream) -> tuple[bool, int]:
        return bool(stream.disposition & kinds.default), stream.width * stream.height

    best = max(decodable, key=rank)
    source.watch.check_size(source.name, best.width, best.height)
    # A stream may change its size on the way.
    best.codec_context.options = {"max_pixels": str(source.watch.limits.pixels)}
    return best


def demux(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Yields the packets of a stream.

    Raises:
        FFmpegError: if the file cannot be read on.
    """
    try:
        yield from container.demux(stream)
    except IndexError as error:
        # PyAV knows the streams that the beginning of a file announces.
        raise av.InvalidDataError(_INVALID_DATA, "a stream begins in its middle") from error


_INVALID_DATA = 1094995529
"""FFmpeg's number of this error."""
