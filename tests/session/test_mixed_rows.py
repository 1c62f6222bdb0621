"""A batch with another adapter in each row, in one run of a batched model."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from slot_models import dense, model_of
from trained_cases import CASES

import onnx_adapt as oa
from onnx_adapt.dtypes import DTYPES
from onnx_adapt.errors import AdapterError, AdapterNotFoundError
from onnx_adapt.slot.weights import fan_in, part_shape

TRAINED = (
    *("peft_bert_lora_default_ts", "peft_bert_lora_all_linear", "peft_bert_dora"),
    *("peft_gpt2_lora", "peft_gpt2_lora_ts", "peft_gpt2_lora_embedding", "peft_llama_lora_ts"),
    *("ah_bert_ia3", "ah_bert_double_seq_bn", "ah_bert_par_bn", "ah_bert_residual_after_ln"),
    *("ah_bert_ln_before", "peft_convnet_lora", "peft_convnet_dora", "peft_vit_lora"),
    *("peft_bert_lora_embedding", "peft_bert_lora_float16"),
)
WHOLE = [
    name for name in TRAINED if name not in ("peft_vit_lora", "peft_bert_lora_default_ts")
]
SIZES = {"a": 4, "b": 1, "c": 8, "d": 3, "e": 4}
ROWS: list[Any] = [*"ab", None, "c", {"a": 0.5, "d": -1.25}, *"ee", None, *"adcb"]
ROWS += [{"b": 0.1, "c": 0.2, "e": 0.7}, "a", None, "d"]


@cache
def _models(case: str) -> tuple[oa.Model, oa.Model, oa.Adapter]:
    """A trained case with ordinary slots, with batched ones, and its adapter."""
    base = oa.open_model(CASES[case].base)
    checkpoint = oa.load_checkpoint(CASES[case].adapter, base, name="trained")
    plain = oa.insert_checkpoint(base, checkpoint)
    batched = oa.insert_checkpoint(base, checkpoint, batched=True)
    return plain, batched, checkpoint.adapter


def _random(
    model: oa.Model, size: int, seed: int = 0, slots: slice = slice(None)
) -> oa.Adapter:
    rng = np.random.default_rng([seed, size])
    weights: dict[str, dict[str, np.ndarray]] = {}
    for slot in oa.list_slots(model)[slots]:
        for part in slot.parts:
            draw = rng.standard_normal(part_shape(slot, part, size)) * 0.3
            if part == "down":
                draw /= 0.3 * np.sqrt(fan_in(slot, part))
            elif part in ("scale", "gain", "norm_weight"):
                draw += 1
            weights.setdefault(slot.name, {})[part] = draw.astype(DTYPES[slot.dtype])
    return oa.make_adapter(model, f"random {seed}", weights)


def _batch(case: str, rows: int) -> dict[str, np.ndarray]:
    """The rows of a case's inputs, in another order for each seed, over and over."""
    inputs = CASES[case].inputs()
    size = len(next(iter(inputs.values())))
    chosen = np.random.default_rng(7).integers(0, size, rows)
    return {name: np.take(value, chosen, 0) for name, value in inputs.items()}


