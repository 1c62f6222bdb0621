"""Adapters on static QDQ models: what saturates is said, and `--calibrate` mends it.

The models and PyTorch's answers are in `tests/qdq` (made by `tools/make_qdq_cases.py`).
"""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import numpy_helper
from slot_models import cli, model_of, saved, session

import onnx_adapt as oa
from onnx_adapt.dtypes import Array
from onnx_adapt.slot.manifest import read_manifest

QDQ = Path(__file__).parent.parent / "qdq"
CASES = ("dense_uint8", "dense_int8", "dense_uint16", "conv_uint8", "conv_int8")
WEIGHTS_ONLY = 0.08
"""Of the largest answer: what rounding of weights and 8-bit activations may cost."""


def truth(case: str) -> dict[str, Array]:
    return dict(np.load(QDQ / case / "truth.npz"))


def base_of(case: str) -> oa.Model:
    return oa.open_model(QDQ / case / "base.onnx")


def bottleneck(case: str, model: oa.Model) -> oa.Adapter:
    """The weights that PyTorch ran with, as the slots have them."""
    stored = np.load(QDQ / case / "bottleneck.npz")
    weights = {}
    for slot in oa.list_slots(model):
        name = slot.module or ("first" if "first" in slot.name else "second")
        down, up = stored[f"{name}.down"], stored[f"{name}.up"]
        if slot.axis == 1:
            down, up = down.T[:, :, None, None], up.T[:, :, None, None]
        weights[slot.name] = {"down": np.array(down, order="C"), "up": np.array(up, order="C")}
    return oa.Adapter("bottleneck", weights)


def answers(model: oa.Model, adapter: oa.Adapter | None, x: Array) -> list[Array]:
    """What stock ONNX Runtime gives with an adapter fed, plain and optimised."""
    feeds = {"x": x, **(adapter.feeds() if adapter else {})}
    return [
        session(model.proto, optimised=optimised).run(["y"], feeds)[0]
        for optimised in (False, True)
    ]


def off_by(got: list[Array], wanted: Array) -> float:
    return max(float(np.abs(item - wanted).max() / np.abs(wanted).max()) for item in got)


def failed(report: oa.Report) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


@pytest.mark.parametrize("case", CASES)
def test_a_lora_that_saturates_is_not_verified_and_calibrated_it_is_pytorchs(
    case: str,
) -> None:
    base, known = base_of(case), truth(case)
    checkpoint = oa.load_checkpoint(QDQ / case / "adapter", base)
    adapter, inputs = checkpoint.adapter, {"x": known["x"]}
    plain = oa.insert_checkpoint(base, checkpoint)
    assert off_by(answers(plain, adapter, known["x"]), known["lora"]) > 0.5
    report = oa.verify(base, plain, adapter=adapter, inputs=inputs)
    assert failed(report) == ["saturation"]
    assert {slot for item in report.saturation for slot in item.slots} == set(adapter.weights)

    plain = oa.insert_checkpoint(base, checkpoint)
    wide = oa.calibrate(plain, checkpoint.adapter, inputs)
    assert off_by(answers(wide, adapter, known["x"]), known["lora"]) < WEIGHTS_ONLY
    assert off_by(answers(wide, None, known["x"]), known["base"]) < WEIGHTS_ONLY
    assert failed(oa.verify(base, wide, adapter=adapter, inputs=inputs)) == []
    assert oa.remove(wide).proto.SerializeToString() == base.proto.SerializeToString()


