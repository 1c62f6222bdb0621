"""Requests for completions and chat, as OpenAI's and vLLM's clients write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnx_adapt.errors import RequestError
from onnx_adapt.serve.llm.orders import Sampling
from onnx_adapt.serve.openai_errors import ParameterError

Prompt = str | tuple[int, ...]
"""A text, or the tokens of one."""

_READ = {
    *("model", "stream", "stream_options", "stop", "max_tokens", "seed"),
    *("temperature", "top_p", "top_k", "repetition_penalty"),
}
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("parallel_tool_calls", "request_id"),
}
"""What has no bearing on the text."""

_NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "suffix": "",
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "min_p": 0,
    "min_tokens": 0,
    "ignore_eos": False,
}
"""What is not supported, with the value that asks for nothing."""

_MOST_PROMPTS = 128
_MOST_STOPS = 16
_LONGEST_STOP = 256
_LIKELIEST = 1e-5
_COOLEST = 0.01
"""As in vLLM: below the one a temperature is 0, and up to the other it is that."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for.

    Attributes:
        model: The adapter, or the base.
        prompts: What to continue; none of a chat.
        messages: The messages of a chat, or None.
        most: How many tokens to write at most, or None.
        sampling: How they are chosen.
        stops: Texts that end an answer.
        stream: Whether it is sent while it is written.
        usage: Whether the number of tokens is sent in a stream.
    """

    model: str
    prompts: tuple[Prompt, ...]
    messages: tuple[Mapping[str, Any], ...] | None
    most: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    usage: bool


def read_completion(document: Mapping[str, Any], defaults: Mapping[str, Any]) -> Asked:
    """Read a request to continue texts.

    Args:
        document: The body.
        defaults: How the model's makers would have tokens chosen.

    Raises:
        RequestError: If something is wrong, or not supported.
    """
    _refuse_unsupported(document, {*_READ, "prompt"})
    return _read(document, defaults, prompts=_prompts(document.get("prompt")))


def read_chat(document: Mapping[str, Any], defaults: Mapping[str, Any]) -> Asked:
    """Read a request to answer messages.

    Args:
        document: The body.
        defaults: How the model's makers would have tokens chosen.

    Raises:
        RequestError: If something is wrong, or not supported.
    """
    _refuse_unsupported(document, {*_READ, "messages", "max_completion_tokens"})
    given = document.get("messages")
    if not isinstance(given, list) or not given:
        raise ParameterError("messages", "`messages` is no list of some")
    return _read(document, defaults, messages=tuple(map(_message, given)))


def _read(
    document: Mapping[str, Any],
    defaults: Mapping[str, Any],
    prompts: tuple[Prompt, ...] = (),
    messages: tuple[Mapping[str, Any], ...] | None = None,
) -> Asked:
    model = document.get("model")
    if not isinstance(model, str) or not model:
        raise ParameterError("model", "`model` is missing", hint="an adapter, or the base")
    stream = _flag(document, "stream")
    options = document.get("stream_options")
    if options is not None and (not stream or not isinstance(options, dict)):
        raise ParameterError(
            "stream_options", "`stream_options` belongs to `stream`: true", hint="leave it out"
        )
    options = options or {}
    if unknown := [key for key in options if key != "include_usage"]:
        raise _unsupported(f"stream_options.{unknown[0]:.50}")
    most = [
        _number(document, name, None, 1, math.inf, kind=int)
        for name in ("max_completion_tokens", "max_tokens")
    ]
    if messages is None and most[1] is None:
        most[1] = 16  # OpenAI's number
    return Asked(
        model,
        prompts,
        messages,
        most[0] if most[0] is not None else most[1],
        _sampling(document, defaults),
        _stops(document.get("stop")),
        stream,
        _flag(options, "include_usage"),
    )


def _refuse_unsupported(document: Mapping[str, Any], known: set[str]) -> None:
    """Refuse what would have no effect; who asked for it would not notice."""
    for name in document.keys() - known - _IGNORED:
        value, neutral = document[name], _NEUTRAL.get(name)
        if value is not None and (
            value != neutral or isinstance(value, bool) != _is_flag(name)
        ):
            raise _unsupported(name)


def _is_flag(name: str) -> bool:
    return isinstance(_NEUTRAL[name], bool)


def _unsupported(name: str) -> ParameterError:
    return ParameterError(
        name[:100],
        f"{name[:100]!r} is not supported",
        hint="leave it out",
        code="unsupported_parameter",
    )


def _prompts(given: Any) -> tuple[Prompt, ...]:
    """One prompt or several, as texts or tokens."""
    wrong = ParameterError("prompt", "`prompt` is no text, nor tokens, nor a list of some")
    if isinstance(given, str) or (isinstance(given, list) and _are_tokens(given)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise wrong
    if len(given) > _MOST_PROMPTS:
        raise ParameterError(
            "prompt", f"`prompt` has {len(given)} of them; the most is {_MOST_PROMPTS}"
        )
    if all(isinstance(item, str) for item in given):
        return tuple(_whole(item, "prompt") for item in given)
    if all(isinstance(item, list) and _are_tokens(item) for item in given):
        return tuple(map(tuple, given))
    raise wrong


def _are_tokens(row: list[Any]) -> bool:
    return bool(row) and all(type(item) is int for item in row)


def _message(given: Any) -> Mapping[str, Any]:
    """A message as templates take it: its content is a text."""
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise ParameterError("messages", "a message is no object with a `role`")
    content = given.get("content")
    if isinstance(content, list):
        content = "\n".join(map(_part, content))
    if not isinstance(content, str):
        raise ParameterError("messages", "the `content` of a message is no text")
    found = {"role": _whole(given["role"], "messages"), "content": _whole(content, "messages")}
    for name in given.keys() - found.keys():
        if given[name] is None:
            continue
        if name != "name" or not isinstance(given[name], str):
            raise _unsupported(f"messages.{name}")
        found["name"] = _whole(given["name"], "messages")
    return found


def _part(given: Any) -> str:
    text = given.get("text") if isinstance(given, dict) else None
    if not isinstance(text, str) or given.get("type") != "text":
        raise ParameterError("messages", "a part of a message's content is no text")
    return text


def _whole(text: str, parameter: str) -> str:
    """A text that can be written in UTF-8: JSON can hold half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ParameterError(
            parameter, f"`{parameter}` has a text with half of a surrogate pair"
        ) from error
    return text


