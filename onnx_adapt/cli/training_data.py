"""What `onnx-adapt train` reads: the samples, and the settings of a loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from onnx_adapt.cli.outputs import say

if TYPE_CHECKING:
    from onnx_adapt import Model
    from onnx_adapt.training.data import Dataset
    from onnx_adapt.training.texts import Texts


def read_samples(model: Model, given: Mapping[str, Any]) -> tuple[Dataset, Dataset | float]:
    """The samples to train with, and those to validate with or their share.

    Args:
        model: The model that is trained.
        given: The options of the command.
    """
    import onnx_adapt as oa
    from onnx_adapt.training.reading import read_dataset
    from onnx_adapt.training.teacher import taught

    text = read_texts(model, given)
    labels = "" if given["teacher"] else given["labels"]
    samples = read_dataset(given["data"], labels, text=text)
    if classes := samples.classes:
        say(f"classes: {', '.join(f'{i} {name}' for i, name in enumerate(classes))}")
    held_back: Dataset | float = given["held_back"]
    if given["validation"]:
        held_back = read_dataset(given["validation"], labels, text=text, classes=classes)
    if given["teacher"]:
        teacher, where = oa.open_model(given["teacher"]), given["provider"]
        samples = taught(samples, teacher, output=given["model_output"], provider=where)
        if not isinstance(held_back, float):
            held_back = taught(
                held_back, teacher, output=given["model_output"], provider=where
            )
    return samples, held_back


def read_texts(model: Model, given: Mapping[str, Any]) -> Texts | None:
    """How texts become the inputs of a model, from the options of these; else None."""
    from onnx_adapt.training.texts import texts_for

    if given["tokenizer"]:
        return texts_for(model, given["tokenizer"], given["texts"], given["max_length"])
    for option, value in (("--text", "texts"), ("--max-length", "max_length")):
        if given[value]:
            raise click.UsageError(f"{option} needs --tokenizer")
    return None


def read_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a loss: numbers, lists of numbers, true or false."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            found[key] = json.loads(value)
        except ValueError as error:
            raise click.BadParameter(
                f"{pair!r}: give KEY=VALUE with a number, [1, 2, ...], true or false"
            ) from error
        if not equals:
            raise click.BadParameter(f"{pair!r}: give KEY=VALUE")
    return found
