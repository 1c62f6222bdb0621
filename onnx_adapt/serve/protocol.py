"""The Open Inference Protocol, version 2: bodies of requests and responses.

JSON, and the binary tensor data extension: after the JSON come the raw tensors in the order
in which the JSON names them, and a header tells how long the JSON is. Nothing here knows of
HTTP, models or Ray; no input makes anything but a `RequestError`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import RequestError
from onnx_adapt.serve.tensors import (
    array_of_bytes,
    array_of_json,
    bytes_of_array,
    json_of_array,
)

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The HTTP header that tells how long the JSON is where raw tensors follow."""

_INPUT_PARAMETERS = {"binary_data_size"}
_OUTPUT_PARAMETERS = {"binary_data"}
_REQUEST_PARAMETERS = {"adapter", "binary_data_output"}
_FOREIGN_PARAMETERS = {"content_type", "headers", "priority", "timeout"}
"""What clients of other servers send with every request; it means nothing here."""

_HALF = re.compile("[\ud800-\udfff]")
"""Half a character, which `json` takes and nothing can write."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What an input or output of a model is declared as.

    Attributes:
        name: Its name.
        datatype: The protocol's word for its element type.
        shape: A number for each axis; -1 where any will do.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request to run the model.

    Attributes:
        id: What the client calls it, or ''.
        adapter: The request parameter of this name, as it came, or None.
        feeds: Arrays by input name.
        datatypes: What the request says each of them is.
        outputs: The outputs it asks for; empty for all.
        binary: Of these outputs, the ones wanted as raw bytes.
        all_binary: Whether outputs that it does not name are wanted as raw bytes.
    """

    id: str
    adapter: object
    feeds: Mapping[str, Array]
    datatypes: Mapping[str, str]
    outputs: tuple[str, ...]
    binary: frozenset[str]
    all_binary: bool


def read_request(body: bytes, header_length: str | None = None) -> InferRequest:
    """Read the body of an inference request.

    Args:
        body: The body.
        header_length: The value of the header `HEADER_LENGTH`, where it came.

    Raises:
        RequestError: If anything about it is not as the protocol has it.

    Example:
        >>> tensor = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}
        >>> request = read_request(json.dumps({"inputs": [tensor]}).encode())
        >>> request.feeds["x"].tolist()
        [1.0, 2.0]
    """
    length = _header_length(header_length, len(body))
    document = _read_numbers(body[:length])
    parameters = _parameters(document, _REQUEST_PARAMETERS)
    all_binary = _flag(parameters, "binary_data_output")
    tensors = _read_inputs(document, memoryview(body)[length:])
    outputs: dict[str, bool] = {}
    for item in _objects(document, "outputs"):
        chosen = _parameters(item, _OUTPUT_PARAMETERS)
        outputs[_text(item, "name")] = _flag(chosen, "binary_data", all_binary)
    return InferRequest(
        id=_id(document) if document.get("id") is not None else "",
        adapter=parameters.get("adapter"),
        feeds={name: array for name, (_, array) in tensors.items()},
        datatypes={name: datatype for name, (datatype, _) in tensors.items()},
        outputs=tuple(outputs),
        binary=frozenset(name for name, binary in outputs.items() if binary),
        all_binary=all_binary,
    )


def write_response(
    request: InferRequest,
    model: str,
    version: str,
    adapter: str,
    outputs: Sequence[tuple[Spec, Array]],
) -> tuple[bytes, dict[str, str]]:
    """Write the body of a response, and its HTTP headers.

    Args:
        request: What is answered.
        model: The model that it named.
        version: The version of that.
        adapter: The versions of the adapters that were active, or ''.
        outputs: The outputs, with what the model declares them as.

    Raises:
        RequestError: If an output cannot be written as the request wants it.
    """
    entries, raws = [], []
    for spec, array in outputs:
        entry: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype}
        entry["shape"] = list(array.shape)
        named = spec.name in request.outputs
        if spec.name in request.binary if named else request.all_binary:
            raw = bytes_of_array(spec.datatype, array)
            raws.append(raw)
            entry["parameters"] = {"binary_data_size": len(raw)}
        else:
            entry["data"] = orjson.Fragment(json_of_array(spec.datatype, array))
        entries.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": version}
    document["parameters"] = {"adapter": adapter}
    if request.id:
        document["id"] = request.id
    document["outputs"] = entries
    head = orjson.dumps(document)
    if not raws:
        return head, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return b"".join([head, *raws]), headers


