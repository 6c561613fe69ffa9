"""Tells which packets decoding may start at and still give exactly the same frames.

Containers mark key frames, but some of these are only places where a player may start and where the
picture becomes right after a while, or where frames that follow still refer to earlier ones.
"""

from collections.abc import Iterator

import av

_ALWAYS = {
    "av1",
    "dnxhd",
    "ffv1",
    "flv",
    "libaom-av1",
    "libdav1d",
    "mjpeg",
    "mpeg1video",
    "mpeg2video",
    "prores",
    "vp8",
    "vp9",
}
"""Codecs whose key frames refer to nothing before them, nor do the frames shown after them.

MPEG-4 is left out: its decoder adapts to the encoder that the first packet may name.
"""

_H264_IDR = {5}
_HEVC_RANDOM_ACCESS = {16, 17, 18, 19, 20, 21}  # BLA, IDR and CRA


def is_entry_point(packet: av.Packet, codec: str, extradata: bytes | None) -> bool:
    """Whether decoding may start at a packet that its container marks as a key frame.

    Frames that follow it in the file but are shown before it (leading pictures) are not looked at.

    Args:
        packet: a packet with data.
        codec: FFmpeg's name of its decoder.
        extradata: the codec's configuration, as the container stores it.

    Returns:
        For H.264, whether it holds an IDR picture; for HEVC, whether it holds a random access
        picture (ITU-T H.264 and H.265, table 7-1). For codecs that are not known, False.
    """
    if codec == "h264":
        units = _nal_units(memoryview(packet), extradata, length_at=4)
        return any(header & 0x1F in _H264_IDR for header in units)
    if codec == "hevc":
        units = _nal_units(memoryview(packet), extradata, length_at=21)
        return any(header >> 1 & 0x3F in _HEVC_RANDOM_ACCESS for header in units)
    return codec in _ALWAYS


def is_referenced(packet: av.Packet, codec: str, extradata: bytes | None) -> bool:
    """Whether other frames may refer to the frame of a packet; True if that is not known.

    H.264 says it in each slice (``nal_ref_idc``, ITU-T H.264, section 7.4.1). A frame to which none
    refers need not be decoded if it is not wanted itself.

    Args:
        packet: a packet with data.
        codec: FFmpeg's name of its decoder.
        extradata: the codec's configuration, as the container stores it.
    """
    if codec != "h264":
        return True
    units = _nal_units(memoryview(packet), extradata, length_at=4)
    slices = [header for header in units if 1 <= header & 0x1F <= 5]
    return not slices or any(header & 0x60 for header in slices)


def _nal_units(data: memoryview, extradata: bytes | None, length_at: int) -> Iterator[int]:
    """Yields the first byte of each NAL unit of a packet.

    Args:
        data: the packet: units behind start codes, or each behind its length.
        extradata: the codec's configuration; its first byte is 1 if units stand behind lengths.
        length_at: place in ``extradata`` of the byte whose two low bits give the size of a length.
    """
    if extradata and extradata[0] == 1 and len(extradata) > length_at:
        size = (extradata[length_at] & 3) + 1
        place = 0
        while place + size < len(data):
            yield data[place + size]
            place += size + int.from_bytes(data[place : place + size], "big")
        return
    content = bytes(data)
    place = content.find(b"\0\0\1")
    while 0 <= place < len(content) - 3:
        yield content[place + 3]
        place = content.find(b"\0\0\1", place + 3)
