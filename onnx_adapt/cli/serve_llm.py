"""The options of `onnx-adapt serve` for a language model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from onnx_adapt.serve.llm.facts import Writing

_F = TypeVar("_F", bound=Callable[..., Any])

_LIMITS = ("max_generators", "max_waiting", "max_model_len")
_OF_TENSORS = (
    *("provider", "batching", "batch_axis", "max_batch_size", "batch_wait_ms", "grpc_port"),
    *("embed", "tokenizer", "pooling", "normalize", "replicas", "address", "gateways"),
)
"""The options that mean nothing to a server of texts."""

_OPTIONS = (
    click.option(
        "--llm",
        type=click.Path(),
        help="Instead of MODEL: the folder of a language model for onnxruntime-genai. Serve "
        "/v1/chat/completions and /v1/completions as OpenAI has them; not on Ray.",
    ),
    click.option(
        "--max-generators",
        type=click.IntRange(1),
        help="With --llm: how many texts are written at a time; by default 16.",
    ),
    click.option(
        "--max-waiting",
        type=click.IntRange(1),
        help="With --llm: how many texts may wait for those; by default 256.",
    ),
    click.option(
        "--max-model-len",
        type=click.IntRange(2),
        help="With --llm: the most tokens of a prompt with its answer; by default all that "
        "the model's context has.",
    ),
)


def llm_options(command: _F) -> _F:
    """Add the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_llm(model: str | None, options: dict[str, Any]) -> tuple[str, Writing | None]:
    """The model's file, and how texts are written if that is what is served.

    Takes its own options out of `options`, and names the base there.

    Raises:
        AdaptError: If the folder holds no language model.
    """
    folder: str | None = options.pop("llm")
    limits = {name: options.pop(name) for name in _LIMITS}
    limits = {name: value for name, value in limits.items() if value is not None}
    if folder is None:
        if model is None:
            raise click.UsageError("give MODEL, or --llm FOLDER")
        for name in limits:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --llm")
        return model, None
    if model is not None:
        raise click.UsageError("give MODEL or --llm, not both")
    given = click.get_current_context().get_parameter_source
    for name in _OF_TENSORS:
        if given(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} means nothing with --llm")
    from onnx_adapt.serve.llm.facts import Writing, read_facts

    facts = read_facts(Path(folder).absolute())
    options["name"] = options["name"] or facts.folder.name
    names = {"max_generators": "texts", "max_waiting": "waiting", "max_model_len": "length"}
    return str(facts.model), Writing(facts, **{names[k]: v for k, v in limits.items()})
