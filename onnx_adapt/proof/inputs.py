"""The inputs of a proof: those that are given, or made-up ones that the base runs with."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from onnx_adapt.errors import RunError, UnprovableError
from onnx_adapt.graph.index import index_model
from onnx_adapt.model.file import Model
from onnx_adapt.ort import CPU, Providers
from onnx_adapt.proof.feeds import WITHOUT_PROOF, Feeds, check_feeds, inputs_hint, load_feeds
from onnx_adapt.proof.input_sizes import Sizes, first_sizes, second_sizes
from onnx_adapt.proof.runner import Runner, Values, as_arrays
from onnx_adapt.proof.synthetic_inputs import Recipe, read_recipe

_SECONDS, _TRIES = 60.0, 400
"""The time and the number of runs after which no more inputs are made up."""

_UNQUESTIONED = 1 << 14
_LARGEST = 1 << 26
"""Inputs of fewer elements are not checked for growth; no tensor may have more than these."""

Inputs = str | os.PathLike[str] | Mapping[str, Any]
"""An `.npz` file, or arrays by name."""


def inputs_for(
    base: Model,
    given: Inputs | Sequence[Inputs] | None = None,
    seed: int = 0,
    providers: Providers = CPU,
) -> list[Feeds]:
    """The inputs that `verify` runs a base with: those given, or some that are made up.

    Raises:
        AdaptError: If those given do not fit, or none can be made up.
        UnprovableError: If the base does not run here at all.
    """
    runner = base_runner(base, providers)
    if _listed(given):
        return given_feeds(base, given)
    return [feeds for feeds, _ in _made_up(base, runner, seed)]


def base_runner(base: Model, providers: Providers) -> Runner:
    """The base in ONNX Runtime, optimised.

    Raises:
        UnprovableError: If it does not run here at all.
    """
    try:
        return Runner(base, providers, optimised=True)
    except RunError as error:
        where = ", ".join(provider.name for provider in providers)
        raise UnprovableError(
            error.message, hint=f"a proof runs the base on {where}; {WITHOUT_PROOF}"
        ) from error


def runs_of_base(
    base: Model, runner: Runner, given: Inputs | Sequence[Inputs] | None, seed: int
) -> list[tuple[Feeds, Values]]:
    """The inputs that are given, checked, or some that are made up; and the base's outputs.

    Raises:
        AdaptError: If those given do not fit.
        UnprovableError: If none can be made up.
    """
    if not _listed(given):
        return _made_up(base, runner, seed)
    return [(feeds, runner.run(feeds)) for feeds in given_feeds(base, given)]


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


def _made_up(base: Model, runner: Runner, seed: int) -> list[tuple[Feeds, Values]]:
    """Inputs that the base runs with, and its outputs; two of them where they can differ."""
    recipe = read_recipe(index_model(base), seed)
    trial = _Trial(base, runner, recipe)
    for sizes in first_sizes(set(recipe.kinds.values())):
        # Random ids may be special ones, such as an image's that is not there.
        for constant in (None, 1, 0) if recipe.has_integers else (None,):
            first = trial.run(sizes, 0, constant)
            if first is None:
                continue
            for other in second_sizes(sizes):
                same = recipe.shapes(other) == recipe.shapes(sizes)
                if recipe.steered or not same:
                    more = trial.run(other, 1, constant)
                    if more is not None:
                        return [first, more]
            return [first]
    if trial.empty is not None:
        return [trial.empty]
    raise UnprovableError(
        f"{base.label} runs with none of the inputs that were made up ({trial.last})",
        hint=inputs_hint(recipe.inputs),
    )


@dataclass(slots=True)
class _Trial:
    """Runs of a base with inputs that are made up, within a budget of time and memory.

    Attributes:
        last: Why the last one failed.
        empty: A run with nothing in any output.
    """

    base: Model
    runner: Runner
    recipe: Recipe
    last: str = ""
    empty: tuple[Feeds, Values] | None = None
    _spent: float = 0.0
    _tries: int = 0
    _seen: set[object] = field(default_factory=set)

    def run(
        self, sizes: Sizes, variant: int, constant: int | None
    ) -> tuple[Feeds, Values] | None:
        """Inputs of these sizes, and outputs, if the base runs with them, and may be run."""
        key = (*self.recipe.shapes(sizes).items(), variant, constant)
        if key in self._seen:
            return None
        self._seen.add(key)
        if self._spent > _SECONDS or self._tries >= _TRIES or not self._is_small(sizes):
            return None
        self._tries += 1
        started = time.monotonic()
        try:
            feeds = self.recipe.feeds(sizes, variant, constant)
            found = self.runner.run(feeds)
        except RunError as error:  # these sizes do not suit it: try others
            self.last = error.message  # an exception would keep this frame, and so the session
            return None
        finally:
            self._spent += time.monotonic() - started
        if not any(array.size for value in found.values() for array in as_arrays(value)):
            self.empty = self.empty or (feeds, found)
            return None
        return feeds, found

    def _is_small(self, sizes: Sizes) -> bool:
        """Whether no tensor in the graph is known to become very large.

        What grows with the square of an axis, as attention does, shows before it is run.
        The smallest inputs are not looked at: it takes as long as opening the model.
        """
        shapes = self.recipe.shapes(sizes)
        elements = sum(map(math.prod, shapes.values()))
        if elements > _LARGEST:
            self.last = self.last or f"inputs of {elements} elements are not made up"
            return False
        if elements <= _UNQUESTIONED or not self.recipe.kinds:
            return True
        proto = onnx.ModelProto()
        proto.CopyFrom(self.base.proto)
        for value in proto.graph.input:
            if value.name in shapes:
                for dim, size in zip(
                    value.type.tensor_type.shape.dim, shapes[value.name], strict=True
                ):
                    dim.dim_value = size
        del proto.graph.value_info[:]
        views = index_model(replace(self.base, proto=proto)).views.values()
        return all(
            math.prod(dim for dim in known.shape or () if isinstance(dim, int)) <= _LARGEST
            for view in views
            for known in view.types.values()
        )


def _listed(given: Inputs | Sequence[Inputs] | None) -> list[Inputs]:
    if given is None:
        return []
    if isinstance(given, str | os.PathLike | Mapping):
        return [given]
    return list(given)
