"""Files made to do harm: never a traceback, never a hang, and memory stays bounded.

``HOSTILE_EXAMPLES`` sets how many damaged files are read; its default keeps the tests quick.
"""

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
import pytest
from PIL import Image
from support.clips import (
    cut,
    frame_numbers,
    numbered_frame,
    real_clip,
    scramble,
    textured,
    write_clip,
)
from support.mutations import mutations, seeds
from support.tiny import tiny_model

from dycoke_jax import Failure, Request
from dycoke_jax.errors import ConfigError, DycokeError, VideoError
from dycoke_jax.inputs import Clip, DecodingLimits, FrameSampling, check_clip, read_clip
from dycoke_jax.inputs.decoding_pool import DecodingPool
from dycoke_jax.inputs.system_errors import may_pass

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "150"))
SIZE = 32
FEW, ALL = FrameSampling(4), FrameSampling(1000, fps=1000.0)
SECONDS = 10.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return seeds(tmp_path_factory.mktemp("seeds"))


@pytest.fixture
def pool() -> Iterator[DecodingPool]:
    with DecodingPool(DecodingLimits(seconds=SECONDS), processes=2) as made:
        yield made


def resident() -> int:
    """Bytes of memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def read_all(read: Callable[..., Clip], damaged: list[bytes], warm: int) -> tuple[int, int, float]:
    """Reads files, each of which must give a clip or one line; how many did, memory, and seconds.

    Returns:
        The number of clips, the growth of memory after the first ``warm`` files in bytes, and the
        longest time of a file in seconds.
    """
    clips, before, longest = 0, 0, 0.0
    messages = []
    for number, content in enumerate(damaged):
        if number == warm:
            before = resident()
        begin = time.perf_counter()
        sampling = FEW if number % 2 else ALL
        try:
            clip = read(content, sampling, SIZE, allow_damaged=number % 3 == 0)
        except DycokeError as error:
            messages.append(str(error))
        else:
            clips += 1
            assert clip.frames.shape[1:] == (SIZE, SIZE, 3)
            assert len(clip.times) == len(clip.frames)
        longest = max(longest, time.perf_counter() - begin)
    assert all(message.isprintable() and len(message) < 600 for message in messages)
    return clips, resident() - before, longest


def test_the_files_that_are_damaged_can_be_read(files: list[bytes], pool: DecodingPool) -> None:
    for content in files:
        assert len(pool.read(content, FEW, SIZE).frames) == 4


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_give_a_clip_or_one_line(files: list[bytes]) -> None:
    damaged = [*mutations(files, EXAMPLES)]
    clips, _, longest = read_all(read_clip, damaged, 0)
    assert EXAMPLES // 10 < clips < EXAMPLES // 2
    assert longest < SECONDS


def test_damaged_files_in_another_process_leave_memory_as_it_is(
    files: list[bytes], pool: DecodingPool
) -> None:
    damaged = [*mutations(files, EXAMPLES, seed=1)]
    clips, growth, longest = read_all(pool.read, damaged, EXAMPLES // 5)
    assert EXAMPLES // 10 < clips < EXAMPLES // 2
    assert growth < 0.05 * resident()
    assert longest < SECONDS


# What a process of its own gives is what reading here gives


def same(one: Clip, other: Clip) -> None:
    np.testing.assert_array_equal(one.frames, other.frames)
    assert (one.times, one.duration, one.notes) == (other.times, other.duration, other.notes)


def test_a_clip_of_every_kind_is_the_same(
    pool: DecodingPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_clip(Path("relative.mkv"), 12)
    odd = write_clip(tmp_path / "a\n\u4f60.mp4", 5)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.fromarray(numbered_frame(number)).save(pictures / f"{number}.png")
    (pictures / "notes.txt").write_text("")
    data = real_clip().read_bytes()
    givens = ["relative.mkv", Path("relative.mkv"), b"relative.mkv", odd, pictures, data]
    givens += [bytearray(data), np.zeros((2, 8, 8, 3), np.uint8)]
    for given in givens:
        expected = read_clip(given, FEW, SIZE) if not isinstance(given, np.ndarray) else None
        clip = pool.read(given, FEW, SIZE)
        if expected is None:
            assert clip.frames.shape == (2, SIZE, SIZE, 3)
        else:
            same(clip, expected)
    with real_clip().open("rb") as opened:
        same(pool.read(opened, FEW, SIZE), read_clip(data, FEW, SIZE))


def test_errors_and_notes_are_the_same(pool: DecodingPool, tmp_path: Path) -> None:
    data = real_clip().read_bytes()
    cut = tmp_path / "cut.ts"
    write_clip(cut, 24)
    cut.write_bytes(cut.read_bytes()[:-5000])
    for bad in ("nowhere.mp4", b"no video\0", data[: len(data) // 2], cut, tmp_path / "x\udc80"):
        for allow in (False, True):
            texts = []
            for read in (pool.read, read_clip):
                try:
                    texts.append(str(read(bad, FEW, SIZE, allow_damaged=allow).notes))
                except VideoError as error:
                    texts.append(str(error))
            assert texts[0] == texts[1]


def test_the_cause_in_the_operating_system_is_told(pool: DecodingPool) -> None:
    """Whoever may try again asks for it."""
    with pytest.raises(VideoError) as caught:
        pool.read("y" * 300, FEW, SIZE)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENAMETOOLONG


class EndsInAnError:
    """An open file that has an error of the disk in place of its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def read(self, size: int = -1) -> bytes:
        content = self.file.read(size)
        if size < 0 or len(content) < size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return content

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(place, whence)

    def __enter__(self) -> "EndsInAnError":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@pytest.fixture
