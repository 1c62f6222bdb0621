"""The one door to onnxruntime-genai: a model, its adapters, and texts being written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from onnx_adapt.errors import RequestError, RunError
from onnx_adapt.serve.llm.facts import CONFIG, Facts

_PIECE = 256
"""Tokens of a prompt that are read in one step: others go on between the pieces."""


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


class LanguageModel:
    """A model of onnxruntime-genai, and the adapters that are loaded.

    Args:
        facts: What its folder says.
        threads: How many threads a step uses.

    Raises:
        RunError: If onnxruntime-genai does not load it.
    """

    def __init__(self, facts: Facts, threads: int) -> None:
        self.facts = facts
        session = {"session_options": {"intra_op_num_threads": threads}}
        with _translated(f"{facts.folder} does not load"):
            config = og.Config(str(facts.folder))
            config.overlay(json.dumps({"model": {"decoder": session}}))
            self._model = og.Model(config)
            self._adapters = og.Adapters(self._model)
            self._tokenizer = og.Tokenizer(self._model)

    def load(self, name: str, path: Path) -> None:
        """Load an adapter from an `.onnx_adapter` file.

        Raises:
            RunError: If onnxruntime-genai does not take it.
        """
        with _translated("the adapter does not load"):
            self._adapters.load(str(path.absolute()), name)

    def unload(self, name: str) -> None:
        """Unload an adapter that no text is written with.

        Raises:
            RunError: If one is.
        """
        with _translated("the adapter cannot be unloaded"):
            self._adapters.unload(name)

    def templated(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that the model's chat template makes of messages.

        Raises:
            RequestError: If it has no template, or that refuses the messages.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(json.dumps(messages))
        except RuntimeError as error:
            if "Empty chat template" in str(error):
                raise RequestError(
                    "the model has no chat template, so it cannot tell messages apart",
                    hint=f"use /v1/completions, or put chat_template.jinja beside {CONFIG}",
                ) from error
            reason = str(error).splitlines()[0]
            raise RequestError(
                f"the model's chat template refuses the messages: {reason}",
                hint="see which roles it takes, and in which order",
            ) from error
        return text

    def start(self, order: Order) -> Generation:
        """Begin to write a text.

        Raises:
            RequestError: If onnxruntime-genai fails.
        """
        with _running():
            params = og.GeneratorParams(self._model)
            length = len(order.prompt) + order.most
            params.set_search_options(max_length=length, **order.sampling.options())
            generator = og.Generator(self._model, params)
            # Before the prompt: what is read without it stays so in the cache.
            if order.adapter:
                generator.set_active_adapter(self._adapters, order.adapter)
        return Generation(generator, order.prompt, self.facts.ends)


class Generation:
    """A text that is being written, by a generator of its own.

    Attributes:
        ended: Whether it has its last token.
    """

    def __init__(self, generator: Any, prompt: Sequence[int], ends: frozenset[int]) -> None:
        self._generator = generator
        self._prompt = np.array(prompt, np.int32)
        self._read = 0
        self._ends = ends
        self.ended = False

    def step(self) -> int | None:
        """Read a piece of the prompt, or write the next token.

        Raises:
            RequestError: If onnxruntime-genai fails.
        """
        with _running():
            if self._read < len(self._prompt):
                piece = self._prompt[self._read : self._read + _PIECE]
                self._generator.append_tokens(piece)
                self._read += len(piece)
                return None
            self._generator.generate_next_token()
            token = int(self._generator.get_next_tokens()[0])
            self.ended = token in self._ends or self._generator.is_done()
            return token


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        raise RunError(f"{what}: {error}", hint="see docs/genai.md") from error


@contextmanager
def _running() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        raise RequestError(
            f"the model failed: {error}", hint="see the server's log", status=500
        ) from error
