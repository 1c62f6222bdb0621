"""Turn texts into the inputs of a model, with a `tokenizer.json`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.readers.optional import optional_library
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import TrainingError
from onnx_adapt.model.file import Model
from onnx_adapt.slot.manifest import read_manifest
from onnx_adapt.words import beside, count

_log = logging.getLogger(__name__)

_FIELDS = {
    "input_ids": "ids",
    "attention_mask": "attention_mask",
    "token_type_ids": "type_ids",
}
"""Inputs of models for texts, and what the tokenizer calls them."""

STEP = 8
"""Texts are padded to a multiple of this many tokens, so that many have one length."""


@dataclass(frozen=True, slots=True)
class Texts:
    """How texts become inputs.

    Attributes:
        tokenizer: A `tokenizer.json` of the library `tokenizers`.
        inputs: Which inputs the model has, of `input_ids`, `attention_mask` and
            `token_type_ids`.
        columns: The columns with the texts: one, or two for pairs. By default the only
            column with texts.
        length: The number of tokens that the model takes, if it is fixed.
        most: The most tokens of a text; longer ones are cut. By default as the tokenizer says.
    """

    tokenizer: Path
    inputs: tuple[str, ...] = tuple(_FIELDS)
    columns: tuple[str, ...] = ()
    length: int | None = None
    most: int | None = None

    def encode(self, texts: Sequence[Sequence[str]]) -> list[dict[str, Array]]:
        """The inputs of each text, or pair of texts; `input_ids` is `(tokens,)`.

        Texts are cut to `most` tokens, to the length that the model takes, or as the tokenizer
        says; how many were is logged. Where the model has an attention mask they are padded to
        a multiple of `STEP`.

        Raises:
            TrainingError: If the tokenizer cannot be read, or leaves no room for the texts.
        """
        tokenizer = self._read()
        self._require_room(tokenizer, pairs=any(len(row) > 1 for row in texts))
        rows = [row[0] if len(row) == 1 else tuple(row) for row in texts]
        encoded = tokenizer.encode_batch(rows)
        if cut := sum(bool(found.overflowing) for found in encoded):
            most = tokenizer.truncation["max_length"]
            _log.warning("cut %d of %s to %d tokens", cut, count(len(rows), "text"), most)
        return [self._padded(found, tokenizer) for found in encoded]

    def _read(self) -> Any:
        library = optional_library("tokenizers", "text", "text", TrainingError)
        if not self.tokenizer.is_file():
            raise TrainingError(
                f"there is no file {self.tokenizer}", hint=beside(self.tokenizer)
            )
        try:
            tokenizer = library.Tokenizer.from_file(str(self.tokenizer))
        except Exception as error:  # the library raises this class itself
            raise TrainingError(
                f"cannot read {self.tokenizer}: {error}",
                hint="give the tokenizer.json that belongs to the model",
            ) from error
        tokenizer.no_padding()
        if limit := self.most or self.length:
            tokenizer.enable_truncation(limit)
        return tokenizer

    def _require_room(self, tokenizer: Any, *, pairs: bool) -> None:
        """Refuse to cut texts to no more than what the tokenizer puts around them."""
        own = tokenizer.num_special_tokens_to_add(pairs)
        limit = self.most or self.length
        if limit is not None and limit <= own:
            raise TrainingError(
                f"texts cannot be cut to {count(limit, 'token')}: {self.tokenizer.name} adds "
                f"{own} of its own",
                hint=f"allow {own + 1} or more",
            )

    def _padded(self, found: Any, tokenizer: Any) -> dict[str, Array]:
        tokens = len(found.ids)
        length = self.length or tokens
        if self.length is None and "attention_mask" in self.inputs:
            length = min(-(-tokens // STEP) * STEP, self.most or sys.maxsize)
        made = {}
        for name in self.inputs:
            fill = _pad_id(tokenizer) if name == "input_ids" else 0
            made[name] = np.full(length, fill, np.int64)
            made[name][:tokens] = getattr(found, _FIELDS[name])
        return made


def _pad_id(tokenizer: Any) -> int:
    """The token that fills texts up; attention is masked there, so any will do."""
    known = (tokenizer.token_to_id(name) for name in ("[PAD]", "<pad>", "<|endoftext|>"))
    return next((token for token in known if token is not None), 0)


def texts_for(
    model: Model,
    tokenizer: str | os.PathLike[str],
    columns: Sequence[str] = (),
    most: int | None = None,
) -> Texts:
    """How texts become the inputs of a model.

    Args:
        model: A model that reads tokens.
        tokenizer: A `tokenizer.json`.
        columns: The columns with the texts, one or two.
        most: The most tokens of a text; longer ones are cut.

    Raises:
        TrainingError: If the model has no input for tokens, or takes fewer.
    """
    manifest = read_manifest(model.proto)
    own = {name for slot in manifest.slots for name in slot.inputs} if manifest else set()
    values = {v.name: v.type.tensor_type for v in model.proto.graph.input if v.name not in own}
    inputs = tuple(name for name in _FIELDS if name in values)
    if "input_ids" not in inputs:
        raise TrainingError(
            f"{model.label} has no input 'input_ids' for tokens; it has {', '.join(values)}",
            hint="turn the texts into its inputs yourself, and give them as an .npz",
        )
    dims = values["input_ids"].shape.dim
    length = dims[1].dim_value if len(dims) == 2 else 0
    if most and length and most > length:
        raise TrainingError(
            f"{model.label} takes {length} tokens, and texts are to be cut to {most}",
            hint=f"cut them to {length} or fewer",
        )
    return Texts(Path(tokenizer), inputs, tuple(columns), length or None, most)