def bad_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be read to its end by Python; FFmpeg and Pillow take what is there for all."""
    opened = Path.open

    def fail(path: Path, *arguments: Any, **options: Any) -> EndsInAnError:
        return EndsInAnError(opened(path, *arguments, **options))

    monkeypatch.setattr(Path, "open", fail)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Damaged files of more than 4 KB."""
    folder = tmp_path_factory.mktemp("damaged")
    picture = folder / "cut.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(picture)
    kinds = ("mp4", "mkv", "avi")
    clips = [write_clip(folder / f"cut.{kind}", textured(40)) for kind in kinds]
    scrambled = scramble(write_clip(folder / "noise.ts", textured(40)), 0.4, 0.6)
    text = folder / "text.mp4"
    text.write_text("no video " * 1000)
    return [*(cut(path, 0.6) for path in (picture, *clips)), scrambled, text]


@pytest.mark.usefixtures("bad_disk")
def test_a_file_that_the_disk_does_not_give_is_not_called_damaged(damaged: list[Path]) -> None:
    for path in damaged:
        for allow in (False, True):
            with pytest.raises(VideoError) as caught:
                read_clip(path, FEW, SIZE, allow_damaged=allow)
            words = f"{path} cannot be read to its end (Input/output error); try again"
            assert str(caught.value).startswith(words)
            assert may_pass(caught.value)
    with pytest.raises(VideoError, match="cannot be read to its end"):
        check_clip(path)


def test_damage_does_not_pass(damaged: list[Path], pool: DecodingPool) -> None:
    for path in damaged:
        if path.suffix in (".mkv", ".avi"):
            continue  # a clip that ends early is odd there, and not refused
        for read in (read_clip, pool.read):
            with pytest.raises(VideoError) as caught:
                read(path, FEW, SIZE)
            assert not may_pass(caught.value)
    of_ffmpeg = VideoError("ends too early")
    of_ffmpeg.__cause__ = av.error.OSError(errno.EIO, "Input/output error")
    assert not may_pass(of_ffmpeg)


@pytest.mark.usefixtures("bad_disk")
def test_only_a_file_that_is_refused_is_read_to_its_end() -> None:
    """And not one that is beyond a limit, since it may be large."""
    assert len(read_clip(real_clip(), FEW, SIZE).frames) == 4
    with pytest.raises(VideoError, match="more than the limit of 1 pixels"):
        read_clip(real_clip(), FEW, SIZE, limits=DecodingLimits(pixels=1))


def test_a_folder_that_cannot_be_read_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> Iterator[Path]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(VideoError, match="cannot be read") as caught:
        read_clip(tmp_path, FEW, SIZE)
    assert may_pass(caught.value)