def _counted(model: oa.Model, folder: Path) -> tuple[oa.AdapterSession, Any]:
    """A session, and how many runs it has had of ONNX Runtime since it began."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = oa.AdapterSession(model, session_options=options)
    session._model.base_size = 1 << 60  # so large that one run is always faster

    def runs() -> int:
        events = json.loads(Path(session._model.session.end_profiling()).read_text())
        return sum(event["name"] == "model_run" for event in events)

    return session, runs


def _close(got: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-5) -> None:
    for name, value in wanted.items():
        assert got[name].shape == value.shape
        assert got[name].dtype == value.dtype
        np.testing.assert_allclose(
            got[name].astype(np.float64), value, tolerance, tolerance * np.abs(value).max()
        )


@pytest.mark.parametrize("case", TRAINED)
def test_sixteen_rows_of_five_adapters_blends_and_none_are_as_each_row_alone(
    case: str, tmp_path: Path
) -> None:
    plain, batched, _ = _models(case)
    feeds = _batch(case, len(ROWS))
    mixed, runs = _counted(batched, tmp_path)
    with oa.AdapterSession(plain) as alone, mixed:
        for i, (name, size) in enumerate(SIZES.items()):
            for session in (alone, mixed):
                session.load(name, _random(batched, size, i), allow_partial=True)
        got = mixed.run(feeds, adapter=ROWS)
        assert runs() == 1
        mixed._model.base_size = 0
        assert len(mixed.rows_of_runs(feeds, ROWS)) == 8
        apart = mixed.run(feeds, adapter=ROWS)
        single = [
            alone.run({name: value[i : i + 1] for name, value in feeds.items()}, adapter=row)
            for i, row in enumerate(ROWS)
        ]
        wanted = {name: np.concatenate([one[name] for one in single]) for name in got}
        off = alone.run(feeds)
    for each in (got, apart):
        _close(each, wanted, 5e-3 if "float16" in case else 1e-5)
    moved = [np.abs(got[name] - off[name]).max() for name in got]
    assert max(moved) > 0.05


@pytest.mark.parametrize(
    "case",
    [name for name in WHOLE if not _models(name)[2].replaced],
)
def test_rows_with_a_trained_adapter_are_what_pytorch_computes(case: str) -> None:
    _, batched, adapter = _models(case)
    feeds = CASES[case].inputs()
    name, expected = CASES[case].expected()
    rows = [adapter if i % 2 == 0 else None for i in range(len(expected))]
    assert len(rows) > 1
    with oa.AdapterSession(batched) as session:
        got = session.run(feeds, adapter=rows)[name]
        off = session.run(feeds)[name]
    far = np.abs(got[::2].astype(np.float64) - expected[::2]).max()
    assert far <= CASES[case].tolerance
    np.testing.assert_allclose(got[1::2], off[1::2], 1e-3, CASES[case].tolerance)


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("case", TRAINED)
def test_without_rows_a_batched_model_is_the_ordinary_one_bit_for_bit(
    case: str, optimised: bool, tmp_path: Path
) -> None:
    plain, batched, adapter = _models(case)
    options = ort.SessionOptions()
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    file = tmp_path / "trained.onnx_adapter"
    oa.save_adapter(adapter, file)
    feeds = CASES[case].inputs()
    blend = {"fr": 0.25} if not adapter.replaced else None
    with (
        oa.AdapterSession(plain, {"fr": file}, session_options=options) as ordinary,
        oa.AdapterSession(batched, {"fr": file}, session_options=options) as session,
    ):
        for choice in (None, "fr", blend):
            got, wanted = (one.run(feeds, adapter=choice) for one in (session, ordinary))
            if case == "peft_convnet_dora" and optimised and choice:
                _close(got, wanted, 1e-6)  # a bias of rows is not fused into a Conv
            else:
                assert all(got[name].tobytes() == wanted[name].tobytes() for name in wanted)


MLP3 = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[batch,seq,4] x) => (float[batch,seq,4] y)
<{dense("w1")}, {dense("w2", seed=1)}>
{{ [first] a = MatMul(x, w1)  [act] b = Relu(a)  [second] y = MatMul(b, w2) }}"""
X = np.random.default_rng(9).standard_normal((3, 5, 4)).astype(np.float32)


def _mlp(**options: Any) -> tuple[oa.Model, oa.Model]:
    base = model_of(MLP3)
    places = ["first", "second"]
    return (
        oa.insert(base, after=places, **options),
        oa.insert(base, after=places, batched=True, **options),
    )


PARTS = (
    {"parts": ("down", "up", "gain", "up_bias"), "activation": "gelu"},
    {"parts": ("down", "up", "down_bias", "norm_weight", "norm_bias")},
    {"parts": ("down", "up", "skip", "scale"), "activation": "sigmoid"},
)


@pytest.mark.parametrize("options", PARTS)
def test_gains_and_own_normalisations_go_into_the_projections(
    options: dict[str, Any], tmp_path: Path
) -> None:
    plain, batched = _mlp(**options)
    session, runs = _counted(batched, tmp_path)
    rows = ["p", None, {"q": 0.5, "p": -2.0}]
    with oa.AdapterSession(plain) as alone, session:
        for name, size in (("p", 2), ("q", 5)):
            alone.load(name, _random(batched, size, size))
            session.load(name, _random(batched, size, size))
        got, wanted = (one.run({"x": X}, adapter=rows) for one in (session, alone))
        assert runs() == 1
    _close(got, wanted)


def test_an_adapter_in_memory_can_have_rows() -> None:
    plain, batched = _mlp()
    one, two = (_random(batched, size) for size in (2, 3))
    with oa.AdapterSession(plain) as alone, oa.AdapterSession(batched) as session:
        rows = [one, two, one]
        _close(session.run({"x": X}, adapter=rows), alone.run({"x": X}, adapter=rows))


