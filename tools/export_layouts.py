"""Export tiny PyTorch models whose features change their axis, and what an adapter gives.

The folders ``tests/cases/layout_*`` are made by this script and committed, so that the
tests need no torch. For every model and exporter it writes ``<exporter>.onnx`` with random
weights, and for every model ``truth.npz``:

``x`` and ``y``
    An input of other sizes than the exporters saw, and PyTorch's output for it.
``<module>.down``, ``<module>.up``
    ``(features, 3)`` and ``(3, features)``, the weights of an adapter.
``<module>.y``
    PyTorch's output with ``h + up(relu(down(h)))`` on what that module gives, the
    features being on the axis that the model's author meant.

Environment and versions are those of ``export_fixtures.py``::

    /tmp/export/bin/python tools/export_layouts.py
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "cases"
BOTTLENECK = 3


class Shuffled(nn.Module):
    """Channels shuffled between two convolutions, as in ShuffleNet."""

    def __init__(self) -> None:
        """Make the modules."""
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.shuffle = Shuffle(2)
        self.relu = nn.ReLU()
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute pictures from pictures."""
        return self.second(self.relu(self.shuffle(self.first(x))))


class Shuffle(nn.Module):
    """Channels from ``(groups, n)`` to ``(n, groups)``, as torchvision writes it."""

    def __init__(self, groups: int) -> None:
        """Keep the number of groups."""
        super().__init__()
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shuffle the channels."""
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2)
        return x.reshape(n, c, h, w)


class Back(nn.Module):
    """Pictures with their channels last, and back."""

    def __init__(self) -> None:
        """Make the modules."""
        super().__init__()
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute with channels last."""
        return self.act(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Patches(nn.Module):
    """The patches of a picture as a sequence, as in a vision transformer."""

    def __init__(self) -> None:
        """Make the modules."""
        super().__init__()
        self.projection = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give ``(batch, patches, 8)``."""
        return self.projection(x).flatten(2).transpose(1, 2)


class Squeezed(nn.Module):
    """A squeeze-and-excitation block with Linears."""

    def __init__(self) -> None:
        """Make the modules."""
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels."""
        gate = self.gate(self.pool(x).flatten(1))
        return x * gate[:, :, None, None]


class Block(nn.Module):
    """A block of ConvNeXt."""

    def __init__(self) -> None:
        """Make the modules."""
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, 16)
        self.act = nn.GELU()
        self.narrow = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add to the picture."""
        inner = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.narrow(self.act(self.wide(inner))).permute(0, 3, 1, 2)


class Grouped(nn.Module):
    """A GroupNorm behind a convolution."""

    def __init__(self) -> None:
        """Make the modules."""
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.act = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute pictures from pictures."""
        return self.act(self.norm(self.first(x)))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to export.

    Attributes:
        model: The model.
        places: The feature axis of what its modules give.
        size: Height and width of the pictures where the model needs them.
    """

    model: nn.Module
    places: dict[str, int]
    size: int | None = None


def cases() -> dict[str, Case]:
    """Return the models by name."""
    conv = nn.Conv2d(3, 8, 3, padding=1)
    return {
        "groupnorm": Case(Grouped(), {"norm": 1, "act": 1}),
        "shuffle": Case(Shuffled(), {"shuffle": 1, "relu": 1}),
        "nhwc": Case(nn.Sequential(conv, Back(), nn.Conv2d(8, 4, 1)), {"1": 1, "1.act": 3}),
        "flatten": Case(
            nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 3 * 3, 2)),
            {"1": 1, "2": 1},
            size=3,
        ),
        "patches": Case(
            nn.Sequential(Patches(), nn.LayerNorm(8), nn.Linear(8, 5)),
            {"0": 2, "0.projection": 1},
        ),
        "squeeze": Case(
            nn.Sequential(conv, Squeezed(), nn.Conv2d(8, 4, 1)), {"1": 1, "1.gate": 1}
        ),
        "convnext": Case(nn.Sequential(conv, Block(), nn.ReLU()), {"1": 1, "1.act": 3}),
    }


def export(model: nn.Module, x: torch.Tensor, path: Path, *, dynamo: bool, free: bool) -> None:
    """Export one model with a dynamic batch, and dynamic pictures if they are ``free``."""
    axes = {0: "batch", 2: "height", 3: "width"} if free else {0: "batch"}
    how: dict[str, object] = {"dynamic_axes": {"x": axes, "y": {0: "batch"}}}
    if dynamo:
        how = {"dynamic_shapes": [dict.fromkeys(axes, torch.export.Dim.DYNAMIC)]}
        how |= {"external_data": False}
    names = {"input_names": ["x"], "output_names": ["y"]}
    torch.onnx.export(
        model, (x,), path, dynamo=dynamo, opset_version=18, verbose=False, **names, **how
    )
    proto = onnx.load(path)
    for holder in (proto.graph, *proto.graph.node, *proto.graph.value_info):
        kept = [p for p in holder.metadata_props if "stack_trace" not in p.key]
        del holder.metadata_props[:]
        holder.metadata_props.extend(kept)
    onnx.save(proto, path)


class Adapter:
    """An adapter on what a module gives, its weights made when it is first called.

    Attributes:
        axis: The axis with the features.
        down: ``(features, 3)``.
        up: ``(3, features)``.
    """

    def __init__(self, axis: int) -> None:
        """Keep the axis."""
        self.axis = axis
        self.down = self.up = torch.empty(0)

    def __call__(self, _: nn.Module, __: object, h: torch.Tensor) -> torch.Tensor:
        """Give ``h + up(relu(down(h)))``."""
        h = h.movedim(self.axis, -1)
        self.down = torch.randn(h.shape[-1], BOTTLENECK)
        self.up = torch.randn(BOTTLENECK, h.shape[-1])
        return (h + torch.relu(h @ self.down) @ self.up).movedim(-1, self.axis)


def truth(case: Case, x: torch.Tensor) -> dict[str, np.ndarray]:
    """What PyTorch gives, without an adapter and with one after each place."""
    found = {"x": x, "y": case.model(x)}
    for place, axis in case.places.items():
        adapter = Adapter(axis)
        hook = case.model.get_submodule(place).register_forward_hook(adapter)
        found[f"{place}.y"] = case.model(x)
        hook.remove()
        found[f"{place}.down"], found[f"{place}.up"] = adapter.down, adapter.up
    return {name: value.detach().numpy() for name, value in found.items()}


def main() -> None:
    """Write all cases."""
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    for name, case in cases().items():
        folder = FOLDER / f"layout_{name}"
        folder.mkdir(exist_ok=True)
        case.model.eval()
        seen = torch.randn(2, 3, case.size or 8, case.size or 8)
        for exporter in ("torchscript", "dynamo"):
            path = folder / f"{exporter}.onnx"
            export(case.model, seen, path, dynamo=exporter == "dynamo", free=not case.size)
        x = torch.randn(3, 3, case.size or 8, case.size or 4)
        np.savez_compressed(folder / "truth.npz", **truth(case, x))


if __name__ == "__main__":
    main()
