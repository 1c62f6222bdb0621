"""Frozen dataclasses as JSON objects that can grow.

A field that has its default is not written. Keys that this version does not know are kept and
written back. For example

    {"name": "fc", "inner": "h/target", "width": 64, "colour": "red"}

is read into a slot whose `source` is its `inner`, `"h/target"`, because the key is missing,
and whose `extra` is `(("colour", '"red"'),)`. It is written as the same object again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

EXTRA = "extra"
"""The field of a dataclass that holds the unknown keys of its record."""

Extra = tuple[tuple[str, str], ...]
"""Keys that are not known to this version, each with its value as JSON text."""


@dataclass(frozen=True, slots=True)
class SameAs:
    """The default of a key that is missing: the value of another key."""

    field: str


def absent(value: Any) -> Any:
    """Declare a field that a record may lack, and its value then. Python code must give it."""
    return field(metadata={"absent": value})


def read_object(kind: type[T], item: Any) -> T:
    """Read a dataclass from a JSON object.

    Raises:
        KeyError: If a key without a default is missing.
        TypeError: If a value has another type, or the item is no object.
        ValueError: If a number or a text is out of range.
    """
    if not isinstance(item, dict):
        raise TypeError(f"{item!r} is no object")
    values: dict[str, Any] = {}
    known = _keys(kind)
    for name, (annotation, default) in known.items():
        if name in item:
            values[name] = _value(item[name], annotation)
            continue
        if default is MISSING:
            raise KeyError(name)
        values[name] = values[default.field] if isinstance(default, SameAs) else default
    values[EXTRA] = read_extra(item, known)
    return kind(**values)


def read_extra(item: Mapping[str, Any], known: Collection[str]) -> Extra:
    """Return the keys of an object that are not known, with their values as JSON text."""
    extra = ((key, to_text(value)) for key, value in item.items() if key not in known)
    return tuple((typed(key, str), typed(text, str)) for key, text in extra)


def write_object(item: Any) -> dict[str, Any]:
    """Write a dataclass as a JSON object, without the fields that have their default."""
    data = {}
    kind: type[DataclassInstance] = type(item)
    for name, (_, default) in _keys(kind).items():
        value = getattr(item, name)
        if isinstance(default, SameAs):
            default = getattr(item, default.field)
        if value != default:
            data[name] = value
    return data | write_extra(item.extra)


def write_extra(extra: Extra) -> dict[str, Any]:
    """Return the unknown keys of an object with their values."""
    return {key: json.loads(text) for key, text in extra}


def to_text(value: Any) -> str:
    """Write a value as compact JSON text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def typed(value: Any, kind: type) -> Any:
    """Return a value if it has exactly this type.

    Raises:
        TypeError: If it has another.
        ValueError: If it is a number that no field of ONNX holds, or half a character.
    """
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not {kind.__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"no field of ONNX holds {value}")
    if isinstance(value, str):
        value.encode()  # JSON can spell half a character, which no name can have
    return value


_KINDS = {"int": int, "str": str, "bool": bool}


def _value(value: Any, annotation: str) -> Any:
    many = annotation.removeprefix("tuple[").removesuffix(", ...]")
    if many == annotation:
        return typed(value, _KINDS[annotation])
    return tuple(typed(each, _KINDS[many]) for each in typed(value, list))


@cache
def _keys(kind: type[DataclassInstance]) -> dict[str, tuple[str, Any]]:
    """The keys of a record: the type of each, and its value where it is missing."""
    return {
        each.name: (str(each.type), each.metadata.get("absent", each.default))
        for each in fields(kind)
        if each.name != EXTRA
    }


def read_input(place: Any, declared: Any) -> tuple[int, str]:
    """The place and the declaration of an input that was dropped, checked.

    Raises:
        ValueError: If they are none.
    """
    if not 0 <= typed(place, int) < 2**31:
        raise ValueError(f"no input is at {place}")
    bytes.fromhex(typed(declared, str))
    return place, declared
