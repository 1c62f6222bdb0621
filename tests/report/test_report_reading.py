"""What a reader of the report meets first: plain words, order, the map, two adapters."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from slot_models import MLP, MODELS, cli, model_of

import onnx_adapt as oa
from onnx_adapt.errors import AdapterError
from onnx_adapt.report.about import about
from onnx_adapt.report.costs import Costs, Latency
from onnx_adapt.report.overview import Overview, overview
from onnx_adapt.report.page import render
from onnx_adapt.report.summary import by_need, in_one_sentence, layers_of, needs_a_look
from onnx_adapt.report.whole_graph import MOST

Capture = pytest.CaptureFixture[str]
CASE = Path(__file__).parent.parent / "cases" / "peft_bert_lora_default_ts"


def _adapters(model: oa.Model) -> list[oa.Adapter]:
    rng = np.random.default_rng(0)
    found = []
    for name in ("fr", "de"):
        weights = {
            slot.name: {
                "down": rng.standard_normal((slot.width, 2)).astype("f4"),
                "up": rng.standard_normal((2, slot.width)).astype("f4"),
            }
            for slot in oa.list_slots(model)
        }
        found.append(oa.make_adapter(model, name, weights))
    return found


@pytest.fixture(scope="module")
def mlp() -> Overview:
    base = model_of(MLP)
    adapted = oa.insert(base, after=["first", "act"])
    first, second = _adapters(adapted)
    return overview(base, adapted, adapter=first, other=second, command="onnx-adapt report")


def test_two_adapters_are_as_far_apart_as_runs_with_them_say(mlp: Overview) -> None:
    adapted = oa.insert(model_of(MLP), after=["first", "act"])
    first, second = _adapters(adapted)
    feeds = {"x": np.random.default_rng(3).standard_normal((64, 4)).astype("f4")}
    found = overview(model_of(MLP), adapted, adapter=first, other=second, inputs=feeds)
    with oa.AdapterSession(adapted, {"fr": first, "de": second}) as session:
        off, fr, de = (next(iter(session.run(feeds, n).values())) for n in (None, "fr", "de"))
    compared = found.compared
    assert compared is not None
    assert compared.first == pytest.approx(abs(fr - off).max() / abs(off).max(), rel=1e-5)
    assert compared.second == pytest.approx(abs(de - off).max() / abs(off).max(), rel=1e-5)
    assert compared.apart == pytest.approx(abs(fr - de).max() / abs(fr).max(), rel=1e-5)
    assert compared.moved.keys() == {view.slot.name for view in found.slots}
    assert "Two adapters" in render(found)


def test_baked_slots_cannot_be_compared(mlp: Overview) -> None:
    adapted = oa.insert(model_of(MLP), after=["first", "act"])
    first, second = _adapters(adapted)
    with pytest.raises(AdapterError, match="its slots are baked"):
        overview(model_of(MLP), oa.bake(oa.fill(adapted, first)), adapter=first, other=second)


def test_a_third_adapter_is_refused_before_any_work(tmp_path: Path, capsys: Capture) -> None:
    names = ["--adapter", "a", "--adapter", "b", "--adapter", "c"]
    code, _, err = cli(capsys, "report", "base.onnx", "adapted.onnx", *names)
    assert code == 2
    assert "at most twice" in err


def test_the_page_begins_with_one_sentence_of_plain_words(mlp: Overview) -> None:
    words = in_one_sentence(mlp)
    assert words.startswith("While its adapter is off, the result answers as the model does")
    assert "at 2 places" in words
    assert "showed no effect" not in words
    unseen = replace(mlp, slots=(mlp.slots[0], replace(mlp.slots[1], result=None)))
    assert "at 1 place an" in in_one_sentence(unseen)
    assert in_one_sentence(unseen).endswith("1 more place showed no effect with these inputs.")
    bad = replace(mlp.report.checks[2], passed=False)
    checks = (*mlp.report.checks[:2], bad, *mlp.report.checks[3:])
    failed = replace(mlp, report=replace(mlp.report, checks=checks))
    assert in_one_sentence(failed).startswith("Do not use the result")
    assert "`off` failed" in render(failed)


def test_the_page_tells_its_files_inputs_and_command() -> None:
    file = MODELS / "dnsmos-p808.onnx"
    base = oa.open_model(file)
    found = overview(base, oa.insert(base, after="conv2d_5"), command="onnx-adapt report a b")
    about = found.about
    assert about is not None
    assert about.files[0].size == file.stat().st_size
    assert about.inputs[0]["input_1"] == "[N = 1, 900, 120]"
    page = render(found)
    assert about.fingerprint in page
    assert "onnx-adapt report a b" in page
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", page)


def test_the_sizes_are_those_of_all_files_of_a_model(tmp_path: Path) -> None:
    """Data beside a model counts, and so do the weights that a thin model borrows."""
    proto = onnx.load(MODELS / "plcmos.onnx")
    onnx.save(proto, tmp_path / "base.onnx", save_as_external_data=True, location="w.data")
    base = oa.open_model(tmp_path / "base.onnx")
    site = next(site.address for site in oa.find_sites(base) if not site.refused)
    oa.save_model(oa.insert(base, after=site), tmp_path / "thin.onnx", thin=True)
    whole = (tmp_path / "w.data").stat().st_size
    found = about(base, oa.open_model(tmp_path / "thin.onnx"), [])
    sizes = [whole + (tmp_path / name).stat().st_size for name in ("base.onnx", "thin.onnx")]
    assert [file.size for file in found.files] == sizes


def test_a_difference_within_the_noise_is_no_difference(mlp: Overview) -> None:
    costs = mlp.costs
    assert isinstance(costs, Costs)
    quick, slow = Latency(10, 11, 12), Latency(10.4, 11, 12)
    assert replace(costs, base=quick, noise=0.05).against_base(slow) is None
    assert replace(costs, base=quick, noise=0.03).against_base(slow) == pytest.approx(0.04)
    same = replace(costs, base=quick, off=slow, on=slow, noise=0.05)
    assert render(replace(mlp, costs=same)).count("no measurable difference") == 2


def test_every_node_is_on_the_map_once_and_behind_what_it_reads() -> None:
    base = oa.open_model(CASE / "base.onnx")
    adapted = oa.insert(base, after="bert.encoder.layer.*.output.dense")
    graph = overview(base, adapted).graph
    nodes = [node for node in adapted.proto.graph.node if node.op_type != "Constant"]
    assert [mark.op for mark in graph.marks] == [node.op_type for node in nodes]
    assert len({(mark.column, mark.lane) for mark in graph.marks}) == len(nodes)
    assert all(graph.marks[a].column < graph.marks[b].column for a, b in graph.edges)
    slots = {slot.name for slot in oa.list_slots(adapted)}
    assert {mark.slot for mark in graph.marks} - {""} == slots


def test_a_graph_too_large_to_read_has_no_map(mlp: Overview) -> None:
    none = replace(mlp, graph=replace(mlp.graph, marks=(), edges=()))
    assert f"more than {MOST:,} nodes" in render(none)


def test_slots_are_grouped_by_layer_and_sorted_by_need() -> None:
    base = oa.open_model(CASE / "base.onnx")
    places = ["bert.encoder.layer.*.output.dense", "bert.pooler.dense"]
    found = overview(base, oa.insert(base, after=places))
    layers = layers_of(found.slots)
    assert layers["bert.encoder.layer.1.output.dense"] == "bert.encoder.layer.1"
    assert layers["bert.pooler.dense"] == ""
    assert "<h3>bert.encoder.layer.0</h3>" in render(found)
    ratios = {view.slot.name: view.result.ratio for view in found.slots if view.result}
    order = by_need(found.slots)
    assert sorted(ratios, key=lambda name: order[name]) == sorted(
        ratios, key=lambda name: -(ratios[name] or 0)
    )
    assert not any(needs_a_look(view) for view in found.slots)
    unseen = replace(found.slots[-1], result=None)
    assert needs_a_look(unseen)
    assert by_need((*found.slots[:-1], unseen))[unseen.slot.name] == 0
