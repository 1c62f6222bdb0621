"""Slots go behind the feed-forward of each block, however the graph was exported."""

from pathlib import Path

import onnx
import pytest

import onnx_adapt as oa
from onnx_adapt.errors import SiteError
from onnx_adapt.training.places import usual_places

BASES = Path(__file__).parents[1] / "cases/bases"

MODULES = {
    "bert_torchscript": "bert.encoder.layer.{}.output.dense",
    "bert_tf4_opset14": "bert.encoder.layer.{}.output.dense",
    "bert_optimised": "bert.encoder.layer.{}.output.dense",
    "gpt2_tf4_optimum": "transformer.h.{}.mlp.c_proj",
    "llama_dynamo": "model.layers.{}.mlp.down_proj",
    "vit_torchscript": "vit.layers.{}.mlp.fc2",
}


@pytest.mark.parametrize("case", MODULES)
def test_the_output_layer_of_each_feed_forward_is_taken(case: str) -> None:
    base = oa.open_model(BASES / case / "base.onnx")
    adapted = oa.insert(base, after=usual_places(base))
    wanted = [MODULES[case].format(number) for number in range(2)]
    assert [slot.module for slot in oa.list_slots(adapted)] == wanted


def test_without_blocks_the_last_layers_are_taken() -> None:
    base = oa.open_model("models/dnsmos-p808.onnx")
    places = usual_places(base)
    assert len(places) == 4
    assert places[-1] == "main:mos_estimator_small_1/dense_4/BiasAdd:0"


def test_a_model_without_layers_has_no_places() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n] x) => (float[n] y) { y = Abs(x) }"""
    with pytest.raises(SiteError, match="no layer"):
        usual_places(oa.Model(onnx.parser.parse_model(text)))
