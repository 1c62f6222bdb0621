"""Whether padding behind a prompt leaves a model's logits as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.serve.llm.facts import Facts

_LENGTHS = (2, 7, 4)
_STEPS = 2
_FAR = 0.5
"""How far logits may be from those without padding, in standard deviations. Rounding moved
those of int4 models by up to 0.08, wrong positions by 2 to 6."""


def padding_changes_nothing(generator: Callable[..., Any], facts: Facts) -> bool:
    """Try whether rows of several lengths compute what each computes alone.

    Attention must take the length of a row from the mask, as GroupQueryAttention does.

    Args:
        generator: Makes a generator with these search options.
        facts: What the model's folder says.

    Raises:
        RuntimeError: If the model does not run.
    """
    usual = [t for t in range(facts.vocabulary) if t not in facts.ends and t != facts.pad]
    longest = max(_LENGTHS)
    if longest + _STEPS >= facts.context_length or not usual:
        return False
    tokens = np.resize(usual, (len(_LENGTHS), longest + _STEPS)).astype(np.int32)
    rows = [row[: size + _STEPS] for row, size in zip(tokens, _LENGTHS, strict=True)]
    padded = np.full((len(rows), longest), facts.pad, np.int32)
    for row, text, size in zip(padded, rows, _LENGTHS, strict=True):
        row[:size] = text[:size]
    together = _logits(generator, padded, [row[-_STEPS:] for row in rows])
    alone = np.concatenate(
        [_logits(generator, row[None, :-_STEPS], [row[-_STEPS:]]) for row in rows]
    )
    return bool(np.abs(together - alone).max() <= _FAR * alone.std())


def _logits(generator: Callable[..., Any], prompts: Array, written: Sequence[Array]) -> Array:
    """The logits behind prompts and behind tokens that are chosen: `(rows, steps, tokens)`."""
    size = prompts.shape[1] + _STEPS
    running = generator(max_length=size + 1, batch_size=len(prompts), do_sample=False)
    running.append_tokens(prompts)
    found = []
    for tokens in np.transpose(written):
        logits = np.array(running.get_logits())
        found.append(logits.reshape(len(prompts), -1).copy())
        only = np.full_like(found[-1], -1e9)
        only[np.arange(len(prompts)), tokens] = 0
        running.set_logits(only.reshape(logits.shape))
        running.generate_next_token()
    found.append(np.array(running.get_logits()).reshape(len(prompts), -1))
    return np.stack(found, 1)
