"""Sites in bodies, functions and real models, reasons to refuse, and the `sites` command."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import pytest
from fetch_models import fetch
from sites_models import chosen, every, layers, model, over

import onnx_adapt as oa
from onnx_adapt import Model, find_sites
from onnx_adapt.errors import SiteRefusedError


def produced(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Every tensor that nodes make, at any depth, in no particular order."""
    for node in nodes:
        yield from filter(None, node.output)
        for attribute in node.attribute:
            yield from produced(attribute.g.node)
            for graph in attribute.graphs:
                yield from produced(graph.node)


def assert_each_tensor_has_an_address(made: Model) -> None:
    sites = find_sites(made, all_tensors=True)
    assert sorted(s.tensor for s in sites) == sorted(produced(made.proto.graph.node))
    assert len({s.address for s in sites}) == len(sites)
    for site in sites:
        (choice,) = chosen(made, site.address)
        assert choice.site == site


# Bodies

BRANCHES = """<
  then_branch = t () => (float[B,4] h) {h = MatMul(x, w)},
  else_branch = e () => (float[B,4] k) {k = Relu(x)}>"""


@over(
    "one two",
    """
    other names    | a         | b
    same name      | a         | a
    no name        | none      | none
    like no name   | If#1      | none
    like a body    | a.else_branch:k | a
    """,
)
def test_bodies_have_addresses_of_their_own_whatever_their_nodes_are_called(
    one: str, two: str
) -> None:
    text = f"""g (float[B,4] x, bool c) => (float[B,4] y) {{
      i = If(c) {BRANCHES}
      j = If(c) {BRANCHES}
      y = Add(i, j)
    }}"""
    made = model(text, "w 4 4")
    for node, name in zip(made.proto.graph.node, (one, two), strict=False):
        node.name = name.replace("none", "")
    assert_each_tensor_has_an_address(made)


def test_a_body_inside_a_body_is_not_mistaken_for_a_body_with_its_name() -> None:
    text = f"""g (float[B,4] x, bool c) => (float[B,4] y) {{
      [a] i = If(c) <
        then_branch = t () => (float[B,4] u) {{[b] u = If(c) {BRANCHES}}},
        else_branch = e () => (float[B,4] v) {{v = Relu(x)}}>
      ["a.then_branch/b"] j = If(c) {BRANCHES}
      y = Add(i, j)
    }}"""
    assert_each_tensor_has_an_address(model(text, "w 4 4"))


def test_loops_and_scans_have_sites_inside() -> None:
    text = """g (float[B,4] x, int64 n, bool c) => (float[B,4] y, float[S,4] z) {
      [loop] y = Loop(n, c, x) <body = l (int64 i, bool g, float[B,4] s)
        => (bool g2, float[B,4] h) {g2 = Identity(g) h = MatMul(s, w)}>
      [scan] z = Scan<num_scan_inputs=1, body = k (float[4] r) => (float[4] h)
        {h = Gelu(r)}>(x)
    }"""
    made = model(text, "w 4 4", opset=20, ir=9)
    assert {s.address: s.refused for s in find_sites(made, all_tensors=True)} == {
        "main/loop.body:h": None,
        "main/scan.body:h": None,
        "main:y": None,
        "main:z": None,
    }


# Refused, with the reason


def test_a_tensor_that_reaches_no_output_is_dead() -> None:
    text = """g (float[B,4] x) => (float[B,4] y, int64[N] n) {
      used = MatMul(x, w)
      y = Relu(used)
      unused = MatMul(x, w)
      also = Relu(unused)
      measured = MatMul(x, w)
      n = Shape(measured)
    }"""
    made = every(model(text, "w 4 4"))
    dead = {name for name, site in made.items() if site.refused}
    assert dead == {"unused", "also", "measured"}
    assert all(str(made[name].refused).startswith("dead") for name in dead)


LAST_STATE = """g (float[{size},B,4] x, int64[1] given) => (float[C,B,4] y)
    <int64[1] last = {{-1}}, int64[1] zero = {{0}}, int64[2] ends = {{0, -1}}> {{
      first = MatMul(x, w)
      second = MatMul(x, w)
      both = Concat<axis = 0>(first, second)
      y = Gather<axis = 0>(both, {which})
      {more}
    }}"""