def read_json(text: bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RequestError: If the text is none.
    """
    try:
        document = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from error
    return _object(document)


def _read_numbers(text: bytes) -> dict[str, Any]:
    """Read a JSON object of many numbers; integers of more than 64 bits are floats."""
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:  # Python's reader takes more, and says better what is wrong
        return read_json(text)
    return _object(document)


def _object(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise RequestError("the body is no JSON object")
    return document


def _no_number(name: str) -> None:
    raise ValueError(f"JSON has no {name}")


def _header_length(given: str | None, size: int) -> int:
    if given is None:
        return size
    if not given.isdecimal() or not given.isascii() or int(given[:20]) > size:
        raise RequestError(
            f"{HEADER_LENGTH} is {given[:20]!r}; the body has {size} bytes",
            hint="it is the number of bytes of the JSON",
        )
    return int(given)


def _read_inputs(document: dict[str, Any], raw: memoryview) -> dict[str, tuple[str, Array]]:
    """Datatype and array of each input."""
    tensors: dict[str, tuple[str, Array]] = {}
    for item in _objects(document, "inputs"):
        name, datatype, shape = _text(item, "name"), _text(item, "datatype"), _shape(item)
        if name in tensors:
            raise RequestError(f"input {name!r} is given twice")
        size = _raw_size(item, len(raw))
        try:
            if size is None:
                array = array_of_json(datatype, shape, item["data"])
            else:
                array, raw = array_of_bytes(datatype, shape, raw[:size]), raw[size:]
        except RequestError as error:
            raise RequestError(f"input {name!r}: {error.message}", hint=error.hint) from error
        tensors[name] = (datatype, array)
    if not tensors:
        raise RequestError("the request has no `inputs`")
    if raw:
        raise RequestError(f"{len(raw)} bytes follow that belong to no input")
    return tensors


def _raw_size(item: dict[str, Any], left: int) -> int | None:
    """How many raw bytes an input has, or None if it has JSON."""
    size = _parameters(item, _INPUT_PARAMETERS).get("binary_data_size")
    if (size is None) == (item.get("data") is None):
        raise RequestError(f"input {item['name']!r}: give `data`, or `binary_data_size`")
    if size is None:
        return None
    if type(size) is not int or not 0 <= size <= left:
        raise RequestError(
            f"input {item['name']!r}: binary_data_size is {size!r}; {left} bytes follow"
        )
    return size


def _objects(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    items = document.get(key)
    items = [] if items is None else items
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RequestError(f"`{key}` is no list of JSON objects")
    return items


def _text(item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise RequestError(f"`{key}` is {value!r}, which is no text")
    return value


def _id(document: Mapping[str, Any]) -> str:
    found = _text(document, "id")
    if _HALF.search(found):
        raise RequestError(f"`id` is {found!r}, which is no text")
    return found


def _shape(item: Mapping[str, Any]) -> list[int]:
    shape = item.get("shape")
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise RequestError(f"`shape` is {shape!r}", hint="give a list of numbers")
    if len(shape) > 32 or math.prod(shape) > 2**62:
        raise RequestError("`shape` is too large")
    return shape


def _parameters(item: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The parameters of something."""
    found = item.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RequestError("`parameters` is no JSON object")
    refuse_unknown(found, known)
    return found


def refuse_unknown(parameters: Mapping[str, Any], known: set[str]) -> None:
    """Refuse parameters that mean nothing; a misspelt one must not go unnoticed.

    Raises:
        RequestError: With the first of them.
    """
    if unknown := sorted(parameters.keys() - known - _FOREIGN_PARAMETERS):
        raise RequestError(
            f"parameter {unknown[0]!r} is not supported",
            hint=f"supported here: {', '.join(sorted(known))}",
        )


def _flag(parameters: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise RequestError(f"`{key}` is {value!r}; it is true or false")
    return value
