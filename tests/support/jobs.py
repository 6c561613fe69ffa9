"""Batch jobs for tests: files of requests, jobs in processes of their own, and their results."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dycoke_jax.assets import TINY
from support.clips import cut, real_clip, scramble, textured, write_clip, write_sound

QUESTIONS = ("What happens?", "Which thing moves?", "How many things are there in all of it?", "?")


def write_lines(path: Path, lines: list) -> Path:
    """Writes lines, those that are no texts as JSON."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def read_results(path: Path) -> dict[str, dict]:
    """The results by id; every line must be whole, and every id be there once."""
    content = path.read_bytes()
    assert content.endswith(b"\n") or not content
    results = [json.loads(line) for line in content.splitlines()]
    by_id = {result["id"]: result for result in results}
    assert len(by_id) == len(results)
    return by_id


def without_times(results: dict[str, dict]) -> dict[str, dict]:
    """The results without what differs between two runs."""
    return {
        own: {key: value for key, value in result.items() if key != "seconds"}
        for own, result in results.items()
    }


def write_job(folder: Path, count: int) -> Path:
    """A file of requests over real, made and broken clips, with faulty lines among them."""
    shutil.copy(real_clip(), folder / "real.mp4")
    write_clip(folder / "made.mp4", 24)
    write_clip(folder / "made.mkv", 40, codec="mpeg4")
    write_clip(folder / "made.avi", 9, codec="mpeg4")
    cut(write_clip(folder / "cut.mp4", textured(20)), 0.6)
    cut(write_clip(folder / "cut.mkv", textured(20), codec="mpeg4"), 0.6)
    scramble(write_clip(folder / "noise.avi", textured(20), codec="mpeg4"), 0.3, 0.6)
    write_sound(folder / "sound.mp4")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video")
    whole = ("real.mp4", "made.mp4", "made.mkv", "made.avi")
    broken = ("cut.mp4", "cut.mkv", "noise.avi", "sound.mp4", "empty.mp4", "text.mp4", "none.mp4")
    chance = random.Random(0)
    lines: list = []
    for number in range(1, count + 1):
        line: dict = {"id": f"clip-{number}", "prompt": chance.choice(QUESTIONS)}
        kind = number % 10
        if kind == 9:
            fault = chance.choice(("{", "[1]", '{"prompt": "?"}', json.dumps(line | {"x": 1})))
            lines.append(fault)
            continue
        if kind in (3, 6):
            line["video"] = chance.choice(broken)
        elif kind != 8:
            line["video"] = chance.choice(whole)
        if kind in (2, 6):
            line["messages"] = [{"role": "user", "content": line.pop("prompt")}]
        if kind in (1, 4):
            seed = chance.randrange(1000)
            line["decoding"] = {"max_new_tokens": 20, "temperature": 1.0, "seed": seed}
        if kind == 5:
            line["sampling"] = {"fps": 2.0}
        lines.append(line)
    return write_lines(folder / "requests.jsonl", lines)


def job_arguments(requests: Path, results: Path) -> list[str]:
    """The command line of a job on the tiny model."""
    settings = ("--frames", 8, "--max-new-tokens", 12, "--batch-size", 4)
    return [*map(str, ("batch", requests, results, "--model", TINY, *settings))]


def start_job(requests: Path, results: Path) -> subprocess.Popen:
    """Starts a job in a process of its own."""
    program = "from dycoke_jax.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, *job_arguments(requests, results)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_of(results: Path) -> int:
    """Number of whole lines of a file; 0 if there is none."""
    return results.read_bytes().count(b"\n") if results.exists() else 0


def wait_for_lines(process: subprocess.Popen, results: Path, more: int) -> None:
    """Waits until a job has written so many more lines, or has ended."""
    goal = lines_of(results) + more
    while process.poll() is None and lines_of(results) < goal:
        time.sleep(0.005)


def kill_often(requests: Path, results: Path, kills: int, most_lines: int) -> list[int]:
    """Runs a job and kills it at random moments, each time starting it again.

    Every fifth is killed while it starts, the others after a random number of new lines and a
    random part of the time that a batch takes. What was there before must stay as it is.

    Returns:
        How many whole lines there were after each kill.
    """
    chance = random.Random(1)
    counts = []
    before = b""
    while len(counts) < kills:
        process = start_job(requests, results)
        if len(counts) % 5 == 4:
            time.sleep(chance.uniform(0, 5))
        else:
            wait_for_lines(process, results, chance.randint(1, most_lines))
            time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -9, "the job was complete before it was killed"
        content = results.read_bytes() if results.exists() else b""
        assert content.startswith(before)
        before = content[: content.rfind(b"\n") + 1]
        counts.append(before.count(b"\n"))
    return counts
