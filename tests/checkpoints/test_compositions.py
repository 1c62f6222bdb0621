"""Two adapters of AdapterHub at once, against what its library computes with them."""

import json

import numpy as np
import pytest
from trained_cases import ROOT

import onnx_adapt as oa
from onnx_adapt.errors import CheckpointError

HOME = ROOT / "compositions"
BASES = json.loads((HOME / "compositions.json").read_text())["bases"]
TOLERANCE = 1e-5


def base_of(name: str) -> tuple[oa.Model, dict[str, np.ndarray]]:
    folder = ROOT / "bases" / BASES[name]
    return oa.open_model(folder / "base.onnx"), dict(np.load(folder / "inputs.npz"))


def expected(name: str) -> np.ndarray:
    with np.load(HOME / "expected.npz") as stored:
        return stored[name]


def stacked(first: str, second: str) -> tuple[oa.Model, oa.Model, dict[str, np.ndarray]]:
    base, feeds = base_of(first)
    model = base
    for name in (first, second):
        trained = oa.load_checkpoint(HOME / name, model)
        model = oa.insert_checkpoint(model, trained, baked=True)
    return base, model, feeds


def outputs(model: oa.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    with oa.AdapterSession(model) as session:
        return next(iter(session.run(feeds).values()))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("seq", "seq_tanh"),
        ("seq", "plus"),
        ("seq", "lora"),
        ("houlsby", "seq"),
        ("houlsby", "dora"),
        ("houlsby", "ia3"),
        ("normed", "seq"),
        ("par", "lora"),
        ("inv", "seq"),
        ("ia3", "ia32"),
        ("gpt2_houlsby", "gpt2_seq"),
    ],
)
def test_checkpoints_one_after_the_other_are_the_librarys_stack(
    first: str, second: str
) -> None:
    base, model, feeds = stacked(first, second)
    wanted = expected(f"stack/{first}/{second}")
    assert np.abs(outputs(model, feeds) - wanted).max() < TOLERANCE
    bare = oa.remove(model)
    assert bare.proto.SerializeToString(deterministic=True) == base.proto.SerializeToString(
        deterministic=True
    )


def test_either_of_two_stacked_adapters_can_be_removed() -> None:
    _, model, feeds = stacked("houlsby", "lora")  # LoRA went in front of what was there
    slots = {slot.name for slot in oa.list_slots(model)}
    ours = {
        slot.name for slot in oa.load_checkpoint(HOME / "houlsby", base_of("seq")[0]).slots
    }
    for gone, left in ((ours, "lora"), (slots - ours, "houlsby")):
        rest = oa.remove(model, slots=sorted(gone))
        assert np.abs(outputs(rest, feeds) - expected(left)).max() < TOLERANCE


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ("seq", "houlsby", "makes before the residual sum, and the slot is behind it"),
        ("plus", "seq", "a second residual sum and LayerNorm follow"),
        ("seq", "par", "reads the residual input alone"),
        ("par", "par2", "reads the residual input alone"),
        ("par", "seq", "the sub-layer's output is lost behind"),
        ("lora", "lora2", "reads what the first one adds"),
        ("lora", "ia3", "reads what the first one adds"),
        ("seq", "inv", "the invertible adapter of its first adapter alone"),
        ("gpt2_seq", "gpt2_houlsby", "makes before the residual sum"),
    ],
)
def test_a_stack_that_slots_do_not_compute_is_refused(
    first: str, second: str, why: str
) -> None:
    base, _ = base_of(first)
    model = oa.insert_checkpoint(base, oa.load_checkpoint(HOME / first, base))
    with pytest.raises(CheckpointError, match=why):
        oa.load_checkpoint(HOME / second, model)


def two_in_one_slot(first: str) -> tuple[oa.AdapterSession, dict[str, np.ndarray]]:
    base, feeds = base_of(first)
    trained = [oa.load_checkpoint(HOME / name, base) for name in (first, f"{first}2")]
    model = oa.insert_checkpoint(base, trained[0])
    adapters = {"a": trained[0].adapter, "b": trained[1].adapter}
    return oa.AdapterSession(model, adapters), feeds


def test_rows_of_a_batch_are_the_librarys_batch_split_and_parallel() -> None:
    session, feeds = two_in_one_slot("seq")
    with session:
        split = session.run(feeds, adapter=["a", "b", "b"])
        twice = {name: np.concatenate([value, value]) for name, value in feeds.items()}
        parallel = session.run(twice, adapter=["a"] * 3 + ["b"] * 3)
    for found, name in ((split, "batch_split"), (parallel, "parallel")):
        value = next(iter(found.values()))
        assert np.abs(value - expected(f"{name}/seq/seq2")).max() < TOLERANCE


@pytest.mark.parametrize("name", ["lora", "par"])
def test_an_average_of_terms_is_a_blend_with_the_weights_over_their_number(name: str) -> None:
    session, feeds = two_in_one_slot(name)
    with session:
        for share in (0.5, 0.7):
            found = session.run(feeds, adapter={"a": share / 2, "b": (1 - share) / 2})
            value = next(iter(found.values()))
            assert np.abs(value - expected(f"average/{name}/{share}")).max() < TOLERANCE
