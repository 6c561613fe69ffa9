"""Whole programs of a 7B model as a TPU and a GPU get them, without either."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from support.device_programs import METHODS, NEWLINES, TEXT_LAYERS, VISION_LAYERS, programs

COMPILERS = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin"}
KERNEL = {"tpu": "splash", "cuda": "cudnn"}
CALL = {"tpu": "@tpu_custom_call", "cuda": "@__cudnn$fmhaSoftmax"}
NAMES = ["encode"] + [
    f"{stage} {newline} {method}"
    for newline in NEWLINES
    for method in METHODS
    for stage in ("prefill", "decode")
]


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


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_programs_compile_with_their_kernels_and_update_caches_in_place(platform):
    """The device's own compiler takes them; nothing is run."""
    if importlib.util.find_spec(COMPILERS[platform]) is None:
        pytest.skip(f"the compiler for this device is not installed: {COMPILERS[platform]}")
    command = [sys.executable, "-m", "support.device_programs", platform]
    folder = Path(__file__).parent
    lines = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    reports = {report["program"]: report for report in map(json.loads, lines.splitlines())}
    assert [*reports] == NAMES
    for name, report in reports.items():
        layers = {"encode": VISION_LAYERS, "prefill": TEXT_LAYERS, "decode": 0}[name.split()[0]]
        assert report[KERNEL[platform]] == layers, name
        # Only decoding has caches that it is given.
        assert report["aliased"] >= report["caches"], name
        assert (report["caches"] > 0) == name.startswith("decode"), name
