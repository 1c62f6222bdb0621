"""Which adapters a request asks for, in any of the ways it can say so."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from onnx_adapt.errors import RequestError

Blend = Mapping[str, float]
"""Adapters with their weights: none is the base, one of weight 1 is that adapter."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{12}")


def is_name(name: str) -> bool:
    """Whether an adapter can be called so: no path, nothing a URL or a label must quote.

    Example:
        >>> is_name("fr-2.1"), is_name("../fr"), is_name("fr@1")
        (True, False, False)
    """
    return bool(_NAME.fullmatch(name))


def is_version(name: str) -> bool:
    """Whether this is what a version of an adapter is called.

    Example:
        >>> is_version("fr@3f2a9c01b2d4"), is_version("fr@stable")
        (True, False)
    """
    own, _, digest = name.partition("@")
    return is_name(own) and bool(_DIGEST.fullmatch(digest))


def is_alias(name: str) -> bool:
    """Whether an alias can be called so.

    Example:
        >>> is_alias("fr@stable"), is_alias("fr"), is_alias("fr@3f2a9c01b2d4")
        (True, False, False)
    """
    own, _, alias = name.partition("@")
    return is_name(own) and is_name(alias) and not is_version(name)


def read_choice(model: str, base: str, parameter: object, header: str) -> Blend:
    """The adapters that a request asks for.

    Args:
        model: The model that the URL names: the base, or an adapter.
        base: What the base is called.
        parameter: The request parameter `adapter`: a name, a blend, a blend as JSON text.
        header: The header of Ray Serve's multiplexing, or ''.

    Raises:
        RequestError: If it asks for no adapter, or for several in several places.

    Example:
        >>> read_choice("fr", "base", None, "")
        {'fr': 1.0}
        >>> read_choice("base", "base", '{"fr": 0.7, "de": 0.3}', "")
        {'fr': 0.7, 'de': 0.3}
        >>> read_choice("base", "base", "base", "")
        {}
    """
    named = [parameter, header or None, None if model == base else model]
    found = [{} if value == base else _read(value) for value in named if value is not None]
    if any(choice != found[0] for choice in found[1:]):
        raise RequestError(
            "the request names several adapters: in the URL, as a parameter, as a header",
            hint=f"ask for model {base!r}, and give a blend as the parameter `adapter`",
        )
    return found[0] if found else {}


def _read(value: Any) -> Blend:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        from onnx_adapt.serve.protocol import read_json  # with a library that names do without

        value = read_json(value.encode("utf-8", "replace"))
    if isinstance(value, str):
        value = {value: 1.0}
    if not isinstance(value, dict) or not value:
        raise RequestError(
            f"parameter `adapter` is {value!r}",
            hint='give a name, or a blend as JSON text: {"fr": 0.7, "de": 0.3}',
        )
    for name, weight in value.items():
        if not is_name(name) and not is_alias(name):
            raise RequestError(
                f"{name[:100]!r} is no name of an adapter",
                hint="letters, digits, '.', '_' and '-', as in fr or fr@stable; no paths",
            )
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not abs(weight) < 1e30:
            raise RequestError(f"the weight of {name!r} is {weight!r:.50}, no usable number")
    return {name: float(weight) for name, weight in value.items()}
