"""The model that `onnx-adapt train` trains: with slots, and a head or norms if asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnx_adapt.cli.outputs import output_path, refuse_to_replace, say, tell_saved
from onnx_adapt.cli.progress import patience
from onnx_adapt.cli.training_data import read_settings
from onnx_adapt.words import count

if TYPE_CHECKING:
    from onnx_adapt import Adapter, Model
    from onnx_adapt.training.data import Dataset

_SHOWN = 6
"""How many places are named."""


def with_what_trains(model: Model, samples: Dataset, given: Mapping[str, Any]) -> Model:
    """Insert slots into a base, and add a head and replaceable norms if they are asked for.

    Args:
        model: A base, or a model with slots.
        samples: The samples to train with; where slots go in a base depends on them.
        given: The options of the command.

    Returns:
        The model itself if it is as it was.
    """
    import onnx_adapt as oa
    from onnx_adapt.edit.norm_weights import replaceable_norms
    from onnx_adapt.slot.manifest import read_manifest

    head = read_head(given)
    if read_manifest(model.proto) is None:
        model = oa.insert(model, after=_places(model, samples, head, given))
    if head:
        model = oa.add_head(model, **head)
    return replaceable_norms(model) if given["train_norms"] else model


def _places(
    model: Model, samples: Dataset, head: dict[str, Any], given: Mapping[str, Any]
) -> list[str]:
    """Where slots go in a base, which is said."""
    from onnx_adapt.training.choosing import choose_places
    from onnx_adapt.training.places import usual_places

    if given["forward_only"]:  # there may be no gradient to choose by
        places, reason = usual_places(model), "the usual places"
    else:
        with patience("looking where slots learn"):
            chosen = choose_places(
                *(model, samples),
                loss=given["loss"],
                output=given["model_output"],
                loss_settings=read_settings(given["loss_settings"]),
                head=head,
                seed=given["seed"],
                provider=given["provider"],
            )
        places, reason = list(chosen.places), chosen.reason
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    named = ", ".join(place.removeprefix("main:") for place in places[:_SHOWN])
    say(f"slots after {count(len(places), 'layer')}, {reason}: {named}{more}")
    return places


def read_head(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `add_head` takes, from `--head classes=3,pooling=mean` and `--on`; else nothing."""
    text = given["head"]
    if not text:
        return {}
    found: dict[str, Any] = {"output": given["model_output"]}
    for item in text.split(","):
        key, _, value = item.partition("=")
        if key == "classes" and value.isdecimal():
            found[key] = int(value)
        elif key == "pooling" and value:
            found[key] = value
        else:
            raise click.BadParameter(f"--head {text}: give classes=N or classes=N,pooling=cls")
    if "classes" not in found:
        raise click.BadParameter(f"--head {text}: say how many classes, such as classes=3")
    return found


def prove(base: Model, model: Model, samples: Dataset, provider: Any, stage: Any) -> None:
    """Verify a model that was made of a base, on the samples.

    Raises:
        MismatchError: If a check fails.
    """
    import onnx_adapt as oa

    dims = [value.type.tensor_type.shape.dim for value in base.proto.graph.input]
    rows = max((dim[0].dim_value for dim in dims if dim), default=0)
    batch = samples.first(rows or _ROWS)
    wanted = {value.name for value in base.proto.graph.input}
    feeds = {name: value for name, value in batch.inputs.items() if name in wanted}
    report = oa.verify(base, model, inputs=feeds, provider=provider, stage=stage)
    report.raise_for_mismatch()
    say(f"verified: with its slots off it is the base; {count(len(report.checks), 'check')}")


_ROWS = 4
"""Samples to verify with."""


def save_both(
    path: str,
    given: str | None,
    model: Model,
    adapter: Adapter,
    output: Path,
    progress: Callable[[int, int], None],
) -> str:
    """Save a model that was made, with its adapter beside it, both or neither.

    Returns:
        Where the model is.
    """
    import onnx_adapt as oa
    from onnx_adapt.adapter.files import encode_adapter

    target = output_path(path, given, "adapted")
    refuse_to_replace(target, path, output)
    beside = [(output.absolute(), [encode_adapter(adapter, output)])]
    saved = oa.save_model(model, target, beside=beside, progress=progress)
    tell_saved(saved)
    return str(saved.path)