@over(
    "size which more alive",
    """
    the last          | 1 | last  |                          | second
    the first         | 1 | zero  |                          | first
    one of four       | 2 | last  |                          | second
    both              | 1 | ends  |                          | first second
    not known which   | 1 | given |                          | first second
    sizes not known   | N | last  |                          | first second
    two readers       | 1 | last  | z = Gather(both, zero)   | first second
    another reader    | 1 | last  | z = Relu(both)           | first second
    """,
)
def test_a_part_of_a_concat_that_no_gather_picks_is_dead(
    size: str, which: str, more: str, alive: str
) -> None:
    # PyTorch's `h_n[-1]`: the states of the layers before the last are not read.
    text = LAST_STATE.format(size=size, which=which, more=more)
    made = every(model(text, "w 4 4"))
    states = {name for name in ("first", "second") if made[name].refused is None}
    assert states == set(alive.split())


def test_a_tensor_that_only_a_body_reads_is_alive() -> None:
    text = f"""g (float[B,4] a, bool c) => (float[B,4] y) {{
      x = MatMul(a, w)
      y = If(c) {BRANCHES}
    }}"""
    made = model(text, "w 4 4")
    for attribute in made.proto.graph.node[1].attribute:
        known = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["B", 4])
        attribute.g.value_info.append(known)
    assert layers(made)["x"].refused is None


@over(
    "body tensor reason",
    """
    unknown width | t = Transpose(x)                             | t | unknown width
    scalar        | t = ReduceSum<keepdims=0>(x)                 | t | scalar
    constant      | t = Transpose(w)                             | t | constant
    sequence      | q = SequenceConstruct(x) t = ConcatFromSequence<axis=0>(q) | q | no tensor
    optional      | q = Optional(x) t = OptionalGetElement(q)    | q | no tensor
    """,
)
def test_a_tensor_that_cannot_take_an_adapter_says_why(
    body: str, tensor: str, reason: str
) -> None:
    text = f"g (float[B,4] x) => (float[D] out) {{{body} out = com.microsoft.Gelu(t)}}"
    made = model(text, "w 4 6")
    assert reason in str(every(made)[tensor].refused)
    with pytest.raises(SiteRefusedError, match=reason):
        chosen(made, tensor)


def test_integers_and_inputs_and_weights_are_not_listed() -> None:
    text = """g (float[B,4] x, float[4,6] w) => (float[B,6] y, int64[2] n) {
      y = MatMul(x, w)
      n = Shape(y)
    }"""
    assert list(every(model(text, "w 4 6"))) == ["y"]


FUNCTIONS = """g (float[B,4] x) => (float[B,4] y) {[call] y = local.Layer(x, w)}
<domain: "local", opset_import: ["": 17]>
Layer (a, v) => (b) {
  [inner] h = MatMul(a, v)
  [drop] d, m = Dropout(h)
  c = Constant<value = bool {1}>()
  [cond] b = If(c) <then_branch = t () => (p) {[deep] p = Relu(d)},
                    else_branch = e () => (q) {q = Tanh(d)}>
}"""


def test_a_layer_inside_a_function_is_refused_as_such() -> None:
    (site,) = find_sites(model(FUNCTIONS, "w 4 4"))
    assert (site.node, site.op) == ("inner", "MatMul")
    assert site.refused == "inside the model-local function local::Layer"


@pytest.mark.parametrize("name", ["inner", "h", "drop", "deep", "p"])
def test_a_target_inside_a_function_is_an_error_that_offers_to_inline(name: str) -> None:
    with pytest.raises(SiteRefusedError, match="function local::Layer") as caught:
        chosen(model(FUNCTIONS, "w 4 4"), name)
    assert "--inline-functions" in caught.value.hint


def test_tensors_in_functions_have_addresses_of_their_own() -> None:
    made = model(FUNCTIONS, "w 4 4")
    made.proto.functions[0].node[1].output[1] = ""
    made.proto.functions[0].node[2].output.append("")
    addresses = [site.address for site in find_sites(made, all_tensors=True)]
    assert len(set(addresses)) == len(addresses)
    assert not [address for address in addresses if address.endswith(":")]


