"""Texts that are being written by one generator of onnxruntime-genai, each in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from onnx_adapt.errors import RequestError
from onnx_adapt.serve.llm.facts import Facts
from onnx_adapt.serve.llm.orders import Order

_PIECE = 256
"""Tokens of a prompt that are read in one step: others go on between the pieces."""


class Generation:
    """Texts that are being written by one generator, each in a row of its own.

    Attributes:
        left: The rows whose last token is still to come.
    """

    def __init__(
        self,
        generator: Any,
        orders: Sequence[Order],
        facts: Facts,
        done: Callable[[], None],
    ) -> None:
        self._generator = generator
        self._orders = orders
        self._facts = facts
        self._done = done
        longest = max(len(order.prompt) for order in orders)
        self._prompts = np.full((len(orders), longest), facts.pad, np.int32)
        for row, order in zip(self._prompts, orders, strict=True):
            row[: len(order.prompt)] = order.prompt
        # Several rows are read at once: a second piece would be behind the padding.
        self._piece = _PIECE if len(orders) == 1 else longest
        self._read = 0
        self._written: list[list[int]] = [[] for _ in orders]
        self._idle = 0
        self.left = set(range(len(orders)))

    def step(self) -> dict[int, int]:
        """Read a piece of the prompts, or write the next token of each row that is left.

        Raises:
            RequestError: If onnxruntime-genai fails.
        """
        with running():
            if self._read < self._prompts.shape[1]:
                piece = self._prompts[:, self._read : self._read + self._piece]
                self._generator.append_tokens(piece)
                self._read += piece.shape[1]
                return {}
            self._generator.generate_next_token()
            found = self._generator.get_next_tokens()
        self._idle += len(self._orders) - len(self.left)
        tokens = {row: int(found[row]) for row in sorted(self.left)}
        for row, token in tokens.items():
            self._written[row].append(token)
            most = self._orders[row].most
            if token in self._facts.ends or len(self._written[row]) == most:
                self.left.discard(row)
        return tokens

    def rest(self, row: int) -> Order:
        """What is left to be written of a text."""
        order, written = self._orders[row], self._written[row]
        most = order.most - len(written)
        return replace(order, prompt=[*order.prompt, *written], most=most)

    @property
    def wasteful(self) -> bool:
        """Whether the rows that ended have cost what reading the others again would cost.

        A step computes a token in each row, also where the text has ended. That costs about
        as much as a token of a prompt. An example: of four rows with prompts of 10 tokens,
        three end after 5. When the fourth has 13, the others have computed 24 in vain, and
        to read it again is to read 23.
        """
        left = [(self._orders[row], self._written[row]) for row in self.left]
        again = sum(len(order.prompt) + len(written) for order, written in left)
        padding = any(self._facts.pad in written for _, written in left)  # in a prompt
        return 0 < again <= self._idle and not padding

    def close(self) -> None:
        """Let the generator and its adapters go."""
        self._generator = None
        self._done()


@contextmanager
def running() -> Iterator[None]:
    """Tell what onnxruntime-genai raises as a failure of the model."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        raise RequestError(
            f"the model failed: {error}", hint="see the server's log", status=500
        ) from error
