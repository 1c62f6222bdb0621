"""PyTorch module paths, against what PyTorch computed inside the exported models."""

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from sites_models import chosen, meant, model, over, scoped

import onnx_adapt as oa
from onnx_adapt import Model, Site
from onnx_adapt.edit.insert import all_places
from onnx_adapt.errors import AmbiguousSiteError, SiteNotFoundError, SiteRefusedError
from onnx_adapt.graph.resolve import resolve, resolve_tensor
from onnx_adapt.graph.sites import Survey, survey_model

FOLDER = Path(__file__).parent.parent / "exports"
ARCHITECTURES = ["bert", "gpt2", "llama", "vit", "repeated"]
EXPORTS = [f"{a}_{e}" for a in ARCHITECTURES for e in ("dynamo", "torchscript")]
TWICE = "shared"
FUSED = {  # modules that the exporters fuse into the Conv before or the BatchNorm behind
    "repeated_dynamo": {"features.0", "features.3"},
    "repeated_torchscript": {"features.0", "features.1", "features.3", "features.4"},
}


@cache
def opened(export: str) -> Model:
    return oa.open_model(FOLDER / f"{export}.onnx")


@cache
def surveyed(export: str) -> Survey:
    return survey_model(opened(export))


@cache
def recorded(export: str) -> dict[str, np.ndarray]:
    """What PyTorch computed: by module path, and the graph's inputs by `input.<name>`."""
    with np.load(FOLDER / f"{export}.npz") as arrays:
        return {name.removeprefix("module."): arrays[name] for name in arrays.files}


def modules_of(export: str) -> list[str]:
    """The recorded modules that run once and exist in the graph."""
    names = [name for name in recorded(export) if not name.startswith(("input.", "output."))]
    missing = FUSED.get(export, set())
    return [name for name in names if "#" not in name and name not in missing]