def test_the_call_of_a_function_is_a_site() -> None:
    site = every(model(FUNCTIONS, "w 4 4"))["y"]
    assert (site.node, site.width, site.refused) == ("call", 4, None)


# Real models

REAL = """
dnsmos-p808        mos_estimator_small_1/dense_3/MatMul_add  64 float32 -1
dnsmos-p808        mos_estimator_small_1/dense_4/MatMul_add  64 float32 -1
dnsmos-p808        conv2d_5           32 float32 1
dnsmos-p808        conv2d_6           32 float32 1
dnsmos-p808        conv2d_7           32 float32 1
dnsmos-p808        conv2d_8           32 float32 1
dnsmos-p808        conv2d_9           64 float32 1
silero-vad-ifless  node_linear        512 float32 -1
silero-vad-ifless  node_linear_1      512 float32 -1
silero-vad-ifless  node_linear_2      512 float32 -1
silero-vad-ifless  node_linear_1_2    512 float32 -1
smart-turn         node_linear_1      384 float32 -1
smart-turn         node_MatMul_16     384 float32 -1
smart-turn         node_MatMul_74     384 float32 -1
smart-turn         node_MatMul_85     384 float32 -1
smart-turn         node_MatMul_76     1536 float32 -1
plcmos             Gemm_48            128 float32 -1
plcmos             Gemm_50            128 float32 -1
plcmos             Gemm_52            128 float32 -1
plcmos             Gemm_54            128 float32 -1
plcmos             Gemm_56            128 float32 -1
plcmos             Gemm_58            64 float32 -1
plcmos             GRU_34             32 float32 -1
"""
ENCODER = "/model/model.0/auto_model/encoder/layer"


@pytest.mark.parametrize("line", REAL.strip().splitlines())
def test_the_layers_of_real_models_are_sites(line: str) -> None:
    name, node, width, dtype, axis = line.split()
    (choice,) = chosen(oa.open_model(fetch(name)), node)
    site = choice.site
    assert (site.width, site.dtype, site.axis) == (int(width), dtype, int(axis))
    assert site.layer


@pytest.mark.parametrize(
    ("name", "dtype"), [("minilm-l3", "float32"), ("minilm-l3-fp16", "float16")]
)
def test_the_layers_of_a_real_encoder_are_sites(name: str, dtype: str) -> None:
    sites = {site.node: site for site in find_sites(oa.open_model(fetch(name)))}
    for i in range(3):
        for module, width in (
            ("attention/output/dense", 384),
            ("output/dense", 384),
            ("intermediate/dense", 1536),
        ):
            site = sites[f"{ENCODER}.{i}/{module}/MatMul"]
            assert (site.width, site.dtype, site.refused) == (width, dtype, None)
            assert site.tensor == f"{ENCODER}.{i}/{module}/Add_output_0"
            assert site.module == f"{ENCODER[7:]}.{i}/{module}".replace("/", ".")


def test_attention_scores_are_refused_because_no_axis_has_features() -> None:
    made = oa.open_model(fetch("minilm-l3"))
    with pytest.raises(SiteRefusedError, match="sums over its features"):
        chosen(made, f"{ENCODER}.0/attention/self/MatMul")


def test_the_sites_of_silero_are_in_the_branches() -> None:
    sites = find_sites(oa.open_model(fetch("silero-vad-ifless")))
    branches = ["main/node_cond__1.then_branch", "main/node_cond__1.else_branch"]
    assert [[s.graph for s in sites].count(branch) for branch in branches] == [8, 8]
    assert len(sites) == 16


def test_the_unused_output_of_a_gru_is_refused_and_the_other_named() -> None:
    made = oa.open_model(fetch("plcmos"))
    with pytest.raises(SiteRefusedError, match="dead") as caught:
        chosen(made, "GRU_42")
    assert "main:onnx::Concat_332" in caught.value.hint


# The command

PROGRAM = Path(sys.executable).with_name("onnx-adapt")
KEYS = ["address", "node", "op", "tensor", "module", "width", "dtype", "axis", "refused"]


