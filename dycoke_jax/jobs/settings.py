"""The settings of a job, and which of the lines of its file it answers."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from dycoke_jax import checks
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.compression.methods import described
from dycoke_jax.compression.protocol import Compressor
from dycoke_jax.engine.requests import Decoding, Request
from dycoke_jax.errors import RequestError
from dycoke_jax.inputs.prompts import Prompting
from dycoke_jax.inputs.sampling import FrameSampling


@dataclass(frozen=True)
class JobSettings:
    """What holds for all requests of a job that do not say otherwise.

    Attributes:
        compression: method and settings; None: the plain model.
        decoding: how answers are generated; a request may change its fields.
        sampling: which frames of clips are used; a request may change its fields.
        prompting: how prompts are put to the model.
        allow_damaged: use what can be decoded of damaged files.
    """

    compression: Compressor | None = field(default_factory=DyCoke)
    decoding: Decoding = Decoding()  # noqa: RUF009 (frozen)
    sampling: FrameSampling = FrameSampling()  # noqa: RUF009 (frozen)
    prompting: Prompting = Prompting()  # noqa: RUF009 (frozen)
    allow_damaged: bool = False

    def described(self, request: Request) -> dict[str, Any]:
        """The settings of one request as values for JSON.

        Without a clip there is no compression. The text of a system turn is left out where it is
        the default of the prompt format.
        """
        prompting = asdict(request.prompting)
        if request.prompting.system is ...:
            del prompting["system"]
        compression = self.compression if request.video is not None else None
        return {
            "decoding": asdict(request.decoding),
            "sampling": asdict(request.sampling),
            "prompting": prompting,
            "compression": None if compression is None else described(compression),
            "allow_damaged": request.allow_damaged,
        }


@dataclass(frozen=True)
class Shard:
    """One of several equal parts of a file of requests, for one of several machines.

    Attributes:
        number: which part, from 1.
        count: number of parts.

    Raises:
        RequestError: if there is no such part.
    """

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        """Checks the range of the numbers."""
        checks.whole_number("the number of shards", self.count, 1, error=RequestError)
        checks.whole_number("the shard", self.number, 1, self.count, error=RequestError)

    def holds(self, line: int) -> bool:
        """Whether a line of the file, counted from 1, belongs to this part."""
        return line % self.count == self.number % self.count


def parse_shard(text: str) -> Shard:
    """Makes a shard of a text such as ``2/8``.

    Raises:
        RequestError: if the text has another form, or there is no such shard.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None:
        raise RequestError(
            f"shard is {checks.shown(text)}; it must be a number from 1 and how many shards there "
            "are, such as 2/8"
        )
    return Shard(int(match[1]), int(match[2]))