def as_whole_weights(case: str, folder: Path) -> Path:
    """The LoRA of a case as SHiRA that trained every entry: it replaces whole weights."""
    tensors, parts = (
        {},
        safetensors.numpy.load_file(QDQ / case / "adapter" / "adapter_model.safetensors"),
    )
    for module in ("base_model.model.first", "base_model.model.second"):
        added = 2 * parts[f"{module}.lora_B.weight"] @ parts[f"{module}.lora_A.weight"]
        tensors[f"{module}.shira_weight"] = added.ravel()
        places = np.indices(added.shape).reshape(2, -1).astype(np.int32)
        tensors[f"{module}.shira_indices"] = places
    config = {"peft_type": "SHIRA", "r": 2, "target_modules": ["first", "second"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_replaced_weights_that_saturate_are_not_verified_and_can_be_calibrated(
    tmp_path: Path,
) -> None:
    base, known = base_of("dense_uint8"), truth("dense_uint8")
    checkpoint = oa.load_checkpoint(as_whole_weights("dense_uint8", tmp_path), base)
    adapter, inputs = checkpoint.adapter, {"x": known["x"]}
    plain = oa.insert_checkpoint(base, checkpoint)
    assert not checkpoint.slots
    assert off_by(answers(plain, adapter, known["x"]), known["lora"]) > 0.5
    report = oa.verify(base, plain, adapter=adapter, inputs=inputs)
    assert failed(report) == ["saturation"]
    assert any("trained weight 'base.first.weight'" in line for line in report.warnings)

    wide = oa.calibrate(plain, adapter, inputs)
    assert off_by(answers(wide, adapter, known["x"]), known["lora"]) < WEIGHTS_ONLY
    assert failed(oa.verify(base, wide, adapter=adapter, inputs=inputs)) == []


@pytest.mark.parametrize("case", CASES)
def test_a_bottleneck_that_saturates_is_calibrated_too(case: str) -> None:
    base, known = base_of(case), truth(case)
    places, inputs = ["first", "second"], {"x": known["x"]}
    plain = oa.insert(base, after=places)
    adapter = bottleneck(case, plain)
    assert off_by(answers(plain, adapter, known["x"]), known["bottleneck"]) > 0.4
    assert failed(oa.verify(base, plain, adapter=adapter, inputs=inputs)) == ["saturation"]

    wide = oa.calibrate(oa.insert(base, after=places), adapter, inputs)
    assert off_by(answers(wide, adapter, known["x"]), known["bottleneck"]) < WEIGHTS_ONLY
    assert failed(oa.verify(base, wide, adapter=adapter, inputs=inputs)) == []


def test_baked_with_calibration_is_pytorchs_and_comes_out_again() -> None:
    base, known = base_of("dense_uint8"), truth("dense_uint8")
    checkpoint = oa.load_checkpoint(QDQ / "dense_uint8" / "adapter", base)
    inputs = {"x": known["x"]}
    clipped = oa.insert_checkpoint(base, checkpoint, baked=True)
    assert failed(oa.verify(base, clipped, inputs=inputs)) == ["saturation"]
    wide = oa.calibrate(
        oa.insert_checkpoint(base, checkpoint, baked=True), checkpoint.adapter, inputs
    )
    assert off_by(answers(wide, None, known["x"]), known["lora"]) < WEIGHTS_ONLY
    assert failed(oa.verify(base, wide, inputs=inputs)) == []
    assert oa.remove(wide).proto == base.proto


def test_a_relu_that_the_quantiser_folded_into_a_range_stays_a_relu() -> None:
    base, known = base_of("conv_uint8"), truth("conv_uint8")
    assert "Relu" not in {node.op_type for node in base.proto.graph.node}
    checkpoint = oa.load_checkpoint(QDQ / "conv_uint8" / "adapter", base)
    wide = oa.calibrate(
        oa.insert_checkpoint(base, checkpoint), checkpoint.adapter, {"x": known["x"]}
    )
    stored = {tensor.name: tensor for tensor in wide.proto.graph.initializer}
    for node in wide.proto.graph.node:
        if node.op_type == "QuantizeLinear" and "Relu" in node.name:
            assert node.input[1].startswith("widened/")
            assert numpy_helper.to_array(stored[node.input[2]]) == 0  # uint8: nothing below 0


LINE = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n,2] x) => (float[n,2] y, float[n,2] z)
<float[2,2] w = {{1, 0, 0, 1}}, float s = {{0.01}}, uint8 zp = {{100}}{more}> {{
  h = MatMul(x, w)
  q = QuantizeLinear(h, {range})
  y = DequantizeLinear(q, {range})
  r = QuantizeLinear(x, s, zp)
  z = DequantizeLinear(r, s, zp)
}}"""
"""Identity, then a range of -1 to 1.55, which the second output has as well."""

X = np.array([[-0.9, 1.5], [0.2, 0.3]], np.float32)


def pushed(model: oa.Model, by: float) -> oa.Adapter:
    """An adapter that adds `by` times the positive part."""
    (slot,) = oa.list_slots(model)
    eye = np.eye(2, dtype=np.float32)
    return oa.Adapter("pushed", {slot.name: {"down": eye, "up": by * eye}})


def ranges(model: oa.Model, output: str) -> list[tuple[Array, ...]]:
    """Scale and zero point of the nodes that make and read a tensor of integers."""
    stored = {t.name: numpy_helper.to_array(t) for t in model.proto.graph.initializer}
    return [
        tuple(stored[name] for name in node.input[1:])
        for node in model.proto.graph.node
        if output in (node.output[0], node.input[0])
    ]


def test_a_range_that_others_share_is_split_and_is_as_wide_as_computed_by_hand() -> None:
    base = model_of(LINE.format(range="s, zp", more=""))
    plain = oa.insert(base, after="h")
    adapter = pushed(plain, 1.0)
    wide = oa.calibrate(oa.insert(base, after="h"), adapter, {"x": X})
    # 1.5 becomes 3. Seen: -1 (the old end) to 3, and 0.15 / 2 of that as headroom: 3.3.
    for scale, zero in ranges(wide, "q"):
        assert scale == pytest.approx(4.3 / 255, rel=1e-6)
        assert zero == 59  # 1 / (4.3 / 255) = 59.3
    assert ranges(wide, "r") == [(np.float32(0.01), 100)] * 2
    y, z = session(wide.proto).run(None, {"x": X, **adapter.feeds()})
    assert np.abs(y - [[-0.9, 3.0], [0.4, 0.6]]).max() < 4.3 / 255
    assert np.abs(z - X).max() < 0.005
    assert oa.remove(wide).proto == base.proto


def test_the_share_that_saturates_is_counted_exactly() -> None:
    base = model_of(LINE.format(range="s, zp", more=""))
    plain = oa.insert(base, after="h")
    report = oa.verify(base, plain, adapter=pushed(plain, 1.0), inputs={"x": X})
    (found,) = report.saturation
    assert (found.node, found.slots, found.off, found.on) == ("q", ("h",), 0.0, 0.25)
    assert (found.most, found.high) == pytest.approx((3.0, 1.55))
    assert report.as_dict()["saturation"]


def test_an_adapter_that_stays_within_its_ranges_passes() -> None:
    base = model_of(LINE.format(range="s, zp", more=""))
    plain = oa.insert(base, after="h")
    report = oa.verify(base, plain, adapter=pushed(plain, 0.02), inputs={"x": X})
    assert report.passed
    assert report.saturation == ()
    wide = oa.calibrate(oa.insert(base, after="h"), pushed(plain, 0.02), {"x": X})
    assert wide.proto == plain.proto


def test_a_range_for_each_channel_is_widened_where_it_has_to_be() -> None:
    more = ", float[2] sc = {0.01, 0.02}, uint8[2] zc = {100, 100}"
    base = model_of(LINE.format(range="sc, zc", more=more))
    plain = oa.insert(base, after="h")
    adapter = pushed(plain, 2.0)  # 1.5 becomes 4.5, over 3.1; the first channel ends at 0.6
    wide = oa.calibrate(oa.insert(base, after="h"), adapter, {"x": X})
    for scale, zero in ranges(wide, "q"):
        assert scale == pytest.approx([0.01, (6.5 + 0.15 * 6.5 / 2) / 255], rel=1e-6)
        assert list(zero) == [100, 73]  # 2 / (6.9875 / 255) = 72.99
    assert oa.remove(wide).proto == base.proto


def test_a_symmetric_range_stays_symmetric() -> None:
    more = ", float si = {0.02}, int8 zi = {0}"
    base = model_of(LINE.format(range="si, zi", more=more))
    adapter = pushed(oa.insert(base, after="h"), 1.0)
    wide = oa.calibrate(oa.insert(base, after="h"), adapter, {"x": X})
    high = 3 + 0.15 / 2 * (3 + 2.56)
    for scale, zero in ranges(wide, "q"):
        assert (scale, zero) == (pytest.approx(high / 127, rel=1e-6), 0)


def test_ranges_computed_in_the_graph_saturate_nothing_and_are_not_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,2] x) => (float[n,2] y) <float[2,2] w = {1, 0, 0, 1}> {
      h = MatMul(x, w)  q, s, zp = DynamicQuantizeLinear(h)
      y = DequantizeLinear(q, s, zp) }"""
    base = saved(model_of(text), tmp_path / "dynamic.onnx")
    code, _, err = cli(capsys, "insert", str(base), "--after", "h")
    assert (code, "calibrated" in err) == (0, False)


