"""Whole programs of a 7B model as the compilers of a TPU and a GPU get them, without either.

``.ci/devices`` runs these compilers.
"""

import re

import jax
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from support.device_programs import NAMES, programs, token_stages

from dycoke_jax.compression.methods import METHODS

CALL = {"tpu": "@tpu_custom_call", "cuda": "@__cudnn$fmhaSoftmax"}


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_types")  # the model's weights are shapes alone
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_programs_are_handed_to_the_compiler_with_their_kernels(platform, monkeypatch):
    """Needs no compiler of the platform: this is where jax's part ends."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    jax.clear_caches()
    names = []
    for name, function, arguments, static in programs():
        lowered = function.trace(*arguments, **static).lower(lowering_platforms=(platform,))
        assert (CALL[platform] in lowered.as_text()) == (not name.startswith("decode")), name
        names.append(name)
    assert names == NAMES
    jax.clear_caches()


@pytest.mark.usefixtures("unchecked_types")  # the model's weights are shapes alone
def test_token_stages_are_handed_to_the_compiler_without_calls_of_the_host_or_dynamic_shapes():
    """Of 32 frames of a 7B model. Calls of the host are refused when a program is lowered."""

    def lowered(function, arguments):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()

    names = []
    for name, function, arguments, _ in token_stages():
        assert arguments[0].shape == (2, 32, 196, 3584)
        text = lowered(function, arguments)
        assert not re.search(r"tensor<[^>]*\?|callback", text), name
        names.append(name.removeprefix("select "))
    assert names == [name for name in METHODS if METHODS[name]().stages.tokens]

    def calls_the_host(x):
        return jax.pure_callback(np.asarray, x, x)

    with pytest.raises(ValueError, match="platform"):
        lowered(calls_the_host, arguments[1:2])
