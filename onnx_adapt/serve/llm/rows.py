"""Which texts can be rows of one generator of onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from onnx_adapt.serve.llm.orders import Order

_MOST_ROWS = 8
_MOST_ADAPTERS = 4
"""Each row computes the units of all adapters that are side by side."""
_MOST_READ = 1024
"""Tokens that prompts have together: those of several rows are read in one step, in which
no other text gets a token."""


class ApartError(Exception):
    """The adapters of texts cannot be in rows of one generator."""


class Rows:
    """Which texts can be written by one generator, each in a row with an adapter of its own.

    A generator has one way to choose tokens, one stream of random numbers and one length.
    It reads all prompts at once, the shorter ones with padding behind them.

    Args:
        context: How many tokens a row can have.
        pad: The token that prompts are padded with. Where it is in a prompt, a generator of
            several rows takes it for padding.
        most: How many rows a generator has at most.
        padded: Whether a row with padding computes what it computes alone.
    """

    def __init__(
        self, context: int, pad: int, most: int = _MOST_ROWS, *, padded: bool = True
    ) -> None:
        self._context = context
        self._pad = pad
        self._most = most
        self._padded = padded
        self._apart: set[frozenset[str]] = set()

    def take(self, orders: Sequence[Order], order: Order) -> bool:
        """Whether a text can be one more row beside others.

        An example: three prompts of 6, 9 and 7 tokens are 27 with padding. That is less than
        half more than their 22, so they share a generator. With one of 60 it would be 240.
        """
        if len(orders) == self._most or self._alike(order) is None:
            return False
        rows = [*orders, order]
        adapters = {row.adapter for row in rows}
        lengths = [len(row.prompt) for row in rows]
        read = len(rows) * max(lengths)
        return (
            all(self._alike(row) == self._alike(order) for row in orders)
            and read <= min(_MOST_READ, 1.5 * sum(lengths))
            and max(lengths) + max(row.most for row in rows) <= self._context
            and len(adapters - {""}) <= _MOST_ADAPTERS
            and not any(apart <= adapters for apart in self._apart)
        )

    def part(self, adapters: Collection[str]) -> None:
        """Remember that these adapters cannot be in rows of one generator."""
        self._apart.add(frozenset(adapters))

    def forget(self, adapter: str) -> None:
        """Forget what is remembered of an adapter."""
        self._apart = {names for names in self._apart if adapter not in names}

    def _alike(self, order: Order) -> Any:
        """What rows have in common; None for a text that has a generator of its own."""
        options = order.sampling.options()
        seeded = options.get("random_seed", -1) != -1
        if seeded or not order.prompt or self._pad in order.prompt:
            return None
        # A penalty for what is in a text already would be one for the padding as well.
        equal = options["repetition_penalty"] != 1 or not self._padded
        return options, len(order.prompt) if equal else 0
