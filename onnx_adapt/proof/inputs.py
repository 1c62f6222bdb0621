"""The inputs that models are proven and measured with: given, or made up until they run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_adapt.errors import RunError, UnprovableError
from onnx_adapt.graph.index import index_model
from onnx_adapt.model_file import Model
from onnx_adapt.proof.feeds import (
    Feeds,
    candidate_feeds,
    check_feeds,
    is_dynamic,
    load_feeds,
    required_inputs,
)
from onnx_adapt.runtime import Runner

Inputs = str | os.PathLike[str] | Mapping[str, Any]
"""An `.npz` file, or arrays by name."""


def inputs_for(
    base: Model, given: Inputs | Sequence[Inputs] | None = None, seed: int = 0
) -> list[Feeds]:
    """The inputs that `verify` runs a base with: those given, or some that are made up.

    Raises:
        AdaptError: If those given do not fit, or none can be made up.
        UnprovableError: If the base does not run here at all.
    """
    return feeds_for(base, base_runner(base), given, seed)


def base_runner(base: Model) -> Runner:
    """The base in ONNX Runtime, optimised.

    Raises:
        UnprovableError: If it does not run here at all.
    """
    try:
        return Runner(base, optimised=True)
    except RunError as error:
        raise UnprovableError(error.message, hint=error.hint) from error


def feeds_for(
    base: Model, runner: Runner, given: Inputs | Sequence[Inputs] | None, seed: int
) -> list[Feeds]:
    """The inputs that are given, checked; where there are none, some that the base runs with.

    Raises:
        AdaptError: If those given do not fit.
        UnprovableError: If none can be made up.
    """
    if not _listed(given):
        return _made_up(base, runner, seed)
    return given_feeds(base, given)


def given_feeds(base: Model, given: Inputs | Sequence[Inputs] | None) -> list[Feeds]:
    """The inputs that are given, checked.

    Raises:
        AdaptError: If they do not fit.
    """
    return [
        check_feeds(item, base.proto, "the inputs")
        if isinstance(item, Mapping)
        else load_feeds(Path(item), base.proto)
        for item in _listed(given)
    ]


def _made_up(base: Model, runner: Runner, seed: int) -> list[Feeds]:
    """One set of inputs that the base runs with; two where shapes are dynamic."""
    index = index_model(base)
    found: list[Feeds] = []
    last = ""
    for variant in (0, 1) if is_dynamic(base.proto) else (0,):
        for feeds in candidate_feeds(index, variant, seed):
            try:
                runner.run(feeds)
            except RunError as error:  # these sizes do not suit it: try others
                last = str(error)  # an exception would keep this frame, and so the session
                continue
            found.append(feeds)
            break
    if not found:
        names = ", ".join(value.name for value in required_inputs(base.proto))
        raise UnprovableError(
            f"{base.label} runs with none of the inputs that were made up ({last})",
            hint=f"give real inputs ({names}) with --inputs FILE.npz",
        )
    return found


def _listed(given: Inputs | Sequence[Inputs] | None) -> list[Inputs]:
    if given is None:
        return []
    if isinstance(given, str | os.PathLike | Mapping):
        return [given]
    return list(given)
