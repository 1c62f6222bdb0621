"""Aliases: names such as `fr@stable`, which mean one adapter and later another.

They are in a file beside the adapters, so that a server that is started anew has them too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from onnx_adapt.errors import RequestError
from onnx_adapt.serve.choice import is_alias, is_name, is_version

_HINT = '{"fr@stable": "fr-2"}'


@dataclass(frozen=True, slots=True)
class Alias:
    """What an alias means.

    Attributes:
        adapter: An adapter, or one version of it: `fr-2@3f2a9c01b2d4`.
        before: What it meant before, or ''.
    """

    adapter: str
    before: str = ""


Aliases = Mapping[str, Alias]
"""Aliases by name."""


def read_aliases(data: bytes) -> Aliases:
    """Aliases out of their file: each is the name of an adapter, or has one before as well.

    Raises:
        RequestError: If the file holds anything else.

    Example:
        >>> read_aliases(b'{"fr@stable": "fr-2"}')
        {'fr@stable': Alias(adapter='fr-2', before='')}
    """
    try:
        document = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"it is no JSON: {error}", hint=f"as in {_HINT}") from error
    if not isinstance(document, dict):
        raise RequestError("it holds no names", hint=f"as in {_HINT}")
    found: dict[str, Alias] = {}
    for name, given in document.items():
        parts = {"adapter": given} if isinstance(given, str) else given
        if not is_alias(name):
            raise RequestError(f"{name[:100]!r} is no alias", hint=f"as in {_HINT}")
        if not isinstance(parts, dict) or parts.keys() - {"before"} != {"adapter"}:
            raise RequestError(f"{name!r} is {given!r:.100}", hint=f"as in {_HINT}")
        before = parts.get("before") or ""
        found[name] = Alias(_adapter(parts["adapter"]), before and _adapter(before))
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _adapter(given: Any) -> str:
    if not isinstance(given, str) or not (is_name(given) or is_version(given)):
        raise RequestError(
            f"{given!r:.100} is no adapter, nor a version of one",
            hint="as in fr-2, or fr-2@3f2a9c01b2d4",
        )
    return given


def write_aliases(aliases: Aliases) -> bytes:
    """The file of some aliases."""
    found = {name: asdict(alias) for name, alias in sorted(aliases.items())}
    return json.dumps(found, indent=1).encode() + b"\n"


def changed(aliases: Aliases, name: str, adapter: str | None) -> Aliases:
    """Aliases of which one is changed.

    Args:
        aliases: What there was.
        name: The alias.
        adapter: What it shall mean; '' for what it meant before; None for nothing.

    Raises:
        RequestError: If it meant nothing before.

    Example:
        >>> one = changed({}, "fr@stable", "fr-1")
        >>> two = changed(one, "fr@stable", "fr-2")
        >>> changed(two, "fr@stable", "")["fr@stable"]
        Alias(adapter='fr-1', before='')
    """
    others = {key: alias for key, alias in aliases.items() if key != name}
    present = aliases.get(name)
    if adapter is None:
        return others
    if adapter:
        if present is None:
            return {**others, name: Alias(adapter)}
        if present.adapter == adapter:  # asked for twice: what was before is not lost
            return aliases
        return {**others, name: Alias(adapter, present.adapter)}
    if present is None or not present.before:
        raise RequestError(
            f"{name!r} cannot be rolled back: it meant nothing else before",
            hint="load it with the parameter `adapter`",
        )
    return {**others, name: Alias(present.before)}


def read_change(name: str, parameters: Mapping[str, Any]) -> str | None:
    """What the parameters of a load want an alias to mean; None if they want no change.

    Raises:
        RequestError: If there are others: no weights or configurations are taken from
            clients.

    Example:
        >>> read_change("fr@stable", {"adapter": "fr-2"}), read_change("fr", {})
        ('fr-2', None)
    """
    if not parameters:
        return None
    if not is_alias(name) or len(parameters) > 1:
        raise RequestError(
            f"parameters of load are not supported for {name[:100]!r}",
            hint="adapters come from the server's folder only; an alias such as fr@stable "
            "takes `adapter` or `rollback`",
        )
    if parameters.get("rollback") is True:
        return ""
    return _adapter(parameters.get("adapter"))
