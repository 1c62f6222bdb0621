"""The completions that a shell offers for names in a model; none if it cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from onnx_adapt.formats import adapter_files

if TYPE_CHECKING:
    from onnx_adapt import Model

Offer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _offer(names: Callable[[click.Context], Iterable[str]], *, files: bool = False) -> Offer:
    """Offer the names that begin with what was typed; files if there is no such name."""

    def complete(
        ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        try:
            known = [name for name in names(ctx) if name.startswith(incomplete)]
        except Exception:  # a traceback in the middle of a typed line helps nobody
            known = []
        items = [CompletionItem(name) for name in dict.fromkeys(known) if _typable(name)]
        return [CompletionItem(incomplete, type="file")] if files and not items else items

    return complete


def _typable(name: str) -> bool:
    """Whether a shell keeps a name in one piece; all split at spaces, bash at colons too."""
    return not any(c == ":" or c.isspace() or not c.isprintable() for c in name)


def _sites(ctx: click.Context) -> Iterable[str]:
    """The modules and nodes after which a slot can go."""
    import onnx_adapt as oa

    good = [site for site in oa.find_sites(_model(ctx)) if site.reason is None]
    modules = [site.module for site in good if site.module]
    return modules + [site.node for site in good if site.node]


def _slots(ctx: click.Context) -> Iterable[str]:
    import onnx_adapt as oa

    return [slot.name for slot in oa.list_slots(_model(ctx))]


def _adapters(ctx: click.Context) -> Iterable[str]:
    """The names of the adapter files beside the model, such as MODEL.NAME.safetensors."""
    model = _path(ctx)
    return [file.stem.removeprefix(f"{model.stem}.") for file in adapter_files(model)]


def _activations(ctx: click.Context) -> Iterable[str]:
    from onnx_adapt.slot.activations import ACTIVATIONS

    return ACTIVATIONS


def _model(ctx: click.Context) -> Model:
    import onnx_adapt as oa

    return oa.open_model(_path(ctx))


def _path(ctx: click.Context) -> Path:
    """The path of the model; click may not have parsed it yet."""
    return Path(ctx.params["model"] or ctx.args[0]).expanduser()


site_names = _offer(_sites)
slot_names = _offer(_slots)
adapter_names = _offer(_adapters, files=True)
activation_names = _offer(_activations)
