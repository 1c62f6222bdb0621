"""Trainable tokens of PEFT: rows of an embedding, alone or beside LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, Replacement, TokenRows
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

TOKEN_ROWS = "trainable_tokens_delta"
"""What PEFT calls the trained rows. They are the new rows, and no differences."""


def token_edits(found: ModuleTensors) -> Iterator[Edit]:
    """The trained rows of one module; which rows they are is in the configuration.

    For example `trainable_token_indices={"word_embeddings": [3, 5]}` and a tensor `(2, 32)` of
    `embeddings.word_embeddings` are its rows 3 and 5.
    """
    module = found.module.removesuffix(".token_adapter")
    rows = found.parts[TOKEN_ROWS]
    tokens = _tokens_of(module, found)
    if rows.ndim != 2 or len(rows) != len(tokens):
        raise CheckpointError(
            f"module {module!r}: the configuration names {len(tokens)} trained tokens, and "
            f"their rows have shape {list(rows.shape)}",
            hint="was adapter_config.json copied from another adapter?",
        )
    yield TokenRows(module, tokens, rows.astype(np.float64))


def settle_tables(edits: Sequence[Edit]) -> list[Edit]:
    """Say what else belongs to trained rows: a saved table, and the rows of other modules.

    With `save_embedding_layers=True` the base's own table is saved too. It replaces nothing;
    the graph must have the same.
    """
    trained = {edit.module: edit.tokens for edit in edits if isinstance(edit, TokenRows)}
    tables: dict[str, Array] = {}
    settled: list[Edit] = []
    for edit in edits:
        own = isinstance(edit, Replacement) and edit.module in trained
        if isinstance(edit, Replacement) and own and edit.parameter == "weight":
            tables[edit.module] = edit.value
        else:
            settled.append(edit)
    return [
        replace(
            edit,
            others={name: trained[name] for name in trained if name != edit.module},
            table=tables.get(edit.module),
        )
        if isinstance(edit, TokenRows)
        else edit
        for edit in settled
    ]


def _tokens_of(module: str, found: ModuleTensors) -> tuple[int, ...]:
    """The tokens whose rows a module has, in the order of the rows."""
    named = found.config.get("trainable_token_indices") or found.config.get("token_indices")
    if isinstance(named, dict):  # by the end of the module's name, as PEFT looks it up
        named = next((named[name] for name in named if module.endswith(name)), None)
    if not _are_tokens(named):
        shown = "names none" if named is None else f"has {str(named)[:80]}"
        raise CheckpointError(
            f"module {module!r} has trained rows, and the configuration {shown} for them",
            hint="trainable_token_indices or token_indices lists every token once",
        )
    return tuple(named)


def _are_tokens(named: Any) -> TypeGuard[list[int]]:
    whole = isinstance(named, list) and all(type(token) is int for token in named)
    return whole and 0 < len(named) == len(set(named)) and min(named) >= 0
