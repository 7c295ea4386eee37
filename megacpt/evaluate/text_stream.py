"""Text as it is generated: what can be shown after each token, without broken characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megacpt.data.tokenizer import Tokenizer

_UNKNOWN = "\ufffd"
_MAY_GROW = 3  # a UTF-8 character has at most 4 bytes: an unfinished one shows as up to 3 of U+FFFD
_WINDOW, _CONTEXT = 64, 16


class TextStream:
    """Turns tokens into text, a token at a time, holding back bytes that may be half a character.

    Args:
        tokenizer: decodes the tokens.
        prompt: the tokens before the first; they decide whether the text begins with a space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)[-_CONTEXT:]
        self._said = len(tokenizer.decode(self._ids))

    def add(self, token: int) -> str:
        """The text that is certain now that `token` has come; often empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        held = min(len(text) - len(text.rstrip(_UNKNOWN)), _MAY_GROW)
        new = self._take(text[: len(text) - held])
        if len(self._ids) >= _WINDOW and not held:
            self._ids = self._ids[-_CONTEXT:]
            self._said = len(self._tokenizer.decode(self._ids))
        return new

    def end(self) -> str:
        """The text that was still held back."""
        return self._take(self._tokenizer.decode(self._ids))

    def _take(self, text: str) -> str:
        new = text[self._said :]
        self._said = max(self._said, len(text))
        return new
