"""`/v1/embeddings` as OpenAI has it: texts in, one vector for each, with any adapter.

A request's texts are one batch. Texts are padded to a multiple of 16 tokens, so that requests
of other clients, with other adapters, have the same shape and are run with it.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import RequestError
from onnx_adapt.serve.choice import read_choice
from onnx_adapt.serve.gateway import Gateway
from onnx_adapt.serve.protocol import InferRequest, Spec

POOLINGS = ("mean", "cls", "last")
"""How the vectors of a text's tokens become one."""

_STATES = ("last_hidden_state", "token_embeddings")
"""What exporters call the output with a vector for each token."""
_KNOWN = {"input", "model", "encoding_format", "user"}
_PAD_TO = 16
_MOST_TEXTS = 2048


@dataclass(frozen=True, slots=True)
class Embedder:
    """What makes vectors of texts, by a model that the gateway runs.

    Attributes:
        gateway: What runs the model.
        tokenizer: Makes tokens of texts.
        pooling: One of `POOLINGS`.
        normalize: Whether vectors get length 1.
    """

    gateway: Gateway
    tokenizer: tokenizers.Tokenizer
    pooling: str
    normalize: bool

    async def answer(self, document: dict[str, Any]) -> dict[str, Any]:
        """Answer a request, and count what became of it.

        Raises:
            AdaptError: If it cannot be answered.
        """
        with self.gateway.request() as asking:
            rows, wanted, model = self._read(document)
            blend = read_choice(model, self.gateway.base, None, "")
            asking.choose(blend)
            most = self.gateway.settings.max_batch_size
            parts = [rows[i : i + most] for i in range(0, len(rows), most)]
            vectors = np.concatenate([await self._embed(part, blend) for part in parts])
        tokens = sum(map(len, rows))
        data = [
            {"object": "embedding", "index": i, "embedding": _written(vector, wanted)}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": model, "usage": usage}

    def _read(self, document: dict[str, Any]) -> tuple[list[list[int]], str, str]:
        """The tokens of each text, the format of the answer, and the model."""
        for name in document.keys() - _KNOWN:
            if document[name] is not None:
                raise RequestError(f"{name!r} is not supported", hint="leave it out")
        wanted = document.get("encoding_format") or "float"
        if wanted not in ("float", "base64"):
            raise RequestError(f"encoding_format is {wanted!r:.50}", hint="float or base64")
        model = document.get("model")
        if not isinstance(model, str):
            raise RequestError("`model` is missing", hint="an adapter, or the base")
        given = document.get("input")
        if isinstance(given, str) or (isinstance(given, list) and _are_tokens(given)):
            given = [given]
        if not isinstance(given, list) or not given:
            raise RequestError("`input` is no text, nor a list of some")
        if len(given) > _MOST_TEXTS:
            raise RequestError(
                f"`input` has {len(given)} texts", hint=f"send up to {_MOST_TEXTS} at once"
            )
        if all(isinstance(text, str) for text in given):
            _refuse_halves(given)
            rows = [item.ids for item in self.tokenizer.encode_batch(given)]
        elif all(isinstance(row, list) and _are_tokens(row) for row in given):
            rows = given
        else:
            raise RequestError("`input` holds what is neither a text nor a list of tokens")
        if not all(rows):
            raise RequestError("`input` holds a text without tokens")
        return rows, wanted, model

    async def _embed(self, rows: Sequence[Sequence[int]], blend: Any) -> Array:
        longest = max(map(len, rows))
        width = -(-longest // _PAD_TO) * _PAD_TO
        if self.tokenizer.truncation:  # the model may take no more
            width = max(longest, min(width, self.tokenizer.truncation["max_length"]))
        ids = np.zeros((len(rows), width), np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        feeds = _feeds(self.gateway, ids, mask)
        states = states_of(self.gateway.outputs.values()).name
        request = InferRequest(
            id="",
            adapter=None,
            feeds=feeds,
            datatypes=dict.fromkeys(feeds, "INT64"),
            outputs=(states,),
            binary=frozenset(),
            all_binary=True,
        )
        _, outputs = await self.gateway.infer(request, blend)
        return await asyncio.to_thread(
            pooled, outputs[states], mask, self.pooling, normalize=self.normalize
        )


def pooled(states: Array, mask: Array, pooling: str, *, normalize: bool) -> Array:
    """One vector for each text, `(texts, width)`.

    Args:
        states: The vectors of the tokens, `(texts, tokens, width)`.
        mask: 1 where there is a token, which comes before padding: `(texts, tokens)`.
        pooling: One of `POOLINGS`.
        normalize: Whether vectors get length 1.

    Example:
        >>> states = np.array([[[1.0, 3.0], [3.0, 5.0], [9.0, 9.0]]])
        >>> pooled(states, np.array([[1, 1, 0]]), "mean", normalize=False).tolist()
        [[2.0, 4.0]]
    """
    states = states.astype(np.float32)
    counts = mask.sum(1)
    if pooling == "mean":
        vectors = (states * mask[:, :, None]).sum(1) / counts[:, None]
    elif pooling == "cls":
        vectors = states[:, 0]
    else:
        vectors = states[np.arange(len(states)), counts - 1]
    if normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found: Array = vectors.astype(np.float32)
    return found


def _feeds(gateway: Gateway, ids: Array, mask: Array) -> dict[str, Array]:
    made = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
    }
    return {name: made[name] for name in gateway.inputs}


def refuse_other_models(inputs: Sequence[Spec], outputs: Sequence[Spec]) -> None:
    """Refuse a model that does not make vectors of tokens.

    Raises:
        RequestError: With the input that nobody can fill, or what its outputs lack.
    """
    known = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    for spec in inputs:
        if spec.name not in known or spec.datatype != "INT64":
            raise RequestError(
                f"--embed cannot fill the input {spec.name!r} ({spec.datatype})",
                hint=f"it fills {', '.join(known)} of INT64",
            )
    states_of(outputs)


def states_of(outputs: Any) -> Spec:
    """The output with a vector for each token.

    Raises:
        RequestError: If there is none, or it cannot be said which.
    """
    specs = [spec for spec in outputs if len(spec.shape) == 3]
    named = [spec for spec in specs if spec.name in _STATES]
    found: list[Spec] = named or specs
    if len(found) != 1:
        raise RequestError(
            "--embed needs one output (texts, tokens, width)",
            hint=f"name it {_STATES[0]!r} in the model",
        )
    return found[0]


def read_tokenizer(path: str) -> tokenizers.Tokenizer:
    """A tokenizer from its file.

    Raises:
        RequestError: If it is none.
    """
    try:
        found = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing narrower
        raise RequestError(f"{path} is no tokenizer: {error}") from error
    found.no_padding()
    return found


def _refuse_halves(texts: list[str]) -> None:
    """Refuse half of a surrogate pair, which JSON can hold and no tokenizer reads."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"`input` holds a text that is no text: {error.reason}") from error


def _are_tokens(row: list[Any]) -> bool:
    return bool(row) and all(type(item) is int and 0 <= item < 2**31 for item in row)


def _written(vector: Array, wanted: str) -> Any:
    if not np.isfinite(vector).all():
        raise RequestError("the vector holds NaN or infinity", status=500)
    if wanted == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
