"""Answers to completions and chat, whole and in pieces, as OpenAI sends them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer.

    Attributes:
        index: Which answer of the request it belongs to.
        text: The text.
        finish: Why the answer ends with it: `stop` or `length`; '' if it goes on.
    """

    index: int
    text: str
    finish: str = ""


@dataclass(slots=True)
class Usage:
    """How many tokens there are in prompts and answers."""

    prompt: int = 0
    answers: int = 0

    def described(self) -> dict[str, int]:
        """As OpenAI has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answers,
            "total_tokens": self.prompt + self.answers,
        }


@dataclass(frozen=True, slots=True)
class Letter:
    """What is the same in all that is sent of an answer.

    Attributes:
        model: The model that was asked.
        chat: Whether it is a chat.
        id: The name of the answer.
        created: When it was begun, in seconds since the epoch.
    """

    model: str
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """All answers of a request."""
        choices = []
        for index in range(1 + max(piece.index for piece in pieces)):
            own = [piece for piece in pieces if piece.index == index]
            text = "".join(piece.text for piece in own)
            said: dict[str, Any] = {"text": text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(_choice(index, said, own[-1].finish))
        return self._headed(choices) | {"usage": usage.described()}

    def opening(self) -> dict[str, Any]:
        """The first piece of a chat, which says who speaks."""
        said = {"delta": {"role": "assistant", "content": ""}}
        return self._headed([_choice(0, said, "")], stream=True)

    def piece(self, piece: Piece) -> dict[str, Any]:
        """A piece of an answer."""
        said: dict[str, Any] = {"text": piece.text}
        if self.chat:
            said = {"delta": {"content": piece.text} if piece.text else {}}
        return self._headed([_choice(piece.index, said, piece.finish)], stream=True)

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The last piece, if the number of tokens is asked for."""
        return self._headed([], stream=True) | {"usage": usage.described()}

    def _headed(
        self, choices: list[dict[str, Any]], *, stream: bool = False
    ) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if stream else "chat.completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def _choice(index: int, said: dict[str, Any], finish: str) -> dict[str, Any]:
    return {"index": index, **said, "logprobs": None, "finish_reason": finish or None}