def sites(
    *arguments: str | Path, command: str = "sites", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, command, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env=os.environ | environment,
    )


def test_the_json_is_one_document_with_nine_keys_a_site() -> None:
    done = sites(fetch("dnsmos-p808"), "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, list(document)) == (0, ["sites"])
    assert [list(site) for site in document["sites"]] == [KEYS] * 8
    assert document["sites"][0] == {
        "address": "main:convolution_output4",
        "node": "conv2d_5",
        "op": "Conv",
        "tensor": "convolution_output4",
        "module": None,
        "width": 32,
        "dtype": "float32",
        "axis": 1,
        "refused": None,
    }


def test_the_json_tells_modules_reasons_and_unknown_widths() -> None:
    export = Path(__file__).parent.parent / "exports" / "bert_torchscript.onnx"
    done = sites(export, "--json", "--all")
    shown = json.loads(done.stdout)["sites"]
    assert len({site["address"] for site in shown}) == len(shown)
    by_node = {site["node"]: site for site in shown}
    assert by_node["/bert/pooler/dense/Gemm"]["module"] == "bert.pooler.dense"
    scores = by_node["/bert/encoder/layer.0/attention/self/MatMul"]
    assert scores["width"] is None
    assert "sums over its features" in scores["refused"]


def test_an_address_from_the_json_is_what_after_takes(tmp_path: Path) -> None:
    base, adapted = fetch("silero-vad-ifless"), tmp_path / "adapted.onnx"
    (site,) = json.loads(sites(base, "linear_1_2", "--json").stdout)["sites"]
    assert site["address"] == "main/node_cond__1.else_branch:linear_1_2"
    options = ["--after", site["address"], "-o", adapted, "--no-verify"]
    assert sites(base, *options, command="insert").returncode == 0
    (slot,) = oa.list_slots(oa.open_model(adapted))
    assert (slot.graph, slot.tensor, slot.width) == (
        "main/node_cond__1.else_branch",
        "linear_1_2",
        512,
    )


def test_a_pattern_that_matches_nothing_is_an_error_for_people_and_machines() -> None:
    done = sites(fetch("dnsmos-p808"), "dense_33", "--json")
    assert done.returncode == 2
    told = json.loads(done.stdout)["error"]
    error, hint = done.stderr.splitlines()
    assert (error, hint) == (f"error: {told['message']}", f"hint: {told['hint']}")
    assert error.startswith("error: ")
    assert "'dense_33'" in error
    assert hint.startswith("hint: nearest: ")
    assert "dense_3/" in hint


def test_a_model_without_sites_has_an_empty_list(tmp_path: Path) -> None:
    made = model("g (float[B,4] x) => (float[B,4] y) {y = Relu(x)}")
    onnx.save(made.proto, tmp_path / "model.onnx")
    done = sites(tmp_path / "model.onnx", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"sites": []})


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_table_has_one_line_a_site_whatever_its_name(
    encoding: str, tmp_path: Path
) -> None:
    made = model("g (float[B,4] x) => (float[B,4] y) {y = MatMul(x, w)}", "w 4 4")
    name = "größe\n\x1b[31m" + "n" * 300
    made.proto.graph.node[0].name = name
    onnx.save(made.proto, tmp_path / "model.onnx")
    done = sites(tmp_path / "model.onnx", PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    assert header.split() == ["address", "node", "op", "width", "dtype", "axis"]
    assert row.startswith("main:y ")
    assert "n" * 300 in row
    assert "\x1b" not in done.stdout + done.stderr
    done = sites(tmp_path / "model.onnx", "--json", PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout)["sites"][0]["node"] == name


def test_a_name_that_is_no_text_is_no_traceback(tmp_path: Path) -> None:
    made = model("g (float[B,4] x) => (float[B,4] y) {[ZZ] y = MatMul(x, w)}", "w 4 4")
    damaged = made.proto.SerializeToString().replace(b"ZZ", b"\xff\xfe")
    (tmp_path / "model.onnx").write_bytes(damaged)
    done = sites(tmp_path / "model.onnx", "--json")
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)
