"""A text to be written, and how its tokens are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Choose among the likeliest tokens that have this probability together.
        top_k: Choose among so many of the likeliest; 0 is all.
        repetition_penalty: Above 1, what is in the text already gets less likely.
        seed: With the same seed the same tokens are chosen; -1 is another each time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = -1

    def options(self) -> dict[str, Any]:
        """The search options of onnxruntime-genai."""
        found: dict[str, Any] = {"repetition_penalty": self.repetition_penalty}
        found |= {"num_beams": 1, "batch_size": 1, "num_return_sequences": 1}
        if self.temperature == 0:
            return found | {"do_sample": False}
        found |= {"do_sample": True, "temperature": self.temperature}
        return found | {"top_p": self.top_p, "top_k": self.top_k, "random_seed": self.seed}


@dataclass(frozen=True, slots=True)
class Order:
    """A text to be written.

    Attributes:
        prompt: The tokens to continue.
        most: How many tokens to write at most.
        sampling: How they are chosen.
        adapter: What the model calls the adapter to write with, or '' for the base.
        kept: What keeps that adapter loaded.
    """

    prompt: Sequence[int]
    most: int
    sampling: Sampling
    adapter: str = ""
    kept: Any = None

    def unlike(self, order: Order) -> tuple[bool, int]:
        """How much another text would differ beside this one: in its adapter, in its size."""
        sizes = abs(len(order.prompt) - len(self.prompt)), abs(order.most - self.most)
        return order.adapter != self.adapter, sum(sizes)