def _stops(given: Any) -> tuple[str, ...]:
    given = [given] if isinstance(given, str) else given or []
    if not isinstance(given, list) or not all(isinstance(stop, str) for stop in given):
        raise ParameterError("stop", "`stop` is no text, nor a list of some")
    if len(given) > _MOST_STOPS or any(not 0 < len(stop) <= _LONGEST_STOP for stop in given):
        raise ParameterError(
            "stop",
            "`stop` has too many texts, or an empty or a long one",
            hint=f"{_MOST_STOPS} of {_LONGEST_STOP} characters are the most",
        )
    return tuple(given)


def _sampling(document: Mapping[str, Any], defaults: Mapping[str, Any]) -> Sampling:
    def number(name: str, least: float, most: float, neutral: float = 1.0) -> float:
        found = _number(document, name, defaults.get(name, neutral), least, most)
        return float(found)

    temperature = number("temperature", 0, 2)
    if temperature < _LIKELIEST:
        temperature = 0.0
    elif temperature < _COOLEST:
        temperature = _COOLEST
    top_k = _number(document, "top_k", defaults.get("top_k", 0), -1, 2**31 - 1, kind=int)
    seed = _number(document, "seed", -1, -(2**63), 2**63 - 1, kind=int)
    return Sampling(
        temperature,
        number("top_p", 0, 1),
        max(0, top_k),  # -1 is all as well
        number("repetition_penalty", 0.01, 100),
        seed if document.get("seed") is None else seed % 2**31,
    )


def _number(
    document: Mapping[str, Any],
    name: str,
    default: Any,
    least: float,
    most: float,
    kind: type = float,
) -> Any:
    """A number, which lies between two others."""
    value = document.get(name)
    if value is None:
        return default
    right = isinstance(value, int if kind is int else int | float)
    if not right or isinstance(value, bool) or not least <= value <= most:
        what = "a whole number" if kind is int else "a number"
        span = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise ParameterError(name, f"`{name}` is {value!r:.50}", hint=f"give {what}, {span}")
    return value


def _flag(document: Mapping[str, Any], name: str) -> bool:
    value = document.get(name)
    if value is not None and not isinstance(value, bool):
        raise ParameterError(name, f"`{name}` is {value!r:.50}; it is true or false")
    return bool(value)


def most_behind(prompt: int, asked: Asked, context: int) -> int:
    """How many tokens can be written behind a prompt, at most.

    Args:
        prompt: How many tokens the prompt has.
        asked: The request; without a number of its own it means all that fit.
        context: How many tokens both can have.

    Raises:
        RequestError: If they do not fit.
    """
    if prompt < 1:
        raise RequestError("the prompt has no tokens", hint="say something")
    room = context - prompt
    most = room if asked.most is None else asked.most
    if not 1 <= most <= room:
        wanted = "" if asked.most is None else f", and {most} are asked for behind it"
        raise ParameterError(
            "prompt" if asked.messages is None else "messages",
            f"the model's context has {context} tokens; the prompt has {prompt}{wanted}",
            hint="shorten it, or ask for fewer",
            code="context_length_exceeded",
        )
    return most


def refuse_endless(asked: Asked, context: int, longest: int) -> None:
    """Refuse what cannot fit, before it is made into tokens: that takes time and memory.

    Args:
        asked: The request.
        context: How many tokens a prompt and its answer can have.
        longest: How many characters a token can have.

    Raises:
        RequestError: If a prompt has more characters than so many tokens.
    """
    sizes = [len(prompt) for prompt in asked.prompts if isinstance(prompt, str)]
    sizes += [sum(len(message["content"]) for message in asked.messages or ())]
    if max(sizes) > context * longest:
        raise ParameterError(
            "prompt" if asked.messages is None else "messages",
            f"the model's context has {context} tokens of {longest} characters at most; the "
            f"prompt has {max(sizes)} characters",
            hint="shorten it",
            code="context_length_exceeded",
        )
