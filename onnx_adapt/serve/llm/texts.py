"""Texts and tokens: prompts are taken apart, answers put together while they are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from onnx_adapt.errors import ModelFileError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder makes of a character of which not all bytes are there."""

_CONTEXT = 6
"""Tokens of the prompt that are decoded with the answer: alone it could lose a space."""


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a model's folder.

    Raises:
        ModelFileError: If it has none.
    """
    path = folder / "tokenizer.json"
    try:
        found = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelFileError(
            f"{path} is no tokenizer: {error}", hint="the builder writes it with the model"
        ) from error
    found.no_padding()
    found.no_truncation()
    return found


class Answer:
    """The text of an answer, which grows by tokens, up to the first stop string.

    A token may be a part of a character, and a stop string may be spread over several. So
    text is held back until it is sure. With the stop string "--", the tokens "a", "-", "b",
    "-", "-c" are told as "a", "", "-b", "", and there it stops.

    Args:
        tokenizer: What puts tokens together.
        prompt: The tokens before the answer.
        stops: The texts that end it; they are no part of it.

    Attributes:
        stopped: Whether a stop string came.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, prompt: Sequence[int], stops: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._window = list(prompt[-_CONTEXT:])
        if self._decoded(self._window).endswith(_UNFINISHED):
            self._window = []
        self._known = len(self._window)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token: the text that is sure by now, and was not told before."""
        self._window.append(token)
        before = self._decoded(self._window[: self._known])
        now = self._decoded(self._window)
        if now.endswith(_UNFINISHED):
            return ""
        self._window, self._known = (
            self._window[self._known :],
            len(self._window) - self._known,
        )
        return self._told(now[len(before) :])

    def finish(self) -> str:
        """The text that was held back, if no token follows."""
        before = self._decoded(self._window[: self._known])
        text = self._told(self._decoded(self._window)[len(before) :])
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def _told(self, text: str) -> str:
        """Of held and new text, what is neither a stop string nor the start of one."""
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        sure = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[sure:]
        return text[:sure]


def _overlap(text: str, stop: str) -> int:
    """How much of a text's end is the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
