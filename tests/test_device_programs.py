"""Whole programs of a 7B model as the compilers of a TPU and a GPU get them, without either.

``.ci/devices`` runs these compilers.
"""

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from support.device_programs import NAMES, programs

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
