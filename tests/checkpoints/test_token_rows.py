"""Trained rows of an embedding: which rows, which layers follow, and what is refused."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.numpy import load_file, save_file
from trained_cases import CASES, run

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError

TIED = CASES["peft_gpt2_token_indices_ts"]
ALONE = CASES["peft_gpt2_tokens"]
BERT = CASES["peft_bert_token_indices"]
ROWS = "base_model.model.bert.embeddings.word_embeddings.token_adapter.trainable_tokens_delta"


def _changed(
    folder: Path, adapter: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None
) -> Path:
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    weights = load_file(folder / "adapter_model.safetensors") | (tensors or {})
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def test_a_tied_head_follows_the_embedding_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        found = oa.load_checkpoint(TIED.adapter, oa.open_model(TIED.base))
    parts = {slot.name: slot.parts for slot in found.slots}
    assert parts["inner.transformer.wte"] == ("up", "table")
    assert parts["inner.lm_head"] == ("down", "up")
    assert "inner.lm_head has the weight of transformer.wte" in caplog.text


def test_the_slot_of_an_embedding_changes_the_trained_rows_and_no_other() -> None:
    found = oa.load_checkpoint(ALONE.adapter, oa.open_model(ALONE.base))
    weights = found.adapter.weights["transformer.wte"]
    change = weights["table"] @ weights["up"]
    assert sorted(np.flatnonzero(np.abs(change).sum(1))) == [4, 31, 57]


def test_a_head_with_its_own_rows_does_not_follow() -> None:
    case = CASES["peft_gpt2_token_indices_apart"]
    found = oa.load_checkpoint(case.adapter, oa.open_model(case.base))
    up = found.adapter.weights["lm_head"]["up"]
    assert up.shape[0] == 1
    assert np.flatnonzero(up[0]).tolist() == [5]


def test_a_head_that_is_quantised_apart_from_the_embedding_still_follows(
    tmp_path: Path,
) -> None:
    quantize_dynamic(
        TIED.base, tmp_path / "q.onnx", op_types_to_quantize=["MatMul"],
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    base = oa.open_model(tmp_path / "q.onnx")
    found = oa.load_checkpoint(TIED.adapter, base)
    slot = next(slot for slot in found.slots if slot.name == "inner.lm_head")
    oa.save_model(oa.insert_checkpoint(base, found), tmp_path / "a.onnx")
    feeds = TIED.inputs()
    on = run(tmp_path / "a.onnx", {**feeds, **found.adapter.feeds()})
    # The trained rows are exact in float beside a head of 8 bits.
    assert slot.parts == ("down", "up")
    assert TIED.distance(on) < 0.5 < TIED.distance(run(tmp_path / "a.onnx", feeds))


@pytest.mark.parametrize(
    "tokens",
    [None, [], [3], [3, 5, 7], [3, 3], [3, -5], [3, True], [3, 5.0], "35", {"wte": [3]}],
)  # fmt: skip
def test_tokens_that_do_not_fit_the_rows_are_refused(tokens: Any, tmp_path: Path) -> None:
    folder = _changed(tmp_path / "a", BERT.adapter, {"trainable_token_indices": tokens})
    with pytest.raises(CheckpointError) as caught:
        oa.load_checkpoint(folder, oa.open_model(BERT.base))
    assert "word_embeddings" in str(caught.value)


def test_an_adapter_for_an_enlarged_vocabulary_says_by_how_many_rows(tmp_path: Path) -> None:
    tokens = {"trainable_token_indices": {"word_embeddings": [3, 62]}}
    folder = _changed(tmp_path / "a", BERT.adapter, tokens)
    with pytest.raises(
        CheckpointError, match="3 more tokens than the 60 of the graph"
    ) as found:
        oa.load_checkpoint(folder, oa.open_model(BERT.base))
    assert "resize the base by 3 rows" in (found.value.hint or "")


@pytest.mark.parametrize(
    "rows", [np.zeros(0), np.zeros((2, 0)), np.zeros((2, 31)), np.full((2, 32), np.nan)]
)
def test_rows_that_are_no_rows_of_the_graph_are_refused(
    rows: np.ndarray, tmp_path: Path
) -> None:
    folder = _changed(tmp_path / "a", BERT.adapter, {}, {ROWS: rows.astype(np.float32)})
    with pytest.raises(CheckpointError):
        oa.load_checkpoint(folder, oa.open_model(BERT.base))


def test_a_saved_copy_of_the_table_must_be_that_of_the_graph(tmp_path: Path) -> None:
    stored = onnx.load(BERT.base).graph.initializer
    table = next(
        numpy_helper.to_array(t) for t in stored if t.name.endswith("word_embeddings.weight")
    )
    key = ROWS.replace("trainable_tokens_delta", "base_layer.weight")
    base = oa.open_model(BERT.base)
    same = _changed(tmp_path / "same", BERT.adapter, {}, {key: table})
    found = oa.load_checkpoint(same, base)
    assert not found.replacements
    np.testing.assert_array_equal(
        found.adapter.weights["bert.embeddings.word_embeddings"]["up"],
        oa.load_checkpoint(BERT.adapter, base).adapter.weights[
            "bert.embeddings.word_embeddings"
        ]["up"],
    )
    other = _changed(tmp_path / "other", BERT.adapter, {}, {key: table[::-1].copy()})
    with pytest.raises(CheckpointError, match="not that of the graph"):
        oa.load_checkpoint(other, base)
    larger = np.concatenate([table, table[:2]])
    longer = _changed(tmp_path / "longer", BERT.adapter, {}, {key: larger})
    with pytest.raises(CheckpointError, match="2 more tokens"):
        oa.load_checkpoint(longer, base)


def test_a_tied_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    """PEFT leaves the bias out while the adapter is on, and not when it is merged."""
    model = onnx.load(TIED.base)
    head = next(node for node in model.graph.node if "logits" in node.output)
    head.output[0] = "product"
    bias = numpy_helper.from_array(np.ones(60, np.float32), "inner.lm_head.bias")
    model.graph.initializer.append(bias)
    name = "/inner/lm_head/Add"
    add = onnx.helper.make_node("Add", ["product", bias.name], ["logits"], name=name)
    model.graph.node.append(add)
    onnx.save(model, tmp_path / "b.onnx")
    with pytest.raises(CheckpointError, match="a bias that PEFT leaves out"):
        oa.load_checkpoint(TIED.adapter, oa.open_model(tmp_path / "b.onnx"))


def _one_table_with_two_names(folder: Path) -> Path:
    """An encoder as TorchScript exports T5's: `shared.weight`, called as `embed_tokens`."""
    table = np.arange(24, dtype=np.float32).reshape(6, 4)
    node = onnx.helper.make_node(
        "Gather", ["shared.weight", "ids"], ["y"], name="/encoder/embed_tokens/Gather"
    )
    ids = onnx.helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])
    weight = numpy_helper.from_array(table, "shared.weight")
    graph = onnx.helper.make_graph([node], "t5", [ids], [y], [weight])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset), folder / "t5.onnx")
    return folder / "t5.onnx"


def test_trained_rows_of_t5_s_shared_embedding_are_mapped_to_the_name_that_is_called(
    tmp_path: Path,
) -> None:
    base = oa.open_model(_one_table_with_two_names(tmp_path))
    rows = np.full((2, 4), 9, np.float32)
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 4]}
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    key = "base_model.model.shared.trainable_tokens_delta"
    save_file({key: rows}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        oa.load_checkpoint(folder, base)
    assert "--map shared=encoder.embed_tokens" in (refused.value.hint or "")

    found = oa.load_checkpoint(folder, base, module_map={"shared": "encoder.embed_tokens"})
    oa.save_model(oa.insert_checkpoint(base, found), tmp_path / "a.onnx")
    feeds = {"ids": np.arange(6)}
    wanted = np.arange(24, dtype=np.float32).reshape(6, 4)
    wanted[[1, 4]] = rows
    np.testing.assert_allclose(
        run(tmp_path / "a.onnx", {**feeds, **found.adapter.feeds()})["y"], wanted, atol=1e-5
    )
