"""A place of a model that can take an adapter, or the reason why it cannot."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor of a model where an adapter can go.

    Attributes:
        address: Unique in the model: the graph's path, a colon, the tensor.
        node: Name of the node; for a layer the node with the weight.
        op: Operator type of that node.
        tensor: The tensor. For a layer with a separate bias Add it is the Add's output.
        module: PyTorch module path, or None if the exporter left no trace.
        width: Size of the feature axis, or None if unknown.
        dtype: Element type, or '' if unknown.
        axis: The feature axis: -1, or 1 for channels; None if nothing tells.
        refused: Why no adapter can go here, or None.
        graph: Path of the graph the tensor is in.
        rank: Number of axes, or None if unknown.
        layer: Whether the site is the output of a layer.
        core: Index of the node in its graph.
        also: Names of other nodes that stand for it: that of the bias Add.
        before_bias: Where the layer's bias is added, if that is behind the tensor. An
            adapter after the layer cannot go here, one after the tensor can.
    """

    address: str
    node: str
    op: str
    tensor: str
    module: str | None
    width: int | None
    dtype: str
    axis: int | None
    refused: str | None
    graph: str
    rank: int | None
    layer: bool
    core: int
    also: tuple[str, ...] = ()
    before_bias: str | None = None

    @property
    def reason(self) -> str | None:
        """Why no adapter can go after the layer or module that this is, or None."""
        return self.refused or self.before_bias

    def as_dict(self) -> dict[str, object]:
        """What `onnx-adapt sites --json` prints of a site."""
        return {name: getattr(self, name) for name in _PRINTED} | {"refused": self.reason}


_PRINTED = ("address", "node", "op", "tensor", "module", "width", "dtype", "axis", "refused")
