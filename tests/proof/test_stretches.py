"""Whether a slot moves an output shows at the nearest one, with a part of the model alone."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from slot_models import dense, model_of

import onnx_adapt as oa
from onnx_adapt.edit.weights import make_swappable
from onnx_adapt.ort import CPU
from onnx_adapt.proof.stretches import Stretch, computed_reads, find_stretches, movements

LAYERS = 8
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


TANH = "Tanh(b{0})"
BRANCHES = """If (yes) <
  then_branch = g1 () => (float[n,4] t{0}) {{ t{0} = Tanh(b{0}) }},
  else_branch = g2 () => (float[n,4] e{0}) {{ e{0} = Neg(b{0}) }}
>"""


def _decoder(cache: str = "Neg(b{0})", through: str = TANH) -> oa.Model:
    """Eight layers of three nodes, each with an output of its own, and one at the end."""
    layers = "".join(
        f"[layer{i}] b{i} = MatMul(a{i}, w1)  c{i} = {cache.format(i)}  "
        f"a{i + 1} = {through.format(i)}\n"
        for i in range(LAYERS)
    )
    caches = ", ".join(f"float[n,4] c{i}" for i in range(LAYERS))
    return model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] a0) => ({caches}, float[n,4] y)
    <{dense("w1")}, float[1] zero = {{0}}, bool yes = {{1}}> {{
      {layers} y = Identity(a{LAYERS})
    }}""")


def _adapted(base: oa.Model) -> oa.Model:
    return oa.insert(base, after=[f"layer{i}" for i in range(LAYERS)])


def _stretches(model: oa.Model) -> tuple[Stretch, ...]:
    swappable = make_swappable(model)
    names = [value.name for value in model.proto.graph.output]
    return find_stretches(swappable.proto, oa.list_slots(model), names)


def test_each_slot_needs_the_nodes_up_to_the_nearest_output_alone() -> None:
    found = _stretches(_adapted(_decoder()))
    assert [item.outputs for item in found] == [(f"c{i}",) for i in range(LAYERS)]
    assert {len(item.slots) for item in found} == {1}
    assert max(len(item.nodes) for item in found) <= 6


def test_a_model_with_one_output_at_its_end_runs_whole() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,4] y) <{dense("w1")}> {{
      [first] a = MatMul(x, w1)  [second] b = MatMul(a, w1)  y = Tanh(b)
    }}""")
    assert _stretches(oa.insert(base, after=["first", "second"])) == ()


@pytest.mark.parametrize("through", [TANH, BRANCHES])
def test_a_stretch_moves_its_output_as_the_whole_model_does(through: str) -> None:
    model = _adapted(_decoder(through=through))
    rng = np.random.default_rng(1)
    session = onnxruntime.InferenceSession(model.proto.SerializeToString())
    names = [item.name for item in session.get_outputs()]
    found = _stretches(model)
    assert len(found) == LAYERS
    tapped = model.copy()
    for name in computed_reads(model.proto, found):
        tapped.proto.graph.output.add(name=name)
    whole = onnxruntime.InferenceSession(tapped.proto.SerializeToString())
    read = [item.name for item in whole.get_outputs()]
    values = {"a0": X, **dict(zip(read, whole.run(None, {"a0": X}), strict=True))}
    still = dict(zip(names, session.run(None, {"a0": X}), strict=True))
    for item in found:
        (slot,) = item.slots
        weights = {
            slot.weight("down"): rng.standard_normal((4, 2)).astype(np.float32),
            slot.weight("up"): rng.standard_normal((2, 4)).astype(np.float32),
        }
        (name,) = item.outputs
        (got,) = session.run([name], {"a0": X, **weights})
        wanted = np.abs(got - still[name]).max() / np.abs(still[name]).max()
        [(_, moved)] = movements(model, item, values, lambda _, fed=weights: fed, CPU)
        assert moved == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("through", [TANH, BRANCHES])
def test_every_slot_of_a_decoder_has_an_effect(through: str) -> None:
    base = _decoder(through=through)
    assert oa.verify(base, _adapted(base), inputs={"a0": X}, strict=True).passed


def test_a_slot_whose_nearest_output_stands_still_moves_a_later_one() -> None:
    base = _decoder(cache="Mul(b{0}, zero)")
    report = oa.verify(base, _adapted(base), inputs={"a0": X}, strict=True)
    assert report.passed
    assert all(slot.effect for slot in report.slots)


def test_a_dead_slot_among_live_ones_is_found() -> None:
    base = _decoder()
    adapted = _adapted(base)
    for reader in adapted.proto.graph.node:
        if list(reader.output) in (["c3"], ["a4"]):
            reader.input[0] = "adapter.layer3/target"
    effects = [slot.effect for slot in oa.verify(base, adapted, inputs={"a0": X}).slots]
    assert [effect == 0 for effect in effects] == [i == 3 for i in range(LAYERS)]