BODY = """<ir_version: 9, opset_import: ["" : 17, "com.microsoft" : 1]>
g (float[n,2] x, bool c) => (float[n,2] y)
<float[2,2] w = {1, 0, 0, 1}, float s = {0.0001}, int16 zp = {0}> {
  y = If (c) <
    then_branch = g1 () => (float[n,2] a) {
      h = MatMul(x, w)
      t = Transpose <perm = [1, 0]> (h)
      q = com.microsoft.QuantizeLinear(t, s, zp)
      u = Transpose <perm = [1, 0]> (q)
      a = com.microsoft.DequantizeLinear(u, s, zp) },
    else_branch = g2 () => (float[n,2] b) { b = Identity(x) }
  >
}"""
"""A range of -3.28 to 3.28 in a branch, in 16 bits of ONNX Runtime's own operators."""


def test_a_range_in_a_branch_with_integers_that_are_rearranged_is_widened() -> None:
    base = model_of(BODY)
    plain = oa.insert(base, after="h")
    adapter = pushed(plain, 4.0)
    inputs = {"x": X, "c": np.array(True)}
    assert failed(oa.verify(base, plain, adapter=adapter, inputs=inputs)) == ["saturation"]
    wide = oa.calibrate(oa.insert(base, after="h"), adapter, inputs)
    got = session(wide.proto).run(None, {**inputs, **adapter.feeds()})[0]
    assert np.abs(got - [[-0.9, 7.5], [1.0, 1.5]]).max() < 1e-3
    assert failed(oa.verify(base, wide, adapter=adapter, inputs=inputs)) == []
    assert oa.remove(wide).proto == base.proto


