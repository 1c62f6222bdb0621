"""What answers requests for text: names become adapters, prompts tokens, and tokens texts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterNotFoundError, RequestError, RunError
from onnx_adapt.serve.batcher import Result
from onnx_adapt.serve.gateway import Gateway
from onnx_adapt.serve.held import Fetch, Held, Loads, Recent
from onnx_adapt.serve.llm.answers import Piece, Usage
from onnx_adapt.serve.llm.facts import Writing
from onnx_adapt.serve.llm.model import LanguageModel
from onnx_adapt.serve.llm.orders import Order
from onnx_adapt.serve.llm.requests import Asked, Prompt, most_behind, refuse_endless
from onnx_adapt.serve.llm.texts import Answer, read_tokenizer
from onnx_adapt.serve.llm.turns import Turns
from onnx_adapt.serve.metrics import Metrics
from onnx_adapt.serve.protocol import Spec
from onnx_adapt.serve.settings import Settings

_SMALL = 1 << 16
"""Characters that are tokenized faster than a thread can be asked to."""


class Writer:
    """A language model that writes texts, with the versions of adapters that were used last.

    To a gateway it is the one replica of the model, which runs no tensors.

    Args:
        settings: What was said about the server; its model is the decoder's file.
        writing: The language model, and how much may be asked of it.
        fetch: Where the files of versions come from, as onnxruntime-genai maps them.
        metrics: What counts loads.

    Attributes:
        facts: What the folder says.
        context: How many tokens a prompt and its answer can have.
        recent: What keeps versions loaded.

    Raises:
        AdaptError: If the folder holds no language model.
    """

    def __init__(
        self, settings: Settings, writing: Writing, fetch: Fetch, metrics: Metrics
    ) -> None:
        self.facts = writing.facts
        self.context = writing.context
        self._tokenizer = read_tokenizer(self.facts.folder)
        self._longest = max(map(len, self._tokenizer.get_vocab()))
        self._model = LanguageModel(self.facts, settings.threads, self.context)
        self._thread = ThreadPoolExecutor(1)
        self._turns = Turns(
            self._model.start,
            self._model.shares,
            self._thread,
            writing.texts,
            writing.waiting,
            settings.timeout_s,
        )
        loads = Loads(fetch, self._model.load, self._unload, metrics, self._thread)
        self.recent = Recent(loads, settings.max_adapters)

    async def describe(self) -> tuple[Mapping[str, Spec], Mapping[str, Spec]]:
        """The tensors that a client can send and get: none."""
        return {}, {}

    async def infer(
        self,
        feeds: Mapping[str, Array],
        datatypes: Mapping[str, str],
        outputs: Sequence[str],
        blend: Mapping[str, float],
    ) -> Result:
        """Refuse to run tensors."""
        return RequestError("this server writes texts", hint="use /v1/completions")

    async def _orders(self, asked: Asked) -> list[Order]:
        """What is to be written, by the base."""
        refuse_endless(asked, self.context, self._longest)
        given: Sequence[Prompt] = asked.prompts
        if asked.messages is not None:
            made = asyncio.get_running_loop().run_in_executor(
                self._thread, self._model.templated, asked.messages
            )
            given = [await made]
        prompts = [await self._tokens(prompt, asked) for prompt in given]
        mosts = [most_behind(len(prompt), asked, self.context) for prompt in prompts]
        return [
            Order(prompt, most, asked.sampling)
            for prompt, most in zip(prompts, mosts, strict=True)
        ]

    async def _tokens(self, prompt: Prompt, asked: Asked) -> Sequence[int]:
        if not isinstance(prompt, str):
            for token in prompt:
                if not 0 <= token < self.facts.vocabulary:
                    raise RequestError(
                        f"the model has no token {token}",
                        hint=f"they are 0 to {self.facts.vocabulary - 1}",
                    )
            return prompt
        # The template of a chat writes the special tokens itself.
        arguments = (prompt, None, False, asked.messages is None)
        if len(prompt) <= _SMALL:
            return list(self._tokenizer.encode(*arguments).ids)
        return list((await asyncio.to_thread(self._tokenizer.encode, *arguments)).ids)

    async def write(
        self, gateway: Gateway, asked: Asked, usage: Usage
    ) -> AsyncGenerator[Piece, None]:
        """Answer a request piece by piece, and count what became of it.

        Args:
            gateway: Knows which version of which adapter is served.
            asked: What is asked for.
            usage: Where the tokens of prompts and answers are counted.

        Raises:
            AdaptError: If it cannot be answered.
        """
        with gateway.request() as asking:
            asking.choose({} if asked.model == gateway.base else {asked.model: 1})
            held = await self._held(gateway, asked.model)
            orders = await self._orders(asked)
            usage.prompt = sum(len(order.prompt) for order in orders)
            if held:
                orders = [replace(order, adapter=held.name, kept=held) for order in orders]
            async with aclosing(self._together(orders, asked.stops, usage)) as pieces:
                async for piece in pieces:
                    yield piece

    async def _together(
        self, orders: Sequence[Order], stops: Sequence[str], usage: Usage
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of several texts, as they come."""
        news: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        async def follow(index: int, order: Order) -> None:
            try:
                async with aclosing(self._one(index, order, stops, usage)) as pieces:
                    async for piece in pieces:
                        news.put_nowait(piece)
            except Exception as error:
                news.put_nowait(error)

        tasks = [asyncio.create_task(follow(i, order)) for i, order in enumerate(orders)]
        try:
            left = len(orders)
            while left:
                piece = await news.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= bool(piece.finish)
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(
        self, index: int, order: Order, stops: Sequence[str], usage: Usage
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of a text, of which the last says why it ends."""
        answer, finish = Answer(self._tokenizer, order.prompt, stops), "length"
        async with aclosing(self._turns.tokens(order)) as tokens:
            async for token in tokens:
                usage.answers += 1
                if token in self.facts.ends:
                    finish = "stop"
                    break
                text = answer.add(token)
                if answer.stopped:
                    yield Piece(index, text, "stop")
                    return
                if text:
                    yield Piece(index, text)
        text = answer.finish()
        yield Piece(index, text, "stop" if answer.stopped else finish)

    async def _held(self, gateway: Gateway, model: str) -> Held | None:
        """The adapter that a model means, loaded; None is the base."""
        if model == gateway.base:
            return None
        try:
            return await self.recent(gateway.version(model))
        except AdapterNotFoundError:  # the file was replaced a moment ago, or there is none
            await gateway.refresh()
            return await self.recent(gateway.version(model))

    def _unload(self, name: str, path: Path) -> None:
        def unload() -> None:
            with contextlib.suppress(RunError):  # loading it failed
                self._model.unload(name)
            path.unlink(missing_ok=True)

        with contextlib.suppress(RuntimeError):  # the process ends, and with it the thread
            self._thread.submit(unload)
