"""The tokenizer of the tiny model: byte-level BPE, trained on the texts of the built-in task."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import trainers

from dycoke_jax.checkpoint.untrained import CONTROL_TOKENS, byte_tokenizer, save_tokenizer
from dycoke_jax.config import TINY
from dycoke_jax.inputs.prompts import DEFAULT_SYSTEM
from dycoke_jax.tasks.task import task_clip


def save_task_tokenizer(folder: Path) -> None:
    """Trains the tokenizer and writes its files into a folder.

    The result is the same at every call. Its vocabulary has ``TINY.text.vocab_size`` tokens at
    most, control tokens included.

    Args:
        folder: the folder to write into.
    """
    backend = byte_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY.text.vocab_size - len(CONTROL_TOKENS),
        initial_alphabet=sorted(backend.get_vocab()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(), trainer)
    save_tokenizer(backend, folder)


def _texts() -> Iterator[str]:
    for number in range(500):
        yield f"system\n{DEFAULT_SYSTEM}"
        yield "user\n"
        yield "assistant\n"
        for question in task_clip("train", number).questions:
            yield question.text
            yield question.answer