def test_batched_slots_are_calibrated_too() -> None:
    base, known = base_of("dense_uint8"), truth("dense_uint8")
    checkpoint = oa.load_checkpoint(QDQ / "dense_uint8" / "adapter", base)
    inputs = {"x": known["x"]}
    wide = oa.calibrate(
        oa.insert_checkpoint(base, checkpoint, batched=True), checkpoint.adapter, inputs
    )
    with oa.AdapterSession(wide, adapters={"a": checkpoint.adapter}) as rows:
        got = rows.run(inputs, adapter=["a", None] * 16)["y"]
    assert off_by([got[::2]], known["lora"][::2]) < WEIGHTS_ONLY
    assert off_by([got[1::2]], known["base"][1::2]) < WEIGHTS_ONLY


def test_a_second_adapter_widens_the_ranges_again_and_the_base_comes_back() -> None:
    base = model_of(LINE.format(range="s, zp", more=""))
    adapter = pushed(oa.insert(base, after="h"), 1.0)
    once = oa.calibrate(oa.insert(base, after="h"), adapter, {"x": X})
    stacked = oa.insert(once, after="h")
    (_, slot) = oa.list_slots(stacked)
    eye = np.eye(2, dtype=np.float32)
    empty = {"down": np.zeros((2, 0), np.float32), "up": np.zeros((0, 2), np.float32)}
    second = oa.Adapter("second", {"h": empty, slot.name: {"down": eye, "up": 4 * eye}})
    twice = oa.calibrate(oa.insert(once, after="h"), second, {"x": X})
    assert ranges(twice, "q")[0][0] > ranges(once, "q")[0][0]
    manifest = read_manifest(twice.proto)
    assert manifest is not None
    assert sorted(item.original for item in manifest.widened) == ["s", "zp"]
    assert oa.remove(twice).proto == base.proto


def test_a_record_from_before_ranges_were_widened_is_read() -> None:
    plain = oa.insert(model_of(LINE.format(range="s, zp", more="")), after="h")
    (entry,) = [e for e in plain.proto.metadata_props if e.key == "onnx_adapt"]
    assert "widened" not in json.loads(entry.value)
    manifest = read_manifest(plain.proto)
    assert manifest is not None
    assert manifest.widened == ()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with the case's model and inputs."""
    (tmp_path / "base.onnx").write_bytes((QDQ / "dense_uint8" / "base.onnx").read_bytes())
    np.savez(tmp_path / "in.npz", x=truth("dense_uint8")["x"])
    return tmp_path


