"""Models for the tests of sites, modules and names: ONNX text plus generated weights."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

from onnx_adapt import Model, Site, find_sites
from onnx_adapt.resolve import Choice, resolve
from onnx_adapt.sites import survey_model

HEADER = '<ir_version: {ir}, opset_import: ["": {opset}, "com.microsoft": 1, "local": 1]>\n'


def over(names: str, table: str) -> pytest.MarkDecorator:
    """Parametrise a test by a table: one case a line, its title first, `|` between cells."""
    lines = [line.split("|") for line in table.splitlines() if line.strip()]
    cases = [
        pytest.param(*(cell.strip() for cell in cells), id=title.strip())
        for title, *cells in lines
    ]
    return pytest.mark.parametrize(tuple(names.split()), cases)


def weight(text: str) -> onnx.TensorProto:
    """A constant from text such as `w 4 6` or `w 4 6 int8`, with small positive values."""
    name, *rest = text.split()
    dims = [int(word) for word in rest if word.isdigit()]
    dtype = next((word.upper() for word in rest if not word.isdigit()), "FLOAT")
    values = np.arange(math.prod(dims)) % 7 + 1
    return helper.make_tensor(name, TensorProto.DataType.Value(dtype), dims, values.tolist())


def model(text: str, *weights: str, opset: int = 17, ir: int = 8) -> Model:
    """A model from the text of a graph (and functions), with initializers added."""
    proto = onnx.parser.parse_model(HEADER.format(ir=ir, opset=opset) + text)
    proto.graph.initializer.extend(map(weight, weights))
    onnx.checker.check_model(proto)
    return Model(proto)


def scoped(made: Model, scopes: dict[str, str]) -> Model:
    """Give nodes, found by their first output, a dynamo module path in their metadata."""
    for node in made.proto.graph.node:
        if node.output[0] in scopes:
            path = scopes[node.output[0]].split(".")
            parents = [".".join(path[:end]) for end in range(1, len(path) + 1)]
            entry = node.metadata_props.add()
            entry.key = "pkg.torch.onnx.name_scopes"
            entry.value = repr(["", *parents, node.output[0]])
    return made


def layers(made: Model) -> dict[str, Site]:
    """The sites listed by default, by tensor."""
    return {site.tensor: site for site in find_sites(made)}


def every(made: Model) -> dict[str, Site]:
    """All sites, by tensor."""
    return {site.tensor: site for site in find_sites(made, all_tensors=True)}


def chosen(made: Model, *names: str) -> list[Choice]:
    """What names mean in a model."""
    return list(resolve(survey_model(made), names).choices)


def meant(made: Model, *names: str) -> list[str]:
    """The tensors that names mean in a model."""
    return [choice.site.tensor for choice in chosen(made, *names)]