def test_progress_is_told(pool: DecodingPool, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int, int]] = []
    for _ in range(20):  # a report comes every tenth of a second
        pool.read(real_clip(), FrameSampling(132), 384, progress=lambda *it: told.append(it))
        if told:
            break
    what, done, total = told[0]
    assert what == "decoding frames"
    assert 0 < done <= total == 132


def test_the_process_imports_nothing_that_is_slow() -> None:
    code = (
        "import dycoke_jax.inputs.decoding_process, sys\n"
        "print([m for m in ('jax', 'flax', 'transformers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# Limits


def test_limits_say_their_range() -> None:
    for setting in ({"seconds": 0}, {"pixels": 0}, {"frames": 0}, {"megabytes": -1}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            DecodingLimits(**setting)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="processes"):
        DecodingPool(processes=0)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (DecodingLimits(seconds=1e-6), "more than the limit of 1e-06 seconds"),
        (DecodingLimits(pixels=384 * 216 - 1), "384x216 pixels, more than the limit of 82943"),
        (DecodingLimits(frames=131), "more frames than the limit of 131"),
    ],
    ids=["seconds", "pixels", "frames"],
)
def test_a_clip_beyond_a_limit_is_refused_and_one_within_it_is_not(
    limits: DecodingLimits, says: str
) -> None:
    with pytest.raises(VideoError, match=says) as caught:
        read_clip(real_clip(), FEW, SIZE, limits=limits)
    assert str(real_clip()) in str(caught.value)
    assert "DecodingLimits." in str(caught.value)
    just = DecodingLimits(seconds=60, pixels=384 * 216, frames=132)
    same(read_clip(real_clip(), FEW, SIZE, limits=just), read_clip(real_clip(), FEW, SIZE))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_animations_have_the_same_limits(tmp_path: Path, name: str) -> None:
    pictures = [Image.fromarray(numbered_frame(number)) for number in range(6)]
    pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=100)
    for limits in (
        DecodingLimits(seconds=1e-6),
        DecodingLimits(pixels=100),
        DecodingLimits(frames=5),
    ):
        with pytest.raises(VideoError, match="the limit of"):
            read_clip(tmp_path / name, FEW, SIZE, limits=limits)


def test_a_stream_that_becomes_too_large_on_its_way_is_refused(tmp_path: Path) -> None:
    small = write_clip(tmp_path / "small.h264", 12).read_bytes()
    frames = [numbered_frame(number, 512, 1024) for number in range(12)]
    large = write_clip(tmp_path / "large.h264", frames).read_bytes()
    both = tmp_path / "both.h264"
    both.write_bytes(small + large)
    assert frame_numbers(read_clip(both, ALL, 64).frames) == [*range(12), *range(12)]
    with pytest.raises(VideoError, match="is damaged"):
        read_clip(both, ALL, 64, limits=DecodingLimits(pixels=10_000))


def png(width: int, height: int, rows: int) -> bytes:
    """A black PNG that says how large it is, and holds so many rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data = zlib.compress(bytes(rows * (1 + 3 * width)), 1)
    header = chunk(b"IHDR", size + b"\x08\x02\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(8193, 8192), (13_000, 13_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_says_it_is_huge_is_refused_at_once(width: int, height: int) -> None:
    begin, before = time.perf_counter(), resident()
    with pytest.raises(VideoError, match="pixels") as caught:
        read_clip(png(width, height, 0), FEW, SIZE)
    assert str(caught.value).isprintable()
    assert time.perf_counter() - begin < 2
    assert resident() - before < 50e6


def test_a_picture_that_needs_too_much_memory_ends_in_its_process() -> None:
    bomb = png(8000, 8000, 8000)  # 192 MB of pixels
    assert len(bomb) < 2_000_000
    with DecodingPool(DecodingLimits(megabytes=100), processes=1) as pool:
        before = resident()
        with pytest.raises(VideoError, match="limit of 100 megabytes"):
            pool.read(bomb, FEW, SIZE)
        assert resident() - before < 50e6
        assert len(pool.read(real_clip(), FEW, SIZE).frames) == 4


# Processes that fail


def children() -> list[int]:
    """The processes that this one has started and that run."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return sorted(found)


