"""Checkpoints whose modules are inside operators: what is right, and what is refused."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from adapter_models import peft_folder
from onnx import helper, numpy_helper
from slot_models import cli
from trained_cases import CASES, run

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages
from onnx_adapt.errors import CheckpointError, SlotError
from onnx_adapt.report.costs import update_cost
from onnx_adapt.report.overview import overview

Array = np.ndarray
H = 8
W = np.random.default_rng(0).standard_normal((H, 3 * H)).astype(np.float32) / 3
B = np.random.default_rng(1).standard_normal(3 * H).astype(np.float32)
X = np.random.default_rng(2).standard_normal((2, 5, H)).astype(np.float32)
OUTPUT = "/layer.0/attn/Reshape_3_output_0"


def fused(
    op: str = "Attention", *, output: str = OUTPUT, name: str = "Attention_0"
) -> oa.Model:
    """An attention, or what else is given, as ONNX Runtime's optimiser leaves it."""
    nodes = [
        helper.make_node(
            op, ["x", "w", "b"], [output], name, domain="com.microsoft", num_heads=2
        ),
        helper.make_node("Relu", [output], ["y"], "/layer.0/out/Relu"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", "s", H])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", "s", H])],
        [numpy_helper.from_array(W, "w"), numpy_helper.from_array(B, "b")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return oa.Model(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def outputs(model: oa.Model, folder: Path, feeds: Mapping[str, Array] | None = None) -> Array:
    oa.save_model(model, folder / "m.onnx", overwrite=True)
    return run(folder / "m.onnx", {"x": X, **(feeds or {})})["y"]


def with_values(model: oa.Model, **values: Array) -> oa.Model:
    result = model.copy()
    for tensor in result.proto.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return result


def lora_tensors(
    *modules: str, rank: int = 2, out: int = H, seed: int = 3
) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    shapes = {"lora_A": (rank, H), "lora_B": (out, rank)}
    return {
        f"base_model.model.{module}.{part}.weight": rng.standard_normal(shape).astype("f4")
        for module in modules
        for part, shape in shapes.items()
    }


def delta(tensors: Mapping[str, Array], module: str) -> Array:
    a, b = (
        tensors[f"base_model.model.{module}.{part}.weight"] for part in ("lora_A", "lora_B")
    )
    return (b @ a).T * (4 / a.shape[0])


@pytest.mark.parametrize(
    "names", [("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v")]
)
def test_projections_inside_attention_are_columns_of_its_weight(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    base = fused()
    modules = [f"layer.0.attn.{name}" for name in names]
    tensors = lora_tensors(modules[2], modules[0])
    found = oa.load_checkpoint(peft_folder(tmp_path / "a", tensors), base)
    assert [(s.name, s.modules, s.columns) for s in found.slots] == [
        ("layer.0.attn.qkv", tuple(modules), (0, H, 2 * H, 3 * H))
    ]
    value = W.copy()
    value[:, :H] += delta(tensors, modules[0])
    value[:, 2 * H :] += delta(tensors, modules[2])
    wanted = outputs(with_values(base, w=value), tmp_path)
    got = outputs(oa.insert_checkpoint(base, found), tmp_path, found.adapter.feeds())
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert np.abs(wanted - outputs(base, tmp_path)).max() > 0.1


def test_a_packed_projection_is_all_of_the_weight(tmp_path: Path) -> None:
    base = fused()
    tensors = lora_tensors("layer.0.attn.c_attn", out=3 * H)
    found = oa.load_checkpoint(peft_folder(tmp_path / "a", tensors), base)
    assert [slot.name for slot in found.slots] == ["layer.0.attn.c_attn"]
    wanted = outputs(with_values(base, w=W + delta(tensors, "layer.0.attn.c_attn")), tmp_path)
    got = outputs(oa.insert_checkpoint(base, found), tmp_path, found.adapter.feeds())
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_ia3_scales_the_bias_as_well(tmp_path: Path) -> None:
    base = fused()
    vector = np.linspace(0.2, 2, H, dtype=np.float32)
    tensors = {"base_model.model.layer.0.attn.value.ia3_l": vector[:, None]}
    folder = peft_folder(tmp_path / "a", tensors, peft_type="IA3", feedforward_modules=[])
    found = oa.load_checkpoint(folder, base)
    assert [(slot.tensor, slot.weight_shape) for slot in found.slots] == [
        ("w", (H, 3 * H)),
        ("b", (3 * H,)),
    ]
    scale = np.concatenate([np.ones(2 * H, np.float32), vector])
    wanted = outputs(with_values(base, w=W * scale, b=B * scale), tmp_path)
    adapted = oa.insert_checkpoint(base, found)
    got = outputs(adapted, tmp_path, found.adapter.feeds())
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert oa.verify(base, adapted, inputs={"x": X}).passed
    assert oa.remove(adapted).proto == base.proto


def test_without_scopes_the_values_of_the_base_find_the_projections(tmp_path: Path) -> None:
    base = fused(output="t7")
    modules = [f"layer.0.attn.{name}" for name in ("query", "key", "value")]
    tensors = lora_tensors(modules[1])
    folder = peft_folder(tmp_path / "a", tensors)
    with pytest.raises(CheckpointError, match="no module of the checkpoint is in the graph"):
        oa.load_checkpoint(folder, base)
    spans = (W[:, i * H : (i + 1) * H] for i in range(3))
    weights = {
        f"{module}.weight": np.ascontiguousarray(span.T)
        for module, span in zip(modules, spans, strict=True)
    }
    safetensors.numpy.save_file(weights, tmp_path / "base.safetensors")
    found = oa.load_checkpoint(folder, base, base_weights=tmp_path / "base.safetensors")
    value = W.copy()
    value[:, H : 2 * H] += delta(tensors, modules[1])
    wanted = outputs(with_values(base, w=value), tmp_path)
    got = outputs(oa.insert_checkpoint(base, found), tmp_path, found.adapter.feeds())
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_another_adapter_fits_the_slots_of_the_first(tmp_path: Path) -> None:
    base = fused()
    first = lora_tensors("layer.0.attn.query", "layer.0.attn.value")
    other = lora_tensors("layer.0.attn.key", rank=5, seed=8)
    found = oa.load_checkpoint(peft_folder(tmp_path / "a", first), base)
    adapted = oa.insert_checkpoint(base, found)
    adapter = oa.convert(peft_folder(tmp_path / "b", other), adapted, name="b")
    value = W.copy()
    value[:, H : 2 * H] += delta(other, "layer.0.attn.key")
    wanted = outputs(with_values(base, w=value), tmp_path)
    got = outputs(adapted, tmp_path, adapter.feeds())
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_a_second_checkpoint_goes_onto_the_weight_that_the_first_changes(
    tmp_path: Path,
) -> None:
    base = fused()
    tensors = [
        lora_tensors(f"layer.0.attn.{name}", seed=i) for i, name in enumerate(("query", "key"))
    ]
    adapted, feeds = base, {}
    for number, given in enumerate(tensors):
        found = oa.load_checkpoint(peft_folder(tmp_path / str(number), given), adapted)
        adapted = oa.insert_checkpoint(adapted, found)
        feeds |= found.adapter.feeds()
    assert damages(adapted) == []
    value = W.copy()
    value[:, :H] += delta(tensors[0], "layer.0.attn.query")
    value[:, H : 2 * H] += delta(tensors[1], "layer.0.attn.key")
    wanted = outputs(with_values(base, w=value), tmp_path)
    np.testing.assert_allclose(outputs(adapted, tmp_path, feeds), wanted, atol=1e-4)
    assert oa.remove(adapted).proto == base.proto


def test_both_branches_of_an_if_read_one_changed_weight(tmp_path: Path) -> None:
    def branch(name: str, after: str) -> onnx.GraphProto:
        out = f"/layer.0/attn/Reshape_{name}_output_0"
        nodes = [
            helper.make_node(
                "Attention", ["x", "w", "b"], [out], name, domain="com.microsoft", num_heads=2
            ),
            helper.make_node(after, [out], [f"{name}_y"], f"/layer.0/{name}/out"),
        ]
        kind = helper.make_tensor_value_info(
            f"{name}_y", onnx.TensorProto.FLOAT, ["n", "s", H]
        )
        return helper.make_graph(nodes, name, [], [kind])

    base = fused()
    graph = base.proto.graph
    del graph.node[:]
    graph.input.append(helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    bodies = {"then_branch": branch("one", "Relu"), "else_branch": branch("two", "Neg")}
    graph.node.append(helper.make_node("If", ["c"], ["y"], "choice", **bodies))
    tensors = lora_tensors("layer.0.attn.value")
    found = oa.load_checkpoint(peft_folder(tmp_path / "a", tensors), base)
    assert [(slot.graph, len(slot.readers)) for slot in found.slots] == [("main", 2)]
    adapted = oa.insert_checkpoint(base, found)
    assert damages(adapted) == []
    value = W.copy()
    value[:, 2 * H :] += delta(tensors, "layer.0.attn.value")
    changed = with_values(base, w=value)
    for taken in (True, False):
        feeds = {"c": np.array(taken)}
        wanted = outputs(changed, tmp_path, feeds)
        got = outputs(adapted, tmp_path, {**feeds, **found.adapter.feeds()})
        np.testing.assert_allclose(got, wanted, atol=1e-4)
        np.testing.assert_allclose(
            outputs(adapted, tmp_path, feeds), outputs(base, tmp_path, feeds), atol=1e-5
        )
    both = [{"x": X, "c": np.array(taken)} for taken in (True, False)]
    assert oa.verify(base, adapted, inputs=both).passed
    assert oa.remove(adapted).proto == base.proto


def test_a_thin_model_borrows_the_weight_that_its_slot_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["peft_mixtral_one_stack"]
    base = tmp_path / "base.onnx"
    base.write_bytes(case.base.read_bytes())
    out = tmp_path / "thin.onnx"
    args = ("insert", str(base), "--adapter", str(case.adapter), "-o", str(out), "--thin")
    status, _, err = cli(capsys, *args)
    assert status == 0, err
    adapter = oa.load_adapter(next(tmp_path.glob("thin.*.safetensors")))
    assert case.distance(run(out, {**case.inputs(), **adapter.feeds()})) < case.tolerance


def test_the_report_shows_the_nodes_that_read_the_weight() -> None:
    case = CASES["peft_bert_optimised_lora"]
    base = oa.open_model(case.base)
    checkpoint = oa.load_checkpoint(case.adapter, base)
    found = overview(base, oa.insert_checkpoint(base, checkpoint), adapter=checkpoint.adapter)
    views = [view for view in found.slots if view.slot.on_weight]
    assert len(views) == 2
    for view in views:
        assert view.before is not None
        assert view.moved is not None
        for around in (view.before, view.after):
            assert "Attention" in [box.label for box in around.boxes]
    # They are listed where their Attention runs, between the layers around it.
    names = [view.slot.name for view in found.slots]
    assert names.index("bert.encoder.layer.0.attention.self.qkv") == 0
    assert names.index("bert.encoder.layer.1.attention.self.qkv") == 3


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    tensors = lora_tensors("layer.0.attn.query", out=H + 1)
    with pytest.raises(CheckpointError, match="inside node 'Attention_0'"):
        oa.load_checkpoint(peft_folder(tmp_path / "a", tensors), fused())


def test_a_bias_inside_the_adapter_is_refused(tmp_path: Path) -> None:
    tensors = lora_tensors("layer.0.attn.query")
    tensors["base_model.model.layer.0.attn.query.lora_B.bias"] = np.ones(H, np.float32)
    folder = peft_folder(tmp_path / "a", tensors, lora_bias=True)
    with pytest.raises(CheckpointError, match="not its output"):
        oa.load_checkpoint(folder, fused())


def test_a_quantised_attention_is_refused_by_name(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", lora_tensors("layer.0.attn.query"))
    with pytest.raises(CheckpointError, match=r"'Attention_0' \(QAttention\): its weight is"):
        oa.load_checkpoint(folder, fused("QAttention"))


@pytest.mark.parametrize("op", ["MoE", "QMoE"])
def test_experts_inside_a_node_are_refused_by_name(op: str, tmp_path: Path) -> None:
    tensors = lora_tensors("layer.0.mlp.experts", rank=4)
    folder = peft_folder(tmp_path / "a", tensors, r=2, target_parameters=["experts.down_proj"])
    base = fused(op, name="/layer.0/moe/MoE")
    with pytest.raises(CheckpointError, match=rf"inside node '/layer.0/moe/MoE' \({op}\)"):
        oa.load_checkpoint(folder, base)


def test_rows_with_adapters_of_their_own_exit_2_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["peft_bert_optimised_lora"]
    out = tmp_path / "out.onnx"
    args = ("insert", str(case.base), "--adapter", str(case.adapter), "-o", str(out))
    status, _, err = cli(capsys, *args, "--batched")
    assert status == 2
    assert "which all rows of a run share" in err
    assert "hint: insert it without --batched" in err
    assert list(tmp_path.iterdir()) == []


def test_insert_says_what_slots_on_weights_cost_where_it_is_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["peft_bert_optimised_lora_patterns"]
    out = tmp_path / "out.onnx"
    args = ("insert", str(case.base), "--adapter", str(case.adapter), "-o", str(out))
    status, _, err = cli(capsys, *args)
    assert status == 0
    # Ranks 4, 2 and 4 of three projections: 2 * 32 * 10 * 96 operations, and 32 * 96 to add.
    assert "note: 1 slot on weights: 64.5 k operations in each run" in err
    assert "hint: with --baked" in err
    status, _, err = cli(capsys, *args, "--force", "--baked")
    assert status == 0
    assert "operations in each run" not in err


def test_slots_on_activations_have_no_cost_of_updates() -> None:
    case = CASES["peft_bert_lora_default_ts"]
    base = oa.open_model(case.base)
    adapted = oa.insert_checkpoint(base, oa.load_checkpoint(case.adapter, base))
    assert update_cost(base, adapted, None) is None


def test_slots_shows_the_shape_of_the_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["peft_mixtral_one_stack"]
    base = oa.open_model(case.base)
    adapted = oa.insert_checkpoint(base, oa.load_checkpoint(case.adapter, base))
    oa.save_model(adapted, tmp_path / "m.onnx")
    status, out, _ = cli(capsys, "slots", str(tmp_path / "m.onnx"))
    assert status == 0
    assert "4x16x24  weight" in out


def test_a_slot_on_a_weight_cannot_be_batched_in_python() -> None:
    case = CASES["peft_recurrent_gru"]
    base = oa.open_model(case.base)
    with pytest.raises(SlotError, match="which all rows of a run share"):
        oa.insert_checkpoint(base, oa.load_checkpoint(case.adapter, base), batched=True)


@pytest.mark.parametrize(
    "name",
    ["peft_bert_optimised_lora", "peft_bert_optimised_dora", "peft_bert_optimised_ia3",
     "peft_recurrent_lstm", "peft_recurrent_ts_gru", "peft_mixtral_experts",
     "peft_olmoe_square", "peft_experts_bmm", "peft_experts_einsum"],
)  # fmt: skip
def test_the_slots_on_weights_verify(name: str) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    adapted = oa.insert_checkpoint(base, oa.load_checkpoint(case.adapter, base))
    report = oa.verify(base, adapted, inputs=case.inputs())
    assert report.passed, [c for c in report.checks if not c.passed]
    assert all(slot.error is not None and slot.effect for slot in report.slots)
    assert damages(adapted) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_parameters": ["experts.one", "experts.two"]}, "which of the parameters"),
        ({"target_parameters": ["experts.up_proj"]}, "has the LoRA of 2 parameters"),
        ({"r": 5}, "are not of rank 5 for each matrix"),
    ],
)
def test_a_file_that_does_not_tell_its_parameters_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    case = CASES["peft_experts_einsum"]
    tensors = safetensors.numpy.load_file(case.adapter / "adapter_model.safetensors")
    config = {"target_parameters": ["experts.up_proj", "experts.down_proj"], "r": 4, **change}
    folder = peft_folder(tmp_path / "a", tensors, **config)
    with pytest.raises(CheckpointError, match=message):
        oa.load_checkpoint(folder, oa.open_model(case.base))


def test_a_parameter_that_kept_its_name_is_adapted_as_it_is_stored(tmp_path: Path) -> None:
    """`x @ self.mix`, with a square `mix`: B is for its rows and A for its columns."""
    mix = np.random.default_rng(5).standard_normal((4, 4)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "block.mix"], ["y"], "/block/MatMul")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(mix, "block.mix")],
    )
    opsets = [helper.make_opsetid("", 17)]
    base = oa.Model(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((2, 4)), rng.standard_normal((4, 2))
    named = {"lora_A": a.astype("f4"), "lora_B": b.astype("f4")}
    tensors = {f"base_model.model.block.{k}.weight": v for k, v in named.items()}
    folder = peft_folder(tmp_path / "a", tensors, target_parameters=["block.mix"])
    safetensors.numpy.save_file({"block.mix": mix}, tmp_path / "base.safetensors")
    x = rng.standard_normal((3, 4)).astype(np.float32)
    for weights in (None, tmp_path / "base.safetensors"):
        found = oa.load_checkpoint(folder, base, base_weights=weights)
        adapted = oa.insert_checkpoint(base, found)
        oa.save_model(adapted, tmp_path / "m.onnx", overwrite=True)
        got = run(tmp_path / "m.onnx", {"x": x, **found.adapter.feeds()})["y"]
        np.testing.assert_allclose(got, x @ (mix + 2 * b @ a), rtol=1e-4, atol=1e-4)


def test_two_layers_of_equal_weights_that_are_stored_once_have_a_slot_each(
    tmp_path: Path,
) -> None:
    base = fused()
    first = base.proto.graph.node[0]
    second = onnx.NodeProto()
    second.CopyFrom(first)
    second.name, second.input[0] = "Attention_1", OUTPUT
    second.output[0] = OUTPUT.replace("layer.0", "layer.1")
    base.proto.graph.node.insert(1, second)
    base.proto.graph.node[2].input[0] = second.output[0]
    tensors = lora_tensors("layer.0.attn.query", "layer.1.attn.value")
    found = oa.load_checkpoint(peft_folder(tmp_path / "a", tensors), base)
    assert [slot.tensor for slot in found.slots] == ["w", "w"]
    adapted = oa.insert_checkpoint(base, found)
    assert damages(adapted) == []
    apart = base.copy()
    apart.proto.graph.node[1].input[1] = "w1"
    values = [W.copy(), W.copy()]
    values[0][:, :H] += delta(tensors, "layer.0.attn.query")
    values[1][:, 2 * H :] += delta(tensors, "layer.1.attn.value")
    apart.proto.graph.initializer.append(numpy_helper.from_array(values[1], "w1"))
    wanted = outputs(with_values(apart, w=values[0]), tmp_path)
    got = outputs(adapted, tmp_path, found.adapter.feeds())
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert oa.verify(base, adapted, inputs={"x": X}).passed
    assert oa.remove(adapted).proto == base.proto


def test_square_experts_of_an_old_peft_are_refused(tmp_path: Path) -> None:
    case = CASES["peft_olmoe_square"]
    tensors = safetensors.numpy.load_file(case.adapter / "adapter_model.safetensors")
    named = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = {"target_parameters": named, "r": 4, "lora_alpha": 8, "peft_version": "0.18.1"}
    folder = peft_folder(tmp_path / "a", tensors, **config)
    with pytest.raises(CheckpointError, match="has square matrices"):
        oa.load_checkpoint(folder, oa.open_model(case.base))


def test_a_recurrent_layer_that_the_graph_lacks_is_refused(tmp_path: Path) -> None:
    case = CASES["peft_recurrent_lstm"]
    tensors = {
        "base_model.model.lstm.lora_A.weight": np.ones((2, 8), np.float32),
        "base_model.model.lstm.lora_B.weight": np.ones((32, 2), np.float32),
    }
    folder = peft_folder(tmp_path / "a", tensors, target_parameters=["lstm.weight_hh_l2"])
    with pytest.raises(CheckpointError, match="2 recurrent layers"):
        oa.load_checkpoint(folder, oa.open_model(case.base))
