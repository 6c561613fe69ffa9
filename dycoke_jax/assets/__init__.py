"""Where the tiny trained checkpoint lies that gives a newcomer true answers."""

from pathlib import Path

TINY = Path(__file__).parent / "tiny"
"""A LLaVA-OneVision of 1.3 million weights in the llava-hf layout. It knows the clips of
``tasks.task`` and nothing else; ``recipes.tiny`` is the recipe, ``training.jsonl`` in it the
log of loss and accuracy."""
