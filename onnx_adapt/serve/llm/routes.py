"""The paths of OpenAI's API for texts, and vLLM's for adapters."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from pathlib import PurePosixPath
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from onnx_adapt.errors import AdaptError
from onnx_adapt.serve.bodies import read_body
from onnx_adapt.serve.counting import GONE, later, status_of
from onnx_adapt.serve.gateway import Gateway
from onnx_adapt.serve.llm.answers import Letter, Piece, Usage
from onnx_adapt.serve.llm.requests import Asked, read_chat, read_completion
from onnx_adapt.serve.llm.writer import Writer
from onnx_adapt.serve.openai_errors import ParameterError, openai_error
from onnx_adapt.serve.protocol import read_json

_T = TypeVar("_T")


def text_routes(writer: Writer, gateway: Gateway) -> list[Route]:
    """The paths that a writer of texts answers.

    Args:
        writer: What writes them.
        gateway: Knows which adapters there are.
    """
    asked = _Asked(writer, gateway)
    models = _Models(writer, gateway)
    paths = {
        "/v1/completions": asked.completion,
        "/v1/chat/completions": asked.chat,
        "/v1/load_lora_adapter": models.load,
        "/v1/unload_lora_adapter": models.unload,
    }
    routes = [Route(path, _told(answer), methods=["POST"]) for path, answer in paths.items()]
    return [
        *routes,
        Route("/v1/models", _told(models.listed)),
        Route("/v1/models/{model}", _told(models.one)),
    ]


_Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


def _told(answer: _Endpoint) -> _Endpoint:
    """An endpoint that tells errors as OpenAI does."""

    async def endpoint(request: Request) -> Response:
        try:
            return await answer(request)
        except AdaptError as error:
            found, status = openai_error(error)
            return JSONResponse(found, status, later(status))
        except ClientDisconnect:  # nobody is there to read it
            return Response(status_code=GONE)

    return endpoint


class _Asked:
    """Answers requests for texts."""

    def __init__(self, writer: Writer, gateway: Gateway) -> None:
        self._writer = writer
        self._gateway = gateway

    async def completion(self, request: Request) -> Response:
        return await self._answer(request, read_completion)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat)

    async def _answer(
        self, request: Request, read: Callable[[Mapping[str, Any], Mapping[str, Any]], Asked]
    ) -> Response:
        began = time.monotonic()
        try:
            document = read_json(await read_body(request, self._gateway.settings))
            asked = read(document, self._writer.facts.search)
        except AdaptError as error:
            spent = time.monotonic() - began
            self._gateway.answered("unknown", status_of(error), spent)
            raise
        letter, usage = Letter(asked.model, chat=asked.messages is not None), Usage()
        pieces = self._writer.write(self._gateway, asked, usage)
        if not asked.stream:
            found = await _unless_gone(request.receive, _all(pieces))
            return JSONResponse(letter.whole(found, usage))
        # The status must be known, so the first piece must be there.
        first = await _unless_gone(request.receive, anext(pieces))
        return _Stream(_events(letter, first, pieces, usage if asked.usage else None))


async def _all(pieces: AsyncGenerator[Piece, None]) -> list[Piece]:
    async with aclosing(pieces):
        return [piece async for piece in pieces]


async def _events(
    letter: Letter, first: Piece, pieces: AsyncGenerator[Piece, None], usage: Usage | None
) -> AsyncGenerator[str, None]:
    """What is sent of a stream: documents, and `[DONE]`."""
    beside = {} if usage is None else {"usage": None}
    async with aclosing(pieces):
        if letter.chat:
            yield json.dumps(letter.opening() | beside)
        yield json.dumps(letter.piece(first) | beside)
        try:
            async for piece in pieces:
                yield json.dumps(letter.piece(piece) | beside)
        except AdaptError as error:  # the status is sent already
            yield json.dumps(openai_error(error)[0])
        else:
            if usage is not None:
                yield json.dumps(letter.closing(usage))
    yield "[DONE]"


class _Stream(Response):
    """Server-sent events, until the client goes."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}

        async def write() -> None:
            await send(start)
            async with aclosing(self._events):
                async for event in self._events:
                    body = f"data: {event}\n\n".encode()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        with suppress(ClientDisconnect):
            await _unless_gone(receive, write())


async def _unless_gone(receive: Receive, work: Any) -> Any:
    """The result of some work, which is given up when the client goes.

    Raises:
        ClientDisconnect: If it does.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Models:
    """Tells which models there are, and loads and unloads adapters."""

    def __init__(self, writer: Writer, gateway: Gateway) -> None:
        self._writer = writer
        self._gateway = gateway
        self._created = int(time.time())

    async def listed(self, request: Request) -> Response:
        data = [self._described(name) for name in self._gateway.served()]
        return JSONResponse({"object": "list", "data": data})

    async def one(self, request: Request) -> Response:
        name = request.path_params["model"]
        self._gateway.named(name)
        return JSONResponse(self._described(name))

    def _described(self, name: str) -> dict[str, Any]:
        base = self._gateway.base
        found = {"id": name, "object": "model", "created": self._created}
        found |= {"owned_by": "onnx-adapt", "root": name}
        found["parent"] = None if name == base else base
        return found | {"max_model_len": self._writer.context}

    async def load(self, request: Request) -> Response:
        """Check an adapter's file again, and serve it; its name is that of its file."""
        document = await self._read(request, {"lora_name", "lora_path", "load_inplace"})
        name, path = document["lora_name"], document.get("lora_path")
        if path is not None:
            self._refuse_elsewhere(name, path)
        await self._gateway.load(name, {})
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        document = await self._read(request, {"lora_name", "lora_int_id"})
        name = document["lora_name"]
        await self._gateway.unload(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _read(self, request: Request, known: set[str]) -> dict[str, Any]:
        document = read_json(await read_body(request, self._gateway.settings))
        if unknown := sorted(document.keys() - known):
            raise ParameterError(unknown[0][:100], f"{unknown[0][:100]!r} is not supported")
        if not isinstance(document.get("lora_name"), str):
            raise ParameterError("lora_name", "`lora_name` is missing", hint="an adapter")
        return document

    def _refuse_elsewhere(self, name: str, path: Any) -> None:
        """Refuse a path that is not the adapter's file; nothing is looked at there."""
        folder = self._gateway.settings.adapters
        given = PurePosixPath(path) if isinstance(path, str) else PurePosixPath()
        if given.stem != name or str(given.parent) not in (".", folder.rstrip("/")):
            raise ParameterError(
                "lora_path",
                f"`lora_path` is not the file of {name!r} in the server's folder of adapters",
                hint="put the file there, under the adapter's name, and leave `lora_path` out",
            )