def run(export: str, tensors: set[str]) -> dict[str, np.ndarray]:
    """The values of tensors inside the exported model, computed by ONNX Runtime."""
    proto = onnx.load(FOLDER / f"{export}.onnx")
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(tensor) for tensor in tensors - known
    )
    session = ort.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {i.name: recorded(export)[f"input.{i.name}"] for i in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def site_of(export: str, path: str) -> Site:
    return resolve_tensor(surveyed(export), path)


@pytest.mark.parametrize("export", EXPORTS)
def test_a_module_is_the_tensor_that_pytorch_computed(export: str) -> None:
    paths = modules_of(export)
    assert len(paths) >= 10
    sites = {path: site_of(export, path) for path in paths}
    values = run(export, {site.tensor for site in sites.values()})
    wrong = {}
    for path, site in sites.items():
        expected, found = recorded(export)[path], values[site.tensor]
        same_width = found.shape[site.axis] == expected.shape[site.axis]
        if not same_width or found.size != expected.size:
            wrong[path] = f"{site.tensor} has shape {found.shape}, not {expected.shape}"
        elif np.abs(found.reshape(expected.shape) - expected).max() > 1e-4:
            wrong[path] = f"{site.tensor} has other values"
    assert wrong == {}


@pytest.mark.parametrize("export", EXPORTS)
def test_every_module_can_take_an_adapter_of_its_width(export: str) -> None:
    refused = {}
    for path in modules_of(export):
        site = site_of(export, path)
        expected = recorded(export)[path].shape[site.axis]
        if site.refused is not None or site.width != expected:
            refused[path] = f"width {site.width}, not {expected}: {site.refused}"
    assert refused == {}


@pytest.mark.parametrize("export", EXPORTS)
def test_a_path_may_have_other_prefixes_than_the_export(export: str) -> None:
    for path in modules_of(export):
        site = site_of(export, path)
        assert site_of(export, f"base_model.model.{path}") == site
        assert site_of(export, f"outer.wrapper.{path}") == site
        if path.count(".") >= 3:
            assert site_of(export, path.partition(".")[2]) == site


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_exporters_give_slots_the_same_names(architecture: str) -> None:
    names = []
    for exporter in ("dynamo", "torchscript"):
        export = f"{architecture}_{exporter}"
        usable = [p for p in modules_of(export) if site_of(export, p).refused is None]
        choices = [(path, resolve(surveyed(export), [path]).choices[0]) for path in usable]
        names.append({p.removeprefix("inner."): choice.name for p, choice in choices})
    shared = names[0].keys() & names[1].keys()
    assert len(shared) >= 10
    for path in shared:
        assert names[0][path] == names[1][path].removeprefix("inner.") == path


@pytest.mark.parametrize("export", ["bert_dynamo", "bert_torchscript"])
def test_a_layer_has_one_slot_name_however_it_is_called(export: str) -> None:
    path = "bert.encoder.layer.0.output.dense"
    (choice,) = chosen(opened(export), path)
    site = choice.site
    adding = [n.name for n in opened(export).proto.graph.node if site.tensor in n.output]
    assert adding != [site.node]
    for name in (site.address, site.node, site.tensor, *adding, f"{path[:-4]}*"):
        assert [(c.name, c.site) for c in chosen(opened(export), name)] == [(path, site)]


@pytest.mark.parametrize("export", EXPORTS)
def test_slots_change_neither_the_sites_nor_what_paths_mean(export: str) -> None:
    adapted = survey_model(oa.insert(oa.insert(opened(export), after="**"), after="**"))
    assert [s.as_dict() for s in adapted.sites] == [
        s.as_dict() for s in surveyed(export).sites
    ]
    for path in modules_of(export):
        found = resolve_tensor(adapted, path)
        assert found.as_dict() == site_of(export, path).as_dict()


# Modules that run twice


def _places(made: Model, *names: str) -> list[list[str]]:
    """The tensors of all places of each choice."""
    choices = resolve(survey_model(made), names).choices
    return [[site.tensor for site in (c.site, *c.further)] for c in choices]


@pytest.mark.parametrize("export", ["repeated_dynamo", "repeated_torchscript"])
def test_a_module_that_runs_twice_is_one_choice_with_both_calls(export: str) -> None:
    (tensors,) = _places(opened(export), TWICE)
    values = run(export, set(tensors))
    for i, tensor in enumerate(tensors):
        expected = recorded(export)[f"{TWICE}#{i}"]
        assert np.abs(values[tensor] - expected).max() < 1e-4


def test_both_exporters_give_the_calls_of_a_module_the_same_slot_names() -> None:
    names = []
    for exporter in ("dynamo", "torchscript"):
        base = opened(f"repeated_{exporter}")
        for after in (TWICE, [f"main:{tensor}" for tensor in _places(base, TWICE)[0]]):
            adapted = oa.insert(base, after=after)
            names.append([slot.name for slot in all_places(adapted)])
    assert names[:2] == names[2:] == [["shared", "shared@2"], ["shared", "shared.2"]]


# What both exporters write of a block, and of an activation, that run twice.
TORCHSCRIPT = """g (float[B,4] x) => (float[B,4] y) {
  ["/block/fc/MatMul"] a = MatMul(x, w)
  ["/block/Relu"] b = Relu(a)
  ["/block/fc_1/MatMul"] c = MatMul(b, w)
  ["/block_1/Relu"] d = Relu(c)
  ["/act/Relu"] e = Relu(d)
  ["/head/MatMul"] f = MatMul(e, v)
  ["/act_1/Relu"] y = Relu(f)
}"""
DYNAMO = dict.fromkeys("ac", "block.fc") | dict.fromkeys("bd", "block") | {"f": "head"}


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("path", ["block.fc", "block", "act"])
def test_all_calls_of_a_module_that_runs_twice_are_found(exporter: str, path: str) -> None:
    made = model(TORCHSCRIPT, "w 4 4", "v 4 4")
    if exporter == "dynamo":
        for node in made.proto.graph.node:
            node.name = f"node_{node.output[0]}"
        made = scoped(made, DYNAMO | dict.fromkeys("ey", "act"))
    ends = {"block.fc": ["a", "c"], "block": ["b", "d"], "act": ["e", "y"]}
    assert _places(made, path) == [ends[path]]


def _copied(made: Model, name: str, readers: list[str], change: float = 0) -> Model:
    """A weight copied for some of its readers, as simplifiers fold a shared one."""
    (stored,) = [t for t in made.proto.graph.initializer if t.name == name]
    value = onnx.numpy_helper.to_array(stored) + np.float32(change)
    made.proto.graph.initializer.append(onnx.numpy_helper.from_array(value, f"{name}.copy"))
    for node in made.proto.graph.node:
        if node.name in readers:
            node.input[1] = f"{name}.copy"
    return made


@pytest.mark.parametrize("path", ["block.fc", "block"])
def test_calls_with_equal_copies_of_a_weight_are_calls_of_one_module(path: str) -> None:
    made = _copied(model(TORCHSCRIPT, "w 4 4", "v 4 4"), "w", ["/block/fc_1/MatMul"])
    assert len(_places(made, path)[0]) == 2


def test_large_copies_on_disk_are_compared_to_their_end(tmp_path: Path) -> None:
    text = """g (float[B,64] x) => (float[B,64] y) {
      ["/fc/MatMul"] a = MatMul(x, w)
      ["/fc_1/MatMul"] y = MatMul(a, w)
    }"""
    made = _copied(model(text, "w 64 64"), "w", ["/fc_1/MatMul"])
    onnx.save(made.proto, tmp_path / "equal.onnx")
    assert _places(oa.open_model(tmp_path / "equal.onnx"), "fc") == [["a", "y"]]
    copy = made.proto.graph.initializer[1]
    copy.raw_data = copy.raw_data[:-1] + bytes([copy.raw_data[-1] ^ 1])
    onnx.save(made.proto, tmp_path / "other.onnx")
    assert meant(oa.open_model(tmp_path / "other.onnx"), "fc", "fc_1") == ["a", "y"]


def test_modules_called_alike_are_not_calls_of_one_module() -> None:
    text = """g (float[B,4] x) => (float[B,4] y) {
      ["/layer/MatMul"] a = MatMul(x, w)
      ["/layer_1/MatMul"] y = MatMul(a, w)
    }"""
    made = _copied(model(text, "w 4 4"), "w", ["/layer_1/MatMul"], change=1)
    assert meant(made, "layer", "layer_1") == ["a", "y"]


def test_two_weights_in_nameless_constants_are_not_one_module_run_twice() -> None:
    text = """g (float[B,2] x) => (float[B,2] y) {
      w = Constant<value = float[2,2] {1, 2, 3, 4}>()
      v = Constant<value = float[2,2] {5, 6, 7, 8}>()
      ["/attention/MatMul"] a = MatMul(x, w)
      ["/attention/MatMul_1"] b = MatMul(a, v)
      ["/Relu"] y = Relu(b)
    }"""
    assert meant(model(text), "attention") == ["b"]


def test_a_module_in_both_branches_is_one_choice_with_both_places() -> None:
    text = """g (float[B,4] x, bool c) => (float[B,4] y) {
      [i] y = If(c) <then_branch = t () => (float[B,4] p) {["/fc/MatMul"] p = MatMul(x, w)},
                     else_branch = e () => (float[B,4] q) {["/fc/MatMul"] q = MatMul(x, w)}>
    }"""
    assert _places(model(text, "w 4 4"), "fc") == [["p", "q"]]


# Fusion


@pytest.mark.parametrize("path", ["features.0", "features.3"])
def test_a_conv_that_torchscript_fused_names_the_node_that_is_there(path: str) -> None:
    with pytest.raises(SiteRefusedError, match="fused") as caught:
        chosen(opened("repeated_torchscript"), path)
    assert f"--after /features/{path}/Conv" in caught.value.hint
    (tensor,) = meant(opened("repeated_torchscript"), f"/features/{path}/Conv")
    both = recorded("repeated_torchscript")[path.replace("0", "1").replace("3", "4")]
    assert np.abs(run("repeated_torchscript", {tensor})[tensor] - both).max() < 1e-4


@over(
    "export path near",
    """
    dynamo      | repeated_dynamo      | features.0 | features.1
    torchscript | repeated_torchscript | features.1 | features.0
    """,
)
def test_a_module_that_was_fused_away_is_not_found_and_its_neighbour_is_named(
    export: str, path: str, near: str
) -> None:
    with pytest.raises(SiteNotFoundError, match=path) as caught:
        chosen(opened(export), path)
    assert near in caught.value.hint.removeprefix("nearest: ").split(", ")


# Where the path is written


def test_the_namespace_is_enough() -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(opened("bert_dynamo").proto)
    for node in proto.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == "namespace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    bare = survey_model(Model(proto, opened("bert_dynamo").payloads))
    for path in modules_of("bert_dynamo"):
        assert resolve_tensor(bare, path) == site_of("bert_dynamo", path)


@over(
    "name path",
    """
    list       | /bert/encoder/layer.0/query/MatMul | bert.encoder.layer.0.query
    sequential | /layer1/layer1.0/conv1/MatMul      | layer1.0.conv1
    deeper     | /a/a.0/a.0.1/MatMul                | a.0.1
    list in list | /blocks.0/blocks.0.1/MatMul      | blocks.0.1
    wrapped    | /model/model.0/auto_model/fc/MatMul | model.0.auto_model.fc
    alike      | /conv/conv1/MatMul                 | conv.conv1
    same name  | /fc/fc/MatMul                      | fc.fc
    """,
)
def test_the_node_name_tells_the_module(name: str, path: str) -> None:
    text = f'g (float[B,4] x) => (float[B,4] y) {{["{name}"] h = MatMul(x, w) y = Relu(h)}}'
    (choice,) = chosen(model(text, "w 4 4"), path)
    assert (choice.site.tensor, choice.site.module, choice.name) == ("h", path, path)


@pytest.mark.parametrize("name", ["MatMul", "/MatMul", "a/b/MatMul", "", "node_linear"])
def test_a_node_without_a_trace_has_no_module(name: str) -> None:
    made = model("g (float[B,4] x) => (float[B,4] y) {y = MatMul(x, w)}", "w 4 4")
    made.proto.graph.node[0].name = name
    (site,) = oa.find_sites(made)
    assert not site.module


@pytest.mark.parametrize(
    "value", ["", "nonsense(", "['']", "['', 3, 'y']", "{'a': 1}", "['a'" + "[" * 500, "fc"]
)
def test_metadata_that_is_no_list_of_scopes_is_passed_over(value: str) -> None:
    text = 'g (float[B,4] x) => (float[B,4] y) {["/fc/MatMul"] y = MatMul(x, w)}'
    made = model(text, "w 4 4")
    for key in ("pkg.torch.onnx.name_scopes", "namespace"):
        entry = made.proto.graph.node[0].metadata_props.add()
        entry.key, entry.value = key, value
    assert meant(made, "fc") == ["y"]


# Which modules a path means


def test_a_path_that_ends_several_modules_is_an_error_that_lists_them() -> None:
    with pytest.raises(AmbiguousSiteError) as caught:
        chosen(opened("bert_dynamo"), "output.dense")
    expected = [
        f"bert.encoder.layer.{i}.{path}"
        for i, path in itertools.product((0, 1), ("output.dense", "attention.output.dense"))
    ]
    for tensor in meant(opened("bert_dynamo"), *expected):
        assert f"main:{tensor}" in caught.value.message


def test_a_wrapper_with_the_name_of_a_child_does_not_hide_the_child() -> None:
    text = """g (float[B,4] x) => (float[B,4] y) {
      ["/model/model/fc/MatMul"] h = MatMul(x, w)
      ["/model/head/MatMul"] y = MatMul(h, w)
    }"""
    made = model(text, "w 4 4")
    assert meant(made, "model.fc", "model.model.fc", "model.head") == ["h", "h", "y"]


def test_a_node_without_a_trace_inside_a_module_belongs_to_it() -> None:
    text = """g (float[B,4] x) => (float[B,4] y) {
      ["/block/fc/MatMul"] a = MatMul(x, w)
      [rewritten] b = Gelu(a)
      ["/block/Relu"] c = Relu(b)
      ["/head/MatMul"] y = MatMul(c, w)
    }"""
    made = model(text, "w 4 4", opset=20, ir=9)
    assert meant(made, "block", "block.fc") == ["c", "a"]