@pytest.fixture
def started() -> Iterator[tuple[DecodingPool, int]]:
    """A pool of one process, and its number."""
    before = children()
    with DecodingPool(DecodingLimits(seconds=0.5), processes=1) as pool:
        pool.read(png(8, 8, 8), FEW, SIZE)
        (process,) = set(children()) - set(before)
        yield pool, process
    assert children() == before


def test_a_process_that_crashes_fails_its_clip_and_the_pool_goes_on(
    started: tuple[DecodingPool, int],
) -> None:
    pool, process = started
    os.kill(process, signal.SIGSTOP)

    def crash() -> None:
        os.kill(process, signal.SIGSEGV)
        os.kill(process, signal.SIGCONT)

    timer = threading.Timer(0.2, crash)
    timer.start()
    with pytest.raises(VideoError, match=r"bunny.mp4 cannot be read: .* crashed \(signal 11\)"):
        pool.read(real_clip(), FEW, SIZE)
    timer.join()
    assert len(pool.read(png(8, 8, 8), FEW, SIZE).frames) == 4


def test_a_process_that_hangs_is_ended_in_time(
    started: tuple[DecodingPool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, process = started
    monkeypatch.setattr("dycoke_jax.inputs.decoding_pool._GRACE_SECONDS", 0.2)
    os.kill(process, signal.SIGSTOP)
    begin = time.perf_counter()
    with pytest.raises(VideoError, match=r"bunny.mp4 takes more than the limit of 0.5 seconds"):
        pool.read(real_clip(), FEW, SIZE)
    assert time.perf_counter() - begin < 5
    assert len(pool.read(png(8, 8, 8), FEW, SIZE).frames) == 4


def test_a_process_that_has_ended_while_idle_costs_no_clip(
    started: tuple[DecodingPool, int],
) -> None:
    pool, process = started
    os.kill(process, signal.SIGKILL)
    time.sleep(0.1)
    assert len(pool.read(png(8, 8, 8), FEW, SIZE).frames) == 4


def test_no_process_outlives_the_one_that_asks(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from dycoke_jax.inputs import FrameSampling\n"
        "from dycoke_jax.inputs.decoding_pool import DecodingPool\n"
        "pool = DecodingPool()\n"
        "pool.read(sys.argv[1], FrameSampling(2), 32)\n"
        "print(flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(real_clip())]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == b"\n"
        listed = Path(f"/proc/{asking.pid}/task/{asking.pid}/children").read_text()
        (process,) = listed.split()
        asking.kill()
    end = time.monotonic() + 20
    while is_running(process) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(process)


def is_running(process: str) -> bool:
    """Whether a process has not ended; a zombie has no command."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_is_replaced_after_many_clips(
    started: tuple[DecodingPool, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dycoke_jax.inputs.decoding_pool._MOST_CLIPS", 3)
    pool, process = started
    for _ in range(4):
        pool.read(png(8, 8, 8), FEW, SIZE)
    assert process not in children()


def test_several_threads_read_at_the_same_time(pool: DecodingPool) -> None:
    expected = read_clip(real_clip(), FEW, SIZE)
    read: list[Clip] = []
    threads = [
        threading.Thread(target=lambda: read.append(pool.read(real_clip(), FEW, SIZE)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read) == 6
    for clip in read:
        same(clip, expected)


def test_requests_are_read_in_other_processes_if_asked(pool: DecodingPool) -> None:
    model = tiny_model(layers=1)
    request = Request("What?", real_clip(), sampling=FrameSampling(3))
    prepared, expected = model.prepare(request, read=pool.read), model.prepare(request)
    np.testing.assert_array_equal(prepared.frames, expected.frames)
    assert prepared.prompt == expected.prompt
    read = []

    def counted(video: object, *arguments: object, **options: object) -> Clip:
        read.append(video)
        return pool.read(video, *arguments, **options)  # type: ignore[arg-type]

    broken = Request("What?", b"\0broken")
    (failed,) = model.run([broken], compression=None, read=counted)
    assert isinstance(failed, Failure)
    assert failed.kind == "video"
    assert read == [b"\0broken"]
