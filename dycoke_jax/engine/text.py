"""The text of an answer while its tokens are generated."""

from tokenizers.decoders import DecodeStream

from dycoke_jax.engine.requests import Generated
from dycoke_jax.inputs.prompts import Tokenizer


class GrowingText:
    """The text of a growing list of ids, in whole characters only.

    Attributes:
        whole: the text so far.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._read = 0
        self.whole = ""

    def extend(self, generated: Generated) -> str:
        """Returns the text that the ids since the last call have added."""
        ids = generated.token_ids
        before = self.whole
        if generated.finish_reason is not None:
            # The bytes of an incomplete character become replacement characters.
            self.whole = self._backend.decode(list(ids), skip_special_tokens=True)
        else:
            for token in ids[self._read :]:
                self.whole += self._stream.step(self._backend, token) or ""
            self._read = len(ids)
        return self.whole[len(before) :]