def test_a_partial_adapter_leaves_its_rows_alone_in_the_other_slots() -> None:
    plain, batched = _mlp(bias=True)
    adapters = {
        "p": _random(batched, 2, slots=slice(1)),
        "q": _random(batched, 3, slots=slice(1, None)),
        "r": _random(batched, 1),
    }
    with oa.AdapterSession(plain) as alone, oa.AdapterSession(batched) as session:
        for name, adapter in adapters.items():
            alone.load(name, adapter, allow_partial=True)
            session.load(name, adapter, allow_partial=True)
        for rows in (["p", "q", "r"], ["p", None, "p"], ["q", "p", None]):
            got, wanted = (one.run({"x": X}, adapter=rows) for one in (session, alone))
            _close(got, wanted)


def test_adapters_that_replace_weights_of_the_base_are_run_one_after_the_other(
    tmp_path: Path,
) -> None:
    plain, batched, adapter = _models("ah_bert_double_seq_bn")
    assert adapter.replaced
    feeds = CASES["ah_bert_double_seq_bn"].inputs()
    session, runs = _counted(batched, tmp_path)
    rows = ["fr", *[None] * (len(next(iter(feeds.values()))) - 1)]
    with oa.AdapterSession(plain, {"fr": adapter}) as alone, session:
        session.load("fr", adapter)
        _close(session.run(feeds, adapter=rows), alone.run(feeds, adapter=rows))
        assert runs() == 2


def test_normalisations_with_nowhere_to_go_are_run_one_after_the_other(
    tmp_path: Path,
) -> None:
    plain, batched = _mlp(parts=("down", "up", "norm_weight", "norm_bias"))
    one, two = (_random(batched, size) for size in (2, 3))
    session, runs = _counted(batched, tmp_path)
    with oa.AdapterSession(plain) as alone, session:
        rows = [one, two, None]
        _close(session.run({"x": X}, adapter=rows), alone.run({"x": X}, adapter=rows))
        assert runs() == 3


def test_a_model_with_ordinary_slots_as_well_is_run_by_adapter(tmp_path: Path) -> None:
    batched = oa.insert(model_of(MLP3), after="first", batched=True)
    both = oa.insert(batched, after="second")
    assert [slot.batched for slot in oa.list_slots(both)] == [True, False]
    session, runs = _counted(both, tmp_path)
    with session, oa.AdapterSession(_mlp()[0]) as alone:
        rows = [_random(both, 2), None, None]
        _close(session.run({"x": X}, adapter=rows), alone.run({"x": X}, adapter=rows))
        assert runs() == 2


def test_a_batch_of_fixed_size_is_one_run() -> None:
    text = MLP3.replace("batch", "3").replace("seq", "5")
    batched = oa.insert(model_of(text), after=["first", "second"], batched=True)
    assert oa.verify(model_of(text), batched).passed
    plain = _mlp()[0]
    rows = [_random(batched, 2), None, _random(batched, 3)]
    # The same weights, for another base: one whose batch may have any size.
    same = [row and oa.make_adapter(plain, row.name, row.weights) for row in rows]
    with oa.AdapterSession(plain) as alone, oa.AdapterSession(batched) as session:
        _close(session.run({"x": X}, adapter=rows), alone.run({"x": X}, adapter=same))


def test_a_reloaded_adapter_is_what_its_rows_get(tmp_path: Path) -> None:
    _, batched = _mlp()
    file = tmp_path / "p.safetensors"
    oa.save_adapter(_random(batched, 2), file)
    with oa.AdapterSession(batched, {"p": file, "q": _random(batched, 3)}) as session:
        rows = ["p", "q", None]
        before = session.run({"x": X}, adapter=rows)["y"]
        oa.save_adapter(_random(batched, 5, 1), file)
        assert session.reload() == ("p",)
        after = session.run({"x": X}, adapter=rows)["y"]
        assert np.abs(after[0] - before[0]).max() > 1e-3
        np.testing.assert_allclose(after[1:], before[1:], 1e-5, 1e-6)
        session.unload("p")
        with pytest.raises(AdapterNotFoundError):
            session.run({"x": X}, adapter=rows)


@pytest.mark.parametrize("weight", [np.nan, np.inf, "1", True])
def test_a_row_with_an_odd_weight_is_refused(weight: Any) -> None:
    _, batched = _mlp()
    with (
        oa.AdapterSession(batched, {"p": _random(batched, 2)}) as session,
        pytest.raises(AdapterError, match="no weight of a blend"),
    ):
        session.run({"x": X}, adapter=["p", {"p": weight}, None])
