"""Checkpoints and graphs of one model, wrapped in different ways; and of other models."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from adapter_models import B2, W1, W2, lora, lora_on, peft_folder, saved_model, two_layers
from onnx import helper, numpy_helper
from trained_cases import run

import onnx_adapt as oa
from onnx_adapt.checkpoints.modules.names import map_modules
from onnx_adapt.errors import CheckpointError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)


def _wrapped(prefix: str) -> onnx.ModelProto:
    """`two_layers` as an attribute of other modules: `model.inner.` for example."""
    proto = two_layers()
    for node in proto.graph.node:
        node.name = f"/{prefix.replace('.', '/')}{node.name[1:]}"
    proto.graph.initializer[2].name = proto.graph.node[3].input[1] = f"{prefix}fc2.bias"
    return proto


def _trained(prefix: str) -> dict:
    key = "base_model.model."
    return {key + prefix + k.removeprefix(key): v for k, v in lora().items()}


def _adapted(base: onnx.ModelProto, tensors: dict, folder: Path) -> np.ndarray:
    model = oa.open_model(saved_model(folder / "model.onnx", base))
    checkpoint = oa.load_checkpoint(peft_folder(folder / "trained", tensors), model)
    oa.save_model(oa.insert_checkpoint(model, checkpoint), folder / "a.onnx")
    return run(folder / "a.onnx", {"x": X, **checkpoint.adapter.feeds()})["y"]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        *itertools.product([""], ["inner.", "model.inner.", "0.auto_model.", "a.b.c.d.e."]),
        *itertools.product(["inner.", "model.inner.", "0.auto_model."], [""]),
        *itertools.product(["inner.", "model."], ["inner.", "model."]),
        ("model.net.", "model.inner.net."),
        ("model.inner.net.", "model.net."),
    ],
)
def test_a_wrapper_around_the_whole_model_is_no_other_architecture(
    theirs: str, ours: str, tmp_path: Path
) -> None:
    if theirs == ours or "" in (theirs, ours) or "net" in theirs:
        found = _adapted(_wrapped(ours), _trained(theirs), tmp_path)
        np.testing.assert_allclose(found, lora_on(X, lora()), 1e-4, 1e-4)
    else:  # fc1 and fc2 alone do not tell one model from another
        with pytest.raises(CheckpointError, match="in the graph"):
            _adapted(_wrapped(ours), _trained(theirs), tmp_path)


def test_a_dictionary_of_modules_has_no_name_in_scopes_but_in_weights(tmp_path: Path) -> None:
    """TorchScript: node `/inner/fc2/Add`, weight `model.inner.fc2.bias`."""
    base = _wrapped("inner.")
    base.graph.initializer[2].name = base.graph.node[3].input[1] = "model.inner.fc2.bias"
    found = _adapted(base, _trained(""), tmp_path)
    np.testing.assert_allclose(found, lora_on(X, lora()), 1e-4, 1e-4)


def _two_branches() -> onnx.ModelProto:
    """`a.fc2(relu(a.fc1(x))) + b.fc2(relu(b.fc1(x)))`."""
    nodes, stored = [], []
    for branch, (first, second) in {"a": (W1, W2), "b": (W2, W1)}.items():
        for name, value in (("w1", first.T), ("w2", second.T), ("b2", B2)):
            plain = np.ascontiguousarray(value)
            stored.append(numpy_helper.from_array(plain, branch + name))
        nodes += [
            helper.make_node(
                "MatMul", ["x", f"{branch}w1"], [f"{branch}1"], f"/{branch}/fc1/M"
            ),
            helper.make_node("Relu", [f"{branch}1"], [f"{branch}2"], f"/{branch}/act/R"),
            helper.make_node(
                "MatMul", [f"{branch}2", f"{branch}w2"], [f"{branch}3"], f"/{branch}/fc2/M"
            ),
            helper.make_node(
                "Add", [f"{branch}3", f"{branch}b2"], [f"{branch}4"], f"/{branch}/fc2/A"
            ),
        ]
    nodes.append(helper.make_node("Add", ["a4", "b4"], ["y"], "/Add"))
    x, y = (helper.make_tensor_value_info(name, 1, ["n", 4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_modules_that_two_parts_of_the_graph_have_are_refused_with_both(
    tmp_path: Path,
) -> None:
    with pytest.raises(CheckpointError) as caught:
        _adapted(_two_branches(), _trained(""), tmp_path)
    assert "'a.fc1' or 'b.fc1'" in caught.value.message


@pytest.mark.parametrize("branch", ["a", "b"])
def test_a_part_that_the_checkpoint_names_is_the_one(branch: str, tmp_path: Path) -> None:
    found = _adapted(_two_branches(), _trained(f"{branch}."), tmp_path)
    one, other = (W1, W2) if branch == "a" else (W2, W1)
    tensors = lora()
    a, b = ([tensors[f"base_model.model.fc{i}.lora_{p}.weight"] for i in (1, 2)] for p in "AB")
    hidden = np.maximum(X @ (one + 2 * b[0] @ a[0]).T, 0)
    plain = np.maximum(X @ other.T, 0) @ one.T
    expected = hidden @ (other + 2 * b[1] @ a[1]).T + plain + 2 * B2
    np.testing.assert_allclose(found, expected, 1e-4, 1e-4)


BODY = ["layer.0.attention.query", "layer.1.attention.query"]


def _with(prefix: str, *more: str) -> list[str]:
    return [*(prefix + name for name in BODY), *more]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("", "bert."),
        ("bert.", ""),
        ("bert.", "model."),
        ("model.", "inner."),
        ("bert.encoder.", "model.bert.encoder."),
        ("model.encoder.", "model.bert.encoder."),
        ("model.bert.encoder.", "model.encoder."),
    ],
)
def test_all_modules_change_their_prefix_alike(theirs: str, ours: str) -> None:
    graph = _with(ours, f"{ours}other")
    expected = dict(zip(_with(theirs), _with(ours), strict=True))
    assert map_modules(_with(theirs), graph) == expected


@pytest.mark.parametrize(
    ("theirs", "ours", "kind"),
    [
        ("bert.encoder.", "vit.encoder.", ""),
        ("encoder.", "vit.encoder.", "bert"),
        ("encoder.", "decoder.", ""),
        ("text_model.encoder.", "vision_model.encoder.", ""),
        ("h.", "blocks.", ""),
    ],
)
def test_the_same_names_in_another_model_are_not_found(
    theirs: str, ours: str, kind: str
) -> None:
    cut = [name.removeprefix("layer.") for name in BODY] if theirs == "h." else BODY
    found = map_modules([theirs + n for n in cut], [ours + n for n in cut], kind=kind)
    assert found == {}


def test_a_module_missing_from_its_part_is_not_taken_from_another() -> None:
    graph = ["left.layer.0.q", "left.layer.1.q", "right.layer.0.q", "right.layer.2.q"]
    assert map_modules(["left.layer.2.q"], graph) == {}


@pytest.mark.parametrize("graph", [["layers.0.q"], ["model.layers.0.q"], ["inner.q"]])
def test_a_layer_is_not_taken_for_another(graph: list[str]) -> None:
    assert map_modules(["layers.5.q"], graph) == {}


def test_a_head_alone_is_found_inside_a_wrapper() -> None:
    graph = ["inner.model.layers.0.mlp", "inner.lm_head"]
    assert map_modules(["lm_head"], graph) == {"lm_head": "inner.lm_head"}
    assert map_modules(["lm_head", "score"], graph) == {}
