"""onnx-graphsurgeon: the same slots on its Graph, and a second opinion on ours."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

import onnx_adapt as oa
from onnx_adapt import graphsurgeon
from onnx_adapt.errors import SiteNotFoundError, SlotError

MODELS = Path(__file__).parent.parent.parent / "models"
DENSE = "mos_estimator_small_1/dense_4/MatMul_add"


def _run(model: onnx.ModelProto | Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    source = model if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def _sound(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"input_1": rng.standard_normal((2, 900, 120)).astype(np.float32)}


def _insert_by_hand(graph: gs.Graph, node: gs.Node, down: np.ndarray, up: np.ndarray) -> None:
    """What a graphsurgeon user writes today: weights as constants, consumers rewired."""
    (bias,) = node.outputs[0].outputs
    target = bias.outputs[0]
    readers = list(target.outputs)
    a, b, c, y = (gs.Variable(f"hand_{n}", np.float32) for n in "abcy")
    graph.nodes += [
        gs.Node("MatMul", inputs=[target, gs.Constant("hand_down", down)], outputs=[a]),
        gs.Node("Relu", inputs=[a], outputs=[b]),
        gs.Node("MatMul", inputs=[b, gs.Constant("hand_up", up)], outputs=[c]),
        gs.Node("Add", inputs=[target, c], outputs=[y]),
    ]
    for reader in readers:
        reader.inputs = [y if tensor is target else tensor for tensor in reader.inputs]
    graph.toposort()


def test_a_slot_equals_the_one_a_graphsurgeon_user_builds_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    down = rng.standard_normal((64, 5)).astype(np.float32)
    up = rng.standard_normal((5, 64)).astype(np.float32)
    path = MODELS / "dnsmos-p808.onnx"
    graph = gs.import_onnx(onnx.load(path))
    _insert_by_hand(graph, next(n for n in graph.nodes if n.name == DENSE), down, up)
    adapted = oa.insert(oa.open_model(path), after=DENSE)
    oa.save_model(adapted, tmp_path / "a.onnx")
    (slot,) = oa.list_slots(adapted)
    sound = _sound(rng)
    weights = {slot.weight("down"): down, slot.weight("up"): up}
    (ours,) = _run(tmp_path / "a.onnx", {**sound, **weights})
    (theirs,) = _run(gs.export_onnx(graph), sound)
    (base,) = _run(path, sound)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert np.abs(ours - base).max() > 1e-3


@pytest.mark.parametrize("name", ["dnsmos-p808", "silero-vad-ifless", "plcmos"])
def test_slots_on_a_graphsurgeon_graph_verify_and_come_out_again(
    name: str, tmp_path: Path
) -> None:
    base = gs.import_onnx(onnx.load(MODELS / f"{name}.onnx"))
    onnx.save(gs.export_onnx(base), tmp_path / "base.onnx")
    adapted = graphsurgeon.insert(base, after="**")
    onnx.save(graphsurgeon.export_onnx(adapted), tmp_path / "adapted.onnx")
    report = oa.verify(tmp_path / "base.onnx", tmp_path / "adapted.onnx")
    assert report.passed, report
    assert len(report.slots) > 7
    removed = oa.remove(oa.open_model(tmp_path / "adapted.onnx"))
    oa.save_model(removed, tmp_path / "removed.onnx")
    assert oa.list_slots(removed) == ()
    rng = np.random.default_rng(0)
    if name == "dnsmos-p808":
        sound = _sound(rng)
        before, after = (_run(tmp_path / f"{n}.onnx", sound)[0] for n in ("base", "removed"))
        assert np.array_equal(before, after)


def test_the_given_graph_is_left_as_it_was() -> None:
    graph = gs.import_onnx(onnx.load(MODELS / "dnsmos-p808.onnx"))
    before = gs.export_onnx(graph).SerializeToString()
    graphsurgeon.insert(graph, after=DENSE)
    assert gs.export_onnx(graph).SerializeToString() == before


def test_slots_inserted_one_after_the_other_are_all_there() -> None:
    graph = gs.import_onnx(onnx.load(MODELS / "dnsmos-p808.onnx"))
    once = graphsurgeon.insert(graph, after=DENSE, bias=True)
    twice = graphsurgeon.insert(once, after="conv2d_5")
    proto = graphsurgeon.export_onnx(twice)
    assert [slot.axis for slot in oa.list_slots(oa.Model(proto))] == [-1, 1]
    assert len(proto.graph.input) == 1 + 4 + 2


def test_an_unknown_place_is_the_same_error_as_elsewhere() -> None:
    graph = gs.import_onnx(onnx.load(MODELS / "dnsmos-p808.onnx"))
    with pytest.raises(SiteNotFoundError, match="nothing_here"):
        graphsurgeon.insert(graph, after="nothing_here")


def test_exporting_a_graph_without_slots_is_an_error() -> None:
    graph = gs.import_onnx(onnx.load(MODELS / "dnsmos-p808.onnx"))
    with pytest.raises(SlotError, match="no record of slots"):
        graphsurgeon.export_onnx(graph)
