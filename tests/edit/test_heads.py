"""A head is a linear layer on a pooled output; it goes with the slots and leaves no trace."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_adapt as oa
from onnx_adapt.dtypes import Array
from onnx_adapt.edit.damage import damages
from onnx_adapt.edit.norm_weights import replaceable_norms
from onnx_adapt.errors import SlotError
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.ort import CPU
from onnx_adapt.proof.runner import Runner

BASE = Path(__file__).parents[1] / "cases/bases/bert_headless/base.onnx"
OUTPUT = "last_hidden_state"


@pytest.fixture(scope="module")
def base() -> oa.Model:
    return oa.open_model(BASE)


@pytest.fixture(scope="module")
def slotted(base: oa.Model) -> oa.Model:
    return oa.insert(base, after="encoder.layer.1.output.dense")


@pytest.fixture(scope="module")
def feeds() -> dict[str, Array]:
    ids = np.random.default_rng(0).integers(1, 60, (3, 6))
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}


def _run(model: oa.Model, feeds: dict[str, Array]) -> list[Array]:
    return list(Runner(model, CPU, optimised=False).run(feeds).values())


WEIGHT = np.random.default_rng(1).standard_normal((32, 3)).astype(np.float32)
BIAS = np.array([1.0, 2.0, 3.0], np.float32)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_head_is_linear_in_the_pooled_output(
    pooling: str, base: oa.Model, slotted: oa.Model, feeds: dict[str, Array]
) -> None:
    model = oa.add_head(slotted, 3, pooling=pooling, output=OUTPUT)
    hidden = _run(base, feeds)[0]
    mask = feeds["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    wanted = (mean if pooling == "mean" else hidden[:, 0]) @ WEIGHT + BIAS
    given = {**feeds, "head.weight": WEIGHT, "head.bias": BIAS}
    found = _run(model, given)
    np.testing.assert_allclose(found[-1], wanted, atol=2e-5)
    np.testing.assert_array_equal(_run(model, feeds)[-1], 0)  # nothing is fed


def test_the_mean_is_over_all_positions_where_no_mask_is(feeds: dict[str, Array]) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,t,4] x) => (float[n,t,4] y) <float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}> {
      [fc] y = MatMul(x, w) }"""
    model = oa.insert(oa.Model(onnx.parser.parse_model(text)), after="fc")
    model = oa.add_head(model, 2)
    x = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    found = _run(model, {"x": x, "head.weight": WEIGHT[:4, :2], "head.bias": BIAS[:2]})
    wanted = x.mean(1) @ WEIGHT[:4, :2] + BIAS[:2]
    np.testing.assert_allclose(found[-1], wanted, rtol=1e-5, atol=1e-6)


def test_a_head_on_vectors_pools_nothing(slotted: oa.Model, feeds: dict[str, Array]) -> None:
    model = oa.add_head(slotted, 3, output="pooler_output", name="mood")
    given = {**feeds, "mood.weight": WEIGHT, "mood.bias": BIAS}
    values = _run(model, given)
    np.testing.assert_allclose(values[-1], values[1] @ WEIGHT + BIAS, atol=2e-5)


def test_a_model_with_a_head_and_norms_is_proven_and_is_its_base_again(
    base: oa.Model, slotted: oa.Model, feeds: dict[str, Array]
) -> None:
    model = replaceable_norms(oa.add_head(slotted, 3, output=OUTPUT))
    report = oa.verify(base, model, inputs=feeds)
    assert report.passed, report
    assert damages(model) == []
    assert oa.remove(model).proto == base.proto
    exported, neutral = oa.export(model)
    assert oa.remove(exported).proto == base.proto
    assert {"head.weight", "head.bias"} <= set(neutral.replaced)


def test_a_filled_and_baked_head_stays_one(
    base: oa.Model, slotted: oa.Model, feeds: dict[str, Array]
) -> None:
    model = oa.add_head(slotted, 3, output=OUTPUT)
    neutral = oa.export(model)[1]
    replaced = {"head.weight": WEIGHT, "head.bias": BIAS}
    adapter = replace(neutral, name="mood", replaced=replaced)
    fed = _run(model, {**feeds, **replaced})[-1]
    filled = oa.fill(model, adapter)
    np.testing.assert_array_equal(_run(filled, feeds)[-1], fed)
    np.testing.assert_array_equal(_run(oa.bake(filled), feeds)[-1], fed)
    assert oa.remove(oa.bake(filled)).proto == base.proto
    with oa.AdapterSession(model, {"mood": adapter}) as session:
        np.testing.assert_allclose(session.run(feeds, "mood")["head"], fed, rtol=1e-5)


def test_a_head_that_lost_its_nodes_is_damage(slotted: oa.Model) -> None:
    model = oa.add_head(slotted, 3, output=OUTPUT).copy()
    del model.proto.graph.output[-1]
    assert damages(model) == ["head 'head': its nodes or its output are gone"]


BAD = {
    "no classes": ({"classes": 0}, "0 classes is not possible"),
    "another pooling": ({"classes": 3, "pooling": "max"}, "unknown pooling 'max'"),
    "no such output": ({"classes": 3, "output": "y"}, "no output 'y'"),
    "two outputs": ({"classes": 3, "output": ""}, "2 outputs with floats"),
    "a taken name": ({"classes": 3, "name": "input_ids"}, "has a tensor 'input_ids' already"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_head_that_cannot_be_is_refused(what: str, slotted: oa.Model) -> None:
    options, words = BAD[what]
    given = {"output": OUTPUT, **options}
    with pytest.raises(SlotError, match=words):
        oa.add_head(slotted, **given)  # type: ignore[arg-type]


def test_a_base_without_slots_or_norms_is_refused(base: oa.Model) -> None:
    with pytest.raises(SlotError, match="no slots"):
        oa.add_head(base, 3, output=OUTPUT)
    dnsmos = oa.open_model("models/dnsmos-p808.onnx")
    with pytest.raises(SlotError, match="no LayerNorm or RMSNorm"):
        replaceable_norms(oa.insert(dnsmos, after="conv2d_5"))


def test_norms_are_fed_as_the_base_has_them(
    base: oa.Model, slotted: oa.Model, feeds: dict[str, Array]
) -> None:
    model = replaceable_norms(slotted)
    added = {v.name for v in model.proto.graph.input} - {
        v.name for v in slotted.proto.graph.input
    }
    assert len(added) == 10  # five norms, with a weight and a bias each
    name = "base.encoder.layer.1.output.LayerNorm.bias"
    moved = _run(model, {**feeds, name: BIAS[:1].repeat(32)})[0]
    plain = _run(base, feeds)[0]
    (stored,) = (t for t in base.proto.graph.initializer if f"base.{t.name}" == name)
    shift = 1 - read_tensor(base, stored)
    np.testing.assert_allclose(moved, plain + shift, atol=1e-5)
