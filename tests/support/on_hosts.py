"""One process of several that answer a stream of requests together.

    python -m support.on_hosts FOLDER PORT PROCESSES PROCESS MESH [fsdp] [orbax] [kill]

It reads the checkpoint ``FOLDER/model`` and the requests of ``requests(FOLDER)``, and writes what
it has seen to ``FOLDER/PROCESS.json``: all answers, the clips that it has opened, and the bytes of
weights that it has read. Each process has two devices, parts of the CPU that XLA simulates. With
``orbax`` it restores the converted ``FOLDER/orbax`` as well, and streams answers after a warm-up.
With ``kill`` the last process ends itself, without a word, when it has read its first clip.
"""

import json
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    # Compiling is most of the time, and all processes do it.
    flags = ("--xla_force_host_platform_device_count=2", "--xla_backend_optimization_level=0")
    os.environ["XLA_FLAGS"] = " ".join(flags)

import av
import jax
import numpy as np

from dycoke_jax import Decoding, DyCoke, LlavaVideo, Request
from dycoke_jax.checkpoint import open_checkpoint, safetensors_reader
from dycoke_jax.checkpoint.load import load_params
from dycoke_jax.compilation import counted
from dycoke_jax.engine.requests import Failure
from dycoke_jax.hosts import Hosts, initialise
from dycoke_jax.inputs import FrameSampling

METHOD, BATCH = DyCoke(layer=1, threshold=0.999), 4
TIMEOUT = 10


def requests(folder):
    """Clips of two lengths, questions without a clip, and a file that is no clip."""
    for number in range(9):
        video = None if number % 7 == 2 else folder / f"{number % 4}.mp4"
        if number == 5:
            video = folder / "damaged.mp4"
        sampling = FrameSampling(3 + number % 2)
        question = "What" + "?" * number
        yield Request(question, video, Decoding(4 + 2 * number), sampling)


def answers(llava, folder):
    """What comes of each request, and how likely the answers to two of them are."""
    found = {}
    for one in llava.run(requests(folder), compression=METHOD, batch_size=BATCH):
        assert one.index not in found
        if isinstance(one, Failure):
            found[one.index] = [one.kind, type(one.error).__name__, one.message]
        else:
            found[one.index] = [one.text, one.answer.token_ids, *one.answer.tokens.attended]
    first = [*requests(folder)][:2]
    scored = llava.score(
        [one.video for one in first],
        [one.prompt for one in first],
        ["a cat", "none"],
        compression=METHOD,
    )
    return found, [list(one.log_likelihoods) for one in scored]


def streamed(llava, folder):
    """The pieces of text of two answers, and how many programs they needed after a warm-up."""
    first = [one for one in requests(folder) if one.sampling.frames == 3][:2]
    warm = llava.warm_up(
        frames=[3], batch=[2], question_tokens=[8], max_new_tokens=[12], compression=METHOD
    )
    pieces = {}
    with counted() as count:
        for piece in llava.stream(
            [one.video for one in first],
            [one.prompt for one in first],
            compression=METHOD,
            decoding=Decoding(12),
            sampling=FrameSampling(3),
        ):
            pieces.setdefault(piece.index, []).append(piece.text)
    return {
        "layouts": warm.layouts,
        "compiled": warm.compiled + warm.found > 0,
        "after": count.compiled + count.found,
        "pieces": pieces,
    }


class CountedFile:
    """A safetensors file that counts the bytes which are copied out of it."""

    read = 0

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        self._opened = self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self._opened, name)

    def _count(self, array):
        CountedFile.read += array.nbytes
        return array

    def get_tensor(self, name):
        return self._count(self._opened.get_tensor(name))

    def get_slice(self, name):
        return CountedSlice(self._opened.get_slice(name), self._count)


class CountedSlice:
    def __init__(self, part, count):
        self._part, self._count = part, count

    def __getattr__(self, name):
        return getattr(self._part, name)

    def __getitem__(self, index):
        return self._count(self._part[index])


def main(folder, port, processes, process, mesh, *options):
    opened = set()
    av_open, safe_open = av.open, safetensors_reader.safe_open

    def note(file):
        if str(file).endswith(".mp4"):
            opened.add(Path(file).name)
            if "kill" in options and process == processes - 1:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted_open(file, *arguments, **settings):
        note(file)
        return av_open(file, *arguments, **settings)

    av.open = counted_open  # FFmpeg opens files by itself, which Python does not hear of
    sys.addaudithook(lambda event, arguments: note(arguments[0]) if event == "open" else None)
    safetensors_reader.safe_open = lambda *a, **k: CountedFile(safe_open(*a, **k))
    hosts = Hosts(False, f"localhost:{port}", processes, process, process_timeout=TIMEOUT)
    initialise(hosts)
    assert len(jax.devices()) == 2 * processes
    llava = LlavaVideo.from_pretrained(folder / "model", mesh=mesh, fsdp="fsdp" in options)
    read = CountedFile.read
    parts = {
        (path, str(shard.index)): shard.data.nbytes
        for path, weight in llava.params.items()
        for shard in weight.addressable_shards
    }
    quantised = load_params(
        open_checkpoint(folder / "model").folder,
        weights="int8",
        mesh=llava.model.mesh,
        fsdp="fsdp" in options,
    )
    whole = load_params(open_checkpoint(folder / "model").folder, weights="int8")
    found, likelihoods = answers(llava, folder)
    result = {
        "answers": found,
        "likelihoods": likelihoods,
        "opened": sorted(opened),
        "read": read,
        "own": sum(parts.values()),
        "int8": quantised.keys() == whole.keys()
        and all(
            np.array_equal(shard.data, np.asarray(whole[path])[shard.index])
            for path, weight in quantised.items()
            for shard in weight.addressable_shards
        ),
        "all": sum(weight.nbytes for weight in llava.params.values()),
    }
    if "orbax" in options:
        restored = LlavaVideo.from_pretrained(folder / "orbax", mesh=mesh)
        result["restored"] = restored.params.keys() == llava.params.keys() and all(
            np.array_equal(one.data, other.data)
            for path, weight in restored.params.items()
            for one, other in zip(
                weight.addressable_shards, llava.params[path].addressable_shards, strict=True
            )
        )
        result["streamed"] = streamed(restored, folder)
    (folder / f"{process}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), *sys.argv[5:])
