"""The arguments of the model ``dycoke_jax`` in lmms-eval, and the settings that they stand for."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dycoke_jax import checks
from dycoke_jax.compression.dycoke import DyCoke
from dycoke_jax.compression.ttm import Mode
from dycoke_jax.config import PoolMode
from dycoke_jax.errors import ConfigError
from dycoke_jax.inputs.prompts import Prompting
from dycoke_jax.inputs.sampling import FrameSampling

Failures = Literal["raise", "empty"]


@dataclass(frozen=True)
class Arguments:
    """What ``--model_args`` and ``--batch_size`` say.

    Names are those of the model ``llava_onevision`` in the code of DyCoke's authors, and of
    ``llava_vid`` in lmms-eval. The defaults are those of ``llava_onevision``, except that what is
    not said about DyCoke is as in ``DyCoke``; the authors' default of ``dycoke_p`` is 0.8.

    Attributes:
        pretrained: checkpoint: a folder or a hub id.
        conv_template: format of prompts; ``qwen_1_5``, in which the models were trained, is the
            only one.
        max_frames_num: number of frames, as ``FrameSampling.frames``.
        video_fps: frames a second, as ``FrameSampling.fps``; None spreads ``max_frames_num`` frames
            evenly, as ``llava_onevision`` does, and ``llava_vid`` with ``force_sample``.
        add_time_instruction: whether the prompt tells the times of the frames.
        mm_spatial_pool_mode: pooling of frames; None: as the checkpoint's configuration says.
        dycoke: whether to use DyCoke.
        dycoke_l: as ``DyCoke.layer``; None: its default. The same goes for the next three.
        dycoke_p: as ``DyCoke.p``.
        dycoke_k: as ``DyCoke.k``.
        mode: as ``DyCoke.mode``.
        batch_size: number of requests that run together.
        mesh: sizes of the axes ``data`` and ``model`` of a mesh over all devices, such as ``2x4``;
            None for a single device. lmms-eval separates arguments by commas, so there is none.
        failures: what becomes of a question that cannot be answered, such as one whose clip cannot
            be read. ``raise``: its error ends the evaluation. ``empty``: it is logged, and gets an
            empty answer, which tasks count as wrong; log-likelihoods raise all the same.

    Raises:
        ConfigError: naming the argument and what is allowed.
    """

    pretrained: str
    conv_template: str = "qwen_1_5"
    max_frames_num: int = 32
    video_fps: float | None = None
    add_time_instruction: bool = False
    mm_spatial_pool_mode: PoolMode | None = None
    dycoke: bool = False
    dycoke_l: int | None = None
    dycoke_p: float | None = None
    dycoke_k: float | None = None
    mode: Mode | None = None
    batch_size: int = 1
    mesh: str | None = None
    failures: Failures = "raise"

    def __post_init__(self) -> None:
        """Checks all but the checkpoint and the devices, before the weights are read."""
        checks.path("pretrained", self.pretrained)
        if self.conv_template != "qwen_1_5":
            raise ConfigError(
                f"conv_template is {checks.shown(self.conv_template)}; it must be qwen_1_5, the "
                "format of the models that this package runs"
            )
        if self.mm_spatial_pool_mode is not None:
            checks.choice("mm_spatial_pool_mode", self.mm_spatial_pool_mode, get_args(PoolMode))
        checks.flag("add_time_instruction", self.add_time_instruction)
        checks.flag("dycoke", self.dycoke)
        checks.choice("failures", self.failures, get_args(Failures))
        checks.whole_number("batch_size", self.batch_size, 1)
        # What the rest stands for is made here, so that it is checked too.
        _ = self.compression, self.sampling, self.prompting, self.mesh_sizes

    @property
    def compression(self) -> DyCoke | None:
        """DyCoke with its settings; None for the plain model."""
        settings = {
            "layer": self.dycoke_l,
            "p": self.dycoke_p,
            "k": self.dycoke_k,
            "mode": self.mode,
        }
        given: dict[str, Any] = {name: v for name, v in settings.items() if v is not None}
        if self.dycoke:
            return DyCoke(**given)
        if given:
            raise ConfigError(
                "dycoke_l, dycoke_p, dycoke_k and mode are settings of DyCoke, which is off; add "
                "dycoke=True"
            )
        return None

    @property
    def sampling(self) -> FrameSampling:
        """Which frames of a clip are used."""
        return FrameSampling(self.max_frames_num, self.video_fps)

    @property
    def prompting(self) -> Prompting:
        """How questions are put to the model."""
        return Prompting(time_text=self.add_time_instruction)

    @property
    def mesh_sizes(self) -> dict[str, int] | None:
        """Sizes of the mesh by axis; None for a single device."""
        if self.mesh is None:
            return None
        sizes = re.fullmatch("([1-9][0-9]*)x([1-9][0-9]*)", str(self.mesh))
        if sizes is None:
            raise ConfigError(
                f"mesh is {checks.shown(self.mesh)}; write the sizes of its axes data and model, "
                "as in 2x4"
            )
        return {"data": int(sizes[1]), "model": int(sizes[2])}


def arguments_of(given: Mapping[str, Any]) -> Arguments:
    """Makes arguments of what lmms-eval gives the model's class.

    Raises:
        ConfigError: if an argument is not known, is missing, or has a value that is not allowed.
    """
    known = [field.name for field in dataclasses.fields(Arguments)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(
            f"dycoke_jax has no argument {', '.join(unknown)}; it takes {', '.join(known)}"
        )
    if "pretrained" not in given:
        raise ConfigError("pretrained is missing; name a checkpoint: a folder or a hub id")
    size = given.get("batch_size")
    if isinstance(size, str) and size.isdecimal():  # lmms-eval's command line gives a text
        given = {**given, "batch_size": int(size)}
    return Arguments(**given)
