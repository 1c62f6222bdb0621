"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

from onnx_adapt.errors import AdapterNotFoundError, AdaptError, RequestError
from onnx_adapt.serve.counting import status_of


class ParameterError(RequestError):
    """A request is refused for one of its parameters.

    Attributes:
        parameter: Its name.
        code: What OpenAI calls what is wrong, or ''.
    """

    def __init__(
        self, parameter: str, message: str, *, hint: str = "", code: str = ""
    ) -> None:
        super().__init__(message, hint=hint)
        self.parameter = parameter
        self.code = code


def openai_error(error: AdaptError) -> tuple[dict[str, Any], int]:
    """An error as OpenAI's clients read it, and its status.

    Example:
        >>> found, status = openai_error(ParameterError("n", "`n` is 2", hint="it is 1"))
        >>> found["error"]["message"], found["error"]["param"], status
        ('`n` is 2; it is 1', 'n', 400)
    """
    status = status_of(error)
    what: dict[str, Any] = {"message": f"{error.message}; {error.hint}"}
    what["type"] = "invalid_request_error" if status < 500 else "server_error"
    what |= {"param": None, "code": None}
    if isinstance(error, ParameterError):
        what |= {"param": error.parameter, "code": error.code or None}
    elif isinstance(error, AdapterNotFoundError):
        what["code"] = "model_not_found"
    elif status == 429:
        what["code"] = "rate_limit_exceeded"
    return {"error": what}, status
