"""The checkpoint of the tiny trained model that ships with the package."""

from pathlib import Path

TINY = Path(__file__).parent / "tiny"
"""Folder of a LLaVA-OneVision model with 1.3 million weights, in the llava-hf layout.

It was trained on the clips of ``tasks.task`` only, by ``recipes.tiny``. Its file ``training.jsonl``
is the log of loss and accuracy.
"""