def test_the_command_line_warns_says_no_and_calibrates(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, inputs = str(files / "base.onnx"), str(files / "in.npz")
    checkpoint = str(QDQ / "dense_uint8" / "adapter")
    plain, wide = str(files / "plain.onnx"), str(files / "wide.onnx")
    code, out, err = cli(
        capsys, "insert", base, "--adapter", checkpoint, "-o", plain, "--json"
    )
    assert code == 0
    assert len(json.loads(out)["warnings"]) == 2
    assert "range was calibrated on the base" in err
    assert "--calibrate INPUTS.npz" in err
    adapter = json.loads(out)["adapter"]

    given = ["--adapter", adapter, "--inputs", inputs]
    assert cli(capsys, "verify", base, plain, "--inputs", inputs)[0] == 0
    code, out, err = cli(capsys, "verify", base, plain, *given)
    assert code == 1
    assert "saturation  FAILED" in out
    assert "the answer is NOT the trained adapter's" in err
    code, out, _ = cli(capsys, "check", plain, adapter, "--inputs", inputs)
    assert code == 1
    assert "saturates" in out
    code, out, _ = cli(capsys, "report", base, plain, *given, "--json")
    assert code == 1
    assert json.loads(out)["report"]["saturation"]

    again = ["--adapter", checkpoint, "--calibrate", inputs, "-o", wide, "--json"]
    code, out, err = cli(capsys, "insert", base, *again)
    assert code == 0
    assert json.loads(out)["warnings"] == []
    assert json.loads(out)["widened"]
    assert "range was calibrated" not in err
    assert cli(capsys, "verify", base, wide, *given)[0] == 0
    assert cli(capsys, "check", wide, adapter, "--inputs", inputs)[0] == 0
    back = files / "back.onnx"
    assert cli(capsys, "remove", wide, "-o", str(back))[0] == 0
    assert back.read_bytes() == Path(base).read_bytes()


def test_baking_an_adapter_that_saturates_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, inputs = str(files / "base.onnx"), str(files / "in.npz")
    checkpoint = str(QDQ / "dense_uint8" / "adapter")
    options = ["--adapter", checkpoint, "--baked", "--inputs", inputs]
    code, _, err = cli(capsys, "insert", base, *options)
    assert code != 0
    assert "--calibrate" in err
    assert not (files / "base.adapted.onnx").exists()
    assert cli(capsys, "insert", base, *options, "--calibrate", inputs)[0] == 0


def test_ranges_are_not_calibrated_without_an_adapter(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--after", "first", "--calibrate", str(files / "in.npz")]
    code, _, err = cli(capsys, "insert", str(files / "base.onnx"), *options)
    assert code == 2
    assert "--calibrate widens ranges for an adapter" in err


def test_a_widened_range_that_another_tool_took_away_is_damage() -> None:
    base = model_of(LINE.format(range="s, zp", more=""))
    adapter = pushed(oa.insert(base, after="h"), 1.0)
    wide = oa.calibrate(oa.insert(base, after="h"), adapter, {"x": X})
    broken = wide.copy()
    kept = [t for t in broken.proto.graph.initializer if not t.name.startswith("widened/")]
    copies = [onnx.TensorProto.FromString(t.SerializeToString()) for t in kept]
    del broken.proto.graph.initializer[:]
    broken.proto.graph.initializer.extend(copies)
    with pytest.raises(oa.AdaptError, match="is gone from the model"):
        oa.remove(broken)


FLOAT = Path(__file__).parent.parent / "cases" / "peft_bert_lora_default_ts"


def test_nothing_to_calibrate_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, given = str(FLOAT / "base.onnx"), str(FLOAT / "inputs.npz")
    out = tmp_path / "out.onnx"
    options = ["--adapter", str(FLOAT / "adapter"), "--calibrate", given, "-o", str(out)]
    code, _, err = cli(capsys, "insert", base, *options)
    assert code == 2
    assert "nothing that an adapter changes with a calibrated range" in err
    assert not out.exists()


def test_ranges_that_hold_the_values_already_are_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_of(LINE.format(range="s, zp", more=""))
    onnx.save(base.proto, tmp_path / "base.onnx")
    adapter = pushed(oa.insert(base, after="h"), 1e-6)
    oa.save_adapter(adapter, tmp_path / "a.safetensors")
    np.savez(tmp_path / "in.npz", x=X)
    named = ["--adapter", str(tmp_path / "a.safetensors")]
    options = ["--after", "h", *named, "--calibrate", str(tmp_path / "in.npz")]
    code, out, err = cli(capsys, "insert", str(tmp_path / "base.onnx"), *options, "--json")
    assert (code, json.loads(out)["widened"]) == (0, [])
    assert "no range was widened" in err


def test_an_adapter_on_a_float_model_has_nothing_to_saturate_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, given = oa.open_model(FLOAT / "base.onnx"), str(FLOAT / "inputs.npz")
    trained = oa.load_checkpoint(FLOAT / "adapter", base, name="fr")
    adapted = oa.insert_checkpoint(base, trained)
    report = oa.verify(base, adapted, adapter=trained.adapter, inputs=given)
    (check,) = [check for check in report.checks if check.name == "saturation"]
    assert (check.passed, check.detail[:26]) == (True, "no value that an adapter c")
    oa.save_model(adapted, tmp_path / "a.onnx")
    oa.save_adapter(trained.adapter, tmp_path / "fr.npz")
    files = [str(tmp_path / "a.onnx"), str(tmp_path / "fr.npz")]
    code, _, err = cli(capsys, "check", *files, "--inputs", given)
    assert code == 0
    assert "nothing was run" in err
