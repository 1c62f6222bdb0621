"""What can be said about a server."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from onnx_adapt.errors import RequestError
from onnx_adapt.serve.choice import is_name


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be said about a server.

    Attributes:
        model: The path of the adapted model, on every node that runs a replica.
        adapters: The folder of adapters: a path, or a URL that fsspec opens.
        name: What the base is called; by default its file's name without the suffix.
        replicas: How many copies of the model run.
        threads: How many threads, and CPUs of Ray, each of them has.
        provider: The execution provider that they run on, such as `cuda`; by default the CPU.
        max_adapters: How many adapters a replica keeps loaded.
        batching: Whether concurrent requests are joined into batches.
        batch_axis: Which axis the batch is, where its symbolic dimension does not say.
        max_batch_size: The most rows of a batch, and of a request.
        batch_wait_ms: How long the first request of a batch waits for others.
        max_body_mb: The most megabytes of a request.
        timeout_s: How long a client may take to send, and the model to answer.
        poll_s: How often the folder of adapters is looked at.
        gateways: How many processes speak HTTP with clients.
        max_per_adapter: How many requests for one adapter, or for the base, may be under way
            in each of those, those that wait included; 0 is no limit.
        token_file: A file with the bearer token that clients must send, or '' for none; on
            every node that runs a gateway.
        access_log: A file to which a gateway adds a line for each request, `-` for stderr, or
            '' for no lines.
    """

    model: str
    adapters: str
    name: str = ""
    replicas: int = 1
    threads: int = 1
    provider: str = ""
    max_adapters: int = 32
    batching: bool = True
    batch_axis: int | None = None
    max_batch_size: int = 64
    batch_wait_ms: float = 0.0
    max_body_mb: float = 64.0
    timeout_s: float = 60.0
    poll_s: float = 1.0
    gateways: int = 1
    max_per_adapter: int = 0
    token_file: str = ""
    access_log: str = ""

    @property
    def base(self) -> str:
        """What the base is called."""
        return self.name or Path(self.model).stem

    @property
    def settle_s(self) -> float:
        """How long a file must have been as it is before it is read."""
        return min(self.poll_s, 1.0)


_LEAST = {
    "batch_axis": 0,
    "max_per_adapter": 0,
    "batch_wait_ms": 0,
    "max_body_mb": 0.001,
    "timeout_s": 0.001,
}


def read_settings(arguments: Mapping[str, Any]) -> Settings:
    """Settings out of arguments; `serve run` gives numbers as text.

    Raises:
        RequestError: If one is unknown, missing, or of another kind.

    Example:
        >>> read_settings({"model": "a.onnx", "adapters": "dir", "replicas": "2"}).replicas
        2
    """
    known = {field.name: field for field in fields(Settings)}
    if unknown := sorted(arguments.keys() - known.keys()):
        raise RequestError(
            f"there is no setting {unknown[0]!r}", hint=f"there are {', '.join(known)}"
        )
    for name, field in known.items():
        if field.default is MISSING and not arguments.get(name):
            raise RequestError(f"`{name}` is missing", hint="give a path")
    kinds = typing.get_type_hints(Settings)
    settings = Settings(**{k: _read(k, kinds[k], v) for k, v in arguments.items()})
    if not is_name(settings.base):
        raise RequestError(
            f"{settings.base!r} is no name for a model", hint="give another one as `name`"
        )
    return settings


def _read(name: str, kind: Any, value: Any) -> Any:
    """A setting as what it is declared to be."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = kind.__args__[0]
    if kind is str:
        return str(value)
    if kind is bool:
        words = {"true": True, "false": False}
        if str(value).lower() not in words:
            raise RequestError(f"`{name}` is {value!r}", hint="give true or false")
        return words[str(value).lower()]
    try:
        number = kind(value)
    except (TypeError, ValueError) as error:
        raise RequestError(f"`{name}` is {value!r}", hint="give a number") from error
    least = _LEAST.get(name, 0.05 if kind is float else 1)
    if not least <= number < 1e9:
        raise RequestError(f"`{name}` is {value!r}", hint=f"give {least} or more")
    return number
