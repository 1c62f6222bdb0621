"""From what a user writes to sites."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from sites_models import chosen, meant, model, over, scoped

import onnx_adapt as oa
from onnx_adapt import Model, find_sites
from onnx_adapt.errors import AmbiguousSiteError, SiteNotFoundError, SiteRefusedError
from onnx_adapt.graph.resolve import resolve, resolve_tensor
from onnx_adapt.graph.sites import survey_model

DENSE = """g (float[B,4] x) => (float[B,4] y) {
  [mul] h = MatMul(x, w)
  [add] b = Add(h, c)
  [act] y = Relu(b)
}"""
WEIGHTS = ("w 4 4", "c 4")

# The order of look-up


def named_alike() -> Model:
    """Node `name` makes `a`, node `B` makes tensor `name`, module `name` gives `c`."""
    text = """g (float[B,4] x) => (float[B,4] y) {
      [name] a = Relu(x)
      [B] name = Relu(a)
      [C] c = Relu(name)
      [D] y = Relu(c)
    }"""
    return scoped(model(text), {"c": "name", "y": "other"})


def test_a_node_comes_before_a_tensor_and_a_tensor_before_a_module() -> None:
    made = named_alike()
    assert meant(made, "name") == ["a"]
    made.proto.graph.node[0].name = "A"
    assert meant(made, "name") == ["name"]
    made.proto.graph.node[1].output[0] = made.proto.graph.node[2].input[0] = "b"
    assert meant(made, "name") == ["c"]


def test_an_address_comes_before_a_node() -> None:
    made = model(DENSE, *WEIGHTS)
    made.proto.graph.node[2].name = "main:b"
    assert meant(made, "main:b") == ["b"]


@pytest.mark.parametrize("name", ["a*", "*", "**", "?", "x?"])
def test_a_name_comes_before_the_glob_it_looks_like(name: str) -> None:
    text = "g (float[B,4] x) => (float[B,4] y) {a = Relu(x) ax = Relu(a) y = Relu(ax)}"
    made = model(text)
    made.proto.graph.node[1].name = name
    assert meant(made, name) == ["ax"]


# Names of layers and their parts


@over(
    "name tensor",
    """
    node of the weight | mul    | b
    node of the bias   | add    | b
    tensor with bias   | b      | b
    raw tensor         | h      | h
    raw address        | main:h | h
    no layer           | act    | y
    """,
)
def test_a_layer_is_named_by_its_nodes_and_its_raw_output_by_its_tensor(
    name: str, tensor: str
) -> None:
    assert meant(model(DENSE, *WEIGHTS), name) == [tensor]


def test_the_raw_output_of_a_layer_can_take_an_adapter_of_its_own() -> None:
    made = model(DENSE, *WEIGHTS)
    base = [site.address for site in find_sites(made)]
    adapted = oa.insert(made, after=["h", "b"])
    assert [slot.tensor for slot in oa.list_slots(adapted)] == ["h", "b"]
    assert base == ["main:b"]


def test_one_site_named_twice_is_chosen_twice_and_a_glob_adds_nothing_to_it() -> None:
    made = model(DENSE, *WEIGHTS)
    assert meant(made, "mul", "add") == ["b", "b"]
    assert meant(made, "mul", "m*l") == ["b"]
    assert meant(made, "m*l", "mu*") == ["b"]
    assert len({slot.name for slot in oa.list_slots(oa.insert(made, after=["mul", "b"]))}) == 2


def test_sites_come_in_the_order_they_were_named_and_globs_last() -> None:
    text = (
        "g (float[B,4] x) => (float[B,4] c) {[A] a = Relu(x) [B] b = Relu(a) [C] c = Relu(b)}"
    )
    made = model(text)
    assert meant(made, "?", "C", "B") == ["c", "b", "a"]


def test_a_site_with_slots_is_found_by_its_old_names() -> None:
    adapted = oa.insert(model(DENSE, *WEIGHTS), after="mul")
    for name in ("mul", "add", "b", "main:b"):
        assert meant(adapted, name) == ["b"]
    assert [site.address for site in find_sites(adapted)] == ["main:b"]


# Nodes with several outputs


@over(
    "body name tensor",
    """
    first output  | [n] a, b = Split<axis=1>(x) y = Add(a, b)                  | n | a
    second output | [n] a, b = Split<axis=1>(x) y = Add(a, b)                  | b | b
    no first      | [n] "", a = GRU<hidden_size=2>(t, w, r) y = Squeeze(a, k)  | n | a
    """,
)
def test_a_node_means_its_first_output(body: str, name: str, tensor: str) -> None:
    text = f"""g (float[B,4] x) => (float[B,2] y) {{
      k = Constant<value = int64[1] {{0}}>()
      t = Unsqueeze(x, k)
      {body}
    }}"""
    assert meant(model(text, "w 1 6 4", "r 1 6 2"), name) == [tensor]


def test_a_dead_first_output_is_refused_and_the_living_one_named() -> None:
    text = "g (float[S,B,2] x) => (float[1,B,3] h) {[gru] y, h = GRU<hidden_size=3>(x, w, r)}"
    made = model(text, "w 1 9 2", "r 1 9 3")
    with pytest.raises(SiteRefusedError, match=r"'y'.*dead") as caught:
        chosen(made, "gru")
    assert "--after 'main:h'" in caught.value.hint
    assert meant(made, "g*") == ["h"]


def test_a_dead_first_output_of_any_operator_names_the_living_one() -> None:
    text = "g (float[B,4] x) => (float[B,2] y) {[cut] a, b = Split<axis=1>(x) y = Relu(b)}"
    with pytest.raises(SiteRefusedError, match="dead") as caught:
        chosen(model(text), "cut")
    assert "main:b" in caught.value.hint


def test_an_integer_target_is_refused_and_the_float_tensor_named() -> None:
    text = """g (float[B,4] x) => (float[B,4] y) {
      q, s, z = DynamicQuantizeLinear(x)
      [int] h = MatMulInteger(q, w, z)
      f = Cast<to=1>(h)
      y = Mul(f, s)
    }"""
    with pytest.raises(SiteRefusedError, match=r"int32.*'y'"):
        chosen(model(text, "w 4 4 int8"), "int")


# Ambiguous names


def test_nodes_of_one_name_are_an_error_that_lists_their_addresses() -> None:
    text = "g (float[B,4] x) => (float[B,4] y) {[n] a = Relu(x) [n] b = Relu(a) y = Relu(b)}"
    with pytest.raises(AmbiguousSiteError, match=r"'n' means 2 .*main:a, main:b") as caught:
        chosen(model(text), "n")
    assert "address" in caught.value.hint


BODIES = """g (float[B,4] x, bool c) => (float[B,4] y) {
  [i] y = If(c) <then_branch = t () => (float[B,4] h) {[fc] h = MatMul(x, w)},
                 else_branch = e () => (float[B,4] h) {[fc] h = MatMul(x, w)}>
}"""


@pytest.mark.parametrize("name", ["fc", "h"])
def test_a_name_in_two_bodies_is_an_error_and_an_address_is_not(name: str) -> None:
    made = model(BODIES, "w 4 4")
    places = ["main/i.then_branch:h", "main/i.else_branch:h"]
    with pytest.raises(AmbiguousSiteError) as caught:
        chosen(made, name)
    assert all(place in caught.value.message for place in places)
    assert [choice.site.address for choice in chosen(made, *places)] == places
    assert len(chosen(made, "f*")) == 2


# Globs


TREE = """g (float[B,4] x) => (float[B,4] d) {
  ["/enc/layer.0/dense"] a = MatMul(x, w)
  ["/enc/layer.1/dense"] b = MatMul(a, w)
  ["/enc/layer.0/out/dense"] c = MatMul(b, w)
  ["/head"] d = MatMul(c, w)
}"""


@over(
    "pattern tensors",
    """
    one part             | /enc/*/dense         | a b
    within a part        | /enc/layer.*/dense   | a b
    one character        | /enc/layer.?/dense   | a b
    any depth            | /enc/**              | a b c
    any depth, one end   | /enc/**/dense        | a b c
    from anywhere        | **dense              | a b c
    one part at the top  | /*                   | d
    by address           | main:*               | a b c d
    number of modules    | layer.*.dense        | a b
    whole module path    | bert.layer.*.dense   | a b
    modules at any depth | layer.**.dense       | a b c
    """,
)
def test_one_star_stays_within_a_part_of_a_path_and_two_do_not(
    pattern: str, tensors: str
) -> None:
    scopes = {
        "a": "bert.layer.0.dense",
        "b": "bert.layer.1.dense",
        "c": "bert.layer.0.out.dense",
    }
    assert meant(scoped(model(TREE, "w 4 4"), scopes), pattern) == tensors.split()


@pytest.mark.parametrize("pattern", ["/enc/*", "[ab]*", "dense?", "*.foo"])
def test_a_glob_that_matches_no_whole_name_is_not_found(pattern: str) -> None:
    with pytest.raises(SiteNotFoundError, match="matches") as caught:
        chosen(model(TREE, "w 4 4"), pattern)
    assert pattern in caught.value.message


def test_a_glob_that_is_too_narrow_names_the_wider_one() -> None:
    with pytest.raises(SiteNotFoundError) as caught:
        chosen(model(TREE, "w 4 4"), "/enc/*")
    wider = re.search(r"'(\S+)' matches (\d) places", caught.value.hint or "")
    assert wider is not None
    assert len(meant(model(TREE, "w 4 4"), wider[1])) == int(wider[2])


def test_a_glob_matches_the_node_of_the_bias_as_its_name_does() -> None:
    assert (
        meant(model(DENSE, *WEIGHTS), "ad*") == meant(model(DENSE, *WEIGHTS), "add") == ["b"]
    )


def test_a_glob_takes_layers_if_it_matches_any_and_other_tensors_if_not() -> None:
    made = model(DENSE, *WEIGHTS)
    assert meant(made, "*") == ["b"]
    assert meant(made, "ac*") == ["y"]


def test_a_glob_leaves_out_what_cannot_take_an_adapter_and_says_so() -> None:
    text = """g (float[B,4] x) => (float[B,4] y) {
      [one] y = MatMul(x, w)
      [two] dead = MatMul(x, w)
    }"""
    survey = survey_model(model(text, "w 4 4"))
    resolution = resolve(survey, ["*"])
    assert [choice.site.node for choice in resolution.choices] == ["one"]
    assert [site.node for site in resolution.skipped] == ["two"]
    with pytest.raises(SiteRefusedError, match="dead"):
        resolve(survey, ["tw*"])


# Nothing is called so


def test_a_name_that_is_not_there_lists_the_nearest() -> None:
    made = oa.open_model(Path(__file__).parent.parent / "exports" / "bert_dynamo.onnx")
    for name, near in {
        "bert.encoder.layer.0.output.dens": "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.9.output.dense": "bert.encoder.layer.0.output.dense",
        "node_linear_99": "node_linear_9",
        "encoder.layers.*.output.dense": "bert.encoder.layer.0.output.dense",
    }.items():
        with pytest.raises(SiteNotFoundError) as caught:
            chosen(made, name)
        assert name in caught.value.message
        assert near in caught.value.hint.removeprefix("nearest: ").split(", ")


@over(
    "name kind",
    """
    graph input | x | an input
    weight      | w | a weight
    """,
)
def test_an_input_or_a_weight_is_no_place_and_the_error_says_what_it_is(
    name: str, kind: str
) -> None:
    with pytest.raises(SiteNotFoundError, match=f"'{name}' is {kind} of the model"):
        chosen(model(DENSE, *WEIGHTS), name)


@pytest.mark.parametrize(
    "name", ["", " ", ".", "/", ":", "main:", "main", "*.*", "base_model."]
)
def test_names_that_mean_nothing_are_not_found(name: str) -> None:
    with pytest.raises(SiteNotFoundError) as caught:
        chosen(model(DENSE, *WEIGHTS), name)
    assert caught.value.hint


def test_a_nameless_node_is_not_found_by_the_empty_name() -> None:
    made = model("g (float[B,4] x) => (float[B,4] y) {y = Relu(x)}")
    with pytest.raises(SiteNotFoundError):
        chosen(made, "")


STRANGE = [
    "a;b",
    "a:b",
    "a::b",
    "a/b",
    "[a]",
    "a[0]",
    "a*b",
    "größe",
    "層",
    "a\nb",
    "a b",
    "387",
]


@pytest.mark.parametrize("name", STRANGE)
def test_a_node_and_a_tensor_may_have_any_name(name: str, tmp_path: Path) -> None:
    made = model(DENSE, *WEIGHTS)
    made.proto.graph.node[0].name = name
    made.proto.graph.node[1].output[0] = made.proto.graph.node[2].input[0] = f"{name}.out"
    for found in (name, f"{name}.out", f"main:{name}.out"):
        assert meant(made, found) == [f"{name}.out"]
        adapted = oa.insert(made, after=found)
        oa.save_model(adapted, tmp_path / "adapted.onnx", overwrite=True)
        (slot,) = oa.list_slots(oa.open_model(tmp_path / "adapted.onnx"))
        assert slot.tensor == f"{name}.out"
        onnx.checker.check_model(tmp_path / "adapted.onnx", full_check=True)


# Reading a tensor, and showing sites


def test_any_float_tensor_can_be_named_for_reading_but_no_glob() -> None:
    survey = survey_model(model(DENSE, *WEIGHTS))
    assert resolve_tensor(survey, "h").tensor == "h"
    with pytest.raises(SiteNotFoundError):
        resolve_tensor(survey, "h*")


@over(
    "pattern tensors",
    """
    part of a node   | layer.0 | a c
    a whole name     | d       | d
    glob             | /enc/*/dense | a b
    """,
)
def test_a_pattern_shows_the_sites_it_is_part_of(pattern: str, tensors: str) -> None:
    shown = find_sites(model(TREE, "w 4 4"), pattern)
    assert [site.tensor for site in shown] == tensors.split()


# Large models


def large(blocks: int) -> Model:
    """Five nodes a block: `layers.<i>.fc` with its bias, `layers.<i>.act` and a residual."""
    made = model("g (float[B,4] t0) => (float[B,4] y) {y = Relu(t0)}", *WEIGHTS)
    nodes, scopes = [], {}
    for i in range(blocks):
        at, to = f"t{i}", f"t{i + 1}"
        for op, inputs, output, scope in (
            ("MatMul", [at, "w"], f"{at}.m", f"layers.{i}.fc"),
            ("Add", [f"{at}.m", "c"], f"{at}.b", f"layers.{i}.fc"),
            ("Relu", [f"{at}.b"], f"{at}.r", f"layers.{i}.act"),
            ("Sigmoid", [f"{at}.r"], f"{at}.s", f"layers.{i}.act"),
            ("Add", [at, f"{at}.s"], to, f"layers.{i}"),
        ):
            node = onnx.helper.make_node(op, inputs, [output], name=f"node_{output}")
            nodes.append(node)
            scopes[output] = scope
    last = made.proto.graph.node[0]
    last.input[0] = f"t{blocks}"
    nodes.append(onnx.NodeProto.FromString(last.SerializeToString()))
    del made.proto.graph.node[:]
    made.proto.graph.node.extend(nodes)
    return scoped(made, scopes)


def _in_proportion(resolved: Callable[[int], float]) -> None:
    """Four times as much takes four times as long, not sixteen, in the processor's time."""
    resolved(10)  # whatever is made only once
    few, many = (min(resolved(blocks) for _ in range(2)) for blocks in (500, 2000))
    assert many < 10 * few


def test_thousands_of_nodes_take_time_in_proportion() -> None:
    def resolved(blocks: int) -> float:
        made = large(blocks)
        begun = time.process_time()
        survey = survey_model(made)
        assert len(resolve(survey, ["node_*.m"]).choices) == blocks
        last = resolve(survey, [f"layers.{blocks - 1}.fc"]).choices[0]
        assert last.site.tensor == f"t{blocks - 1}.b"
        assert resolve(survey, ["layers.7"]).choices[0].site.tensor == "t8"
        with pytest.raises(SiteNotFoundError):
            resolve(survey, [f"layers.{blocks}.fc"])
        return time.process_time() - begun

    _in_proportion(resolved)


@pytest.mark.parametrize("each", [False, True])
def test_thousands_of_modules_take_time_in_proportion(each: bool) -> None:
    def resolved(blocks: int) -> float:
        survey = survey_model(large(blocks))
        names = [f"layers.{i}.fc" for i in range(blocks)] if each else ["layers.*.fc"]
        begun = time.process_time()
        assert len(resolve(survey, names).choices) == blocks
        return time.process_time() - begun

    _in_proportion(resolved)
